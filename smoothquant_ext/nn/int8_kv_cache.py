"""A cache of keys and values in INT8: about half the bytes of bf16, at a small cost in accuracy.

Every head of every token has its own scale and is quantized once, when it is appended. Attention reads the integers as
they lie, those of the tokens just appended included: in how many pieces a text goes through the cache does not matter.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .. import ops
from ..errors import SmoothQuantError
from .attention import IMPLEMENTATION, Int8Heads, use_attention_
from .kv_cache import CACHE_NAMES, Buffers, GrowingLayer, append, reserve

PARTS = Buffers._fields


class Int8Layer(DynamicLayer):
    """``keys`` and ``values`` [B, H, T, D] and their scales [B, H, T] are the first T tokens of larger buffers."""

    keys: Tensor
    values: Tensor
    keys_scale: Tensor
    values_scale: Tensor
    buffers: dict[str, Tensor]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See ``DynamicLayer``."""
        super().lazy_initialization(key_states, value_states)
        empty = torch.empty(0, dtype=torch.int8, device=key_states.device)
        self.keys, self.values = empty, empty
        self.keys_scale, self.values_scale = empty.float(), empty.float()
        self.buffers = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantizes and appends; what it returns is for ``attention_forward`` only."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise SmoothQuantError("an INT8 cache takes no gradients: call the model under torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, keys_scale = ops.quantize_per_token(key_states, torch.int8)
        values, values_scale = ops.quantize_per_token(value_states, torch.int8)
        for name, new in zip(PARTS, (keys, values, keys_scale, values_scale), strict=True):
            self.buffers[name], tokens = append(self.buffers.get(name), getattr(self, name), new)
            setattr(self, name, tokens)
        return Int8Heads.of(self.keys, self.keys_scale), Int8Heads.of(self.values, self.values_scale)

    def reserve(self, x: Tensor, shape: tuple[int, int, int, int]) -> tuple[Buffers, int]:
        """As ``GrowingLayer.reserve``."""
        if not self.is_initialized:
            self.lazy_initialization(x, x)
        past = self.get_seq_length()
        for name in PARTS:
            own: Tensor = getattr(self, name)
            self.buffers[name], _ = reserve(self.buffers.get(name), own, own, shape[:3] if "scale" in name else shape)
        return Buffers(**self.buffers), past

    def fill(self, total: int) -> None:
        """As ``GrowingLayer.fill``."""
        for name in PARTS:
            setattr(self, name, self.buffers[name].narrow(2, 0, total))

    def reset(self) -> None:
        """Empties the layer."""
        if self.is_initialized:
            self.buffers = {}
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """See ``DynamicLayer``."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            length = self.keys.shape[-2]
            self.keys_scale, self.values_scale = self.keys_scale[:, :, :length], self.values_scale[:, :, :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch."""
        if self.get_seq_length() > 0:
            for name in PARTS:
                setattr(self, name, getattr(self, name).repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences of the batch."""
        if self.get_seq_length() > 0:
            for name in PARTS:
                setattr(self, name, getattr(self, name)[indices])


class Int8Cache(DynamicCache):
    """An INT8 cache to pass to a model that attends through our implementation, as quantized ones do.

    ``model.generate(ids, past_key_values=Int8Cache(model.config))``. Layers with a sliding window keep their few tokens
    in floating point.
    """

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(config=config)
        make_int8_(self)


def make_int8_(cache: DynamicCache) -> None:
    """Makes the growing layers of a cache INT8 ones, and quantizes what they hold."""
    if getattr(cache, "offloading", False):
        raise SmoothQuantError("an INT8 cache cannot be offloaded: leave out offloading or the INT8 cache")
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = Int8Layer
    for index, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, GrowingLayer):
            cache.layers[index] = Int8Layer()
            if layer.get_seq_length() > 0:
                cache.layers[index].update(layer.keys, layer.values)


def use_int8_cache_(model: PreTrainedModel) -> RemovableHandle:
    """Makes the caches that a model starts INT8 ones: in ``generate``, and in calls without gradients.

    The model attends through our implementation then, as quantized models do anyway. Kinds of cache that are asked for
    by name (``cache_implementation="static"``) stay what they are.

    Returns:
        A handle whose ``remove()`` undoes it; the model goes on attending through our implementation.

    Raises:
        SmoothQuantError: the model cannot use our attention, or all its layers have sliding windows.
    """
    use_attention_(model)
    is_causal_lm = isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder
    if not is_causal_lm or model.config._attn_implementation != IMPLEMENTATION:
        raise SmoothQuantError(
            f"{type(model).__name__} cannot have an INT8 cache: it needs a causal LM of transformers whose "
            'attention is exchangeable and was "sdpa", the default'
        )
    if not any(type(layer) is Int8Layer for layer in Int8Cache(model.config).layers):
        raise SmoothQuantError(
            f"{type(model).__name__} gains nothing from an INT8 cache: no layer keeps more than its sliding window"
        )
    handle: RemovableHandle = model.register_forward_pre_hook(_use_int8, with_kwargs=True)
    return handle


def _use_int8(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    given = [kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None]
    for cache in given:
        if isinstance(cache, DynamicCache):
            make_int8_(cache)
    uses_cache = kwargs.get("use_cache")
    if uses_cache is None:
        uses_cache = getattr(model.config, "use_cache", False)
    if not given and uses_cache and not torch.is_grad_enabled():
        known = inspect.signature(model.forward).parameters
        kwargs[next(name for name in CACHE_NAMES if name in known)] = Int8Cache(model.config)
    return args, kwargs
