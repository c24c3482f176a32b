"""The dense decoder in eager torch; test_smollm2 compares it with the published implementation."""

from __future__ import annotations

import torch
from cases import assert_close
from torch import Tensor

from edgert.models.block import Block, interleave, parts
from edgert.models.decoder import Decoder, DecoderConfig
from edgert.models.layers import Heads, paired, rope_tables, rotate


def small(**changes: object) -> Decoder:
    config = {
        "vocab_size": 11,
        "hidden_size": 12,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_size": 6,
        "intermediate_size": 10,
        "rope_theta": 100.0,
        "norm_eps": 1e-6,
        "context": 16,
        "tied_head": True,
    } | changes
    model = Decoder(DecoderConfig(**config)).requires_grad_(False)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_the_past_does_not_see_the_future() -> None:
    """Changing the last token leaves all earlier logits bitwise alone."""
    model = small()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    other = ids.clone()
    other[0, -1] = 9
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_an_untied_head_is_the_one_that_is_used() -> None:
    """Scaling the head scales the logits; the embedding stays out of it."""
    model = small(tied_head=False)
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids)
    assert model.head is not None
    model.head.mul_(2.0)
    assert_close(model(ids), before * 2, rtol=1e-6)


def test_interleaving_makes_half_split_rotation_the_same_scores() -> None:
    """Half-split rotation gives the same dot products as our rotation of permuted rows."""
    heads, d, hidden, tokens = 3, 8, 5, 4
    generator = torch.Generator().manual_seed(5)
    wq, wk = (torch.randn(heads * d, hidden, generator=generator) for _ in range(2))
    x = torch.randn(tokens, hidden, generator=generator)
    cos, sin = rope_tables(10000.0, d, tokens)

    def split(weight: Tensor) -> Tensor:
        return (x @ weight.T).unflatten(-1, (heads, d)).transpose(0, 1)[None]

    def half_split(y: Tensor) -> Tensor:
        a, b = y[..., : d // 2], y[..., d // 2 :]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    want = half_split(split(wq)) @ half_split(split(wk)).transpose(-1, -2)
    q, k = (rotate(split(interleave(w, d)), *paired(cos, sin)) for w in (wq, wk))
    assert_close(q @ k.transpose(-1, -2), want, atol=1e-5, where="scores")


def test_the_parts_of_a_block_are_its_published_projections() -> None:
    """Each [out, in] matrix written to a part is what the fused columns then compute."""
    block = Block(8, Heads(3, 1, 4), 10, 1e-6).requires_grad_(False)
    generator = torch.Generator().manual_seed(8)
    given = {
        name: torch.randn(view.shape, generator=generator) for name, view in parts(block).items()
    }
    for name, view in parts(block).items():
        view.copy_(given[name])
    x = torch.randn((3, 8), generator=generator)
    q, k, v = (x @ block.wqkv).split((12, 4, 4), -1)
    for got, name in ((q, "q"), (k, "k"), (v, "v")):
        assert_close(got, x @ given[name].T, atol=1e-5, where=name)
    gate, up = (x @ block.w_gate_up).chunk(2, -1)
    assert_close(gate, x @ given["gate"].T, atol=1e-5, where="gate")
    assert_close(up, x @ given["up"].T, atol=1e-5, where="up")
    assert torch.equal(block.wo, given["o"].T)
    assert torch.equal(block.w_down, given["down"].T)
    assert torch.equal(block.attn_norm, given["attn_norm"])
    assert all(p.is_contiguous() for p in block.parameters())
