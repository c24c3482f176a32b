"""Which programs the runtime's loops can feed and read: decoders, and models that solve."""

from __future__ import annotations

from edgert.errors import UnsupportedModel, UsageError
from edgert.spec import DECODER_INPUTS, Manifest, TensorSpec, decoder_results


def check_program(manifest: Manifest, where: str) -> None:
    """Raise UnsupportedModel, naming every reason, for what no loop can feed or read."""
    problems = _solver_problems(manifest) if manifest.solves else _decoder_problems(manifest)
    if problems:
        raise UnsupportedModel(
            "\n  - ".join(["this version of edgert cannot run the bundle:", *sorted(problems)]),
            where=where,
            do="install a newer edgert",
        )


def solves_puzzles(where: str) -> UsageError:
    """What to say where somebody wants text of a model that solves; `where` is its bundle."""
    return UsageError(
        "this model solves puzzles, it does not decode text",
        where=where,
        do=f"give it a puzzle:  edgert solve {where} PUZZLE   (in Python: model.solve)",
    )


def _solver_problems(manifest: Manifest) -> list[str]:
    loop, problems = manifest.program.loop, []
    assert loop is not None
    cells, vocab = manifest.context, manifest.vocab_size
    if cells < 1 or vocab < 1:
        problems.append(f"it has no cells: context {cells}, vocab_size {vocab}")
    wanted = {
        ("inputs", "ids"): TensorSpec("int32", ("batch", cells)),
        ("results", "token"): TensorSpec("int32", ("batch", cells)),
        ("results", "logits"): TensorSpec("float32", ("batch", cells, vocab)),
    }
    tensors = {("inputs", name): spec for name, spec in manifest.inputs.items()}
    tensors |= {("results", name): spec for name, spec in manifest.results.items()}
    for key, want in wanted.items():
        if tensors.get(key) != want:
            problems.append(f"{'.'.join(key)} is not {want.dtype} {list(want.shape)}")
    for name in manifest.inputs.keys() - manifest.tables.keys() - {"ids"}:
        problems.append(f"inputs.{name} is unknown, and no table holds its rows")
    tensors |= {("program.loop.values", name): spec for name, spec in loop.values.items()}
    for (side, name), spec in tensors.items():
        named = [axis for axis in spec.shape[1:] if isinstance(axis, str)]
        if spec.shape[:1] != ("batch",) or named:
            problems.append(f"{side}.{name}: its axes are not [batch, sizes]")
    for name, signal in loop.signals.items():
        if (signal.dtype, signal.shape) != ("float32", ("batch",)):
            problems.append(f"program.loop.signals.{name}: it is not float32 [batch]")
    return problems


def _decoder_problems(manifest: Manifest) -> list[str]:
    vocab = manifest.vocab_size
    wanted = {("inputs", name): spec for name, spec in DECODER_INPUTS.items()}
    wanted |= {("results", name): spec for name, spec in decoder_results(vocab).items()}
    declared = {("inputs", name): spec for name, spec in manifest.inputs.items()}
    declared |= {("results", name): spec for name, spec in manifest.results.items()}
    problems = [f"{side}.{name} is unknown" for side, name in declared.keys() - wanted.keys()]
    for key, want in wanted.items():
        if declared.get(key) != want:
            problems.append(f"{'.'.join(key)} is not {want.dtype} {list(want.shape)}")
    counters = [state.kind for state in manifest.states.values()].count("counter")
    if counters != 1:
        problems.append(f"states: {counters} counters instead of one")
    for name, state in manifest.states.items():
        named = [axis for axis in state.shape[1:] if isinstance(axis, str)]
        if state.shape[:1] != ("batch",):
            problems.append(f"states.{name}: its first axis is not 'batch'")
        if named != (["capacity"] if state.kind == "append" else []):
            problems.append(f"states.{name}: the axes {named} of a state of kind {state.kind}")
        if state.kind == "append" and state.init != "zeros":
            problems.append(f"states.{name} grows and has an initial value")
    problems += _loop_problems(manifest)
    if vocab < 1 or manifest.context < 1:
        problems.append(f"it has no tokens: vocab_size {vocab}, context {manifest.context}")
    return problems


def _loop_problems(manifest: Manifest) -> list[str]:
    program = manifest.program
    if program.loop is None:
        parts = [part for part in ("prologue", "body") if getattr(program, part) is not None]
        return [f"program.{part}: a program without a loop has only an epilogue" for part in parts]
    problems = []
    for name, value in program.loop.values.items():
        named = [axis for axis in value.shape[2:] if isinstance(axis, str)]
        if value.shape[:2] != ("batch", "tokens") or named:
            problems.append(f"program.loop.values.{name}: its axes are not [batch, tokens, sizes]")
    for name, signal in program.loop.signals.items():
        if (signal.dtype, signal.shape) != ("float32", ("batch", "tokens")):
            problems.append(f"program.loop.signals.{name}: it is not float32 [batch, tokens]")
    return problems
