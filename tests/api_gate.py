"""What a module uses of a library that is not here, read off its source with `ast`."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRT: dict[str, Any] = json.loads((HERE / "trt_api.json").read_text(encoding="utf-8"))
"""Members by version, recorded from the real modules by scripts/record_trt_api.py."""
CUDA: dict[str, Any] = json.loads((HERE / "cuda_api.json").read_text(encoding="utf-8"))
"""The same of cuda-bindings, by scripts/record_cuda_api.py."""


def tree_of(module: Any) -> ast.Module:
    return ast.parse(Path(module.__file__).read_text(encoding="utf-8"))


def uses(tree: ast.Module, holds: dict[str, str]) -> list[tuple[str, str, int]]:
    """(class or 'module', member, line) of each attribute that is taken from the library.

    holds  name of a variable -> class of the library's object that it holds; `trt` is the module
    """
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id == "trt":
            found.append(("module", node.attr, node.lineno))
        elif isinstance(owner, ast.Name) and owner.id in holds:
            found.append((holds[owner.id], node.attr, node.lineno))
        elif isinstance(owner, ast.Attribute) and ast.unparse(owner).startswith("trt."):
            found.append((ast.unparse(owner).removeprefix("trt."), node.attr, node.lineno))
    return found


def strange(tree: ast.Module, holds: dict[str, str], ours: str) -> set[str]:
    """Attributes of variables that are neither the library's nor, in words, `ours`."""
    known = holds.keys() | {*ours.split(), "trt"}
    return {
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id not in known
    }


def called(tree: ast.Module) -> set[str]:
    """Attributes of what a call gives back, which has no name that would say what it is."""
    return {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call)
    }
