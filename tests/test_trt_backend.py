"""The TensorRT backend, all of it but the libraries: engines and CUDA are stand-ins.

The stand-in for CUDA does things when somebody waits for them, and the one for engines overwrites
its outputs before it reads: so equal tokens say that the runtime waits where it must, and that no
state is written where it is read.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_loop
import fake_model
import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_loop import IDS, looped_manifest, looped_model
from fake_model import PROMPT, SAMPLED
from fake_model import fake_model as on_cpu
from fake_trt import device_backend, device_model, published

import edgert
from edgert.backends.base import GraphSource
from edgert.bundle import Bundle
from edgert.errors import BadFile, DeviceFailed, Incompatible, OutOfMemory, UsageError
from edgert.halting import parse_halt
from edgert.model import Model
from edgert.runner import Runner

VARIANT = "fp32-ort"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "cache"))


def decoder(cuda: FakeCuda | None = None, **changes: Any) -> Model:
    graph = fake_model.Graph()
    return device_model(fake_model.manifest(), VARIANT, {"decode": graph}, cuda=cuda, **changes)


def looped(cuda: FakeCuda | None = None, **changes: Any) -> Model:
    graphs = fake_loop.Graphs()
    functions = {"enter": graphs.enter, "think": graphs.think, "leave": graphs.leave}
    return device_model(looped_manifest(), VARIANT, functions, cuda=cuda, **changes)


def calls(model: Model) -> list[str]:
    found: list[str] = model.runner.backend.device.cuda.calls  # type: ignore[attr-defined]
    return found


# ---------------------------------------------------------------------- the same as on a CPU


def test_it_says_what_the_cpu_says():
    """Prefill, steps, and the growth of the states into the next capacity."""
    ids = PROMPT * 90  # 270 tokens: beyond the first capacity
    with decoder() as device, on_cpu() as host:
        got, want = (model.generate(ids, max_tokens=30).tokens for model in (device, host))
        assert got == want
        assert device.placement == f"{VARIANT} · tensorrt 10.3.0 · GPU, SM 8.7"


@pytest.mark.parametrize("options", [{"speculate": 3, "max_tokens": 30}, SAMPLED | {"seed": 4}])
def test_guesses_and_draws_are_those_of_the_cpu(options):
    ids = PROMPT * 4
    with decoder() as device, on_cpu() as host:
        got, want = (model.generate(ids, **options).tokens for model in (device, host))
    assert got == want


@pytest.mark.parametrize("halt", ["full", "fixed:2", "settle:0.1", "settle:0.3:2:3"])
def test_a_loop_halts_where_it_does_on_the_cpu(halt):
    found = []
    for model in (looped(), looped_model()):
        with model:
            made = model.generate(IDS[:6], max_tokens=20, halt=halt, ignore_eos=True)
            found.append((made.tokens, made.timings.iterations))
    assert found[0] == found[1]
    assert len(found[0][1]) == 19


@pytest.mark.parametrize("policy", ["full", "settle:0.2"])
def test_a_batch_prefilled_row_by_row_is_that_of_the_cpu(policy):
    """Ragged rows that halt at different iterations; most begin where no engine takes an address,
    and what an engine writes into one must not touch the others."""
    rows = [IDS[:9], IDS[3:12], IDS[7:16]]
    seen = []
    for model in (looped(), looped_model()):
        with model:
            execution = model.runner.open(batch=3, tokens=300)
            for index, ids in enumerate(rows):
                row = execution.row(index)
                for _ in row.feed(np.array(ids[: 4 + index], np.int64), chunk=3):
                    pass
            for i in range(3):
                io = execution.io()
                io.ids[:, 0] = [row[4 + index + i] for index, row in enumerate(rows)]
                io.select[:] = 0
                io.run(parse_halt(policy))
                seen.append((io.logits.copy(), io.token.copy(), io.iterations.copy()))
            seen.append(tuple(execution.states.buffers["kept.3"].read((slice(3), slice(11)))))
    half = len(seen) // 2
    for got, want in zip(seen[:half], seen[half:], strict=True):
        for one, other in zip(got, want, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("make", [decoder, looped])
def test_a_session_moves_between_the_devices_token_for_token(make, tmp_path):
    """Saved at every turn of the sides, and resumed on the other one: the same tokens."""
    other = on_cpu if make is decoder else looped_model
    options = {"max_tokens": 12, "ignore_eos": True}
    with make() as device, other() as host:
        want = list(host.session().stream(IDS[:4], **options))
        for position in (1, 2, 5):
            for first, second in ((device, host), (host, device), (device, device)):
                session = first.session()
                stream = session.stream(IDS[:4], **options)
                got = [next(stream) for _ in range(position)]
                session.save(tmp_path / "s")
                with edgert.resume(tmp_path / "s", second) as resumed:
                    got += list(resumed.stream())
                assert [p.token for p in got] == [p.token for p in want]


def test_sessions_share_a_stream_and_not_their_states():
    with decoder() as device, on_cpu() as host:
        found = []
        for model in (device, host):
            streams = [
                model.session().stream([*PROMPT, i + 2], seed=7, **SAMPLED) for i in range(3)
            ]
            turns = zip(*streams, strict=False)
            found.append([[piece.token for piece in turn] for turn in turns])
    assert found[0] == found[1]


# ------------------------------------------------------------------------------- captured launches


def test_a_step_is_captured_once_for_each_turn_of_its_sides():
    """Run as it is the first time, captured the second, launched from then on."""
    with decoder() as model:
        model.generate(PROMPT, max_tokens=21)
        made = calls(model)
    assert made.count("begin_capture") == made.count("end_capture") == 2
    assert made.count("launch") == 20 - 2  # twenty steps, two of which came first at their turn


def test_a_graph_whose_buffers_stay_is_captured_once():
    with looped() as model:
        model.generate(IDS[:3], max_tokens=11)
        made = calls(model)
    # enter once; a body for each of four iterations, and leave, which reads what they turn, twice
    assert made.count("begin_capture") == 1 + 2 * 4 + 2


def test_an_engine_that_cannot_be_captured_is_run_as_it_is_and_says_so():
    with decoder(capturable=False) as model, on_cpu() as host:
        session = model.session()
        got = session.generate(PROMPT, max_tokens=12).tokens
        assert got == host.generate(PROMPT, max_tokens=12).tokens
        assert "without CUDA graphs: " in model.placement
        assert "would make the legacy stream depend on a capture" in model.placement
        assert calls(model).count("begin_capture") == 1
        assert "launch" not in calls(model)


def test_what_was_captured_is_captured_anew_where_the_scratch_memory_moves():
    with decoder() as model, on_cpu() as host:
        backend: Any = model.runner.backend
        session, other = model.session(), host.session()
        options = {"max_tokens": 8, "ignore_eos": True}
        first = [s.generate(PROMPT, **options).tokens for s in (session, other)]
        assert first[0] == first[1]
        before = calls(model).count("begin_capture")
        backend.device.scratch.expect(50_000)  # as when a larger engine is loaded
        more = [s.generate([5], **options).tokens for s in (session, other)]
        assert more[0] == more[1]
        assert calls(model).count("begin_capture") == before + 2
        assert calls(model).count("end_captured") == 2


# --------------------------------------------------------------------------- where states are


def in_place(ids: Any, select: Any, lens: Any, kept: Any) -> dict[str, Any]:
    return fake_model.Graph()(ids, select, lens, kept)


def test_what_an_engine_writes_in_place_has_one_side():
    """As TensorRT's own layer for keys and values does, and tells: both have one address."""
    aliases = {"kept_next": "kept"}
    manifest = fake_model.manifest()
    with device_model(manifest, VARIANT, {"decode": in_place}, aliases=aliases) as model:
        session = model.session()
        got = session.generate(PROMPT, max_tokens=20).tokens
        cuda: FakeCuda = model.runner.backend.device.cuda  # type: ignore[attr-defined]
        assert cuda.reserved() == 1024 + 256 * 8
        assert calls(model).count("begin_capture") == 1  # no sides, no turns
        assert session.execution.states.buffers["kept"].read().shape == (1, 256)
    with on_cpu() as host:
        assert got == host.generate(PROMPT, max_tokens=20).tokens


def test_aliases_that_the_manifest_does_not_have_are_refused():
    model = looped()
    backend: Any = model.runner.backend
    backend._trt.engines[b"engine of think"].aliases["next"] = "lens"
    bundle = Bundle(Path("fake"), model.manifest)
    again = Runner(bundle, VARIANT, type(backend)(backend._trt, FakeCuda()))
    with pytest.raises(Incompatible, match="writes next over lens"):
        again.open(tokens=8).io()


def test_tensors_of_the_device_are_not_the_hosts():
    with decoder() as model:
        states = model.session().execution.states
        with pytest.raises(Exception, match="in the memory of the device alone"):
            states.buffers["kept"].host  # noqa: B018
        with pytest.raises(IndexError):
            states.buffers["kept"].row(1)
        with pytest.raises(ValueError, match="into int64"):
            states.buffers["kept"].write(np.zeros((1, 3), np.int64))
        values = np.arange(256, dtype=np.int64)[None]
        states.buffers["kept"].write(values)
        assert np.array_equal(states.buffers["kept"].read(), values)


def test_memory_that_is_not_there_is_said():
    """The state has two sides; there is room for one."""
    little = decoder(FakeCuda(limit=1024 + 2048 + 100))
    with pytest.raises(OutOfMemory, match="no memory left"):
        little.generate(PROMPT, max_tokens=4)
    less = decoder(FakeCuda(limit=1024))
    with pytest.raises(OutOfMemory, match=r"0 MB for a int64 tensor of shape \(1, 256\)"):
        less.session()


# -------------------------------------------------------------------------------------- the end


def test_everything_is_let_go_in_order():
    """Captured launches, contexts, the engine, the runtime, memory, the stream; while a session is
    still open, and its arrays stay readable."""
    model = decoder()
    session = model.session()
    tokens = session.generate(PROMPT, max_tokens=9).tokens
    io = session.execution.io()
    made = calls(model)
    cuda: FakeCuda = model.runner.backend.device.cuda  # type: ignore[attr-defined]
    begun = len(made)
    model.close()
    kinds = ("sync", "end_captured", "~context", "~engine", "~runtime", "free", "end_stream")
    ended = [call for call in made[begun:] if call in kinds]
    order = list(dict.fromkeys(ended))
    assert order == list(kinds)
    assert ended == sorted(ended, key=kinds.index)
    # Prefill of three tokens in its first turn, steps in both; the state's sides and the scratch.
    assert [ended.count(kind) for kind in kinds] == [1, 2, 3, 1, 1, 3, 1]
    assert cuda.reserved() == 0
    assert session.tokens[-9:] == list(tokens)
    assert io.token.shape == (1, 1)
    assert io.logits[0, 0].argmax() == io.token[0, 0]
    assert "host_free" not in made[begun:]
    with pytest.raises(UsageError, match="the model is closed"):
        session.generate([5])
    model.close()
    del session, io
    gc.collect()  # the refusal above knows the session
    assert cuda.reserved(shared=True) == 0


def test_a_session_that_ends_gives_its_memory_back_between_two_calls():
    with decoder() as model:
        cuda: FakeCuda = model.runner.backend.device.cuda  # type: ignore[attr-defined]
        sizes = []
        for _ in range(3):
            with model.session() as session:
                session.generate(PROMPT, max_tokens=5)
            del session
            model.runner.backend.wait()
            sizes.append((cuda.reserved(), cuda.reserved(shared=True), len(cuda.graphs)))
    assert sizes == [(1024, 0, 0)] * 3


def test_nothing_is_freed_while_launches_are_written_down():
    """A buffer that goes away in the middle of a capture waits for its end, also where copies are
    captured, as for the rows of a batch."""
    gone: list[Any] = []

    class Watched(FakeCuda):
        def begin_capture(self, stream: int) -> None:
            super().begin_capture(stream)
            gone.clear()

    cuda = Watched()
    backend = device_backend(fake_model.manifest(), VARIANT, {"decode": in_place}, cuda)
    bundle = Bundle(Path("fake"), fake_model.manifest())
    with Model(bundle, Runner(bundle, VARIANT, backend)) as model, on_cpu() as host:
        gone.append(backend.allocate("float32", (64,)))
        found = []
        for each in (model, host):
            row = each.runner.open(batch=2, tokens=20).row(1)
            found.append([io.token.item() for io in row.feed(np.array(IDS[:6]), chunk=1)])
        assert found[0] == found[1]
        assert not gone
        begun, ended = cuda.calls.index("begin_capture"), cuda.calls.index("end_capture")
        assert "copyDeviceToDevice" in cuda.calls[begun:ended]
        assert "free" not in cuda.calls[:ended]
        assert "free" in cuda.calls[ended:]


# ------------------------------------------------------------------------------------ engines


def source(**changes: Any) -> GraphSource:
    ports = (("ids", "select", "lens", "kept"), ("logits", "token", "kept_next"))
    made = GraphSource("decode", Path("decode"), *ports, "bundles/b", VARIANT, "cd" * 32)
    return replace(made, **changes)


@pytest.fixture
def backend() -> Any:
    return device_backend(fake_model.manifest(), VARIANT, {"decode": in_place})


@pytest.mark.parametrize(
    "changes", [{"variant_id": "ee" * 32}, {"name": "step"}, {"sha256": ("ab" * 32,)}], ids=str
)
def test_an_engine_of_something_else_is_none(backend, changes):
    with pytest.raises(Incompatible, match="there is no engine of graph") as caught:
        backend.load(source(**changes))
    assert "edgert build bundles/b --target NAME" in (caught.value.do or "")
    assert "tensorrt 10.3.0 and SM 8.7" in caught.value.what
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("other", [{"compiler": "tensorrt 10.16.1"}, {"sm": "11.0"}], ids=str)
def test_engines_of_other_versions_and_devices_are_passed_by(tmp_path, other):
    """They say so themselves; and what is no engine at all is no reason to stop."""
    manifest = fake_model.manifest()
    path = published(manifest, VARIANT, "decode", b"engine of decode", **other)
    (path.parent / "torn.engine").write_bytes(b"edgert-engine-1\n" + bytes(44))
    (path.parent / "other.engine").write_bytes(b"\xff" * 500)
    trt = device_backend(manifest, VARIANT, {})
    assert not trt.ready("cd" * 32)
    with pytest.raises(Incompatible, match="there is no engine"):
        trt.load(source())


def test_a_damaged_engine_never_reaches_the_library(backend, monkeypatch):
    path = published(fake_model.manifest(), VARIANT, "decode", b"engine of decode")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("edgert.backends.tensorrt.backend.load_engine", pytest.fail)
    with pytest.raises((Incompatible, BadFile), match="not built here by this user, or is damaged"):
        backend.load(source())


def test_what_the_library_refuses_it_says_itself(backend):
    published(fake_model.manifest(), VARIANT, "decode", b"of another build")
    with pytest.raises(Incompatible, match="does not take the engine of graph 'decode'") as caught:
        backend.load(source())
    assert "plan->header.size == blobSize failed" in (caught.value.where or "")


def test_a_step_that_no_shape_profile_takes_names_the_input():
    """A chunk of 513 tokens; the profiles of an Orin end at 512."""
    with decoder() as model:
        execution = model.runner.open(tokens=600)
        with pytest.raises(Incompatible, match="no shape profile of the engine") as caught:
            execution.io(513)
    assert "shape profile 0: ids is 1x513, of 1x1 to 1x512" in (caught.value.where or "")
    assert "larger shape profiles" in (caught.value.do or "")


def test_an_engine_of_other_ports_is_refused(backend):
    graph = backend.load(source())
    buffers = {n: backend.allocate("int64", (1, 1)) for n in ("ids", "select", "kept")}
    buffers["lens"] = backend.allocate("int32", (1,))
    with pytest.raises(Incompatible, match="its manifest differ: kept_next, lens, logits, token"):
        graph.bind(buffers, {})


def test_a_failed_step_is_an_error_with_the_librarys_words(backend, monkeypatch):
    def fails(self: Any, stream_handle: int) -> bool:
        self._log.log("error", "Cask error\nin launch")
        return False

    monkeypatch.setattr("fake_trt.FakeContext.execute_async_v3", fails)
    bundle = Bundle(Path("fake"), fake_model.manifest())
    model = Model(bundle, Runner(bundle, VARIANT, backend))
    with pytest.raises(DeviceFailed, match="graph 'decode' failed in a step") as caught:
        model.generate(PROMPT)
    assert "Cask error in launch" in (caught.value.where or "")


def test_an_engine_is_part_of_what_decides_the_bits():
    """A rebuilt engine may round otherwise: a session that is resumed with it is told."""
    with decoder() as one:
        first = dict(one.runner.backend.build)
    path = published(fake_model.manifest(), VARIANT, "decode", b"engine of decode")
    path.unlink()
    assert first["backend"] == "tensorrt 10.3.0"
    assert first["machine"] == "SM 8.7"
    assert len(first["engine.decode"]) == 16
