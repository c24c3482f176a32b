"""The dense decoder in eager torch equals the published implementation, state by state."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, cases
from torch import Tensor

from edgert.models.decoder import Decoder, DecoderConfig, fused_block, interleave
from edgert.models.importers import load_source
from edgert.models.layers import Eager, paired, rope_tables, rotate


def dense(case: Case) -> bool:
    """Cases of Model A: one pass, no grade-decomposed recurrence, arrays of a forward pass."""
    config = case.meta.get("config", {})
    loops = config.get("loop_count", 3) if config.get("use_loop", True) else 1
    forward = "h_embed" in case.meta.get("arrays", {})
    return forward and loops == 1 and config.get("use_gdr", True) is False


dense_cases = pytest.mark.parametrize("case", cases("hagi", dense), ids=lambda case: case.name)


class Recording(Eager):
    """Keeps the output of every norm; the last of them is the final one."""

    last: Tensor

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.last = super().norm(x, weight, eps)
        return self.last


@torch.no_grad()
def intermediates(case: Case) -> dict[str, Tensor]:
    """Every array that the case names for one forward pass, in the order of computation."""
    model, config = load_source(case.checkpoint).model, case.meta["config"]
    ids = torch.from_numpy(case["input_ids"])
    step = Recording(model.config.heads, model.cos, model.sin, ids.shape[1])
    inputs: list[Tensor] = []
    blocks: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[2]))
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: blocks.append(out[0] + out[1]))
    logits = model(ids, step)
    first, second = config["perception_layers"], config["reasoning_layers"]
    middle = first + second
    empty = torch.empty(0, *inputs[0].shape)

    def stacked(outputs: list[Tensor]) -> Tensor:
        return torch.stack(outputs) if outputs else empty

    assert model.bias is not None
    return {
        "h_embed": inputs[0],
        "h_perception": stacked(blocks[:first]),
        "h_reasoning": stacked(blocks[first:middle])[None],
        "h_loop": (blocks[middle - 1] + model.bias)[None],
        "h_expression": stacked(blocks[middle:]),
        "h_norm": step.last,
        "logits": logits,
        "k_cache": torch.stack([step.k[slot] for slot in sorted(step.k)]),
        "v_cache": torch.stack([step.v[slot] for slot in sorted(step.v)]),
        "logits_t1": model(ids[:, :1]),
    }


@dense_cases
def test_every_state_equals_the_published_model(case: Case) -> None:
    """Compared in the order of computation: the first name that fails is the culprit."""
    for name, got in intermediates(case).items():
        assert_close(got, case[name], **case.tolerance, where=name)


@dense_cases
@torch.no_grad()
def test_greedy_continuation_equals_the_published_model(case: Case) -> None:
    """Token ids are exact, and the logits that chose them agree."""
    model = load_source(case.checkpoint).model
    ids = torch.from_numpy(case["gen_prompt"])
    for i, want in enumerate(case["gen_logits"]):
        last = model(ids)[:, -1]
        assert_close(last, want, **case.tolerance, where=f"logits of continuation token {i}")
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), 1)
    assert_close(ids[:, -case["gen_ids"].shape[1] :], case["gen_ids"], where="continuation")


@dense_cases
def test_the_learned_bias_is_not_silent(case: Case) -> None:
    """Without `iter_embed` the logits are clearly wrong, so the case does test it."""
    model = load_source(case.checkpoint).model
    assert model.bias is not None
    model.bias.zero_()
    got = model(torch.from_numpy(case["input_ids"]))
    assert abs(got.numpy() - case["logits"]).max() > 0.1


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


@pytest.mark.parametrize("after", [1, 2])
def test_the_bias_follows_the_block_it_is_said_to_follow(after: int) -> None:
    """After the last block it is added to what the final norm sees; after the first it is not."""
    ids = torch.tensor([[4, 7]])
    model = small(bias_after=after)
    assert model.bias is not None
    bias = model.bias.clone()
    model.bias.zero_()
    plain = model.hidden(model.eager(2), ids)
    model.bias.copy_(bias)
    got = model.hidden(model.eager(2), ids)
    shift = (got - plain - bias).abs().max()
    assert shift < 1e-5 if after == 2 else shift > 1e-2


def test_a_bias_before_all_blocks_shifts_the_embedding() -> None:
    ids = torch.tensor([[4, 7]])
    model = small(bias_after=0)
    assert model.bias is not None
    got = model.hidden(model.eager(2), ids)
    model.embed += model.bias
    model.bias.zero_()
    assert_close(got, model.hidden(model.eager(2), ids), rtol=0, atol=1e-6)


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


def test_fusing_keeps_every_projection() -> None:
    """Each published [out, in] matrix is found again, transposed, in its columns."""
    generator = torch.Generator().manual_seed(8)
    sizes = {"q": (12, 8), "k": (6, 8), "v": (6, 8), "o": (8, 12), "gate": (10, 8), "up": (10, 8)}
    parts = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    parts["down"] = torch.randn((8, 10), generator=generator)
    fused = fused_block(**parts, attn_norm=torch.ones(8), mlp_norm=torch.ones(8))
    x = torch.randn((3, 8), generator=generator)
    q, k, v = (x @ fused["wqkv"]).split((12, 6, 6), -1)
    for got, name in ((q, "q"), (k, "k"), (v, "v")):
        assert_close(got, x @ parts[name].T, atol=1e-5, where=name)
    gate, up = (x @ fused["w_gate_up"]).chunk(2, -1)
    assert_close(gate, x @ parts["gate"].T, atol=1e-5, where="gate")
    assert_close(up, x @ parts["up"].T, atol=1e-5, where="up")
    assert torch.equal(fused["wo"], parts["o"].T)
    assert torch.equal(fused["w_down"], parts["down"].T)
    assert all(tensor.is_contiguous() for tensor in fused.values())
