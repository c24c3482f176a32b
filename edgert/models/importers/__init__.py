"""Other people's model files -> `Imported`: the decoder, its tokenizer, where it came from.

What a path holds is decided by its content, never by its name:

    HAGI checkpoint   a zip written by torch.save      published.py
    HRM checkpoint    the same, or a folder with all_config.yaml and step_<n>     hrm.py
    GGUF              architecture llama               gguf.py
    folder            config.json of `edgert train`, or a run's step-* folders    trained.py
    folder            config.json + safetensors        huggingface.py

docs/sources.md says what each of them may hold and what is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    settings: Mapping[str, Any] | None = None,
    dataset: Path | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Read a published model.

    context    positions to support, instead of the published number
    tokenizer  a tokenizer.json to use instead of the source's own
    settings   of a model that solves: config fields that its files lack, or that replace theirs
    dataset    of a model that solves: the dataset.json that it was trained with, or its folder

    Raises UsageError for a path that does not exist and for what does not go with the model,
    BadCheckpoint or BadTokenizer for a broken file, UnsupportedModel for a sound one that asks for
    what is not implemented, MissingDependency.
    """
    importer = _importer(path)
    solves = importer.__name__.endswith(".hrm")
    _refuse(
        path,
        solves,
        {"a context": context, "a tokenizer": tokenizer},
        {"settings": settings, "a data set": dataset},
    )
    if solves:
        found = importer.load(path, settings=settings, dataset=dataset, progress=progress)
    else:
        found = importer.load(path, context=context, progress=progress)
    imported: Imported = found
    if tokenizer is None:
        return imported
    text = read_tokenizer(tokenizer, imported.model.config.vocab_size)
    provenance = imported.provenance | {"tokenizer": tokenizer.name}
    notes = tuple(note for note in imported.notes if "--tokenizer" not in note)
    return replace(imported, tokenizer_json=text, provenance=provenance, notes=notes)


def _refuse(
    path: Path, solves: bool, of_text: Mapping[str, Any], of_puzzles: Mapping[str, Any]
) -> None:
    """Raise UsageError for what was given and means nothing to this kind of checkpoint."""
    given = [name for name, value in (of_text if solves else of_puzzles).items() if value]
    if not given:
        return
    why = (
        "this model solves puzzles: it has a fixed number of cells, and no text"
        if solves
        else "only checkpoints of models that solve puzzles can lack what it says"
    )
    raise UsageError(f"{given[0]} was given, and {why}", where=str(path), do="leave it out")


def _importer(path: Path) -> Any:
    """The module that reads what a path holds."""
    from edgert.models.importers.hrm_file import is_hrm

    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UsageError(f"{error.strerror}: {path}", do=ACCEPTED) from error
    if is_folder:
        from edgert.models.importers import hrm, huggingface, trained

        if trained.recognised(path):
            return trained
        return hrm if is_hrm(path) else huggingface
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

        return gguf
    if magic == _ZIP:
        from edgert.models.importers import hrm, published

        return hrm if is_hrm(path) else published
    do = ACCEPTED
    if path.name.endswith(".safetensors"):
        do = "give the folder that holds it together with its config.json"
    raise BadCheckpoint("not a model file that is known here", where=str(path), do=do)
