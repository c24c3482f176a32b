"""A training step of ours against the plain eager loop for the same model, in one run.

    python benchmarks/train_step.py [--recipe export/hagi-d-tiny.toml] [--rounds 6] [--steps 12]

Both start from the same weights and see the same batches; their losses are compared before any
time is believed. They take turns, a block of steps each, so that a machine that slows down slows
both. Reported are the medians of the steps, and plain / ours: above 1 ours is faster.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from plain_model import Plain
from plain_train import Loop

from edgert.train.data import Sampler
from edgert.train.loop import Trainer
from edgert.train.recipe import TrainRecipe, read_recipe
from edgert.train.schedule import cosine
from edgert.train.workers import Workers

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3  # steps of each that are not counted
LOSS_RTOL = 1e-3  # roundings of float32, grown over the steps of the run


class Ours:
    def __init__(self, recipe: TrainRecipe, sampler: Sampler) -> None:
        self.trainer = Trainer(recipe, sampler, Workers())

    def step(self) -> float:
        return self.trainer.advance().loss


class Theirs:
    def __init__(self, recipe: TrainRecipe, sampler: Sampler, weights: dict[str, torch.Tensor]):
        self.c, self.sampler, self.number = recipe.train, sampler, 0
        model = Plain(recipe.model)
        model.load_state_dict(weights)
        self.loop = Loop(model, recipe.train)

    def step(self) -> float:
        x, y = self.sampler.batch(self.c.batch_size)
        lr = cosine(
            self.number,
            peak=self.c.learning_rate,
            floor=self.c.min_lr_ratio * self.c.learning_rate,
            warmup=self.c.warmup_steps,
            steps=self.c.steps,
        )
        self.number += 1
        return self.loop.step(torch.from_numpy(x), torch.from_numpy(y), lr)


def sampler(recipe: TrainRecipe) -> Sampler:
    """Random tokens: how long a step takes does not depend on what is learnt."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, recipe.model.vocab_size, 1 << 18).astype(np.uint16)
    return Sampler([tokens], recipe.train.window, recipe.train.seed)


@click.command()
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    default=ROOT / "export" / "hagi-d-tiny.toml",
    show_default="export/hagi-d-tiny.toml",
)
@click.option("--rounds", default=6, type=click.IntRange(1), show_default=True)
@click.option("--steps", default=12, type=click.IntRange(1), show_default=True, help="In a round.")
@click.option("--threads", type=click.IntRange(1), help="Default: torch's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(recipe: Path, rounds: int, steps: int, threads: int | None, as_json: bool) -> None:
    """Milliseconds of a training step, ours and plain, and their ratio."""
    if threads:
        torch.set_num_threads(threads)
    told = read_recipe(recipe)
    if told.train.grad_accum_steps != 1 or told.train.depth != "full":
        raise click.UsageError("the plain loop takes one batch a step, at full depth")
    ours = Ours(told, sampler(told))
    plain = Theirs(told, sampler(told), ours.trainer.model.published())
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    losses: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(rounds + 1):
        for name, loop in (("ours", ours), ("plain", plain)):
            for _ in range(steps if number else WARM_UP):
                start = time.perf_counter()
                losses[name].append(loop.step())
                if number:
                    times[name].append((time.perf_counter() - start) * 1e3)
    np.testing.assert_allclose(losses["ours"], losses["plain"], rtol=LOSS_RTOL)
    found = {name: median(values) for name, values in times.items()}
    report = {
        "recipe": told.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": told.train.batch_size,
        "window": told.train.window,
        "steps": rounds * steps,
        "ms_median": found,
        "ms_best": {name: min(values) for name, values in times.items()},
        "tokens_per_s": ours.trainer.objective.per_step / found["ours"] * 1e3,
        "plain_over_ours": found["plain"] / found["ours"],
        "losses": "equal to rounding",
    }
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(
        f"{told.name} · {report['threads']} threads · batch {told.train.batch_size} × "
        f"{told.train.window} · losses of {len(losses['ours'])} steps equal to rounding"
    )
    for name, value in found.items():
        click.echo(f"  {name:<8}{value:9.1f} ms a step (best {min(times[name]):.1f})")
    click.echo(f"  plain / ours {report['plain_over_ours']:.3f}")


if __name__ == "__main__":
    main()
