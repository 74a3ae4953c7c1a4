"""Fusion: fewer and larger steps in a quantized model, in place, without changing what it computes.

- an RMS norm, a gated or plain MLP: one op each                                (``rms_norm``, ``mlp``)
- 8-bit layers that read the same tensor, such as q, k and v: one op for all    (``shared_input``)
- a floating-point layer left over, such as the output embedding: ours for few rows  (``linear``)
- a whole decoder layer of the Llama family, if all of that fits: one op        (``decoder_layer``)
- attention, and the cache of keys and values                                   (``nn.attention``, ``nn.kv_cache``)

Everything is found by what it does, not by class names: a module is run on random input and its result compared with
the op's formula, and who reads the same tensor is seen in one pass of the model. A fused module keeps its class,
parameters, names and state dict: it becomes an instance of a subclass of its own class.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .. import ops
from ..nn.attention import use_attention_
from ..nn.embedding import W8A8Embedding
from ..nn.kv_cache import use_growing_cache_
from .decoder_layer import fuse_layers_
from .linear import FusedLinear
from .mixin import fuse_as_
from .mlp import FusedMLP, mlp_attributes
from .rms_norm import FusedRMSNorm, rms_norm_attributes
from .shared_input import share_inputs_


def fuse_(model: nn.Module) -> list[str]:
    """Fuses what can be fused in a quantized model, where it is, in place; the names of what changed.

    It may be moved to another device afterwards: a fused module asks at every call where its input is. The result stays
    what it was, up to the rounding of intermediate values that fused kernels keep in fp32. For a model of transformers
    the list also has the groups of layers that share an input, as ``"q_proj+k_proj+v_proj"`` with their parent's name
    in front, and ``"attention"`` and ``"cache"``.
    """
    fused = [name for name, module in list(model.named_modules()) if _fuse_module_(module)]
    fused += share_inputs_(model)
    if use_attention_(model):
        fused.append("attention")
    if isinstance(model, PreTrainedModel) and model.device.type != "meta":
        if use_growing_cache_(model):
            fused.append("cache")
        fused += fuse_layers_(model)
    return fused


def _fuse_module_(module: nn.Module) -> bool:
    """Makes one module an instance of its fused class; whether there is one for it."""
    mixin: type
    if isinstance(module, W8A8Embedding):
        return False  # it computes its weight, all of it, for whoever asks for it
    if (attributes := rms_norm_attributes(module)) is not None:
        mixin = FusedRMSNorm
    elif (attributes := mlp_attributes(module)) is not None:
        mixin = FusedMLP
    elif type(module) is nn.Linear and (rows := ops.fast_linear_rows()) > 0:
        mixin, attributes = FusedLinear, {"most_rows": rows}
    else:
        return False
    fuse_as_(module, mixin, attributes)
    return True
