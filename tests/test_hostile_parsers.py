"""What fuzzing and reading with bad intent found in the parsers: each stays found."""

from __future__ import annotations

import json
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_importers_gguf_file import ARRAY, STRING, gguf, key, opened, text
from test_importers_tokenizer import WHERE, metadata

from edgert.chat import render_chat, sandbox
from edgert.errors import (
    BadBundle,
    BadCheckpoint,
    BadTokenizer,
    MissingDependency,
    UnsupportedModel,
    UsageError,
)
from edgert.export.recipe import read_recipe
from edgert.models.importers import gguf_tokenizer, huggingface, load_source
from edgert.models.importers.gguf_file import MAX_ARRAY
from edgert.sampler import SamplingParams

TALK = [{"role": "user", "content": "hi"}]

# ------------------------------------------------- chat templates

GROWN = (
    "{% set n = namespace(a=[1], b=[1], t=(1,), u=(1,)) %}{% for i in range(60) %}"
    "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
)
LOOKS = [
    "{{ n.a == n.b }}",
    "{{ n.a < n.b }}",
    "{{ n.a in [n.b] }}",
    "{{ n.a in (range(9)|map(attribute='x', default=n.b)) }}",
    "{{ n.a is eq(n.b) }}",
    "{{ [n.a].index(n.b) }}",
    "{{ [1].index(n.a) }}",
    "{{ [n.a].count(n.b) }}",
    "{{ [n.a, n.b]|sort|length }}",
    "{{ [n.a, n.b]|max|length }}",
    "{{ range(9)|map(attribute='x', default=n.a)|reject('eq', n.b)|list|length }}",
    "{{ {1: n.a, 2: n.b}|dictsort(by='value')|length }}",
    "{{ n.a|upper|length }}",
    "{{ n.a|replace('a', 'b')|length }}",
    "{{ 'a'|replace(n.a, 'b') }}",
    "{{ 'a'.replace(n.a, 'b') }}",
    "{{ [1, 2]|join(n.a) }}",
    "{{ n.a[n.b].x }}",
    "{{ raise_exception(n.a) }}",
    "{% for i in [1, 2] %}{{ loop.changed(n.a) }}{% endfor %}",
    "{% for i in range(60) %}{% set n.t = (n.t, n.t) %}{% endfor %}{{ {n.t: 1}|length }}",
    "{% for i in range(60) %}{% set n.t = (n.t,) + (n.t,) %}{% endfor %}{{ {n.t: 1}|length }}",
]


@pytest.mark.parametrize("look", LOOKS)
def test_looking_into_a_grown_value_is_paid_for(look, monkeypatch):
    """A list that holds another twice, sixty times over, is small until it is looked into: to
    compare it, to hash it or to write it takes 2**60 steps."""
    monkeypatch.setattr(sandbox, "MAX_WORK", 2**16)
    with pytest.raises(BadTokenizer, match="it makes more than 65536 characters on the way"):
        render_chat(GROWN + look, TALK)


def test_growing_alone_is_harmless():
    """What does not look into a value costs nothing."""
    assert render_chat(GROWN + "{{ n.a|length }}{{ n.a|first|length }}{{ n.a is defined }}", TALK)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages|map(attribute='role')|unique|list }}", "['user']"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
        ("{{ 'user' in messages|map(attribute='role') }}", "True"),
        ("{{ {'b': 1, 'a': 2}.items()|sort|list }}", "[('a', 2), ('b', 1)]"),
        ("{{ x is defined }}{{ x|default('d') }}{{ messages is iterable }}", "FalsedTrue"),
        ("{{ {(1, 2): 'c'}[(1, 2)] }}{% set a, b = 1, 2 %}{{ a }}{{ b }}", "c12"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{{ messages[0].content in ('hi', 'ho') }}{{ messages[-1]['role'] }}", "Trueuser"),
        ("{{ 3 is divisibleby 3 }}{{ 1 < 2 < 3 }}{{ 'x'|indent(2, true) }}", "TrueTrue  x"),
    ],
)
def test_paying_changes_nothing(template, expected):
    """The meters between the parts of an expression hand on what they are given."""
    assert render_chat(template, TALK) == expected


def test_the_largest_template_compiles_in_time():
    """The cap on characters keeps the time that no deadline can interrupt within seconds."""
    before = time.process_time()
    with suppress(BadTokenizer):  # a slow or busy machine is past the deadline by then
        render_chat("{{a}}" * (2**17 // 5), TALK)
    assert time.process_time() - before < 2 * sandbox.MAX_SECONDS


# ------------------------------------------------- model files


def folder_with(path: Path, **files: Any) -> Path:
    path.mkdir()
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("name", [[], {}, ["default"], None, 1])
def test_templates_may_have_names_of_any_type(name, tmp_path):
    """Only the one called default counts."""
    templates = [{"name": name, "template": "a"}, {"name": "default", "template": "b"}, "c"]
    folder = folder_with(tmp_path / "m", tokenizer_config={"chat_template": templates})
    assert huggingface._template(folder) == "b"
    folder = folder_with(tmp_path / "n", tokenizer_config={"chat_template": templates[:1]})
    assert huggingface._template(folder) is None


def test_a_template_with_a_lone_surrogate_is_refused(tmp_path):
    """JSON can spell what is no text; writing the bundle would fail on it."""
    folder = folder_with(tmp_path / "m", tokenizer_config={"chat_template": "a\ud800"})
    with pytest.raises(BadTokenizer, match="chat_template has a lone surrogate") as caught:
        huggingface._template(folder)
    assert caught.value.where == str(folder / "tokenizer_config.json")
    assert caught.value.do is not None


@pytest.mark.parametrize("name", ["x" * 300, "é" * 130])
def test_a_shard_name_too_long_for_a_file_is_refused(name, tmp_path):
    """255 bytes is what file systems take; asking them is an error of theirs, not an answer."""
    index = {"weight_map": {"a": f"{name}.safetensors"}}
    folder = folder_with(tmp_path / "m", **{"model.safetensors.index": index})
    with pytest.raises(BadCheckpoint, match=r"weight_map names .*, not a plain"):
        huggingface._weight_files(folder)


def test_a_source_name_too_long_is_refused():
    """The system's word for it, and what would be accepted."""
    with pytest.raises(UsageError, match="File name too long: xxx") as caught:
        load_source(Path("x" * 300))
    assert "accepted are" in (caught.value.do or "")


def test_arrays_of_a_gguf_file_are_bounded_together(tmp_path):
    """A byte of an array becomes a Python object: many large arrays would fill the memory."""
    half = struct.pack("<IQ", 0, MAX_ARRAY // 2 + 1) + bytes(MAX_ARRAY // 2 + 1)
    data = gguf(key("a", ARRAY, half), key("b", ARRAY, half), keys=2)
    with pytest.raises(BadCheckpoint, match="the length of 'b' is 2097153, above the limit"):
        opened(data, tmp_path)


def test_a_strange_architecture_is_told_briefly(tmp_path):
    """The message does not repeat a list of any length."""
    names = struct.pack("<IQ", STRING, 5000) + text("llama") * 5000
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(key("general.architecture", ARRAY, names), keys=1))
    with pytest.raises(UnsupportedModel, match="general.architecture is a list of 5000; of GGUF"):
        load_source(path)


@pytest.mark.parametrize("token", ["a:b", "<s>:1", "x:0"])
def test_a_start_token_that_the_library_cannot_take_is_refused(token):
    """A colon means something in the library's templates; the file only has a text."""
    keys = metadata("llama-bpe")
    keys["tokenizer.ggml.tokens"][0] = token
    with pytest.raises(BadTokenizer, match="tokenizer of the file cannot be built") as caught:
        gguf_tokenizer.read(keys, 1000, WHERE)
    assert (caught.value.where, caught.value.do) == (WHERE, gguf_tokenizer.GIVE_ONE)


# ------------------------------------------------- settings and recipes


@pytest.mark.parametrize("side", ["defaults", "overrides"])
def test_a_setting_called_self_is_unknown(side):
    """A key of a file never meets a parameter's name."""
    given = {"defaults": {}, side: {"self": 1}}
    with pytest.raises((BadBundle, UsageError), match="there is no sampling setting 'self'"):
        SamplingParams.from_mapping(**given)


@pytest.mark.parametrize("name", ["temperature", "top_k", "seed", "max_tokens"])
def test_a_number_beyond_words_is_refused(name):
    """Python does not print integers of more than 4300 digits."""
    with pytest.raises(UsageError, match=f"{name} = an integer of 16610 bits is not possible"):
        SamplingParams(**{name: 10**5000})


def recipe(folder: Path, content: str) -> Path:
    path = folder / "r.toml"
    path.write_text(content)
    return path


def test_a_number_of_thousands_of_digits_in_a_recipe(tmp_path):
    """Not TOML, as far as it can be read."""
    with pytest.raises(UsageError, match="the recipe is not TOML: Exceeds the limit"):
        read_recipe(recipe(tmp_path, "format_version = " + "1" * 5000))


def test_deep_nesting_in_a_recipe(tmp_path):
    """Not TOML, as far as it can be read."""
    with pytest.raises(UsageError, match="the recipe is not TOML"):
        read_recipe(recipe(tmp_path, "a = " + "[" * 5000 + "]" * 5000))


def test_a_program_is_no_package(tmp_path):
    """`__main__` is loaded and cannot be found."""
    content = 'format_version = 1\n[source]\npackage = "__main__"\npath = "x"\n'
    with pytest.raises(MissingDependency, match="package __main__ is not installed"):
        read_recipe(recipe(tmp_path, content))
