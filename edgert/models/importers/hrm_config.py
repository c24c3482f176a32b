"""HRM configs: all_config.yaml and dataset.json beside a checkpoint, or the dict inside one.

The original trainer does not write down what it takes from its dataset, and published copies often
come without one. What the shapes of the weights tell is taken from them; what they cannot tell is
asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from edgert.errors import BadCheckpoint, MissingDependency, UnsupportedModel
from edgert.models.hrm.config import LOSSES, POSITIONS, BidirConfig, HRMConfig
from edgert.models.importers.assets import read_text
from edgert.models.importers.common import (
    EPS,
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_ROTARY,
    MAX_VOCAB,
    MAX_WIDTH,
    THETA,
    Fields,
    Problems,
    shown,
)

MAX_TEXT = 1 << 16  # bytes of either file
MAX_DEPTH = 8  # of nested YAML: each level of a longer one costs the parser more than the last
MAX_CYCLES = 1 << 10
MAX_UPDATES = 1 << 11  # blocks that one segment or all cycles run
MAX_STEPS = 1 << 16
MAX_PUZZLES = 1 << 28

DATASET = ("seq_len", "vocab_size", "num_puzzle_identifiers")
WRONG = "not an HRM checkpoint that can be read"

_ARCHITECTURE = "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1"
_DTYPES = ("float32", "bfloat16", "float16")
_TRAINING = {
    *("data_path", "global_batch_size", "epochs", "lr", "lr_min_ratio", "lr_warmup_steps"),
    *("weight_decay", "beta1", "beta2", "puzzle_emb_lr", "puzzle_emb_weight_decay"),
    *("project_name", "run_name", "checkpoint_path", "seed", "checkpoint_every_eval"),
    *("eval_interval", "eval_save_outputs"),
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping with text keys, of bounded size. Raises BadCheckpoint, MissingDependency.

    Aliases and deep nesting are refused: a few lines of them can stand for more than fits into
    memory, or take minutes to read.
    """
    text = read_text(path, MAX_TEXT, BadCheckpoint)
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependency("PyYAML", "export", why=f"it reads {path.name}") from error
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise ValueError(f"it has aliases, or more than {MAX_DEPTH} levels")
        value = yaml.safe_load(text)  # plain values: tags of Python objects are errors
    except Exception as error:  # values have constructors of their own, with their own errors
        reason = " ".join(str(error).split())
        raise BadCheckpoint(
            f"{path.name} is not a plain YAML file: {shown(reason)}", where=str(path)
        ) from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadCheckpoint(
            f"{path.name} is {shown(value)}, not a mapping with text keys", where=str(path)
        )
    return value


def read_all_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """all_config.yaml -> the fields of `arch`, and top-level fields that nobody knows."""
    raw = read_yaml(path)
    arch = raw.pop("arch", None)
    if not isinstance(arch, dict) or not all(isinstance(key, str) for key in arch):
        raise BadCheckpoint(f"arch is {shown(arch)}, not a mapping with text keys", where=str(path))
    return arch, sorted(set(raw) - _TRAINING)


def read_dataset(path: Path) -> dict[str, Any]:
    """What the network needs of a dataset.json. Raises BadCheckpoint."""
    try:
        value = json.loads(read_text(path, MAX_TEXT, BadCheckpoint))
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path.name} is not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path.name} is {shown(value)}, not an object", where=str(path))
    return {key: value[key] for key in DATASET if key in value}


def from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the original's config that the weights tell: all but heads, cycles, T and,
    with rotary positions, S."""
    shapes = {name: tuple(t.shape) for name, t in state.items() if t.ndim == 2}
    vocab, hidden = shapes.get("embed_tokens.embedding_weight", (1, 1))
    puzzles, width = shapes.get("puzzle_emb.weights", (1, 0))
    found: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_puzzle_identifiers": puzzles,
        "puzzle_emb_ndim": width,
        "pos_encodings": "rope",
        "H_layers": layers(state, "H_level.layers."),
        "L_layers": layers(state, "L_level.layers."),
    }
    gate_up = shapes.get("H_level.layers.0.mlp.gate_up_proj.weight")
    if gate_up is not None and hidden:
        found["expansion"] = gate_up[0] / 2 * 3 / 2 / hidden
    positions = shapes.get("embed_pos.embedding_weight")
    if positions is not None and hidden:
        found["pos_encodings"] = "learned"
        found["seq_len"] = positions[0] + -width // hidden
    return found


def layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers, counted from 0, have a tensor `prefix`<number>.<more>."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)}
    return next(i for i in range(len(numbers) + 1) if str(i) not in numbers)


def read_config(
    raw: Any,
    problems: Problems,
    *,
    name: str = "config",
    wrong: str = WRONG,
    needed: str = "",
) -> tuple[HRMConfig, list[str]]:
    """The original's fields under their published names -> their meaning, and unknown ones.

    name    what messages call the config
    wrong   the first line of the error
    needed  added to it where something is missing: what to do about it
    Raises the error of `problems` with all of them at once, UnsupportedModel.
    """
    fields = _mapping(raw, problems, name, wrong)
    _refuse_others(fields.text("name"), f"{name}.name", _ARCHITECTURE, problems.where)
    loss = fields.section("loss")
    width = fields.integer("hidden_size", high=MAX_WIDTH)
    config = HRMConfig(
        seq_len=fields.integer("seq_len", high=MAX_CONTEXT),
        vocab_size=fields.integer("vocab_size", high=MAX_VOCAB),
        hidden_size=width,
        num_heads=fields.integer("num_heads", high=MAX_HEADS),
        expansion=fields.number("expansion", low=1e-3, high=1e3),
        h_cycles=fields.integer("H_cycles", high=MAX_CYCLES),
        l_cycles=fields.integer("L_cycles", high=MAX_CYCLES),
        h_layers=fields.integer("H_layers", high=MAX_LAYERS),
        l_layers=fields.integer("L_layers", high=MAX_LAYERS),
        pos_encodings=_choice(fields, "pos_encodings", POSITIONS),
        halt_max_steps=fields.integer("halt_max_steps", high=MAX_STEPS),
        puzzle_emb_ndim=fields.integer("puzzle_emb_ndim", 0, low=0, high=MAX_WIDTH),
        num_puzzle_identifiers=fields.integer("num_puzzle_identifiers", high=MAX_PUZZLES),
        halt_exploration_prob=fields.number("halt_exploration_prob", low=0.0, high=1.0),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5, **EPS),
        rope_theta=fields.number("rope_theta", 10000.0, **THETA),
        forward_dtype=_choice(fields, "forward_dtype", _DTYPES, "bfloat16"),
        loss_type=_choice(loss, "loss_type", LOSSES),
    )
    loss.text("name")
    fields.seen |= {"batch_size"}  # sizes a buffer of the published trainer, and nothing else
    problems.check(wrong, do=needed or None)
    rotary = config.pos_encodings == "rope"
    _divides(name, width, config.num_heads, rotary, problems)
    if config.intermediate_size < 1:
        problems.add(f"{name}.expansion {config.expansion:g} leaves a gated layer without a column")
    blocks = config.h_cycles * (config.l_cycles * config.l_layers + config.h_layers)
    if blocks > MAX_UPDATES:
        problems.add(f"{name}: {blocks} blocks in a segment, at most {MAX_UPDATES} are read")
    if config.positions > MAX_CONTEXT or rotary and config.positions * width > 2 * MAX_ROTARY:
        problems.add(f"{name}: {config.positions} positions of {width} are too many")
    problems.check(wrong)
    return config, sorted(fields.unknown() + loss.unknown())


def read_bidir_config(
    raw: Any,
    problems: Problems,
    *,
    name: str = "config",
    wrong: str = WRONG,
    needed: str = "",
) -> tuple[BidirConfig, list[str]]:
    """The bidirectional form's fields -> their meaning, and unknown ones. As `read_config`."""
    fields = _mapping(raw, problems, name, wrong)
    standard = BidirConfig(1, 1, 1, 1, 1)
    config = BidirConfig(
        vocab_size=fields.integer("vocab_size", high=MAX_VOCAB),
        hidden_size=fields.integer("hidden_size", high=MAX_WIDTH),
        num_heads=fields.integer("num_heads", high=MAX_HEADS),
        num_h_layers=fields.integer("num_h_layers", high=MAX_LAYERS),
        num_l_layers=fields.integer("num_l_layers", high=MAX_LAYERS),
        max_cycles=fields.integer("max_cycles", high=MAX_CYCLES),
        dropout=fields.number("dropout", standard.dropout, low=0.0, high=0.99),
        seq_len=fields.integer("seq_len", standard.seq_len, high=MAX_CONTEXT),
        positions=fields.integer("positions", standard.positions, high=MAX_CONTEXT),
        cycle_embedding=fields.flag("cycle_embedding", False),
        reinject_input=fields.flag("reinject_input", False),
    )
    fields.seen |= {"batch_size"}
    problems.check(wrong, do=needed or None)
    _divides(name, config.hidden_size, config.num_heads, False, problems)
    if config.hidden_size % 2:
        problems.add(f"{name}.hidden_size {config.hidden_size} is odd: sinusoids come in pairs")
    if config.seq_len > config.positions:
        problems.add(f"{name}.seq_len {config.seq_len} is above {config.positions} positions")
    blocks = config.max_cycles * (config.num_h_layers + config.num_l_layers)
    if blocks > MAX_UPDATES:
        problems.add(f"{name}: {blocks} layers in all cycles, at most {MAX_UPDATES} are read")
    problems.check(wrong)
    return config, fields.unknown()


def _mapping(raw: Any, problems: Problems, name: str, wrong: str) -> Fields:
    if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
        problems.add(f"{name} is {shown(raw)}, not a dict with text keys")
        problems.check(wrong)
    return Fields(raw, problems, f"{name}.")


def _choice(fields: Fields, key: str, known: tuple[Any, ...], default: str | None = None) -> Any:
    """A text that must be one of the known ones."""
    value = fields.text(key, default)
    if value not in known:
        given = "missing" if value is None else shown(value)
        fields.problems.add(f"{fields.prefix}{key} is {given}, known are: {', '.join(known)}")
        return known[0]
    return value


def _refuse_others(value: str | None, field: str, known: str, where: str) -> None:
    if value is not None and value != known:
        raise UnsupportedModel(
            f"{field} = {shown(value)}: another network than {known}",
            where=where,
            do="use a checkpoint of the published network",
        )


def _divides(name: str, width: int, heads: int, even: bool, problems: Problems) -> None:
    if width % heads or (even and width // heads % 2):
        size = " of an even size" if even else ""
        problems.add(f"{name}.hidden_size {width} does not divide into {heads} heads{size}")
