"""A static cache of keys and values in ``generate``: on a GPU, a step of decoding becomes one CUDA graph."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..errors import SmoothQuantError


def use_static_cache_(model: PreTrainedModel, tokens: int | None = None) -> None:
    """Makes ``generate`` use transformers' static cache, which on a GPU also compiles the model.

    Keys and values then have one place in memory, so that a step of decoding can be captured: transformers compiles the
    first one by ``torch.compile(mode="reduce-overhead")``, and later ones replay it without Python and without a launch
    for each kernel. That takes a minute or more, and again for another batch size or a larger cache. On the CPU nothing
    is compiled. INT8 caches are not static: keys and values have the dtype of the model.

    It sets ``model.generation_config.cache_implementation``, which is saved with the model. ``None`` there undoes it,
    as assisted decoding and caches that are passed to ``generate`` need.

    Args:
        model: a model of transformers that generates, 8-bit or not.
        tokens: room for prompt and answer; a call that needs more gets a larger cache. ``None``: what each call needs.

    Raises:
        SmoothQuantError: the model does not generate, or keeps something else than keys and values of one decoder.
    """
    config = getattr(model, "generation_config", None)
    if not isinstance(model, PreTrainedModel) or config is None or model.config.is_encoder_decoder:
        raise SmoothQuantError(
            f"{type(model).__name__} cannot have a static cache: it needs a causal LM of transformers"
        )
    if tokens is not None and not hasattr(config, "max_cache_len"):
        raise SmoothQuantError(
            "this version of transformers sizes static caches itself: leave out tokens, or update it"
        )
    config.cache_implementation = "static"
    if tokens is not None:
        config.max_cache_len = tokens
