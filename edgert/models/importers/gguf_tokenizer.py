"""The tokenizer inside a GGUF file -> a Hugging Face `tokenizer.json`.

Byte-level BPE only (`tokenizer.ggml.model` = gpt2), and of its pre-tokenizers those that are
checked against known ids. Anything else is left to a tokenizer file given by the user.

Sources  ggml-org/llama.cpp, src/llama-vocab.cpp (pre-tokenizers by name, token types);
         huggingface/tokenizers (the same pipelines in tokenizer.json)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgert.errors import BadTokenizer, EdgertError, MissingDependency
from edgert.models.importers.assets import Assets, checked_ids
from edgert.models.importers.common import shown

GIVE_ONE = "give a tokenizer.json with --tokenizer FILE"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    # tokenizer.ggml.pre -> the pipeline it names
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
}

_CONTROL, _USER_DEFINED = 3, 4


def read(keys: Mapping[str, Any], vocab_size: int, where: str) -> Assets:
    """Everything a GGUF file says about text.

    Raises BadTokenizer if what it says contradicts itself; a sound tokenizer of a kind that is not
    implemented is None with a note.
    """
    ids = {
        part: keys.get(f"tokenizer.ggml.{part}_token_id") for part in ("bos", "eos", "eot", "eom")
    }
    bos = checked_ids([ids["bos"]], vocab_size, "tokenizer.ggml.bos_token_id", where)
    eos = checked_ids(
        [ids["eos"], ids["eot"], ids["eom"]], vocab_size, "tokenizer.ggml.eos_token_id", where
    )
    template = keys.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise BadTokenizer(f"tokenizer.chat_template is {shown(template)}, not text", where=where)
    json, notes = _tokenizer(keys, vocab_size, bos[0] if bos else None, where)
    return Assets(json, template, bos[0] if bos else None, eos, notes)


def _tokenizer(
    keys: Mapping[str, Any], vocab_size: int, bos: int | None, where: str
) -> tuple[str | None, tuple[str, ...]]:
    model, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    if model is None:
        return None, (f"the file has no tokenizer: {GIVE_ONE}",)
    if model != "gpt2":
        return None, (f"tokenizers of the kind {shown(model)} are not converted: {GIVE_ONE}",)
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        return None, (f"the pre-tokenizer {shown(pre)} is not known: {GIVE_ONE}",)
    tokens, merges, types = (
        _array(keys, f"tokenizer.ggml.{part}", kind, where)
        for part, kind in (("tokens", str), ("merges", str), ("token_type", int))
    )
    if len(tokens) > vocab_size or len(set(tokens)) < len(tokens):
        raise BadTokenizer(
            f"tokenizer.ggml.tokens has {len(tokens)} entries, {len(set(tokens))} of them "
            f"different, for {vocab_size} embedding rows",
            where=where,
        )
    if types and len(types) != len(tokens):
        raise BadTokenizer(
            f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens",
            where=where,
        )
    kind = PRE_TOKENIZERS[pre]
    starts = keys.get("tokenizer.ggml.add_bos_token", kind == "llama3")
    ends = keys.get("tokenizer.ggml.add_eos_token", False)
    notes = ("tokenizer.ggml.add_eos_token is ignored: prompts are left open",) if ends else ()
    try:
        return _build(tokens, merges, types, kind, bos if starts else None, where), notes
    except BaseException as error:
        # The library's Rust panics derive from BaseException; they are no reason to die.
        own = isinstance(error, EdgertError) or not isinstance(error, Exception)
        if own and type(error).__name__ != "PanicException":
            raise
        raise BadTokenizer(
            f"the tokenizer of the file cannot be built: {shown(str(error))}",
            where=where,
            do=GIVE_ONE,
        ) from error


def _array(keys: Mapping[str, Any], key: str, kind: type, where: str) -> list[Any]:
    value = keys.get(key, [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise BadTokenizer(f"{key} is not a list of {kind.__name__}", where=where)
    return value


def _build(
    tokens: list[str], merges: list[str], types: list[int], kind: str, first: int | None, where: str
) -> str:
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        from tokenizers.processors import TemplateProcessing
    except ImportError as error:
        raise MissingDependency("tokenizers", "export", why="it holds the vocabulary") from error

    # A byte-level token never holds a real space, so the first one after the start divides.
    pairs = [(merge[: (at := merge.find(" ", 1))], merge[at + 1 :]) for merge in merges]
    known = set(tokens)
    for (left, right), merge in zip(pairs, merges, strict=True):
        if left not in known or right not in known or left + right not in known:
            raise BadTokenizer(
                f"tokenizer.ggml.merges has {shown(merge)}, which does not join two tokens "
                "into a third",
                where=where,
            )
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=kind == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    before: list[Any] = []
    if kind == "digits":
        before.append(pre_tokenizers.Digits(individual_digits=True))
    elif kind == "llama3":
        before.append(pre_tokenizers.Split(Regex(LLAMA3), "isolated"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    if first is not None and first < len(tokens):
        name = tokens[first]
        tokenizer.post_processor = TemplateProcessing(
            single=[name, "$A"], pair=[name, "$A", name, "$B:1"], special_tokens=[(name, first)]
        )
    added = [(token, kind) for token, kind in zip(tokens, types, strict=False)]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, t in added if t == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, t in added if t == _USER_DEFINED]
    )
    return _quickly_read(tokenizer.to_str())


def _quickly_read(text: str) -> str:
    """The same tokenizer with merges as "left right", which the library reads in two thirds of the
    time that ["left", "right"] take: most of what a small model's start waits for."""
    content = json.loads(text)
    merges = [f"{left} {right}" for left, right in content["model"]["merges"]]
    if all(merge.count(" ") == 1 for merge in merges):
        content["model"]["merges"] = merges
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
