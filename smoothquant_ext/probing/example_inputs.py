"""Inputs that a model may run on, to see how it is wired where nobody has given it data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 2
SOUND = 4000  # samples of a waveform: a quarter of a second


def example_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Arguments for the ``forward`` of a model of transformers, on its device, the likeliest first.

    What its configuration says of the sizes of images and sounds need not be all that it asks for: run it in
    ``attempt`` and take the next ones.
    """
    config: Any = getattr(model, "config", None)
    device = next(model.parameters(), torch.empty(0)).device
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    answer = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    main = getattr(model, "main_input_name", "input_ids")
    media = {name: value.to(device, _dtype(model)) for name, value in _media(config).items()}
    if main in media:
        yield {main: media[main], **answer}
    yield {"input_ids": ids, **answer}
    if answer:
        yield {"input_ids": ids}  # of classifiers, which make the other
    if "pixel_values" in media:
        yield {"input_ids": ids, "pixel_values": media["pixel_values"]}  # of models that compare text with images


def _media(config: Any) -> dict[str, Tensor]:
    """A blank image, spectrum and waveform, of the sizes that a configuration speaks of."""
    vision = getattr(config, "vision_config", config)
    size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
    media = {"input_values": torch.zeros(1, SOUND)}
    sides = [size, size] if isinstance(size, int) else size
    if isinstance(sides, (list, tuple)) and len(sides) == 2 and all(isinstance(side, int) for side in sides):
        height, width = sides
        media["pixel_values"] = torch.zeros(1, channels, height, width)
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if isinstance(bins, int) and isinstance(frames, int):
        media["input_features"] = torch.zeros(1, bins, 2 * frames)  # of which a convolution makes half as many
    return media


def _dtype(model: nn.Module) -> torch.dtype:
    floats = (each.dtype for each in model.parameters() if each.is_floating_point())
    return next(floats, torch.float32)
