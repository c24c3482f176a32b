#!/usr/bin/env python3
"""Record what cuda-bindings offers, version by version, from the real packages.

    python scripts/record_cuda_api.py           writes tests/cuda_api.json

They import without a driver. Needs pip, and a Python that all of them have wheels for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "tests" / "cuda_api.json"
PACKAGES = {
    "12.6": "cuda-python==12.6.2.post1",  # JetPack 6.1 and 6.2; a package of its own from 12.8 on
    "12.9": "cuda-bindings==12.9.*",
    "13.2": "cuda-bindings==13.2.*",  # JetPack 7.2
}
ENUMS = "cudaDeviceAttr cudaMemcpyKind cudaStreamCaptureMode"
LIST = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cuda.bindings import runtime
shown = lambda thing: sorted(name for name in dir(thing) if name.startswith("cuda"))
found = {"module": [name for name in shown(runtime)]}
for name in sys.argv[2].split():
    found[name] = shown(getattr(runtime, name))
print(json.dumps(found))
"""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def members(requirement: str) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "pip", "install", "-q", "--target", folder, requirement)
        return json.loads(run(sys.executable, "-c", LIST, folder, ENUMS))


def main() -> None:
    found = {version: members(requirement) for version, requirement in PACKAGES.items()}
    OUT.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    for version, names in found.items():
        print(version, len(names["module"]), "names")


if __name__ == "__main__":
    main()
