"""Keys and values in int8: attention over codes, whose scales a text has told.

    code   int8: x * (1 / scale), rounded half to even, from -128 to 127; x is a value, or a key
           after rotation
    read   code * scale is what attention reads, also of the tokens that a step brings itself
    scale  float32, one for each channel of each KV head of a slot

Source: onnxruntime docs/ContribOperators.md, com.microsoft.GroupQueryAttention (k_scale, v_scale);
its CPU kernel is core/mlas/lib/qkv_quant.cpp.

Two rules beyond "the largest magnitude on the text, over 127":
- Channels 2j and 2j + 1 of a key turn into each other with its position, slow pairs over thousands
  of tokens. So both have the scale of the pair's largest radius, which no position changes.
- The iterations of a loop's block share their scales: where `fill` is `copy`, an iteration finds
  the codes of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgert.errors import UnsupportedModel
from edgert.export import accuracy
from edgert.export.initializers import initializer
from edgert.models.importers import Imported
from edgert.models.layers import Cache
from edgert.models.program import Program, Referee, kv_names
from edgert.progress import Reporter
from edgert.spec import Wire, endpoints

LOW, HIGH = -128, 127
_PAST, _SCALES = (3, 4), (12, 13)  # inputs of GroupQueryAttention: keys, values

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]


class Int8KV:
    """The scales of a model's keys and values, float32 [m, d] by the name of their state."""

    def __init__(self, scales: Mapping[str, Floats]) -> None:
        self.scales = dict(scales)

    @property
    def state_dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self.scales, "int8")

    def rewrite(self, model: ir.Model, inputs: Mapping[str, Wire]) -> None:
        """Let the attention of a traced graph keep codes; `inputs` say which states it reads."""
        for node in list(model.graph):
            if node.op_type != "GroupQueryAttention":
                continue
            operands = [*node.inputs, *[None] * (_SCALES[-1] + 1 - len(node.inputs))]
            for past, scale, present in zip(_PAST, _SCALES, node.outputs[1:3], strict=True):
                value = node.inputs[past]
                assert value is not None
                name = endpoints(inputs[str(value.name)])[0].removeprefix("state.")
                value.type = present.type = ir.TensorType(ir.DataType.INT8)
                make = partial(np.expand_dims, self.scales[name], (0, 2))  # [1, m, 1, d]
                operands[scale] = initializer(model.graph, f"{name}.scale", make)
            node.resize_inputs(len(operands))
            for i, operand in enumerate(operands):
                node.replace_input_with(i, operand)
            for side in ("k", "v"):
                node.attributes.add(ir.AttrString(f"{side}_quant_type", "PER_CHANNEL"))
            node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))

    def rounding(self) -> Cache:
        """A cache as the graph's operator is one: torch rounds what is put into it."""

        def cache(slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            key, value = kv_names(slot)
            return rounded(k, key), rounded(v, value)

        def rounded(x: Tensor, name: str) -> Tensor:
            scale = torch.from_numpy(self.scales[name])[:, None]
            return (x * (1 / scale)).round().clamp(LOW, HIGH) * scale

        return cache

    def holding(self, codes: Mapping[str, Codes]) -> Cache:
        """A cache with these codes [B, m, C, d], by state, whatever is put into it."""

        def read(name: str, tokens: int) -> Tensor:
            held = codes[name][:, :, :tokens].astype(np.float32)
            return torch.from_numpy(held * self.scales[name][:, None])

        def cache(slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            key, value = kv_names(slot)
            return read(key, k.shape[2]), read(value, v.shape[2])

        return cache

    def nearest(self, name: str, codes: Codes, want: Floats) -> Floats:
        """Of all numbers that have these codes [B, m, T, d], those nearest to `want`: `want` itself
        where the code is right, by however little."""
        scale, middle = self.scales[name][:, None], codes.astype(np.float32)
        low = np.where(codes == LOW, -np.inf, middle - 0.5) * scale
        high = np.where(codes == HIGH, np.inf, middle + 0.5) * scale
        return np.clip(want, low, high).astype(np.float32)


def calibrated(
    program: Program, source: Imported, lowerings: Sequence[str], reporter: Reporter
) -> Int8KV:
    """Scales by the calibration text, as eager torch in float32 computes keys and values.

    Raises UnsupportedModel for a model without any, without the lowering `ort`, or without a
    tokenizer that could read a text.
    """
    do = "export with --kv fp32"
    if program.reference is None:
        raise UnsupportedModel("int8 keys and values are for models that decode tokens", do=do)
    if "ort" not in lowerings:
        why = program.refusals.get("ort", "it was not asked for")
        raise UnsupportedModel(f"int8 keys and values need the lowering ort: {why}", do=do)
    tokenizer = accuracy.tokenizer_of(source)
    if tokenizer is None:
        raise UnsupportedModel(
            "int8 keys and values have their scales from a text, and the model has no tokenizer to "
            "read one",
            do=f"{do}, or with --tokenizer FILE",
        )
    windows = accuracy.sample(tokenizer, program.context, offset=0.0).windows
    with reporter.stage("reading", "text for the scales of keys and values"):
        return Int8KV(scales_of(program, ranges(program.reference, windows)))


def radius(k: Tensor) -> Tensor:
    """Rotated keys [..., d] -> the radius of the pair that each channel belongs to, [..., d]."""
    return k.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)


def ranges(
    reference: Referee,
    windows: Iterable[accuracy.Ids],
    size_of_keys: Callable[[Tensor], Tensor] = radius,
) -> dict[str, Floats]:
    """The largest magnitude of each channel on windows of ids [T]: float32 [m, d] by state."""
    found: dict[str, Tensor] = {}

    def watch(slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for name, size in zip(kv_names(slot), (size_of_keys(k), v.abs()), strict=True):
            most = size.amax(dim=(0, 2))
            found[name] = torch.maximum(found[name], most) if name in found else most
        return k, v

    for ids in windows:
        reference(torch.from_numpy(ids[None]), watch)
    return {name: most.numpy() for name, most in found.items()}


def scales_of(program: Program, found: Mapping[str, Floats]) -> dict[str, Floats]:
    """Ranges -> scales, the same for all iterations of a block; 1 / 127 where there is nothing."""
    wide = dict(found)
    for wire in (wire for graph in program.graphs for wire in graph.inputs.values()):
        names = [end.removeprefix("state.") for end in endpoints(wire)]
        if len(names) > 1 and names[0] in found:
            widest: Floats = np.maximum.reduce([found[name] for name in names])
            wide |= dict.fromkeys(names, widest)
    return {
        name: (np.where(most > 0, most, 1.0) / HIGH).astype(np.float32)
        for name, most in wide.items()
    }
