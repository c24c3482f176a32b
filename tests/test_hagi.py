"""HAGI in eager torch equals the published implementation, state by state, in every variant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, assert_close, cases
from torch import Tensor

from edgert.models.hagi.config import Grades, HAGIConfig
from edgert.models.hagi.gdr import GDR, FoldedGDR
from edgert.models.hagi.model import HAGI, drift
from edgert.models.importers import load_source
from edgert.models.layers import Eager


def has_forward(case: Case) -> bool:
    return "h_embed" in case.meta.get("arrays", {})


forward_cases = pytest.mark.parametrize(
    "case", cases("hagi", has_forward), ids=lambda case: case.name
)


def loaded(case: Case) -> HAGI:
    model = load_source(case.checkpoint).model
    assert isinstance(model, HAGI)
    return model


class Recording(Eager):
    """Keeps the output of every norm; the last of them is the final one."""

    last: Tensor

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.last = super().norm(x, weight, eps)
        return self.last


@torch.no_grad()
def intermediates(case: Case) -> dict[str, Tensor]:
    """Every array that the case names for one forward pass, in the order of computation."""
    model = loaded(case)
    c = model.config
    ids = torch.from_numpy(case["input_ids"])
    step = Recording(c.heads, model.cos, model.sin, ids.shape[1])
    blocks: list[Tensor] = []
    mixed: list[Tensor] = []
    for stage in (model.perception, model.reasoning, model.expression):
        for block in stage:
            block.register_forward_hook(lambda _module, _args, out: blocks.append(out[0] + out[1]))
    if model.gdr is not None:
        model.gdr.register_forward_hook(lambda _module, _args, out: mixed.append(out))
    looped: list[Tensor] = []
    reason = model.reason

    def recorded(*args: Any) -> Tensor:
        looped.append(reason(*args))
        return looped[-1]

    model.reason = recorded  # type: ignore[method-assign]
    logits = model(ids, step)
    embedded = torch.nn.functional.embedding(ids, model.embed)
    first, behind = c.perception_layers, c.slots - c.expression_layers

    def stacked(outputs: list[Tensor]) -> Tensor:
        return torch.stack(outputs) if outputs else torch.empty(0, *embedded.shape)

    found = {
        "h_embed": embedded,
        "h_perception": stacked(blocks[:first]),
        "h_reasoning": stacked(blocks[first:behind]).unflatten(
            0, (c.iterations, c.reasoning_layers)
        ),
        "h_loop": stacked(looped),
        "h_expression": stacked(blocks[behind:]),
        "h_norm": step.last,
        "logits": logits,
        "k_cache": torch.stack([step.k[slot] for slot in sorted(step.k)]),
        "v_cache": torch.stack([step.v[slot] for slot in sorted(step.v)]),
        "logits_t1": model(ids[:, :1]),
        "loss": model.loss(ids, torch.from_numpy(case["targets"])),
    }
    return {"h_gdr": stacked(mixed[: c.iterations])} | found if c.use_gdr else found


@forward_cases
def test_every_state_equals_the_published_model(case: Case) -> None:
    """Compared in the order of computation: the first name that fails is the culprit."""
    found = intermediates(case)
    assert set(found) == set(case.meta["arrays"]) - {
        *("input_ids", "targets", "gen_prompt", "gen_ids", "gen_logits")
    }
    for name, got in found.items():
        assert_close(got, case[name], **case.tolerance, where=name)


@forward_cases
@torch.no_grad()
def test_greedy_continuation_equals_the_published_model(case: Case) -> None:
    """Token ids are exact, and the logits that chose them agree."""
    model = loaded(case)
    ids = torch.from_numpy(case["gen_prompt"])
    for i, want in enumerate(case["gen_logits"]):
        last = model(ids)[:, -1]
        assert_close(last, want, **case.tolerance, where=f"logits of continuation token {i}")
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), 1)
    assert_close(ids[:, -case["gen_ids"].shape[1] :], case["gen_ids"], where="continuation")


@forward_cases
@torch.no_grad()
def test_no_part_of_a_case_is_silent(case: Case) -> None:
    """Each tensor that is read is needed: with it zeroed, logits are clearly wrong."""
    model = loaded(case)
    ids = torch.from_numpy(case["input_ids"])
    unread = {"gdr.geo_to_scalar.weight", "gdr.geo_to_bivector.weight"} | {
        "gdr.gate_scalar",
        "gdr.gate_bivector",
    }
    for name, tensor in model.published().items():
        if name in unread and not model.config.grades.geo_interaction:
            continue
        kept = tensor.clone()
        tensor.zero_()
        assert abs(model(ids).numpy() - case["logits"]).max() > 1e-3, name
        tensor.copy_(kept)


@forward_cases
def test_the_number_of_parameters_is_the_stated_one(case: Case) -> None:
    parameters = sum(p.numel() for p in loaded(case).parameters())
    assert parameters == case.meta["params"]


PUBLISHED = {
    "a": ({"use_loop": False, "use_gdr": False}, {}, 113_266_176, 112),
    "b": ({"use_gdr": False}, {}, 113_267_712, 112),
    "c": ({"use_loop": False}, {}, 114_628_610, 132),
    "d": ({}, {}, 114_630_146, 132),
    "d without the geometric term": ({}, {"geo_interaction": False}, 114_630_146, 132),
    "d gated": ({}, {"gated": True}, 114_630_150, 136),
}
MICRO = {"scalar": 32, "vector": 96, "bivector": 96, "trivector": 32, "residual": 128}
SMALL = {
    "micro b": ({"use_gdr": False}, {}, 37_759_488),
    "micro d": ({}, {}, 38_100_738),
    "micro d gated": ({}, {"gated": True}, 38_100_742),
}


def config_768(flags: dict[str, Any], grades: dict[str, Any]) -> HAGIConfig:
    return HAGIConfig(
        vocab_size=49152,
        hidden_size=768,
        num_query_heads=12,
        num_kv_heads=4,
        intermediate_size=2048,
        grades=Grades(**grades),
        context=1,
        **flags,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_exact_counts(name: str) -> None:
    """Parameters and, with the head that is stored a second time, keys of a checkpoint."""
    flags, grades, parameters, keys = PUBLISHED[name]
    with torch.device("meta"):
        model = HAGI(config_768(flags, grades))
    views = model.published()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(view.numel() for view in views.values()) == parameters
    assert len(views) + 1 == keys


@pytest.mark.parametrize("name", SMALL)
def test_micro_sizes_have_their_exact_counts(name: str) -> None:
    flags, grades, parameters = SMALL[name]
    config = replace(
        config_768(flags, MICRO | grades),
        hidden_size=384,
        num_query_heads=6,
        num_kv_heads=2,
        intermediate_size=1024,
    )
    with torch.device("meta"):
        model = HAGI(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def tiny(seed: int = 3, **changes: Any) -> HAGI:
    grades = {"scalar": 4, "vector": 8, "bivector": 6, "trivector": 2, "residual": 4}
    grades |= changes.pop("grades", {})
    config: dict[str, Any] = {
        "vocab_size": 19,
        "hidden_size": 24,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 20,
        "perception_layers": 1,
        "reasoning_layers": 2,
        "expression_layers": 1,
        "loop_count": 2,
        "context": 16,
    } | changes
    model = HAGI(HAGIConfig(**config, grades=Grades(**grades))).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("geo", [False, True])
@pytest.mark.parametrize("residual", [0, 4])
def test_the_folded_form_is_the_published_one(gated: bool, geo: bool, residual: int) -> None:
    """What graphs compute: momenta, gates and signs in the weights, products gathered."""
    sizes = {"scalar": 3, "vector": 16, "bivector": 5, "trivector": 2, "residual": residual}
    gdr = GDR(Grades(**sizes, gated=gated, geo_interaction=geo)).requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    for parameter in gdr.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    x = torch.randn(2, 5, sum(sizes.values()), generator=generator)
    assert_close(FoldedGDR(gdr)(x), gdr(x), atol=1e-5, rtol=1e-5)


def test_writing_to_published_names_writes_to_the_model() -> None:
    """Every weight can be reached by its published name, in published orientation."""
    model, other = tiny(1), tiny(2)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert not torch.equal(model(ids), other(ids))
    for view, source in zip(model.published().values(), other.published().values(), strict=True):
        view.copy_(source.clone())
    assert torch.equal(model(ids), other(ids))


def test_gradients_can_be_reached_by_published_names() -> None:
    model = tiny().requires_grad_(True)
    model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()

    def gradient(parameter: torch.nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    found = model.published(gradient)
    q = found["reasoning.0.attn.q_proj.weight"]
    assert q.shape == (24, 24)
    block = model.reasoning[0]
    assert torch.equal(q, block.wqkv.grad.T[:24])  # type: ignore[union-attr,operator]


def test_gradient_checkpointing_saves_memory_and_changes_no_bit() -> None:
    """Of what a forward pass keeps for the backward one, what lies inside a stage is left out."""
    ids = torch.randint(0, 19, (2, 16), generator=torch.Generator().manual_seed(0))

    def trained(model: HAGI) -> tuple[int, list[Tensor]]:
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            if not isinstance(x, torch.nn.Parameter):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model.requires_grad_(True).loss(ids, ids)
        loss.backward()
        return sum(kept.values()), [loss, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    all_of_it, expected = trained(tiny())
    some, found = trained(tiny(gradient_checkpointing=True))
    assert some < all_of_it / 4
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_loss_in_chunks_is_the_same() -> None:
    """But for a batch without targets: 0 in chunks, undefined at once."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    targets = torch.tensor([[2, -100, 4, 5, 6, 7, -100]])
    plain, chunked = tiny(), tiny(ce_chunk_size=3)
    assert_close(chunked.loss(ids, targets), plain.loss(ids, targets), rtol=1e-6)
    ignored = torch.full_like(targets, -100)
    assert float(chunked.loss(ids, ignored)) == 0.0
    assert bool(plain.loss(ids, ignored).isnan())


def test_the_past_does_not_see_the_future() -> None:
    """Changing the last token leaves all earlier logits bitwise alone."""
    model = tiny()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    other = ids.clone()
    other[0, -1] = 9
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_fewer_iterations_are_the_first_ones() -> None:
    """One iteration of a model of two is a model of one with the first row of `iter_embed`."""
    model = tiny()
    one = tiny(loop_count=1)
    for name, view in one.published().items():
        view.copy_(model.published()[name][: view.shape[0]])
    ids = torch.tensor([[1, 2, 3]])
    assert_close(model(ids, iterations=1), one(ids))


def test_settling_costs_what_late_iterations_still_change() -> None:
    """The drift is that of the states themselves; without weight the loss is the plain one."""
    model = tiny(loop_count=4)
    ids, wanted = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 4, 5]])
    seen: list[Tensor] = []
    model.hidden(model.eager(4), ids, seen=seen)
    changes = [
        ((b - a).norm(dim=-1) / a.norm(dim=-1)).mean() for a, b in zip(seen, seen[1:], strict=False)
    ]
    expected = changes[0] / 4 + changes[1] / 2 + changes[2]
    assert_close(drift(seen), expected, rtol=1e-6)
    plain = model.loss(ids, wanted, 2)
    assert_close(model.loss(ids, wanted, 2, settle=0.5), plain + 0.5 * expected, rtol=1e-6)
    assert torch.equal(model.loss(ids, wanted, 2, settle=0.0), plain)


def test_initial_weights_are_the_published_ones() -> None:
    """N(0, 0.02) where there are two axes, but for `iter_embed`; norms one, all else zero."""
    model = tiny(hidden_size=24).initialize(torch.Generator().manual_seed(1))
    for name, view in model.published().items():
        if name == "iter_embed" or name.endswith("bias") or ".gate_" in name:
            assert not view.any(), name
        elif "norm" in name:
            assert (view == 1).all(), name
        else:
            assert 0.01 < float(view.std()) < 0.03, name
            assert abs(float(view.mean())) < 0.01, name
