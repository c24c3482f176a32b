"""Targets of the runtime: what a device reads."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import bytes_like, change_bytes, json_like, scalars, values_like
from target import Target, through_file

from edgert.errors import EdgertError


def manifest(folder: Path) -> Target:
    """manifest.json, its wiring and its identities."""
    from bundles import tiny_bundle

    from edgert.bundle import check_wiring, seal
    from edgert.manifest import manifest_from_bytes
    from edgert.sampler import SamplingParams

    seed = (tiny_bundle(folder) / "manifest.json").read_bytes()

    def read(data: bytes) -> None:
        found = manifest_from_bytes(data, "manifest.json")
        check_wiring(found)
        seal(found)
        SamplingParams.from_mapping(found.sampling)

    return Target([seed], json_like([json.loads(seed)]), read)


def onnx(folder: Path) -> Target:
    """The bounded walk through a graph file."""
    from bundles import tiny_model
    from small_onnx import small_model

    from edgert.onnxfile import read_onnx_facts

    seeds = [model.SerializeToString() for model in (small_model(), tiny_model())]
    return Target(seeds, bytes_like(seeds), through_file(folder / "graph.onnx", read_onnx_facts))


def onnxedit(folder: Path) -> Target:
    """Our kernels put into a graph file: what comes out is walked through again."""
    from small_onnx import small_model
    from test_kernels import GATE, attention, rowwise

    from edgert.kernels import substituted
    from edgert.onnxfile import read_onnx_facts

    gate = rowwise(GATE, {"x": 3}, {"y": 3})
    models = (gate, attention(4, 2, 16, do_rotary=1), small_model())
    seeds = [model.SerializeToString() for model in models]
    edited = folder / "edited.onnx"

    def read(path: Path) -> None:
        data = substituted(path)
        facts = read_onnx_facts(path)
        if data is None:
            return
        edited.write_bytes(data)
        try:
            after = read_onnx_facts(edited)
        except EdgertError as error:
            raise AssertionError(f"a sound file was spoilt: {error}") from error
        assert (after.inputs, after.external) == (facts.inputs, facts.external)

    return Target(seeds, bytes_like(seeds), through_file(folder / "graph.onnx", read))


def tokenizer(folder: Path) -> Target:
    """tokenizer.json at run time: loaded, asked about itself, used in both directions."""
    from tiny_decoder import tokenizer_json
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    from edgert.tokenizer import HFTokenizer

    library = Library(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("b", -2.0)], 0, False))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>"])
    small = json.loads(tokenizer_json())
    # 256 letters are more than a change needs to find its way
    vocab = small["model"]["vocab"]
    small["model"]["vocab"] = {k: v for k, v in vocab.items() if v < 12 or k in "thesar\u0120enth"}
    small["model"]["merges"] = []
    seeds = [small, json.loads(library.to_str())]

    def read(data: bytes) -> None:
        tokenizer = HFTokenizer(data)
        assert tokenizer.vocab_size >= 0
        assert all(isinstance(text, str) for text in tokenizer.specials)
        for special in (True, False):
            ids = tokenizer.encode("a the <unk> b\u00e9", special=special)
            tokenizer.decode(ids)
            stream = tokenizer.detokenizer()
            for token in [*ids[:8], 0, 3, 2**31]:
                stream.push(token)
            stream.flush()
            for token in ids[:8]:
                tokenizer.token_bytes(token)

    return Target([json.dumps(seed).encode() for seed in seeds], json_like(seeds), read)


PIECES = (
    """
{{ messages }}|{{ messages[0].content }}|{{ messages|length }}|{{ x }}|{{ bos_token * 3 }}|a
{% for m in messages %}|{% endfor %}|{% for i in range(9) %}|{% if add_generation_prompt %}
{% endif %}|{% else %}|{% set ns = namespace(a=[]) %}|{% set ns.a = [ns.a, ns.a] %}
{% set ns.a = ns.a + [1] %}|{% set ns.a = ns.a * 1000 %}|{{ ns.a == ns.a }}|{{ ns.a in [ns.a] }}
{{ ns.a|tojson }}|{{ ns.a|string|length }}|{{ ns.a|sort|unique|list|length }}|{% break %}
{{ messages|map(attribute='role')|join(', ') }}|{{ messages|selectattr('role')|list }}
{{ 'a' * 10 ** 9 }}|{{ 2 ** 2 ** 9 }}|{{ '%s' % x }}|{{ ''.__class__.__mro__ }}|{{ x.y.z }}
{{ 'a'.replace('a', 'b' * 100) }}|{{ 'a'.format(1) }}|{{ range(10 ** 6)|list|length }}
{% macro f(a) %}|{% endmacro %}|{{ f(1) }}|{{ raise_exception('no') }}|{{ strftime_now('%Y') }}
{% include 'a' %}|{% set t = (1, 2) %}|{% set t = (t, t) %}|{{ {t: 1}[t] }}|{{ dict(a=t).items() }}
{% generation %}|{% endgeneration %}|{{ loop.index }}|{{ cycler(1, 2).next() }}|{{ 1 // 0 }}
{{ messages|dictsort }}|{{ 'x'|indent(9, true) }}|{{ messages[0]|items|list }}|{# c #}|{{ 'a' ~ x }}
{{ messages[::-1] }}|{% set messages = messages + messages %}|{{ eos_token|upper|trim|title }}
""".strip()
    .replace("\n", "|")
    .split("|")
)


def chat(folder: Path) -> Target:
    """Chat templates: pieces of templates in any order, and changed text of sound ones."""
    from tiny_decoder import TEMPLATE

    from edgert.chat import render_chat, sandbox

    # The sandbox's own deadline: well before the one of these tests, and by a clock that neither
    # other processes nor other threads move.
    sandbox.MAX_SECONDS = 0.5
    sandbox.time = SimpleNamespace(monotonic=time.thread_time)  # type: ignore[assignment]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    seeds = [
        TEMPLATE,
        "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
    ]

    def changed(draw: Any, seed: str) -> str:
        return change_bytes(draw, seed.encode()).decode("utf-8", "replace")

    examples = st.one_of(
        st.lists(st.sampled_from(PIECES), max_size=16).map("".join),
        st.composite(lambda draw: changed(draw, draw(st.sampled_from(seeds))))(),
        st.composite(
            lambda draw: changed(draw, "".join(draw(st.lists(st.sampled_from(PIECES), max_size=6))))
        )(),
        st.text(max_size=40),
    )
    return Target(seeds, examples, lambda text: render_chat(text, messages, bos_token="<s>"))


def sampling(folder: Path) -> Target:
    """Sampling settings from a bundle and from the user."""
    from edgert.sampler import SamplingParams

    full = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "repetition_window": 4,
        "logit_bias": {"5": -1.0},
        "logprobs": 2,
        "seed": 1,
        "stream": 0,
        "stop": ["a"],
        "stop_tokens": [3],
        "ignore_eos": True,
        "deadline_ms": 1e3,
    }
    leaves = st.one_of(scalars(), st.integers())
    pair = st.tuples(values_like([full, {}], leaves), values_like([full, {}], leaves))
    examples = pair.filter(lambda two: all(isinstance(side, dict) for side in two))
    return Target([(full, full), ({}, {})], examples, lambda two: SamplingParams.from_mapping(*two))


def session(folder: Path) -> Target:
    """Session files: changed as they are, and changed with a seal that fits."""
    from edgert.sessionfile import read_session

    seed, contents, size = _sessions(folder)
    examples = st.one_of(
        bytes_like([seed], hot=size),
        contents,
        st.binary(max_size=64).map(lambda tail: _sealed(b"edgert-locked-1\n" + tail)),
    )
    return Target([seed], examples, through_file(folder / "a.session", read_session))


def locked(folder: Path) -> Target:
    """Encrypted session files, read with their key: changed outside, and changed inside."""
    from edgert.sessionfile import read_session
    from edgert.vault import Key, lock

    key = Key(bytes(range(32)), 1)
    seed, contents, _ = _sessions(folder)
    closed = lock(seed, key)
    examples = st.one_of(
        bytes_like([closed], hot=61),
        bytes_like([closed[:-32]], hot=61).map(_sealed),
        contents.map(lambda content: lock(content, key)),
        st.binary(max_size=300).map(lambda content: lock(content, key)),
    )
    read = through_file(folder / "a.session", lambda path: read_session(path, key))
    return Target([closed], examples, read)


def _sealed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


def _sessions(folder: Path) -> tuple[bytes, st.SearchStrategy[bytes], int]:
    """A sound session file, changed ones whose seal fits, and the bytes of its header."""
    from edgert.sampler import SamplingParams
    from edgert.sessionfile import BundleHint, Move, Request, SavedSession, write_session

    saved = SavedSession(
        bundle=BundleHint("tiny", "ab" * 32, "fp32-ort", "cd" * 32, "/b/tiny", "../tiny"),
        tokens=np.array([1, 2, 3], np.int64),
        states={
            "k.0": np.ones((1, 1, 3, 2), np.float32),
            "flag": np.array([True]),
            "lens": np.array([3], np.int64),
        },
        capacity=8,
        pending=(np.array([0.5, 0.25], np.float32), 0),
        guess=(2, 3),
        record=(1, 0, 255),
        request=Request(SamplingParams(seed=3, logit_bias={1: 0.5}, speculate=4), 1, 5, "length"),
        stream=1,
        place={"backend": "onnxruntime"},
        data={"room": [1, "a"]},
        moves=(Move("int4-ort", "ef" * 32, "carried", 3, 0.5, 0.1, True, "2026-01-01"),),
        written_by="edgert",
        created="2026-01-01T00:00:00Z",
    )
    path = folder / "seed.session"
    write_session(path, saved)
    return _spoiled(path.read_bytes(), "session")


def solving(folder: Path) -> Target:
    """Files of puzzles that are being solved, changed as session files are."""
    from edgert.sessionfile import BundleHint
    from edgert.solvingfile import Answers, SavedSolving, Seats, read_solving, write_solving

    saved = SavedSolving(
        bundle=BundleHint("tiny", "ab" * 32, "fp32-ort", "cd" * 32, "/b/tiny", "../tiny"),
        ids=np.array([[1, 2], [3, 4], [5, 6]], np.int32),
        rows=np.zeros(3, np.int64),
        seats=Seats(
            index=np.array([-1, 1], np.int64),
            steps=np.array([0, 2], np.int64),
            totals=np.array([0, 0.5], np.float32),
            carry={"z": np.ones((1, 2, 3), np.float32)},
        ),
        answers=Answers(
            index=np.array([0], np.int64),
            steps=np.array([1], np.int64),
            halted=np.array([True]),
            ns=np.array([5], np.int64),
            results={"token": np.array([[1, 1]], np.int32)},
        ),
        waiting=2,
        policy="trained:0.0:1:4",
        batch=2,
        logits=False,
        iterations=3,
        ns=9,
        graph_ns=4,
        place={"backend": "onnxruntime"},
        written_by="edgert",
        created="2026-01-01T00:00:00Z",
    )
    path = folder / "seed.session"
    write_solving(path, saved)
    seed, contents, size = _spoiled(path.read_bytes(), "solving")
    examples = st.one_of(bytes_like([seed], hot=size), contents)
    return Target([seed], examples, through_file(folder / "a.session", read_solving))


def puzzles(folder: Path) -> Target:
    """Files of puzzles, as each task reads them."""
    from edgert.tasks import find
    from edgert.tasks.puzzlefile import read_questions

    tasks = [find(name) for name in ("sudoku-4x4", "maze-3x4", "arc-30x30")]
    seeds = [
        b"1...|..3.|.4..|...2\n",
        b"1...|..3.|.4..|...2,1324423124133142\n....|....|....|....\t1324423124133142\n",
        b"S..G\n....\n####\n\nS..G....####",
        b'{"train": [], "test": [{"input": [[1, 2]], "output": [[3]]}]}',
    ]

    def read(data: bytes) -> None:
        failures = []
        for task in tasks:
            try:
                list(read_questions(data, task, "file"))
            except EdgertError as error:
                failures.append(error)
        if len(failures) == len(tasks):
            raise failures[0]

    return Target(seeds, bytes_like(seeds), read)


def _spoiled(seed: bytes, kind: str) -> tuple[bytes, st.SearchStrategy[bytes], int]:
    """A sound file, changed ones whose seal fits, and the bytes of its header."""
    size = 8 + int.from_bytes(seed[:8], "little")
    table = json.loads(seed[8:size])
    inner = json.loads(table["__metadata__"][kind])

    def spelled(header: Any) -> bytes:
        """The file with this header, in the writer's spelling."""
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return _sealed(len(text).to_bytes(8, "little") + text + seed[size:-32])

    def with_inner(value: Any) -> bytes:
        text = json.dumps(value, separators=(",", ":"))
        return spelled(table | {"__metadata__": table["__metadata__"] | {kind: text}})

    assert with_inner(inner) == seed
    contents = st.one_of(
        bytes_like([seed[:-32]], hot=size).map(_sealed),
        values_like([table], scalars()).map(spelled),
        values_like([inner], scalars()).map(with_inner),
        values_like([inner], scalars()).map(with_inner),
    )
    return seed, contents, size


def parity(folder: Path) -> Target:
    """The gate's verdict, as `inspect` reads it from a bundle that may come from anywhere."""
    from edgert.cli.use import _parity

    check = {"variant": "fp32-ort", "name": "prefill", "logits_max_abs": 1e-5}
    seed = {"verdict": "pass", "truth": "eager torch", "checks": [check, check]}

    def read(data: bytes) -> None:
        through_file(folder / "parity.json", lambda path: _parity(path.parent))(data)

    return Target([json.dumps(seed).encode()], json_like([seed]), read)


def accuracy(folder: Path) -> Target:
    """What weights of few bits cost, as `inspect` reads it from a bundle, and as it prints it."""
    from edgert.cli.show import accuracy_lines
    from edgert.cli.use import _MEASURED, _accuracy

    variant = dict.fromkeys(_MEASURED, 1.25) | {"within_budget": True, "precision": "int8"}
    seed = {"format_version": 1, "variants": {"int8-ort": variant, "int4-ort": variant}}

    def read(data: bytes) -> None:
        found = through_file(folder / "accuracy.json", lambda path: _accuracy(path.parent))(data)
        "\n".join(accuracy_lines(found)).encode()

    return Target([json.dumps(seed).encode()], json_like([seed]), read)


def halting(folder: Path) -> Target:
    """The policy that a bundle's report recommends, of a loop over text or over a puzzle."""
    from edgert.exits import parse_exit
    from edgert.halting import REPORT, parse_halt
    from edgert.model import _recommended
    from edgert.spec import HaltSpec, LoopSpec

    loop = LoopSpec(4, {}, {}, "none", HaltSpec("q", 0.0, 1, cumulative=False))
    bundle = SimpleNamespace(
        root=folder,
        manifest=SimpleNamespace(reports=(REPORT,)),
        path=lambda name: folder / name,
    )

    def read(path: Path) -> None:
        try:
            _recommended(bundle, parse_halt)
        except EdgertError:
            _recommended(bundle, lambda text: parse_exit(text, loop))

    seeds = [
        {"format_version": 1, "model_id": "0" * 64, "recommended": text, "points": [{"exact": 1.0}]}
        for text in ("full", "settle:0.5:1:3", "fixed:2", "trained", "trained:0.5:1:2")
    ]
    return Target(
        [json.dumps(seed).encode() for seed in seeds],
        json_like(seeds),
        through_file(folder / REPORT, read),
    )
