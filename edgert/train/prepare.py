"""A recipe's text -> what a run trains on: shards, tokenizer, held-out text; and `run.json`.

run.json      recipe as parsed, hashes of all data; written last: without it nothing is there
data/         shards, and tokenizer.json unless the tokenizer is plain bytes
heldout.txt   the text that is not trained on
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BadFile, BadTokenizer, MissingDependency, UsageError
from edgert.evaluate import parts
from edgert.files import sha256_file, write_atomic
from edgert.models.importers.assets import read_text, read_tokenizer
from edgert.models.importers.common import shown
from edgert.progress import Reporter
from edgert.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from edgert.train import corpus as corpora
from edgert.train.corpus import Corpus, Document
from edgert.train.data import LIMIT, Tokens, open_shard, shard_paths, write_shards
from edgert.train.recipe import BYTE_OFFSET, BYTES, DataConfig, TrainRecipe

RUN = "run.json"
DATA = "data"
HELDOUT = "heldout.txt"
TOKENIZER = "tokenizer.json"
FORMAT = "edgert-run"
VERSION = 1
MAX_JSON = 16 << 20
HELDOUT_TOKENS = 1 << 20  # of a held-out shard that are evaluated

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Prepared:
    """What a run trains on.

    heldout  tokens of heldout.txt, int64 [T]; empty if nothing is held out
    lengths  bytes of text of each id, int64 [V]
    record   what run.json says of it
    """

    shards: list[Tokens]
    heldout: NDArray[np.int64]
    lengths: NDArray[np.int64]
    byte_offset: int | None
    tokenizer_json: str | None
    eos: int
    record: dict[str, Any]

    @property
    def tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)


def prepare(recipe: TrainRecipe, run: Path, reporter: Reporter) -> None:
    """Write everything of a new run but its checkpoints.

    Raises UsageError, BadFile, BadTokenizer naming the file, EdgertError if the disk refuses.
    """
    temp = run / f".{DATA}.tmp"
    shutil.rmtree(temp, ignore_errors=True)
    shutil.rmtree(run / DATA, ignore_errors=True)
    temp.mkdir()
    if _told(recipe).shards is not None:
        tokenizer, json_text, eos = _tokenizer(recipe, None)
        text, record = _from_shards(recipe, tokenizer, eos)
    else:
        corpus = _corpus(recipe)
        split = corpora.split(corpus, _told(recipe).holdout)
        if not split.train:
            raise UsageError(
                "holding out leaves no text to train on", do="give more text, or a smaller holdout"
            )
        tokenizer, json_text, eos = _tokenizer(recipe, split.train)
        with reporter.stage("corpus", _words(corpus)):
            write_shards(temp, (_encoded(tokenizer, d.read()) for d in split.train), eos)
        text = split.heldout
        record = corpus.origin | {"bytes": corpus.size, "sha256": corpus.sha256()}
    if json_text is not None:
        write_atomic(temp / TOKENIZER, json_text.encode())
    temp.rename(run / DATA)
    write_atomic(run / HELDOUT, text.encode())
    value = {
        "format": FORMAT,
        "format_version": VERSION,
        "recipe": recipe.to_json(),
        "corpus": record,
        "eos": eos,
        "byte_offset": BYTE_OFFSET if json_text is None else None,
        "shards": {path.name: sha256_file(path) for path in _paths(recipe, run)},
        "heldout": {"sha256": sha256_file(run / HELDOUT), "bytes": len(text.encode())},
        "tokenizer": None if json_text is None else sha256_file(run / DATA / TOKENIZER),
    }
    write_atomic(run / RUN, (json.dumps(value, indent=1) + "\n").encode())


def read_run(run: Path) -> dict[str, Any]:
    """The content of run.json. Raises BadFile."""
    path = run / RUN
    try:
        value = json.loads(read_text(path, MAX_JSON, BadFile))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{RUN} is not JSON: {error}", where=str(path)) from error
    sound = (
        isinstance(value, dict)
        and value.get("format") == FORMAT
        and value.get("format_version") == VERSION
        and isinstance(value.get("recipe"), dict)
    )
    if not sound:
        raise BadFile(f"{RUN} is not one that this version writes", where=str(path))
    return dict(value)


def open_data(recipe: TrainRecipe, run: Path) -> Prepared:
    """What `prepare` has written, every file compared with its hash. Raises BadFile."""
    record = read_run(run)
    if not all(isinstance(record.get(key), dict) for key in ("shards", "heldout")) or (
        type(record.get("eos")) is not int
    ):
        raise BadFile(f"{RUN} does not say what the text is", where=str(run / RUN))
    names = record["shards"]
    paths = [path for path in _paths(recipe, run) if path.name in names]
    if {path.name for path in paths} != set(names):
        raise BadFile("shards are missing", where=str(run / RUN))
    for path in paths:
        check_file(path, names[path.name])
    check_file(run / HELDOUT, record["heldout"].get("sha256"))
    text = read_text(run / HELDOUT, corpora.MAX_FILE_BYTES, BadFile)
    json_text, offset = None, record.get("byte_offset")
    tokenizer: Tokenizer = ByteTokenizer(BYTE_OFFSET)
    if record.get("tokenizer") is not None:
        path = run / DATA / TOKENIZER
        check_file(path, record["tokenizer"])
        json_text, offset = read_tokenizer(path, recipe.model.vocab_size), None
        tokenizer = HFTokenizer(json_text.encode(), where=str(path))
    heldout = _encoded(tokenizer, text).astype(np.int64)
    if _told(recipe).holdout and len(heldout) < 2:
        raise UsageError(
            f"the held-out text has {len(heldout)} tokens, which leaves nothing to predict",
            where=str(run / HELDOUT),
            do="give more text, or a greater holdout (0: hold out nothing)",
        )
    lengths = [len(tokenizer.token_bytes(i)) for i in range(recipe.model.vocab_size)]
    return Prepared(
        shards=[open_shard(path) for path in paths],
        heldout=heldout,
        lengths=np.array(lengths, np.int64),
        byte_offset=offset,
        tokenizer_json=json_text,
        eos=record["eos"],
        record=record,
    )


def check_file(path: Path, expected: Any) -> None:
    """Raises BadFile if the file's SHA-256 is another."""
    if sha256_file(path) != expected:
        raise BadFile(
            "the data is not what this run was started with",
            where=str(path),
            do="put the file back, or start a new run",
        )


def _told(recipe: TrainRecipe) -> DataConfig:
    assert isinstance(recipe.data, DataConfig)
    return recipe.data


def _paths(recipe: TrainRecipe, run: Path) -> list[Path]:
    """The shards that are trained on."""
    data = _told(recipe)
    if data.shards is None:
        return shard_paths(run / DATA)
    paths = shard_paths(recipe.folder / data.shards)
    return paths[:-1] if data.holdout else paths


def _corpus(recipe: TrainRecipe) -> Corpus:
    path = _told(recipe).path
    return corpora.builtin() if path is None else corpora.from_path(recipe.folder / path)


def _words(corpus: Corpus) -> str:
    python = corpus.origin.get("python")
    name = f"standard library of Python {python}" if python else str(corpus.origin["corpus"])
    return f"{name}, {len(corpus.documents):,} texts, {corpus.size / 1e6:.1f} MB"


def _from_shards(recipe: TrainRecipe, tokenizer: Tokenizer, eos: int) -> tuple[str, dict[str, Any]]:
    """Check ready shards; the text of the last one, which is held out."""
    folder = recipe.folder / str(_told(recipe).shards)
    paths = shard_paths(folder)
    for path in paths:
        highest = int(open_shard(path).max())
        if highest >= recipe.model.vocab_size:
            raise BadFile(
                f"the shard holds token {highest}, the model has {recipe.model.vocab_size} entries",
                where=str(path),
                do="correct model.vocab_size, or the tokenizer",
            )
    text = ""
    if _told(recipe).holdout:
        if len(paths) < 2:
            raise UsageError(
                "the last shard is held out, and there is only one",
                where=str(folder),
                do="give more shards, or set holdout = 0",
            )
        ids = open_shard(paths[-1])[:HELDOUT_TOKENS]
        text = tokenizer.decode(ids[ids != eos].tolist())
    return text, {"corpus": "shards"}


def _tokenizer(
    recipe: TrainRecipe, train: tuple[Document, ...] | None
) -> tuple[Tokenizer, str | None, int]:
    """The tokenizer, its tokenizer.json unless it is plain bytes, and the id that ends a text."""
    data = _told(recipe)
    if data.tokenizer == BYTES:
        return ByteTokenizer(BYTE_OFFSET), None, 0
    if data.tokenizer is not None:
        path = recipe.folder / data.tokenizer
        text = read_tokenizer(path, recipe.model.vocab_size)
        where = str(path)
    else:
        assert train is not None, "shards come with their tokenizer"
        text, where = _learn_bpe(data.bpe, train), "the tokenizer of [data] bpe"
    return HFTokenizer(text.encode(), where=where), text, _end(text, data.eos, where)


def _end(text: str, wanted: str | None, where: str) -> int:
    from tokenizers import Tokenizer as Library

    vocab = Library.from_str(text).get_vocab(with_added_tokens=True)
    for name in [wanted] if wanted is not None else _ENDS:
        if name in vocab:
            return int(vocab[name])
    missing = "none of the customary tokens that end a text" if wanted is None else shown(wanted)
    raise BadTokenizer(
        f"the tokenizer has not {missing}" if wanted else f"the tokenizer has {missing}",
        where=where,
        do="name the token that ends a text: eos in [data]",
    )


def _learn_bpe(size: int, train: tuple[Document, ...]) -> str:
    """A byte-level BPE of at most `size` entries as tokenizer.json; id 0 ends a text."""
    try:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingDependency("tokenizers", "train", why="it learns a vocabulary") from error
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_ENDS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator((document.read() for document in train), trainer)
    return str(library.to_str())


def _encoded(tokenizer: Tokenizer, text: str) -> Tokens:
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + BYTE_OFFSET
    pieces = [np.array(ids, np.int64) for ids in _pieces(tokenizer, text)]
    ids = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    assert not len(ids) or ids.max() < LIMIT, "checked against the vocabulary"
    return ids.astype(np.uint16)


def _pieces(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    for part in parts(text):
        yield tokenizer.encode(part, special=False)
