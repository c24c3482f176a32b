"""Other people's model files -> `Imported`: the decoder, its tokenizer, where it came from.

What a path holds is decided by its content, never by its name:

    HAGI checkpoint   a zip written by torch.save      published.py
    GGUF              architecture llama               gguf.py
    folder            config.json of `edgert train`, or a run's step-* folders    trained.py
    folder            config.json + safetensors        huggingface.py

docs/sources.md says what each of them may hold and what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgert.errors import BadCheckpoint, UsageError
from edgert.models.importers.assets import read_tokenizer
from edgert.models.importers.common import ACCEPTED, Imported, Progress
from edgert.models.importers.gguf_file import MAGIC

__all__ = ["Imported", "Progress", "load_source"]

_ZIP = b"PK\x03\x04"


def load_source(
    path: Path,
    *,
    context: int | None = None,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Read a published model.

    context    positions to support, instead of the published number
    tokenizer  a tokenizer.json to use instead of the source's own

    Raises UsageError for a path that does not exist, BadCheckpoint or BadTokenizer for a broken
    file, UnsupportedModel for a sound one that asks for what is not implemented,
    MissingDependency.
    """
    imported = _read(path, context, progress)
    if tokenizer is None:
        return imported
    text = read_tokenizer(tokenizer, imported.model.config.vocab_size)
    provenance = imported.provenance | {"tokenizer": tokenizer.name}
    notes = tuple(note for note in imported.notes if "--tokenizer" not in note)
    return replace(imported, tokenizer_json=text, provenance=provenance, notes=notes)


def _read(path: Path, context: int | None, progress: Progress | None) -> Imported:
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UsageError(f"{error.strerror}: {path}", do=ACCEPTED) from error
    if is_folder:
        from edgert.models.importers import huggingface, trained

        if trained.recognised(path):
            return trained.load(path, context=context, progress=progress)
        return huggingface.load(path, context=context, progress=progress)
    if not path.exists():
        raise UsageError(f"there is no file or folder {path}", do=ACCEPTED)
    if not path.is_file():
        raise BadCheckpoint("neither a file nor a folder", where=str(path), do=ACCEPTED)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadCheckpoint(f"the file cannot be read: {error}", where=str(path)) from error
    if magic == MAGIC:
        from edgert.models.importers import gguf

        return gguf.load(path, context=context, progress=progress)
    if magic == _ZIP:
        from edgert.models.importers import published

        return published.load(path, context=context, progress=progress)
    do = ACCEPTED
    if path.name.endswith(".safetensors"):
        do = "give the folder that holds it together with its config.json"
    raise BadCheckpoint("not a model file that is known here", where=str(path), do=do)
