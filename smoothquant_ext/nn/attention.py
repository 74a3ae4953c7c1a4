"""Attention through ``torch.ops.sq.attention``, as an attention implementation of transformers.

A model of transformers attends through the function that its configuration names, and ``set_attn_implementation``
changes the name: ``"smoothquant"`` is ours. What our kernel does not compute goes to transformers' own ``"sdpa"``: all
on a GPU, except for keys and values in INT8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import ops
from ..errors import SmoothQuantError
from .batched_prompts import checked_, generate_batch
from .placement import has_ops

IMPLEMENTATION = "smoothquant"


class Int8Heads(Tensor):
    """Keys or values [B, H, T, D] on their way from an INT8 cache to ``attention_forward``.

    Who else calculates with them would take the integers for the values, and gets an error: there is no copy in
    floating point to fall back on.
    """

    q: Tensor
    scale: Tensor  # [B, H, T]

    @staticmethod
    def of(q: Tensor, scale: Tensor) -> Int8Heads:
        """These integers and their scales."""
        heads = q.as_subclass(Int8Heads)
        heads.q, heads.scale = q, scale
        return heads

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers questions about shape and dtype, refuses the rest."""
        if func in _QUESTIONS:
            return super().__torch_function__(func, types, args, kwargs)
        raise SmoothQuantError(
            f"{getattr(func, '__name__', func)} cannot read an INT8 cache of keys and values: only the attention "
            f"implementation {IMPLEMENTATION!r} can, so use that one or another cache"
        )


_QUESTIONS = {
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__),  # type: ignore[attr-defined]
    *(Tensor.is_cpu.__get__, Tensor.is_cuda.__get__, Tensor.requires_grad.__get__, Tensor.dim, Tensor.size),  # type: ignore[attr-defined]
}


def use_attention_(model: nn.Module) -> bool:
    """Makes a transformers model that uses ``"sdpa"`` attend through ``attention_forward``, in place.

    Returns:
        Whether it does now.
    """
    if not isinstance(model, PreTrainedModel) or model.device.type == "meta":
        return False
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(IMPLEMENTATION)
    vars(model)["init_continuous_batching"] = partial(_init_continuous_batching, model)
    vars(model)["generate_batch"] = partial(generate_batch, model)
    return True


def _init_continuous_batching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """transformers' own, which knows no attention but its own, with ``"sdpa"`` for as long as it runs."""
    ours = model.config._attn_implementation == IMPLEMENTATION
    if ours:
        model.set_attn_implementation("sdpa")
    try:
        manager = type(model).init_continuous_batching(model, *args, **kwargs)
    except BaseException:
        if ours:
            model.set_attn_implementation(IMPLEMENTATION)
        raise
    if ours:
        manager._original_attn_impl = IMPLEMENTATION  # what it goes back to when it stops
    return checked_(manager, model)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' ``sdpa_attention_forward``: q [B, H, T, D] and k, v [B, Hkv, S, D] -> [B, T, H, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    wanted = kwargs.get("is_causal")
    is_supported = _is_supported(query, key, value, attention_mask, scale, kwargs)
    if isinstance(key, Int8Heads) and isinstance(value, Int8Heads):
        if not is_supported:
            raise SmoothQuantError(
                f"{type(module).__name__} wants what attention over an INT8 cache does not compute: gradients, "
                "dropout, a soft cap, a bias of positions or a mask that is not boolean; use another cache"
            )
        causal = is_causal(module, query.shape[2], attention_mask, wanted)
        scales = {"k_scale": key.scale, "v_scale": value.scale}
        return ops.attention(query, key.q, value.q, attention_mask, scale=scale, causal=causal, **scales), None
    queries = query.shape[2]
    causal = is_causal(module, queries, attention_mask, wanted)
    if causal and key.shape[2] > queries:
        # The first tokens in a static cache: what lies behind them is not filled yet.
        key, value = key[:, :, :queries], value[:, :, :queries]
    if not is_supported:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    return ops.attention(query, key, value, attention_mask, scale=scale, causal=causal), None


def is_causal(module: nn.Module, queries: int, mask: Tensor | None, wanted: bool | None = None) -> bool:
    """Whether an attention module hides later keys from earlier queries without being given a mask."""
    causal: bool = getattr(module, "is_causal", True) if wanted is None else wanted
    return queries > 1 and mask is None and causal


def takes_mask(mask: Tensor | None, batch: int, heads: int, queries: int, keys: int) -> bool:
    """Whether our kernel understands a mask for attention of this shape."""
    if mask is None:
        return True
    if mask.dtype != torch.bool or mask.dim() != 4:
        return False
    return mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2:] == (queries, keys)


def _is_supported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    kwargs: dict[str, Any],
) -> bool:
    is_int8 = isinstance(key, Int8Heads)
    if not (has_ops(query) if is_int8 else query.is_cpu and query.dtype == key.dtype == value.dtype) or scale <= 0:
        return False
    if kwargs.get("dropout") or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    return takes_mask(mask, query.shape[0], query.shape[1], query.shape[2], key.shape[2])


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
