#!/usr/bin/env python3
"""Record what the Python modules of TensorRT offer, version by version, from the real bindings.

    python scripts/record_trt_api.py            writes tests/trt_api.json

The bindings are small wheels on PyPI; the libraries they are linked with are not. So a library that
defines the ten functions they ask for, and calls none of them, takes the place of all three: then
the module loads, and its classes and enumerations can be listed. TensorRT-RTX is installed whole,
and is asked which operators its parser takes.

Needs pip, a C compiler, onnx, and a Python that the oldest bindings have wheels for (3.8 to 3.12).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "tests" / "trt_api.json"
BINDINGS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.16": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4": "tensorrt-cu12-bindings==11.4.0.106",
}
RTX = "1.7.1.116"
CLASSES = (
    *("Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "IHostMemory"),
    *("OnnxParser", "ParserError", "ITensor", "ILayer", "ITimingCache", "ILogger"),
    *("IProgressMonitor", "Runtime", "ICudaEngine", "IExecutionContext"),
    *("IAttention", "IAttentionInputLayer"),
)
ENUMS = (
    *("DataType", "ErrorCode", "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag"),
    *("ProfilingVerbosity", "TensorIOMode", "TensorLocation", "ComputeCapability"),
    "ExecutionContextAllocationStrategy",
)
"""What a builder and a runtime touch. A class that a version lacks is left out of its record."""

LIST = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
shown = lambda thing: sorted(name for name in dir(thing) if not name.startswith("_"))
found = {"version": module.__version__, "module": shown(module)}
for name in sys.argv[3].split():
    if hasattr(module, name):
        found[name] = shown(getattr(module, name))
found["ILogger.Severity"] = shown(module.ILogger.Severity)
if len(sys.argv) > 4:
    class Quiet(module.ILogger):
        def __init__(self):
            module.ILogger.__init__(self)
        def log(self, severity, message):
            pass
    import onnx
    quiet = Quiet()
    flag = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    parser = module.OnnxParser(module.Builder(quiet).create_network(flag), quiet)
    names = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    found["operators"] = sorted(name for name in names if parser.supports_operator(name))
print(json.dumps(found))
"""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def bindings(requirement: str, work: Path) -> dict[str, object]:
    """The members of one version, read off the module itself."""
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), requirement)
    (wheel,) = work.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(work)
    module = work / "tensorrt_bindings" / "tensorrt.so"
    needed = re.findall(r"\[(libnv[^\]]+)\]", run("readelf", "-d", str(module)))
    symbols = run("nm", "-D", "--undefined-only", str(module))
    asked = re.findall(r" U ((?:create|get|init)\w+)$", symbols, re.MULTILINE)
    source = work / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in asked))
    for name in needed:
        library = work / name
        run("cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(library), str(source))
    loaded = f"import ctypes\nfor p in {[str(work / n) for n in needed]}: ctypes.CDLL(p)\n" + LIST
    return json.loads(
        run(sys.executable, "-c", loaded, str(work), "tensorrt_bindings", " ".join(CLASSES + ENUMS))
    )


def rtx(work: Path) -> dict[str, object]:
    parts = [f"tensorrt-rtx-cu12{part}=={RTX}" for part in ("", "-libs", "-bindings")]
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(work)),
        *parts,
    )
    names = " ".join(CLASSES + ENUMS)
    return json.loads(run(sys.executable, "-c", LIST, str(work), "tensorrt_rtx", names, "ops"))


def main() -> None:
    found = {}
    for version, requirement in BINDINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[version] = bindings(requirement, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        found["rtx-1.7"] = rtx(Path(folder))
    OUT.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    for version, members in found.items():
        print(version, members["version"], len(members["module"]), "names")


if __name__ == "__main__":
    main()
