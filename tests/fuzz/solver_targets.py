"""Targets of published HRM checkpoints: the narrow unpickler, the config beside the weights."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import (
    Raw,
    bytes_like,
    change_bytes,
    change_value,
    dump,
    json_like,
    scalars,
    values_like,
    written,
)
from target import Target, refill, through_file

Files = dict[str, bytes]

NUMPY = [
    *(np.float64(0.5), np.float64("nan"), np.float32(0.5), np.int64(3), np.bool_(True)),
    *(np.ones(2), np.ones((), "<f8"), np.array(["a"]), np.dtype("<f8"), np.dtype(">f8")),
    np.array([{}], object),
]
YAML = [
    *("&a [1]", "*a", "<<: *a", "{<<: {a: 1}}", "!!python/name:os.system", "!!binary aGk="),
    *("!!set {1}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!float .inf", "!!int 1_0", "!!str"),
    *("2026-01-01", "2026-99-99", "2026-01-01T99:99:99Z", "1:20:30", "1" + ":59" * 500),
    *("0x" + "f" * 4000, "0o17", "9" * 5000, "1e999", "-.inf", ".nan", "~", "yes", "? [a]: b"),
    *("{? {a: b}: c}", "|\n  text", "'", '"\\u0', "%YAML 9.9", "---\na: 1\n---\nb: 2", "\t"),
    *("- " * 50 + "x", "[" * 2000, "{a: " * 500, "\x85", "\ufeff"),
]


def _original() -> dict[str, Any]:
    """The weights of a tiny original network."""
    import torch

    from edgert.models.hrm.config import HRMConfig
    from edgert.models.hrm.model import HRM

    config = HRMConfig(4, 5, 4, 2, 1.0, 1, 1, 1, 1, "learned", 2, 4, 3)
    model = HRM(config).initialize(torch.Generator().manual_seed(1))
    return {"_orig_mod.model.inner." + k: v.clone() for k, v in _weights(model).items()}


def _bidirectional() -> dict[str, Any]:
    """A training dict as the trainer of B2 writes it, NumPy scalars included."""
    import torch

    from edgert.models.hrm.bidir import Bidir
    from edgert.models.hrm.config import BidirConfig

    config = BidirConfig(5, 4, 2, 1, 1, 2, seq_len=4, positions=4, cycle_embedding=True)
    model = Bidir(config).initialize(torch.Generator().manual_seed(2))
    told = {"vocab_size": 5, "hidden_size": 4, "num_heads": 2, "num_h_layers": 1}
    return {
        "model_state_dict": {k: v.clone() for k, v in _weights(model).items()},
        "config": told | {"num_l_layers": 1, "max_cycles": 2, "dropout": 0.1},
        "metrics": [{"loss": np.float64(0.25), "accuracy": 0.5}],
        "global_step": 12,
        "run_id": "tiny",
    }


def _weights(model: Any) -> dict[str, Any]:
    return {name: view.detach() for name, view in (model.published() | model.fixed()).items()}


ARCH: dict[str, Any] = {
    "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
    "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
    "num_heads": 2,
    "expansion": 1.0,
    "H_cycles": 1,
    "L_cycles": 1,
    "H_layers": 1,
    "L_layers": 1,
    "hidden_size": 4,
    "pos_encodings": "learned",
    "halt_max_steps": 2,
    "halt_exploration_prob": 0.1,
    "puzzle_emb_ndim": 4,
    "forward_dtype": "float32",
}
CONFIG: dict[str, Any] = {"arch": ARCH, "lr": 1e-4, "seed": 0, "data_path": "data/x"}
DATASET: dict[str, Any] = {"seq_len": 4, "vocab_size": 5, "num_puzzle_identifiers": 3}


def hrm_checkpoint(folder: Path) -> Target:
    """step_<n> and what stands beside it, and *.pt: the zip, the pickle by opcodes, tensors."""
    import torch

    from edgert.models.importers.hrm import is_hrm, read_hrm

    def saved(content: Any) -> bytes:
        out = io.BytesIO()
        torch.save(content, out)
        return out.getvalue()

    beside = {"all_config.yaml": dump(CONFIG).encode(), "dataset.json": dump(DATASET).encode()}
    contents = {"step_7": _original(), "b2.pt": _bidirectional()}
    seeds: list[Files] = [{name: saved(content)} | beside for name, content in contents.items()]
    seeds.append({"bare.pt": saved(contents["b2.pt"]["model_state_dict"])})
    archives = {name: files[name] for files in seeds for name in files if name not in beside}

    @st.composite
    def examples(draw: Any) -> Files:
        files = dict(draw(st.sampled_from(seeds)))
        name = next(iter(files))
        part = draw(st.sampled_from(["ops", "ops", "pickle", "tensors", "values", "zip", "beside"]))
        if part == "beside":
            files["all_config.yaml"] = draw(yaml_like())
            files["dataset.json"] = draw(json_like([DATASET]))
        elif part == "zip":
            files[name] = draw(bytes_like([archives[name]], magic=b"PK\3\4"))
        elif part in ("ops", "pickle"):
            change = change_opcodes if part == "ops" else change_bytes
            files[name] = with_pickle(archives[name], lambda data: change(draw, data))
        elif name in contents:
            content = contents[name]
            changed = _spoiled(draw, content) if part == "tensors" else _told(draw, content)
            with suppress(UnicodeEncodeError, RecursionError):  # no file comes of it
                files[name] = saved(changed)
        return files

    def read(files: Files) -> None:
        home = folder / "hrm"
        refill(home, files)
        path = home / next(iter(files))
        is_hrm(path)
        # As `edgert export` may be told; what the original and a bare state dict lack.
        settings = {} if path.suffix != ".pt" or path.name == "b2.pt" else {"num_heads": 2}
        read_hrm(path, settings=settings)

    return Target(seeds, examples(), read)


def _spoiled(draw: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Another content, with a tensor or two of another kind."""
    import torch

    weights = content.get("model_state_dict", content)
    changed = dict(weights)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(weights)))
        tensor = weights[name]
        shape = draw(st.sampled_from([(8, 8), (1 << 40, 8), (1 << 62,), (0,), (), (1,) * 70]))
        other = [
            tensor.half(),
            tensor[..., :-1].clone(),
            torch.zeros(()).expand(shape),
            tensor.to_sparse(),
            torch.full_like(tensor, float("inf")),
            torch.empty(4, device="meta"),
            torch.nn.Parameter(tensor),
            tensor.t() if tensor.ndim == 2 else tensor.flip(0),
            draw(scalars()),
            draw(st.sampled_from(NUMPY)),
            None,
        ][draw(st.integers(0, 10))]
        if other is None:
            changed.pop(name, None)
        elif draw(st.integers(0, 3)) == 0:
            added = draw(st.sampled_from(["halt_gate", "H_level.layers.9.x", "module.x", 3]))
            changed[added] = other
        else:
            changed[name] = other
    return content | {"model_state_dict": changed} if weights is not content else changed


def _told(draw: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Another content, with other plain values beside the tensors."""
    told = {key: value for key, value in content.items() if key != "model_state_dict"}
    if len(told) == len(content):  # a bare state dict has none
        return content | {draw(st.sampled_from(["config", "x", "global_step"])): draw(scalars())}
    leaves = st.one_of(scalars(), st.sampled_from(NUMPY))
    changed = change_value(draw, {k: v for k, v in told.items() if k != "metrics"}, leaves)
    rest = {"model_state_dict": content["model_state_dict"], "metrics": [draw(leaves)]}
    return rest | changed if isinstance(changed, dict) else {"config": changed} | rest


def with_pickle(archive: bytes, change: Any) -> bytes:
    """A torch.save archive with another pickle and checksums that fit, so that it is read."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(
                info.filename, change(data) if info.filename.endswith("/data.pkl") else data
            )
    return out.getvalue()


_GLOBALS = [
    f"c{module}\n{name}\n".encode()
    for module, name in (
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy.dtypes", "Float64DType"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "FloatStorage"),
        ("torch", "device"),
        ("collections", "OrderedDict"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("edgert.models.importers.hrm_file", "_scalar"),
    )
]
_OPCODES = [
    *(b"R", b"b", b"0", b"2", b"(", b")", b"]", b"}", b"t", b"s", b"u", b"a", b"e", b"N", b"Q"),
    *(b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b".", b"K\2", b"X\2\0\0\0f8", b"C\1a", b"h\0"),
    *(b"q\0", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f"),
    *(b"\x8a\xff" + b"\1" * 255, b"G" + b"\x7f" * 8),
    *(b"X" + struct.pack("<I", 1 << 31), b"B" + struct.pack("<I", (1 << 32) - 1), b"\x80\5"),
    *(b"\x8e" + struct.pack("<Q", 1 << 62), b"\x95" + struct.pack("<Q", 1 << 62), b"\x94", b"\x93"),
]


def change_opcodes(draw: Any, data: bytes) -> bytes:
    """A pickle with whole opcodes dropped, moved, repeated or put in."""
    starts = [place for _, _, place in pickletools.genops(data)]
    ends = [*starts[1:], len(data)]
    ops = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        at = draw(st.integers(0, len(ops) - 1))
        what = draw(st.sampled_from(["drop", "put", "put", "global", "set", "copy", "repeat"]))
        if what == "drop" and len(ops) > 1:
            del ops[at : at + draw(st.sampled_from([1, 1, 3]))]
            ops = ops or [b"."]
        elif what == "copy":
            ops[at] = ops[draw(st.integers(0, len(ops) - 1))]
        elif what == "repeat":
            ops[at:at] = ops[at : at + 8] * draw(st.sampled_from([1, 2, 2000]))
        else:
            new = draw(st.sampled_from(_GLOBALS if what == "global" else _OPCODES))
            ops[at : at + (what == "set")] = [new]
    return b"".join(ops)


@st.composite
def yaml_like(draw: Any) -> bytes:
    """all_config.yaml: changed values, a line or a value in YAML's own ways, changed text."""
    import yaml

    way = draw(st.sampled_from(["flow", "flow", "block", "own", "own", "text", "bytes"]))
    if way == "bytes":
        return draw(st.binary(max_size=64))
    if way == "flow":  # JSON is YAML, but for what `written` puts into it
        return dump(change_value(draw, CONFIG, written())).encode("utf-8", "surrogatepass")
    text = yaml.safe_dump(CONFIG)
    if way == "text":
        return change_bytes(draw, text.encode())
    if way == "own":
        lines = text.splitlines()
        for _ in range(draw(st.sampled_from([1, 1, 2]))):
            at = draw(st.integers(0, len(lines) - 1))
            key = lines[at].partition(":")[0]
            own = draw(st.sampled_from(YAML))
            lines[at] = draw(st.sampled_from([f"{key}: {own}", own, f"{lines[at]}\n{own}"]))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    plain = change_value(draw, CONFIG, scalars())
    try:
        return yaml.safe_dump(plain).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return text.encode()


def hrm_config(folder: Path) -> Target:
    """all_config.yaml and the dataset.json beside it, and what they say about the network."""
    from edgert.models.importers.common import Problems
    from edgert.models.importers.hrm_config import read_all_config, read_config, read_dataset

    data = folder / "dataset.json"

    def read(path: Path) -> None:
        arch, _ = read_all_config(path)
        read_config(DATASET | arch, Problems("step_7"))

    def read_data(path: Path) -> None:
        read_config(ARCH | read_dataset(path), Problems("step_7"))

    yaml_file = through_file(folder / "all_config.yaml", read)
    json_file = through_file(data, read_data)

    def both(example: tuple[str, bytes]) -> None:
        (yaml_file if example[0] == "yaml" else json_file)(example[1])

    seeds = [("yaml", dump(CONFIG).encode()), ("json", json.dumps(DATASET).encode())]
    examples = st.one_of(
        st.tuples(st.just("yaml"), yaml_like()),
        st.tuples(st.just("yaml"), yaml_like()),
        st.tuples(st.just("json"), json_like([DATASET])),
        values_like([CONFIG], scalars()).map(lambda v: ("yaml", _text(v))),
    )
    return Target(seeds, examples, both)


def _text(value: Any) -> bytes:
    return dump(Raw("~") if value is None else value).encode("utf-8", "surrogatepass")
