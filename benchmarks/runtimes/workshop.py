"""Where the benchmark makes things, each once: environments, wheels, models.

    <cache>/envs/<name>               a virtual environment; stamped with the packages it holds
    <cache>/wheels/<name>             what had to be compiled, for this processor
    <cache>/models/<weights>/<name>   the same weights in another format

Folders appear under their names only when they are whole; beside them is the log of their making.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from edgert.errors import EdgertError, UsageError
from edgert.export.write import weights_id
from edgert.files import write_atomic
from edgert.models.decoder import Decoder, DecoderConfig
from edgert.models.importers import Imported
from runtimes.weights import load

BENCHMARKS = Path(__file__).resolve().parents[1]
PYTHON = "py" + ".".join(platform.python_version_tuple()[:2])
TUNING = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_")

Say = Callable[[str], None]


UNCOMPILED = "PYTHONDONTWRITEBYTECODE"  # an installed package is compiled: so is each side's


def own_environment() -> dict[str, str]:
    """Our environment variables, without those that would set threads or kernels for a side."""
    dropped = (*TUNING, UNCOMPILED)
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)}


def foreign_environment() -> dict[str, str]:
    """The same without what would leak our packages into another interpreter."""
    kept = {k: v for k, v in own_environment().items() if not k.startswith(("PYTHON", "VIRTUAL_"))}
    return kept | {"ORT_DISABLE_TELEMETRY": "1"}


def run(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run in the folder of the benchmarks, all output into a file. Raises EdgertError that quotes
    the end of it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        code = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=BENCHMARKS,
            env=dict(foreign_environment() if env is None else env),
        ).returncode
    if code:
        tail = log.read_text(errors="replace").strip().splitlines()[-5:]
        name = " ".join(command[:4])
        raise EdgertError(
            f"{name} ... failed with code {code}:\n  " + "\n  ".join(tail), where=str(log)
        )


class Workshop:
    """source    GGUF file, model folder or recipe (*.toml) that edgert's bundle was exported from
    expected  the bundle's weights_id: every side must hold the same numbers
    """

    def __init__(self, cache: Path, source: Path, expected: str, say: Say) -> None:
        self.cache, self.source, self.expected, self.say = cache, source, expected, say

    @cached_property
    def imported(self) -> Imported:
        """The source. Raises UsageError if it holds other weights than the bundle."""
        imported = load(self.source)
        found = weights_id(imported.model)
        if found != self.expected:
            raise UsageError(
                f"{self.source} holds other weights ({found[:16]}) than the bundle "
                f"({self.expected[:16]})",
                do="give the source that the bundle was exported from: --source FILE",
            )
        return imported

    @property
    def config(self) -> DecoderConfig:
        model = self.imported.model
        if not isinstance(model, Decoder):
            raise UsageError("the peers take Llama-shaped models", where=str(self.source))
        return model.config

    def environment(self, name: str, packages: Sequence[str]) -> Path:
        """The interpreter of an environment that holds these packages."""
        folder = self.cache / "envs" / f"{name}-{PYTHON}"
        python, stamp = folder / "bin" / "python", folder / "stamp.json"
        wanted = json.dumps(list(packages)).encode()
        if not (stamp.is_file() and stamp.read_bytes() == wanted):
            self.say(f"installing {name}")
            log = folder.with_name(f"{folder.name}.log")
            log.unlink(missing_ok=True)
            run([sys.executable, "-m", "venv", "--clear", str(folder)], log)
            run([str(python), "-m", "pip", "install", *packages], log)
            write_atomic(stamp, wanted)
        return python

    def made(self, name: str, make: Callable[[Path, Path], None], note: str) -> Path:
        """A folder of the cache: there, or made by `make(folder, log)` after a note is said."""
        final = self.cache / name
        if not final.is_dir():
            self.say(note)
            final.parent.mkdir(parents=True, exist_ok=True)
            log = final.with_name(f"{final.name}.log")
            log.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=final.parent) as temp:
                work = Path(temp) / "work"
                work.mkdir()
                make(work, log)
                work.rename(final)
        return final

    def model(self, name: str, make: Callable[[Path, Path], None], note: str) -> Path:
        return self.made(f"models/{self.expected[:16]}/{name}", make, note)
