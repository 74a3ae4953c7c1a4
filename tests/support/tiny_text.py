"""A tokenizer of one token a character, text of any length, and tiny model directories for the command line."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

from tiny import VOCAB, amplify_outliers, build
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
CHARACTERS = [c for c in string.printable if c not in "\r\x0b\x0c\t~|`"][: VOCAB - len(SPECIAL)]


# Each message after its role in brackets.
CHATML = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def tiny_tokenizer(bos: bool = False, chat_template: str | None = None) -> Any:
    """One token per character; with ``bos`` it puts <s> before a text, as Llama's does."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    made.chat_template = chat_template
    return made


def some_text(characters: int, seed: int = 0) -> str:
    """Random words, exactly so many characters."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 9))) for _ in range(characters // 2 + 1)]
    return " ".join(words)[:characters]


def write_tiny_model(directory: Path, model_type: str = "llama", **overrides: object) -> Path:
    """A tiny random model with outliers, and its tokenizer, as a Hugging Face directory."""
    model = build(model_type, **overrides)
    amplify_outliers(model)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
