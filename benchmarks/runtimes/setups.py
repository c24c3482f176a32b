"""The sides of the comparison: what each takes to be set up, and how its worker is called.

edgert-<precision>                  as `edgert export` makes it; with `-mapped` behind it,
                                        weights stay in the mapped file
edgert-int4-lean                    of the recipe with the fewest bytes: no matrix in 8 bits,
                                        keys and values in int8
genai-{fp32,int8,int4}              ONNX Runtime GenAI, by its own builder with its defaults
llama-{f32,q8_0,q4_0,q4_1}          llama.cpp compiled for this processor, by its own quantizer
openvino-{int8,int4}                OpenVINO GenAI, from llama.cpp's Q8_0 and Q4_0
torch-{eager,compile}               transformers in float32
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgert.bundle import Bundle
from edgert.errors import EdgertError, UsageError
from edgert.export.write import weights_id
from edgert.machine import instruction_set
from edgert.model import choose_variant
from edgert.models.importers import load_source
from runtimes.weights import (
    gguf_bytes,
    kv_values,
    onnx_bytes,
    source_file,
    write_float_gguf,
    write_model_folder,
)
from runtimes.workshop import Workshop, foreign_environment, own_environment, run

GENAI, LLAMA, OPENVINO = "0.18.0", "0.3.36", "2026.4.1"
GENAI_MIXED = "k_quant_mixed"

# The native build has every vector extension of this processor; what only llama.cpp's programs
# need is left out.
CMAKE = ("GGML_NATIVE=ON", "LLAVA_BUILD=OFF", "LLAMA_BUILD_TOOLS=OFF", "LLAMA_BUILD_EXAMPLES=OFF")
CMAKE += ("LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_SERVER=OFF", "LLAMA_OPENSSL=OFF")
# Its products by AMX crash with this model (0.3.36, in ggml_backend_amx_mul_mat).
LLAMA_BUILD = "native"
if "amx_int8" in instruction_set():
    LLAMA_BUILD += " without AMX"
    CMAKE += ("CMAKE_C_FLAGS=-mno-amx-int8", "CMAKE_CXX_FLAGS=-mno-amx-int8")
JOBS = 2


PROFILES = ("", "mapped", "lean")


@dataclass(frozen=True)
class Bundles:
    """ladder: every precision that is asked for. lean: the fewest bytes; None if not asked for."""

    ladder: Path
    lean: Path | None = None


@dataclass(frozen=True)
class Side:
    """One runtime with one model. `bits` of most weights: sides of equal bits are compared."""

    name: str
    bits: int
    about: str  # the runtime's name and version
    weight_bytes: int  # that a decode step reads
    kv_bytes: int  # that it reads of each position before it
    python: str
    orders: dict[str, Any]
    env: Mapping[str, str] = field(repr=False)

    @property
    def runtime(self) -> str:
        return self.name.partition("-")[0]

    def facts(self) -> dict[str, Any]:
        """What a report needs to know."""
        kept = ("name", "bits", "about", "weight_bytes", "kv_bytes")
        return {key: getattr(self, key) for key in kept}


def edgert(shop: Workshop, variant: str, bundles: Bundles) -> Side:
    precision, _, profile = variant.partition("-")
    if profile not in PROFILES:
        raise UsageError(
            f"edgert-{variant}: {profile!r} is no profile", do="'mapped', 'lean', or none"
        )
    bundle = bundles.lean if profile == "lean" else bundles.ladder
    assert bundle is not None, "made where its side is asked for"
    manifest = Bundle.open(bundle, False).manifest
    if manifest.weights_id != shop.expected:
        raise UsageError("the bundle holds other weights than its neighbour", where=str(bundle))
    try:
        name = choose_variant(manifest, "cpu", precision, "ort")
    except EdgertError as error:
        raise UsageError(f"no variant in {precision}: {error}", where=str(bundle)) from error
    files = {graph.file for graph in manifest.variants[name].graphs.values()}
    orders = {"model": str(bundle), "precision": precision, "prepack": profile != "mapped"}
    return Side(
        name=f"edgert-{variant}",
        bits=int("".join(c for c in precision if c.isdigit())),
        about=f"edgert {version('edgert')}, ONNX Runtime {version('onnxruntime')}",
        weight_bytes=sum(onnx_bytes(bundle / file) for file in files),
        kv_bytes=(1 if manifest.kv_of(name) == "int8" else 4) * kv_values(shop.config),
        python=sys.executable,
        orders=orders | {"runtime": "edgert", "margins": precision == "fp32"},
        env=own_environment(),
    )


def export_bundle(
    cache: Path, source: Path, precisions: str | None, say: Callable[[str], None]
) -> Path:
    """A bundle made by `edgert export` as it is now, in what the recipe says or these precisions:
    another one where its code has changed."""
    import edgert as package

    home = Path(package.__file__).parent
    digest = hashlib.sha256(source.read_bytes())
    for path in sorted(
        [*home.glob("*.py"), *home.glob("export/*.py"), *home.glob("models/**/*.py")]
    ):
        digest.update(path.read_bytes())
    asked = ["--precision", precisions] if precisions else []
    name = "-".join([source.stem, *asked[1:], digest.hexdigest()[:12]]).replace(",", "-")
    bundle = cache / "bundles" / name
    if not (bundle / "manifest.json").is_file():
        say(f"exporting {name} (some minutes)")
        log = bundle.with_name(f"{name}.log")
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "edgert", "export", str(source), "-o", str(bundle)]
        run([*command, *asked, "--lowering", "ort"], log, dict(os.environ))
    return bundle


def genai(shop: Workshop, variant: str) -> Side:
    precision, _, mixed = variant.partition("-")
    extra = ["--extra_options", f"algo_config={GENAI_MIXED}"] if mixed else []
    ort = version("onnxruntime")
    packages = (f"onnxruntime-genai=={GENAI}", f"onnxruntime=={ort}", "numpy")
    python = shop.environment(f"genai-{GENAI}-ort-{ort}", packages)
    source = huggingface(shop)

    def build(folder: Path, log: Path) -> None:
        builder = ["-i", str(source), "-o", str(folder), "-c", str(folder.parent / "cache")]
        command = borrowing(python, "onnxruntime_genai.models.builder")
        offline = foreign_environment() | {"HF_HUB_OFFLINE": "1"}
        run([*command, *builder, "-p", precision, "-e", "cpu", *extra], log, offline)

    model = shop.model(f"genai-{GENAI}-{variant}", build, f"GenAI's builder makes {variant}")
    return Side(
        name=f"genai-{variant}",
        bits={"fp32": 32, "int8": 8, "int4": 4}[precision],
        about=f"ONNX Runtime GenAI {GENAI}, ONNX Runtime {ort}",
        weight_bytes=onnx_bytes(model / "model.onnx"),
        kv_bytes=4 * kv_values(shop.config),
        python=str(python),
        orders={"runtime": "genai", "model": str(model)},
        env=foreign_environment(),
    )


def llama(shop: Workshop, variant: str) -> Side:
    path = quantized(shop, variant)
    return Side(
        name=f"llama-{variant}",
        bits={"f32": 32, "q8_0": 8, "q4_0": 4, "q4_1": 4}[variant],
        about=f"llama.cpp of llama-cpp-python {LLAMA}, {LLAMA_BUILD}",
        weight_bytes=gguf_bytes(path),
        kv_bytes=2 * kv_values(shop.config),  # its default is float16
        python=str(llama_python(shop)),
        orders={"runtime": "llama", "model": str(path)},
        env=foreign_environment(),
    )


def openvino(shop: Workshop, variant: str) -> Side:
    packages = (f"openvino-genai=={OPENVINO}.0", f"openvino=={OPENVINO}", "numpy")
    python = shop.environment(f"openvino-{OPENVINO}", packages)
    source = quantized(shop, {"int8": "q8_0", "int4": "q4_0"}[variant])

    def read(folder: Path, log: Path) -> None:
        gguf = folder / "model.gguf"
        gguf.symlink_to(source)
        run([str(python), "-m", "runtimes.run_openvino", str(gguf)], log)
        gguf.unlink()

    model = shop.model(f"openvino-{OPENVINO}-{variant}", read, f"OpenVINO reads {source.name}")
    return Side(
        name=f"openvino-{variant}",
        bits=int(variant[3:]),
        about=f"OpenVINO GenAI {OPENVINO}",
        weight_bytes=(model / "openvino_model.bin").stat().st_size,
        kv_bytes=kv_values(shop.config),  # its default is 8 bits
        python=str(python),
        orders={"runtime": "openvino", "model": str(model)},
        env=foreign_environment(),
    )


def torch(shop: Workshop, variant: str) -> Side:
    orders = {"runtime": "torch", "model": str(huggingface(shop))}
    kernels = shop.cache / f"inductor-{version('torch')}"  # what it compiled, for the next process
    return Side(
        name=f"torch-{variant}",
        bits=32,
        about=f"torch {version('torch')}, transformers {version('transformers')}",
        weight_bytes=4 * sum(p.numel() for p in shop.imported.model.parameters()),
        kv_bytes=4 * kv_values(shop.config),
        python=sys.executable,
        orders=orders | {"compiled": variant == "compile"},
        env=own_environment() | {"TORCHINDUCTOR_CACHE_DIR": str(kernels)},
    )


def huggingface(shop: Workshop) -> Path:
    def write(folder: Path, log: Path) -> None:
        write_model_folder(shop.imported, folder)

    return shop.model("huggingface", write, "writing the weights as transformers has them")


def borrowing(python: Path, module: str) -> list[str]:
    """The command for a module of another environment, with our packages (torch, transformers)
    behind its own."""
    import sysconfig

    code = (
        "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    return [str(python), "-c", code, sysconfig.get_path("purelib"), module]


def llama_python(shop: Workshop) -> Path:
    """llama-cpp-python, compiled for the instructions of this processor."""
    kind = hashlib.sha256(" ".join([instruction_set(), *CMAKE]).encode()).hexdigest()[:8]

    def compile_wheel(folder: Path, log: Path) -> None:
        tuned = {
            "CMAKE_ARGS": " ".join(f"-D{option}" for option in CMAKE),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(JOBS),
        }
        pip = ["nice", "-n", "10", sys.executable, "-m", "pip", "wheel", "-v", "--no-deps"]
        plain = ["--no-cache-dir", "--no-binary", "llama-cpp-python", "-w", str(folder)]
        env = foreign_environment() | tuned
        run([*pip, *plain, f"llama-cpp-python=={LLAMA}"], log, env)

    name = f"wheels/llama-{LLAMA}-{kind}"
    wheels = shop.made(name, compile_wheel, f"compiling llama.cpp ({LLAMA}, 10 to 20 minutes)")
    (wheel,) = wheels.glob("*.whl")
    return shop.environment(f"llama-{LLAMA}-{kind}", [str(wheel)])


def quantized(shop: Workshop, kind: str) -> Path:
    """The weights in a GGUF file: float32, or what llama.cpp's quantizer makes of that."""

    def write(folder: Path, log: Path) -> None:
        path = folder / "model.gguf"
        write_float_gguf(source_file(shop.source), path)
        found = weights_id(load_source(path).model)
        if found != shop.expected:
            raise EdgertError(f"the GGUF file holds other weights: {found[:16]}", where=str(path))

    def quantize(folder: Path, log: Path) -> None:
        command = [str(llama_python(shop)), "-m", "runtimes.run_llama"]
        run([*command, str(source), str(folder / "model.gguf"), kind], log)

    source = shop.model("llama-f32", write, "writing the weights as a GGUF file") / "model.gguf"
    if kind == "f32":
        return source
    made = shop.model(f"llama-{LLAMA}-{kind}", quantize, f"llama.cpp's quantizer makes {kind}")
    return made / "model.gguf"


VARIANTS: dict[str, tuple[Callable[[Workshop, str], Side], tuple[str, ...]]] = {
    "genai": (genai, ("fp32", "int8", "int4", "int4-mixed")),
    "llama": (llama, ("f32", "q8_0", "q4_0", "q4_1")),
    "openvino": (openvino, ("int8", "int4")),
    "torch": (torch, ("eager", "compile")),
}
PEERS = tuple(f"{name}-{variant}" for name, (_, kinds) in VARIANTS.items() for variant in kinds)


def set_up(shop: Workshop, name: str, bundles: Bundles) -> Side:
    """A side by its name. Raises EdgertError or OSError with the reason why it is not to be had."""
    runtime, _, variant = name.partition("-")
    if runtime == "edgert":
        return edgert(shop, variant, bundles)
    return VARIANTS[runtime][0](shop, variant)
