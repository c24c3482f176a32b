"""What TensorRT parses, version by version, known before any TensorRT is there to ask.

A graph that uses anything else is refused with the node's name. What the table lets pass may still
fail: an importer has limits that only parsing finds, so a pass here is necessary, not sufficient.

Sources  onnx/onnx-tensorrt docs/operators.md of release 10.15 (operators, attributes), and
         docs/Changelog.md (the release that brought an operator, where that is after 10.3). No
         table of 10.16 and later was at hand: for them it is that of 10.15.
         tensorrt_rtx: `OnnxParser.supports_operator` of the 1.7 package, asked for all operators of
         onnx 1.23 (scripts/record_trt_api.py); tests compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from edgert.build.target import Target

_NAMES = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike
Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax
Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round Scan
Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
Transpose Trilu Unsqueeze Upsample Where Xor
"""
SINCE_10_3 = frozenset(_NAMES.split())
LATER: dict[str, tuple[int, int]] = {
    "BlackmanWindow": (10, 4),
    "HammingWindow": (10, 4),
    "HannWindow": (10, 4),
    "STFT": (10, 5),
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
}
"""The release that brought an operator."""

RTX = (SINCE_10_3 | LATER.keys()) - {"DeformConv", "NonMaxSuppression", "NonZero", "RoiAlign"}
"""TensorRT-RTX 1.7. Left out is what its parser knows and then wants plugins for."""


@dataclass(frozen=True)
class Node:
    """One node of a graph, subgraphs included. Domains are spelled out: "ai.onnx", never ""."""

    name: str
    domain: str
    operator: str
    attributes: dict[str, Any]


def parsed(target: Target) -> frozenset[str]:
    """The standard operators that a target's parser takes."""
    if target.compiler == "tensorrt_rtx":
        return RTX
    return SINCE_10_3 | {op for op, release in LATER.items() if release <= target.release}


def refusals(target: Target, nodes: Iterable[Node]) -> Iterator[str]:
    """Why a target's parser would not take a graph, one line for each kind of reason."""
    known = parsed(target)
    found: dict[str, list[str]] = {}
    for node in nodes:
        why = _refusal(known, node)
        if why:
            found.setdefault(why, []).append(node.name)
    for why, names in sorted(found.items()):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{why}: node {names[0]!r:.120}{more}"


def _refusal(known: frozenset[str], node: Node) -> str | None:
    operator = node.operator
    if node.domain != "ai.onnx":
        return f"{node.domain}::{operator} is not a standard operator"
    if operator not in known:
        return f"{operator} is not parsed"
    reduction = node.attributes.get("reduction", b"none")
    if operator == "ScatterND" and reduction not in (b"none", "none"):
        return "ScatterND with a reduction is not parsed"
    if operator == "TopK" and node.attributes.get("sorted", 1) != 1:
        return "TopK unsorted is not parsed"
    return None
