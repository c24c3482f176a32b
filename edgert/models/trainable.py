"""Every family that can be trained: the one table that a recipe's `family` is looked up in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from edgert.models.hagi.config import HAGIConfig
from edgert.models.hagi.model import HAGI
from edgert.models.hrm.bidir import Bidir
from edgert.models.hrm.config import BidirConfig, HRMConfig
from edgert.models.hrm.model import HRM
from edgert.models.importers.common import INTERLEAVED, Problems
from edgert.models.importers.hrm import ROTARY
from edgert.models.importers.hrm import assemble as assemble_grids
from edgert.models.importers.hrm_config import read_bidir_config as read_bidir
from edgert.models.importers.hrm_config import read_config as read_original
from edgert.models.importers.published import assemble, read_config

Kind = Literal["text", "segments", "cycles"]
"""What a family trains on, and how:

text      windows of tokens: `loss(ids, targets, iterations, settle)`, `forward(ids)`
segments  grids with a state that is carried from segment to segment: `embed`, `initial`,
          `segment`, `puzzle_rows`
cycles    grids, all cycles at once: `unroll(ids)`, `signal(p)`
"""

TextModel: TypeAlias = HAGI
SegmentModel: TypeAlias = HRM
CycleModel: TypeAlias = Bidir
GridModel: TypeAlias = HRM | Bidir
Model: TypeAlias = HAGI | HRM | Bidir
"""What the trainer needs of every model: `initialize(generator)`, `published(pick)`, `config`."""

TextConfig: TypeAlias = HAGIConfig
GridConfig: TypeAlias = HRMConfig | BidirConfig
Config: TypeAlias = HAGIConfig | HRMConfig | BidirConfig
"""What it needs of a config: `vocab_size`, `published()`; of a text model's `iterations` and
`context`, of a grid model's `seq_len`."""


@dataclass(frozen=True)
class Family:
    """How a family's config is read (as `published.read_config`), and its model made.

    assemble  config and tensors by published name -> the model, everything checked
    """

    name: str
    kind: Kind
    read_config: Callable[..., tuple[Config, list[str]]]
    build: Callable[[Any], Model]
    assemble: Callable[..., Model]


def _grids(read: Callable[..., tuple[GridConfig, list[str]]]) -> Callable[..., Any]:
    """A reader of configs that takes a number of positions, as that of a text model does."""

    def checked(
        raw: Any,
        problems: Problems,
        context: int | None = None,
        *,
        name: str = "config",
        wrong: str,
    ) -> tuple[GridConfig, list[str]]:
        config, unknown = read(raw, problems, name=name, wrong=wrong)
        if context not in (None, config.seq_len):
            problems.add(f"{context} positions, but the grid has {config.seq_len} cells")
        return config, unknown

    return checked


TRAINABLE = {
    family.name: family
    for family in (
        Family("hagi", "text", read_config, HAGI, assemble),
        Family("hrm", "segments", _grids(read_original), HRM, assemble_grids),
        Family("hrm-bidir", "cycles", _grids(read_bidir), Bidir, assemble_grids),
    )
}


def positions(config: Config) -> int:
    """Positions that the model supports: a text's, or the cells of its grid."""
    return config.context if isinstance(config, HAGIConfig) else config.seq_len


def rotary_order(config: Config) -> str | None:
    """How the checkpoint's weights pair the channels that are rotated; None: none are."""
    if isinstance(config, HAGIConfig):
        return INTERLEAVED
    rotates = isinstance(config, HRMConfig) and config.pos_encodings == "rope"
    return ROTARY if rotates else None


def fixed(model: Model) -> dict[str, Tensor]:
    """Published names -> tensors that belong to the model and are no parameters, themselves."""
    return {} if isinstance(model, HAGI) else model.fixed()
