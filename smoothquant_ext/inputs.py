"""Calibration and test data for a model of any class, made from what a user names: texts, images, sounds.

A causal language model reads windows of tokens. An encoder reads such windows between the special tokens that its
tokenizer puts around a text. The decoder of an encoder-decoder reads what the model itself answers, as it will when it
is used. Images and sounds go through the model's processor.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from .compat import first_line, quiet_transformers
from .errors import SmoothQuantError
from .media import IMAGES, SOUNDS, find_media, read_captions, read_image, read_sound
from .probing.blocks import Batch, run_model
from .probing.trying import Failed, attempt
from .progress import track
from .quantization.calibration import enough_windows
from .text import token_windows
from .traits import predicts_next_token

ANSWER = 64  # tokens of a decoder's own answer, at most
IMAGES_ENOUGH, SOUNDS_ENOUGH = 128, 32  # of a few hundred patches, and of a thousand frames or more
OF_TEXT, OF_IMAGES, OF_SOUND, OF_PAIRS = "text", "images", "sound", "images with captions"
_MAIN: Mapping[str, str] = {
    "input_ids": OF_TEXT,
    "pixel_values": OF_IMAGES,
    "input_features": OF_SOUND,
    "input_values": OF_SOUND,
}


def data_kind(model: nn.Module) -> str:
    """What a model of transformers reads: one of ``OF_TEXT``, ``OF_IMAGES``, ``OF_SOUND`` and ``OF_PAIRS``.

    A model that reads text and images and answers in text is given text.

    Raises:
        SmoothQuantError: it reads something else.
    """
    main = getattr(model, "main_input_name", "input_ids")
    arguments = inspect.signature(model.forward).parameters
    if main == "input_ids" and not getattr(model, "can_generate", lambda: True)():
        if "pixel_values" in arguments and {"image", "text"} <= set(getattr(model, "input_modalities", ())):
            return OF_PAIRS
        if {"input_features", "input_values"} & set(arguments):
            main = "sound with text"
    if main not in _MAIN:
        raise SmoothQuantError(
            f"{type(model).__name__} reads {main}, which this command cannot prepare: quantize it in Python, with "
            "quantize(model, batches) and dicts of the arguments of its forward"
        )
    return _MAIN[main]


def read_batches(
    loaded: tuple[Any, Any], source: str, samples: int, seqlen: int, seed: int = 0, field: str | None = None
) -> Tensor | list[Batch]:
    """Reads data for a model, as ``quantize`` and the functions that measure take it.

    Args:
        loaded: the model, and its tokenizer or processor, from ``load_model``.
        source: a text as ``read_text`` takes it; or a folder or file of images, or of sounds. A model that compares
            images with text needs captions: in metadata.jsonl (``file_name``, ``text``), or beside IMAGE.png in
            IMAGE.txt.
        samples: the number of windows of text, images or sounds.
        seqlen: tokens of a window.
        seed: of the choice.
        field: the field of rows of text.

    Returns:
        Token windows [samples, seqlen] for a causal language model, else a dict of arguments a sample.

    Raises:
        SmoothQuantError: there is no such data, it cannot be read, or the processor refuses it.
    """
    model, processor = loaded
    kind = data_kind(model)
    if kind == OF_TEXT:
        windows = token_windows(tokenizer_of(processor), source, samples, seqlen, seed, model, field)
        if predicts_next_token(model):
            return windows
        batches: list[dict[str, Tensor]] = [{"input_ids": window} for window in windows.split(1)]
    else:
        files = find_media(source, SOUNDS if kind == OF_SOUND else IMAGES, seed)
        captioned = read_captions(files) if kind == OF_PAIRS else ((file, None) for file in files)
        pairs = list(itertools.islice(captioned, samples))
        if not pairs:
            raise SmoothQuantError(
                f"{source} holds no image with a caption, which {type(model).__name__} compares: write "
                'metadata.jsonl beside them, with lines like {"file_name": "1.png", "text": "a dog"}'
            )
        if len(pairs) < samples:
            what = "sounds" if kind == OF_SOUND else kind
            warnings.warn(f"{source} holds {len(pairs)} {what}, not {samples}: using those", stacklevel=2)
        batches = [_prepared(model, processor, kind, *pair) for pair in pairs]
    if model.config.is_encoder_decoder or (kind != OF_TEXT and model.can_generate()):
        answering = Answering(model)
        batches = [answering.completed(batch) for batch in track(batches, "Answering", show=True)]
    return [{name: value for name, value in batch.items() if _is_used(model, name)} for batch in batches]


def _prepared(model: Any, processor: Any, kind: str, file: Path, caption: str | None) -> dict[str, Tensor]:
    """The arguments of ``forward`` for one image or sound."""
    if kind == OF_SOUND:
        extractor = getattr(processor, "feature_extractor", processor)
        rate = extractor.sampling_rate
        given: dict[str, Any] = {"sampling_rate": rate}
        prepare = partial(extractor, read_sound(file, rate))  # each class has a name of its own for it
    elif kind == OF_PAIRS:
        given, prepare = (
            {"images": read_image(file), "text": [caption], "padding": "max_length", "truncation": True},
            processor,
        )
    else:
        given, prepare = {"images": read_image(file)}, getattr(processor, "image_processor", processor)
    try:
        with quiet_transformers():
            prepared = prepare(**given, return_tensors="pt")
    except Exception as error:  # processors raise what they like
        kind_of = type(getattr(prepare, "func", prepare)).__name__
        raise SmoothQuantError(f"{kind_of} of the model cannot prepare {file} ({first_line(error)})") from error
    return {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in prepared.items()
        if isinstance(value, Tensor)
    }


class Answering:
    """Gives batches what a model's decoder reads while the model answers them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._start = _first_token(model)
        self._has_warned = False

    def completed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the ids of the answer.

        The first of them alone where the model cannot answer, or nothing where it makes its own, as classifiers do.
        """
        if self._model.can_generate():
            answer = self._answer(batch)
        elif not isinstance(attempt(lambda: run_model(self._model, batch), self._model), Failed):
            return batch
        else:
            answer = torch.full((1, 1), self._start)
        return {**batch, "decoder_input_ids": answer}

    def _answer(self, batch: Mapping[str, Tensor]) -> Tensor:
        try:
            with torch.no_grad(), quiet_transformers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer: Tensor = self._model.generate(
                    **{name: value.to(self._model.device) for name, value in batch.items()},
                    max_new_tokens=ANSWER,
                    do_sample=False,
                    num_beams=1,
                    return_dict_in_generate=False,
                ).cpu()
            if answer.dim() != 2 or answer.is_floating_point():
                raise ValueError("its answer is no text")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a configuration without what generate needs
            if not self._has_warned:
                kind = type(self._model).__name__
                warnings.warn(f"{kind} cannot answer ({first_line(error)}): its decoder reads one token", stacklevel=4)
            self._has_warned = True
            return torch.full((1, 1), self._start)
        has_start = int(answer[0, 0]) == self._start
        return answer if has_start else torch.cat([torch.full((len(answer), 1), self._start), answer], dim=1)


def _first_token(model: Any) -> int:
    """The token that a decoder begins with."""
    for config in (getattr(model, "generation_config", None), model.config, getattr(model.config, "decoder", None)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            if isinstance(token := getattr(config, name, None), int):
                return token
    return 0


def _is_used(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the processor, where that is one."""
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def enough_samples(model: nn.Module, seqlen: int) -> int:
    """The number of windows of ``seqlen`` tokens, images or sounds that calibration needs."""
    kind = data_kind(model)
    return enough_windows(model, seqlen) if kind == OF_TEXT else SOUNDS_ENOUGH if kind == OF_SOUND else IMAGES_ENOUGH


def rows_of(batches: Tensor | Iterable[Batch]) -> list[Batch]:
    """The batches one by one."""
    return list(batches.split(1)) if isinstance(batches, Tensor) else list(batches)
