"""What the backend uses of TensorRT and CUDA is in every version of them that it is for."""

from __future__ import annotations

import ast
from typing import get_args

import fake_trt
import pytest
from api_gate import CUDA, TRT, called, strange, tree_of, uses

from edgert.backends.tensorrt import cuda, engine, log
from edgert.backends.tensorrt.cuda import CudaBindings, Direction
from edgert.backends.tensorrt.engine import HOLDS

LATER = {"get_aliased_input_tensor"}
"""From 10.15 on; asked for by name, and not missed."""


@pytest.mark.parametrize("version", TRT)
def test_every_member_that_is_used_is_in_every_version(version):
    used = [*uses(tree_of(engine), HOLDS), *uses(tree_of(log), {})]
    members = TRT[version]
    wrong = [
        f"line {line}: {owner}.{name}"
        for owner, name, line in used
        if name not in members.get(owner, ()) and (owner, name) != ("ILogger", "__init__")
    ]
    assert not wrong
    assert {owner for owner, _, _ in used} >= {"module", "ILogger.Severity", *HOLDS.values()}


def test_every_object_of_the_library_is_known_by_its_name():
    ours = "DTYPES dtypes found math name np port ports profile profiles self shapes"
    assert not strange(tree_of(engine), HOLDS, ours)
    assert called(tree_of(engine)) == set()
    assert called(tree_of(log)) == {"str(message).split"}


def test_later_members_are_asked_for_by_name():
    """And the record says in which versions they are."""
    constants = {n.value for n in ast.walk(tree_of(engine)) if isinstance(n, ast.Constant)}
    assert constants >= LATER
    assert [v for v in TRT if set(TRT[v]["ICudaEngine"]) >= LATER] == ["10.16", "11.4", "rtx-1.7"]


@pytest.mark.parametrize(
    ("stand_in", "real"),
    [
        (fake_trt.FakeRuntime, "Runtime"),
        (fake_trt.FakeEngine, "ICudaEngine"),
        (fake_trt.FakeContext, "IExecutionContext"),
    ],
)
def test_the_stand_ins_have_nothing_that_the_library_lacks(stand_in, real):
    names = {name for name in vars(stand_in) if not name.startswith("_")}
    assert names <= set(TRT["10.3"][real])


def cuda_uses() -> set[tuple[str, str]]:
    """('module' or an enumeration, name) of what is taken from cuda-bindings."""
    found = set()
    for node in ast.walk(tree_of(cuda)):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if text.startswith("self._cuda."):
            owner, _, name = text.removeprefix("self._cuda.").rpartition(".")
            found.add((owner or "module", name))
        elif text.startswith("which."):
            found.add(("cudaDeviceAttr", text.removeprefix("which.")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._ask":
            assert isinstance(node.args[0], ast.Constant)
            found.add(("module", node.args[0].value))
    return found | {("cudaMemcpyKind", f"cudaMemcpy{way}") for way in get_args(Direction)}


@pytest.mark.parametrize("version", CUDA)
def test_every_call_is_in_every_version_of_cuda_bindings(version):
    used = cuda_uses()
    assert not {(owner, name) for owner, name in used if name not in CUDA[version][owner]}
    assert len([name for owner, name in used if owner == "module" and name[4].isupper()]) >= 20


# ------------------------------------------------- the real package, where it is installed

CALLS = {
    "devices": (),
    "capability": (),
    "stream": (),
    "sync": (1,),
    "end_stream": (1,),
    "malloc": (4,),
    "free": (256,),
    "host_alloc": (4,),
    "host_free": (256,),
    "copy": ((256, 4), (512, 4), 4, 1, "DeviceToDevice", 1),
    "fill": (256, 0, 4, 1),
    "begin_capture": (1,),
    "end_capture": (1,),
    "launch": (1, 1),
    "end_captured": (1,),
    "follow": (1, 2),
}


def test_the_interface_is_called_whole():
    assert CALLS.keys() == {n for n in vars(cuda.Cuda) if not n.startswith("_")}


@pytest.mark.parametrize("name", CALLS)
def test_the_real_calls_take_what_they_are_given_and_say_that_there_is_no_driver(name):
    """Without a driver every one gives error 35: arguments of the wrong kind would fail before."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    real = CudaBindings()
    with pytest.raises(cuda.EdgertError) as caught:
        getattr(real, name)(*CALLS[name])
    assert caught.value.exit_code == 4, "a device is here: this test is for machines without"
    assert "cudaErrorInsufficientDriver (35)" in (caught.value.where or "")
