"""A cache of keys and values that does not copy itself for every token.

transformers' dynamic cache concatenates: a step of decoding copies all that is there. Ours keeps room for more tokens
behind those it has. It is the same class of layer otherwise: everything else that transformers does with one works.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 64  # tokens
CACHE_NAMES = ("cache", "past_key_values")  # of a model's argument: it changed in transformers 5


class Buffers(NamedTuple):
    """Room for keys and values [B, H, room, D] and, of an INT8 cache, their scales [B, H, room]."""

    keys: Tensor
    values: Tensor
    keys_scale: Tensor | None = None
    values_scale: Tensor | None = None


class GrowingLayer(DynamicLayer):
    """``keys`` and ``values`` [B, H, T, D] are the first T tokens of larger buffers."""

    keys: Tensor
    values: Tensor
    key_buffer: Tensor | None = None
    value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends; see ``DynamicLayer.update``."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.key_buffer, self.keys = append(self.key_buffer, self.keys, key_states)
        self.value_buffer, self.values = append(self.value_buffer, self.values, value_states)
        return self.keys, self.values

    def reserve(self, x: Tensor, shape: tuple[int, int, int, int]) -> tuple[Buffers, int]:
        """Buffers with room for ``shape`` [B, H, T, D] more like x, and the tokens in them.

        Who writes there tells ``fill``.
        """
        if not self.is_initialized:
            self.lazy_initialization(x, x)
        self.key_buffer, past = reserve(self.key_buffer, self.keys, x, shape)
        self.value_buffer, _ = reserve(self.value_buffer, self.values, x, shape)
        return Buffers(self.key_buffer, self.value_buffer), past

    def fill(self, total: int) -> None:
        """Says that the buffers hold so many tokens now."""
        assert self.key_buffer is not None
        assert self.value_buffer is not None
        self.keys, self.values = self.key_buffer.narrow(2, 0, total), self.value_buffer.narrow(2, 0, total)

    def reset(self) -> None:
        """Empties the layer."""
        self.key_buffer = self.value_buffer = None
        super().reset()


def append(buffer: Tensor | None, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Writes ``new`` behind ``past`` [B, H, T, ...]; the buffer, a larger one if need be, and its tokens in use."""
    buffer, length = reserve(buffer, past, new, new.shape)
    tokens = buffer.narrow(2, 0, length + new.shape[2])
    tokens.narrow(2, length, new.shape[2]).copy_(new)
    return buffer, tokens


def reserve(buffer: Tensor | None, past: Tensor, like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """A buffer that begins with ``past`` and has room for ``shape`` [B, H, T, ...] more, and the tokens of ``past``."""
    length = past.shape[2] if past.numel() else 0
    total = length + shape[2]
    if buffer is None or not _is_start_of(past, buffer) or buffer.shape[2] < total:
        room = max(LEAST_ROOM, total // 4)
        buffer = like.new_empty((*shape[:2], total + room, *shape[3:]))
        if length:
            buffer[:, :, :length] = past
    return buffer, length


def _is_start_of(past: Tensor, buffer: Tensor) -> bool:
    """Whether nobody put other keys and values in the place of ours: beam search does, or cropping."""
    return (
        past.data_ptr() == buffer.data_ptr()
        and past.dim() == buffer.dim()
        and past.stride() == buffer.stride()
        and past.shape[:2] == buffer.shape[:2]
    )


def use_growing_cache_(model: PreTrainedModel) -> bool:
    """Makes the dynamic caches that this model starts grow in place; whether it did not before."""
    if any(hook is _grow for hook in model._forward_pre_hooks.values()):
        return False
    model.register_forward_pre_hook(_grow, with_kwargs=True)
    return True


def _grow(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if isinstance(cache, DynamicCache):
            for layer in cache.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = GrowingLayer
