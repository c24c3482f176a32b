"""Small random decoders and what an importer would have said about them."""

from __future__ import annotations

from typing import Any

import torch

from edgert.models.decoder import Decoder, DecoderConfig
from edgert.models.importers import Imported

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "intermediate_size": 32,
    "rope_theta": 100.0,
    "norm_eps": 1e-5,
    "context": 64,
    "tied_head": True,
}

SPECIALS = ("<|end|>", "<|user|>", "<|system|>", "<|answer|>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "r"), ("s", "t"), ("Ġ", "st"), ("e", "n"))
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def decoder(seed: int = 3, **changes: Any) -> Decoder:
    """Random weights, wide enough that no part of the model is silent."""
    model = Decoder(DecoderConfig(**SIZES | changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        else:
            fan_in = parameter.shape[0] if name.startswith("blocks") else 1
            parameter.copy_(1.5 * noise * fan_in**-0.5)
    return model


def imported(model: Decoder, **changes: Any) -> Imported:
    """What `load_source` would return for a file that holds nothing but the model."""
    fields = {
        "name": "tiny",
        "tokenizer_json": None,
        "chat_template": None,
        "bos": None,
        "eos": (),
        "sampling": {},
        "provenance": {"source": "tests/tiny_decoder.py"},
        "notes": (),
    }
    return Imported(model=model, **fields | changes)  # type: ignore[arg-type]


def tokenizer_json() -> str:
    """A byte-level BPE tokenizer: specials first, then the 256 bytes, then a few merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, *(a + b for a, b in MERGES)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer.to_str()


def speaking() -> Imported:
    """A model with in-op rotary (head size 16), a tokenizer and a chat template.

    It says printable ASCII only and never its end token: the embeddings of all other tokens are
    nearly zero, so that the tied head does not choose them.
    """
    vocabulary = len(SPECIALS) + 256 + len(MERGES)
    model = decoder(
        vocab_size=vocabulary,
        hidden_size=48,
        num_layers=2,
        head_size=16,
        intermediate_size=64,
        context=16384,  # minutes of answer: what Ctrl-C interrupts
        rope_theta=10000.0,
    )
    alphabet = sorted(vocabulary_alphabet())
    printable = [len(SPECIALS) + i for i, c in enumerate(alphabet) if c.isascii() or c == "Ġ"]
    quiet = torch.ones(vocabulary, dtype=torch.bool)
    quiet[printable] = False
    quiet[len(SPECIALS) + 256 :] = False
    model.embed[quiet] *= 0.01
    return imported(
        model,
        tokenizer_json=tokenizer_json(),
        chat_template=TEMPLATE,
        eos=(0,),
        sampling={"temperature": 0.0},
    )


def vocabulary_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())
