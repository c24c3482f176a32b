"""A model folder as transformers writes it: config.json, safetensors, tokenizer files.

Its Q and K rows are in half-split rotary order; they are permuted to interleaved order here.

Source  huggingface/transformers, models/llama/modeling_llama.py (tensor names, rotary order)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from edgert.errors import BadCheckpoint, BadTokenizer, MissingDependency
from edgert.models.importers.assemble import (
    Names,
    build,
    compare_shapes,
    expected_shapes,
    numbered,
)
from edgert.models.importers.assets import (
    Assets,
    checked_ids,
    read_text,
    read_tokenizer,
    sampling_defaults,
)
from edgert.models.importers.common import (
    ACCEPTED,
    PERMUTED,
    Fields,
    Imported,
    Problems,
    Progress,
    named,
    sha256,
    shown,
    slug,
)
from edgert.models.importers.huggingface_config import read_config

MAX_JSON = 16 << 20
MAX_TEMPLATE = 1 << 17  # as the runtime has it
MAX_SHARDS = 1 << 10
MAX_FILE_NAME = 255  # bytes: what Linux file systems take

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")

_PARTS = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_INV_FREQ = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")


def load(folder: Path, *, context: int | None, progress: Progress | None) -> Imported:
    """Read one model folder. Raises BadCheckpoint, BadTokenizer, UnsupportedModel."""
    where = str(folder / "config.json")
    problems = Problems(where)
    raw = _json(folder, "config.json")
    if raw is None:
        raise BadCheckpoint("the folder has no config.json", where=str(folder), do=ACCEPTED)
    config, unknown = read_config(raw, problems, context)
    names = Names(
        embed="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        head="lm_head.weight",
        blocks=numbered((f"model.layers.{i}." for i in range(config.num_layers)), _PARTS),
        half_split=True,
    )
    files = _weight_files(folder)
    problems = Problems(str(folder))
    with ExitStack() as stack:
        weights = _Shards(folder, files, problems, stack)
        compare_shapes(
            expected_shapes(config, names), weights.shapes(), names.embed, names.head, problems
        )
        problems.check("the weights do not fit config.json")
        assets, sampling = _assets(folder, raw, config.vocab_size)
        model = build(config, names, weights, problems, progress)
    problems.check("the weights are unusable")
    title = _title(folder, raw)
    notes = list(assets.notes)
    if unknown:
        notes.append(f"unknown keys in config.json, ignored: {named(unknown)}")
    return Imported(
        model=model,
        name=slug(title, "model"),
        tokenizer_json=assets.json,
        chat_template=assets.chat_template,
        bos=assets.bos,
        eos=assets.eos,
        sampling=sampling,
        provenance={
            "source": "huggingface",
            "name": title,
            "file": WEIGHTS if files == [WEIGHTS] else INDEX,
            "sha256": _digest(folder, files),
            "rotary_order": PERMUTED,
        },
        notes=tuple(notes),
    )


def _inside(folder: Path, name: str) -> Path | None:
    """A file of the folder, or None. Links may lead elsewhere in the folder or, in a hub cache
    (`snapshots/<revision>`), to its `blobs`; a link to anywhere else is refused."""
    path = folder / name
    if not path.is_file():
        return None
    real, home = path.resolve(), folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise BadCheckpoint(
            f"{name} is a link that leads out of the folder",
            where=str(path),
            do="copy the file into the folder",
        )
    return path


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object of the folder, or None without the file."""
    path = _inside(folder, name)
    if path is None:
        return None
    try:
        value = json.loads(read_text(path, MAX_JSON, BadCheckpoint))
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{name} is not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{name} is {shown(value)}, not an object", where=str(path))
    return value


def _weight_files(folder: Path) -> list[str]:
    if _inside(folder, WEIGHTS):
        return [WEIGHTS]
    index = _json(folder, INDEX)
    if index is None:
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(
            p.name for p in folder.glob("*.pt*")
        )
        raise BadCheckpoint(
            f"the folder has neither {WEIGHTS} nor {INDEX}"
            + (f", only {named(others)}" if others else ""),
            where=str(folder),
            do="save the model as safetensors: save_pretrained(folder) of transformers does",
        )
    where = str(folder / INDEX)
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise BadCheckpoint(f"weight_map is {shown(mapping)}, not a mapping", where=where)
    files = set()
    for value in mapping.values():
        plain = isinstance(value, str) and PurePosixPath(value).name == value and "\\" not in value
        if (
            not plain
            or not value.endswith(".safetensors")
            or not value.isprintable()
            or len(os.fsencode(value)) > MAX_FILE_NAME
        ):
            raise BadCheckpoint(
                f"weight_map names {shown(value)}, not a plain *.safetensors file name",
                where=where,
                do="keep all shards in the folder itself",
            )
        files.add(value)
    if len(files) > MAX_SHARDS:
        raise BadCheckpoint(
            f"weight_map names {len(files)} files (limit {MAX_SHARDS})", where=where
        )
    missing = sorted(name for name in files if _inside(folder, name) is None)
    if missing:
        raise BadCheckpoint(
            f"files of the index are missing: {named(missing)}",
            where=where,
            do="download the whole folder",
        )
    return sorted(files)


class _Shards:
    """The tensors of one or more safetensors files, read on demand."""

    def __init__(
        self, folder: Path, files: list[str], problems: Problems, stack: ExitStack
    ) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise MissingDependency("safetensors", "export", why="it reads the weights") from error
        self.home: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                shard = stack.enter_context(safe_open(folder / file, framework="pt"))
                names = list(shard.keys())
            except Exception as error:  # the library has one class, its file access several
                raise BadCheckpoint(
                    f"{file} is not a sound safetensors file: {shown(str(error))}",
                    where=str(folder / file),
                    do="download the file again",
                ) from error
            for name in names:
                if _INV_FREQ.match(name):
                    continue  # old files store the rotary frequencies that the config implies
                view = shard.get_slice(name)
                if name in self.home:
                    problems.add(f"{shown(name)} is in two files")
                elif view.get_dtype() not in DTYPES:
                    problems.add(
                        f"{shown(name)} is {view.get_dtype()}, read are {', '.join(DTYPES)}"
                    )
                self.home[name] = shard
                self._shapes[name] = tuple(view.get_shape())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.home[name].get_tensor(name)
        return tensor.to(torch.float32)


def _assets(
    folder: Path, config: Mapping[str, Any], vocab_size: int
) -> tuple[Assets, dict[str, Any]]:
    """Tokenizer, template and ids, and the published sampling settings."""
    notes = []
    path = _inside(folder, "tokenizer.json")
    tokenizer = read_tokenizer(path, vocab_size) if path else None
    if tokenizer is None:
        notes.append("the folder has no tokenizer.json: give one with --tokenizer FILE")
    generation = _json(folder, "generation_config.json") or {}
    where = str(folder / "generation_config.json")

    def ids(key: str) -> tuple[int, ...]:
        value = generation.get(key)
        value = config.get(key) if value is None else value
        return checked_ids(value if isinstance(value, list) else [value], vocab_size, key, where)

    bos = ids("bos_token_id")
    problems = Problems(where)
    fields = Fields(generation, problems)
    sampling = sampling_defaults(fields) if fields.flag("do_sample", False) else {}
    problems.check("generation_config.json is wrong")
    assets = Assets(
        tokenizer, _template(folder), bos[0] if bos else None, ids("eos_token_id"), tuple(notes)
    )
    return assets, sampling


def _template(folder: Path) -> str | None:
    """The default chat template: a file of its own, else a field of tokenizer_config.json."""
    path = _inside(folder, "chat_template.jinja")
    if path:
        return read_text(path, MAX_TEMPLATE, BadTokenizer)
    value = (_json(folder, "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(value, list):
        defaults = [i for i in value if isinstance(i, dict) and i.get("name") == "default"]
        value = defaults[-1].get("template") if defaults else None
    where = str(folder / "tokenizer_config.json")
    if value is not None and (not isinstance(value, str) or len(value) > MAX_TEMPLATE):
        raise BadTokenizer(
            f"chat_template is {shown(value)}, not text of at most {MAX_TEMPLATE} characters",
            where=where,
        )
    if value is not None and any("\ud800" <= c <= "\udfff" for c in value):
        raise BadTokenizer(
            "chat_template has a lone surrogate, which is no text",
            where=where,
            do="take the template from its source again, or write it to chat_template.jinja",
        )
    return value


def _title(folder: Path, config: Mapping[str, Any]) -> str:
    """The model's name: what the config says it was loaded from, else the folder's."""
    stated = config.get("_name_or_path")
    if isinstance(stated, str) and (name := PurePosixPath(stated.replace("\\", "/")).name):
        return name
    home = folder.resolve()
    if home.parent.name == "snapshots":  # hub cache: models--<owner>--<name>/snapshots/<revision>
        return home.parent.parent.name.rpartition("--")[2]
    return home.name


def _digest(folder: Path, files: list[str]) -> str:
    """SHA-256 of the weights file, or of the shards' listing as sha256sum prints it."""
    sums = [sha256(folder / file) for file in files]
    if len(sums) == 1:
        return sums[0]
    listing = "".join(f"{digest}  {file}\n" for digest, file in zip(sums, files, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()
