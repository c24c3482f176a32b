"""Every family that can be trained: the one table that a recipe's `family` is looked up in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from edgert.models.hagi.config import HAGIConfig
from edgert.models.hagi.model import HAGI
from edgert.models.importers.published import assemble, read_config

Model: TypeAlias = HAGI
"""What the trainer needs of a model: `loss(ids, targets, iterations, settle)`, `forward(ids)`,
`initialize(generator)`, `published(pick)`, `config`."""

Config: TypeAlias = HAGIConfig
"""What it needs of a config: `vocab_size`, `iterations`, `context`, `published()`."""


@dataclass(frozen=True)
class Family:
    """How a family's config is read (as `published.read_config`), and its model made.

    assemble  config and tensors by published name -> the model, everything checked
    """

    name: str
    read_config: Callable[..., tuple[Config, list[str]]]
    build: Callable[[Any], Model]
    assemble: Callable[..., Model]


TRAINABLE = {"hagi": Family("hagi", read_config, HAGI, assemble)}
