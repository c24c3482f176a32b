"""How codes and scales are found for a weight.

    plain     the block's range, rounded: as onnxruntime's own default quantizer, bit for bit
    search    the scale of each block, of several near that of the range, whose squared error is
              least (as ggml's quantizers search theirs)
    weighted  the same, an error weighed by how large that input is on calibration text
    kquant    onnxruntime's k-quant: scale and zero point by weighted least squares
    hqq       onnxruntime's half-quadratic quantization, its zero points rounded. arXiv 2309.15531
    gptq      input by input, each one's rounding error made up for by the inputs behind it, as far
              as the inputs on calibration text go together. arXiv 2210.17323

All take a weight float32 [N, K], a scheme, and the second moments [K, K] of its inputs, which only
the calibrated ones read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgert.export.nbits import Floats, Quantized, Scheme

Moments: TypeAlias = NDArray[np.float64]

_TINY = np.float32(1e-30)
_SHARES = (1.0, *np.linspace(1.08, 0.7, 14))  # of a block's range, tried in `search`
_CHUNK = 1 << 17  # elements searched at once: they stay in a core's cache
_DAMPING = 0.01  # of the mean second moment: GPTQ's own default
_LAZY = 64  # inputs rounded before the ones behind are corrected: the same result, less traffic


def _blocks(weight: Floats, scheme: Scheme) -> Floats:
    """[N, K] -> [N, K / block, block]."""
    block = scheme.block_of(weight.shape[1])
    return weight.reshape(len(weight), -1, block)


def _coded(
    blocks: Floats, scales: Floats, zeros: Floats | int, scheme: Scheme
) -> NDArray[np.uint8]:
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    codes = blocks * inverse[..., None]
    np.rint(codes, out=codes)
    codes += zeros if isinstance(zeros, int) else zeros[..., None]
    np.clip(codes, 0, scheme.top, out=codes)
    return codes.astype(np.uint8)


def _finished(blocks: Floats, scales: Floats, zeros: Floats | int, scheme: Scheme) -> Quantized:
    codes = _coded(blocks, scales, zeros, scheme).reshape(len(blocks), -1)
    kept = None if isinstance(zeros, int) else zeros.astype(np.uint8)
    return Quantized(scheme.bits, codes, scales.astype(np.float32), kept)


def ranges(blocks: Floats, scheme: Scheme) -> tuple[Floats, Floats | int]:
    """Scales and zero points [.., K / block] from each block's own range, zero included."""
    low = np.minimum(blocks.min(-1), 0)
    high = np.maximum(blocks.max(-1), 0)
    if scheme.symmetric:
        # The largest magnitude, with its sign, is the lowest code: that one has no counterpart.
        largest = np.where(np.abs(high) > np.abs(low), high, low)
        return largest / np.float32(-scheme.middle), scheme.middle
    scales = (high - low) / np.float32(scheme.top)
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = np.where(scales == 0, np.float32(0), np.rint(-low / scales))
    return scales, np.clip(zeros, 0, scheme.top)


def plain(weight: Floats, scheme: Scheme, moments: Moments | None = None) -> Quantized:
    blocks = _blocks(weight, scheme)
    return _finished(blocks, *ranges(blocks, scheme), scheme)


def search(weight: Floats, scheme: Scheme, moments: Moments | None = None) -> Quantized:
    blocks = _blocks(weight, scheme)
    return _finished(blocks, *_searched(blocks, scheme), scheme)


def weighted(weight: Floats, scheme: Scheme, moments: Moments | None = None) -> Quantized:
    assert moments is not None
    blocks = _blocks(weight, scheme)
    cost = np.diag(moments).astype(np.float32).reshape(1, *blocks.shape[1:])
    return _finished(blocks, *_searched(blocks, scheme, cost), scheme)


def _searched(
    blocks: Floats, scheme: Scheme, cost: Floats | None = None
) -> tuple[Floats, Floats | int]:
    """Scales and zero points of blocks [N, K / block, block] whose squared error, times a cost for
    each input [1, K / block, block], is least."""
    rows = max(1, _CHUNK // blocks[0].size)
    found = [
        _least(blocks[start : start + rows], scheme, cost) for start in range(0, len(blocks), rows)
    ]
    scales = np.concatenate([scale for scale, _ in found])
    if scheme.symmetric:
        return scales, scheme.middle
    return scales, np.concatenate([np.asarray(zero) for _, zero in found])


def _least(blocks: Floats, scheme: Scheme, cost: Floats | None) -> tuple[Floats, Floats | int]:
    start, zeros = ranges(blocks, scheme)
    best, best_zeros = start, zeros
    least = np.full(start.shape, np.inf, np.float32)
    middle = (np.minimum(blocks.min(-1), 0) + np.maximum(blocks.max(-1), 0)) / 2
    for share in _SHARES:
        scales = start * np.float32(share)
        shifts: list[Floats | int] = [zeros]
        if not isinstance(zeros, int) and share != 1:  # the narrower range about the same middle
            ideal = scheme.top / 2 - middle / np.where(scales == 0, 1, scales)
            shifts = [np.clip(near(ideal), 0, scheme.top) for near in (np.floor, np.ceil)]
        for shift in shifts:
            zero = shift if isinstance(shift, int) else shift[..., None]
            error = _coded(blocks, scales, shift, scheme).astype(np.float32)
            error -= zero
            error *= scales[..., None]
            error -= blocks
            error *= error
            loss = (error if cost is None else error * cost).sum(-1)
            better = loss < least
            least = np.where(better, loss, least)
            best = np.where(better, scales, best)
            if not isinstance(shift, int) and not isinstance(best_zeros, int):
                best_zeros = np.where(better, shift, best_zeros)
    return best, best_zeros


def kquant(weight: Floats, scheme: Scheme, moments: Moments | None = None) -> Quantized:
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    blocks = _blocks(weight, scheme)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes, scales, zeros = quant_tensor_k_quant_cpu(blocks, scheme.bits, blocks.shape[-1])
    shape = blocks.shape[:2]
    return Quantized(
        scheme.bits,
        codes.reshape(weight.shape).astype(np.uint8),
        scales.reshape(shape).astype(np.float32),
        zeros.reshape(shape),
    )


def hqq(weight: Floats, scheme: Scheme, moments: Moments | None = None) -> Quantized:
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantizer

    blocks = _blocks(weight, scheme)
    scales, zeros = ranges(blocks, scheme)
    assert not isinstance(zeros, int), "half-quadratic quantization has zero points"
    inverse = 1 / np.maximum(scales, _TINY)
    with torch.no_grad():
        _, found = HQQWeightOnlyQuantizer.optimize_weights(
            torch.from_numpy(blocks),
            torch.from_numpy(inverse[..., None]),
            torch.from_numpy(zeros[..., None]),
            [0, scheme.top],
            axis=-1,
        )
    rounded = np.clip(np.rint(found.numpy()[..., 0]), 0, scheme.top)
    return _finished(blocks, scales, rounded, scheme)


def gptq(weight: Floats, scheme: Scheme, moments: Moments | None = None) -> Quantized:
    assert moments is not None
    blocks = _blocks(weight, scheme)
    inputs, block = weight.shape[1], blocks.shape[-1]
    cost = np.diag(moments).astype(np.float32).reshape(1, -1, block)
    # A 256th of the range is fine enough as it is.
    fine = scheme.bits == 8
    scales, zeros = ranges(blocks, scheme) if fine else _searched(blocks, scheme, cost)
    # The largest inputs first: their errors have the most inputs behind them.
    order = np.argsort(-np.diag(moments), kind="stable")
    damping = _DAMPING * np.trace(moments) / inputs + 1e-12
    damped = moments[order][:, order] + np.eye(inputs) * damping
    # Upper Cholesky factor of the inverse: row i says how an error at i is made up for behind it.
    factor = np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T, np.float32)
    rest = weight.T[order]  # [K, N]
    codes = np.empty((inputs, len(weight)), np.uint8)
    for start in range(0, inputs, _LAZY):
        stop = min(start + _LAZY, inputs)
        errors = np.empty((stop - start, len(weight)), np.float32)
        for i in range(start, stop):
            at = order[i] // block
            zero = zeros if isinstance(zeros, int) else zeros[:, at]
            code = _coded(rest[i][:, None], scales[:, at], zero, scheme)[:, 0]
            codes[order[i]] = code
            value = (code.astype(np.float32) - zero) * scales[:, at]
            errors[i - start] = (rest[i] - value) / factor[i, i]
            rest[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], errors[i - start])
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return Quantized(
        scheme.bits,
        np.ascontiguousarray(codes.T),
        np.ascontiguousarray(scales, np.float32),
        None if isinstance(zeros, int) else zeros.astype(np.uint8),
    )


Method: TypeAlias = Callable[[Floats, Scheme, Moments | None], Quantized]

METHODS: dict[str, Method] = {
    "plain": plain,
    "search": search,
    "weighted": weighted,
    "kquant": kquant,
    "hqq": hqq,
    "gptq": gptq,
}
