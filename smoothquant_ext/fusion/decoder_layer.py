"""A whole decoder layer as one op: norm, q/k/v, rotation, cache, attention, o, residual, norm, MLP, residual.

For layers of the Llama family, told by what they compute: what their children have become says what the layer could
be, and then its output for a real call must equal the op's, bit for bit. Whatever is called differently, has hooks or
adapters, or caches keys and values in another way runs module by module as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from .. import ops
from ..nn.attention import IMPLEMENTATION, is_causal, takes_mask
from ..nn.grad import needs_grad
from ..nn.int8_kv_cache import Int8Layer
from ..nn.kv_cache import Buffers, GrowingLayer
from ..nn.linear import W8A8Linear
from ..nn.placement import has_ops
from ..probing.copies import copy_of
from ..probing.hooks import hooked, is_watched
from ..probing.trying import Failed, attempt
from ..probing.values import map_values
from .mixin import fuse_as_, unfuse_
from .mlp import FusedMLP
from .rms_norm import FusedRMSNorm
from .shared_input import SharedInput

# With more rows, intermediate results, 13 bytes a row for every element of the hidden state, would pile up.
MOST_ROWS = 4096
# What a layer may be called with; anything else must be unset.
UNDERSTOOD = {
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "use_cache",
    "cache_position",
    "cache",
    "past_key_values",
}


class Parts(NamedTuple):
    """The names of a layer's children, and of its attention's; ``head_norms`` are those of q and k, or none."""

    norm: str
    attention: str
    post_norm: str
    mlp: str
    qkvo: tuple[str, str, str, str]
    head_norms: tuple[str, ...]


class FusedDecoderLayer:
    """Mixed into the class of a decoder layer: one op for what it understands, the class's own forward otherwise."""

    parts: Parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[B, T, K] -> [B, T, K]"""
        if len(args) == 1 and self._is_understood(args[0], kwargs):
            output = self._run(args[0], kwargs)
            if output is not None:
                return output
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _is_understood(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        if not has_ops(x) or x.dim() != 3 or x.shape[0] * x.shape[1] > MOST_ROWS or needs_grad(x):
            return False
        for name, value in kwargs.items():
            if name not in UNDERSTOOD and (isinstance(value, Tensor) or value):
                return False
        angles = kwargs.get("position_embeddings")
        return isinstance(angles, tuple) and len(angles) == 2 and angles[0].dtype == x.dtype

    def _run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The op's result; ``None`` where it does not apply."""
        parts, children = self.parts, self._modules  # type: ignore[attr-defined]
        norm, attention, post_norm, mlp = (
            children[name] for name in (parts.norm, parts.attention, parts.post_norm, parts.mlp)
        )
        roles, projections = mlp.fused_roles, attention._modules
        layers = [projections[name] for name in parts.qkvo]
        layers += [mlp._modules[name] for name in (roles.gate, roles.up, roles.down)]
        if any(type(layer) is not W8A8Linear or not layer.is_plain or not layer.is_with(x) for layer in layers):
            return None
        readers = [layers[index] for index in (0, 3, 4, 6)]  # q, o, gate, down: one of each input's
        head_norms = [projections[name] for name in parts.head_norms]
        norms = (norm, post_norm, *head_norms)
        if not all(isinstance(each, FusedRMSNorm) and not needs_grad(each.weight) for each in norms):
            return None
        if any(is_watched(child) for child in (attention, mlp, *norms, *layers)):
            return None
        if attention.config._attn_implementation != IMPLEMENTATION:
            return None
        cos, sin = kwargs["position_embeddings"]
        heads, d = layers[1].out_features // cos.shape[-1], cos.shape[-1]
        if any(each.weight.numel() != d for each in head_norms):  # of all heads at once
            return None
        cache = kwargs.get("cache")
        if cache is None:
            cache = kwargs.get("past_key_values")  # the older name
        mask, causal = kwargs.get("attention_mask"), is_causal(attention, x.shape[1], kwargs.get("attention_mask"))
        place = find_place(cache, attention.layer_idx, x, (x.shape[0], heads, x.shape[1], d), causal)
        if place is None:
            return None
        if not takes_mask(mask, x.shape[0], layers[0].out_features // d, x.shape[1], place.total):
            return None
        if place.positions is not None and mask is None:  # nothing hides what is not filled yet
            return None
        buffers = place.buffers
        q_norm, k_norm = [each.weight for each in head_norms] or (None, None)
        output = ops.w8a8_decoder_layer_(
            x,
            norm.weight,
            post_norm.weight,
            norm.fused_eps,
            post_norm.fused_eps,
            norm.fused_offset,
            *ops.as_lists(layer.tensors for layer in layers),
            [layer._buffers["input_scale"] for layer in readers],
            cos,
            sin,
            buffers.keys,
            buffers.values,
            place.past,
            mask,
            attention.scaling,
            causal,
            roles.activation,
            buffers.keys_scale,
            buffers.values_scale,
            q_norm,
            k_norm,
            head_norms[0].fused_eps if head_norms else 0.0,
            place.positions,
            [layer.rotate for layer in readers],
        )
        place.fill()
        return output


class Place(NamedTuple):
    """Where a call's keys and values go, and how many tokens then lie there to be attended to.

    Those of a static cache go to ``positions`` [T], which are on its device, and attention reads the whole room. Only
    the first ones come without a mask, and are known by that.
    """

    stored: GrowingLayer | Int8Layer | StaticLayer | None
    buffers: Buffers
    tokens: int
    past: int
    total: int
    positions: Tensor | None = None

    def fill(self) -> None:
        """Tells the cache that the tokens are there."""
        if isinstance(self.stored, StaticLayer):
            self.stored.cumulative_length.add_(self.tokens)
        elif self.stored is not None:
            self.stored.fill(self.total)


def find_place(cache: Any, index: int, x: Tensor, shape: tuple[int, int, int, int], is_first: bool) -> Place | None:
    """A place for keys and values of ``shape`` like x; ``None`` in a cache that the op cannot write to."""
    tokens = shape[2]
    if cache is None:
        if torch.compiler.is_compiling():
            return None
        return Place(None, Buffers(x.new_empty(shape), x.new_empty(shape)), tokens, 0, tokens)
    stored: Any = cache.layers[index] if index < len(cache.layers) else None
    if getattr(cache, "offloading", False):
        return None
    # Versions of transformers before this attribute count a static cache's tokens in another way.
    if type(stored) is StaticLayer and isinstance(getattr(stored, "cumulative_length", None), Tensor):
        if not stored.is_initialized:
            stored.lazy_initialization(*[x.new_empty((shape[0], shape[1], 0, shape[3]))] * 2)
        buffers = Buffers(stored.keys, stored.values)
        if is_first:
            return Place(stored, buffers, tokens, 0, tokens)
        positions = torch.arange(tokens, device=x.device) + stored.cumulative_length
        return Place(stored, buffers, tokens, 0, stored.max_cache_len, positions)
    if torch.compiler.is_compiling():  # a cache that grows would be another graph for every token
        return None
    if type(stored) is DynamicLayer:  # of a cache that the model has just made
        stored.__class__ = GrowingLayer
    if type(stored) is not GrowingLayer and type(stored) is not Int8Layer:
        return None
    if stored.is_initialized and needs_grad(stored.keys):
        return None
    buffers, past = stored.reserve(x, shape)
    return Place(stored, buffers, tokens, past, past + tokens)


def fuse_layers_(model: PreTrainedModel) -> list[str]:
    """Fuses the decoder layers of a model whose norms, MLPs and attention are fused already; their names."""
    candidates = {name: list(_candidates(module)) for name, module in model.named_modules()}
    candidates = {name: parts for name, parts in candidates.items() if parts}
    calls = _capture_calls(model, candidates) if candidates else {}
    fused = []
    for name, (args, kwargs, expected) in calls.items():
        layer = model.get_submodule(name)
        for parts in candidates[name]:
            fuse_as_(layer, FusedDecoderLayer, {"parts": parts})
            if attempt(partial(_computes, layer, args, kwargs, expected), layer) is True:
                fused.append(name)
                break
            unfuse_(layer, {"parts": parts})
    return fused


def _computes(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Tensor) -> bool:
    """Whether a fused layer's op returns what the layer returned in the model."""
    args, kwargs = map_values(torch.clone, (args, kwargs))
    output = _own_output(layer, args, kwargs)
    return (output is not None and torch.equal(output, expected)) or _is_the_same_on_cpu(layer, args, kwargs)


def _is_the_same_on_cpu(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy of a GPU's layer has the bits of the op on the CPU.

    On a GPU a library may sum FP8 products in an order that depends on how many columns it multiplies at once.
    """
    if args[0].is_cpu:
        return False
    tensors = {id(each): nn.Parameter(each.cpu(), requires_grad=False) for each in layer.parameters()}
    tensors |= {id(each): each.cpu() for each in layer.buffers()}  # type: ignore[misc]
    twin = copy_of(layer, tensors)
    args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
    output = _own_output(twin, args, kwargs)
    plain: Any = type(twin).__bases__[1]
    return output is not None and torch.equal(output, plain.forward(twin, *args, **kwargs))


def _own_output(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The output of the op for a recorded call; ``None`` where the op does not apply."""
    assert isinstance(layer, FusedDecoderLayer)
    if len(args) != 1 or not layer._is_understood(args[0], kwargs):
        return None
    return layer._run(args[0], kwargs)


def _candidates(layer: nn.Module) -> Iterator[Parts]:
    """The ways in which the children of a module could be a decoder layer; none for most modules."""
    children = dict(layer.named_children())
    norms = [name for name, child in children.items() if isinstance(child, FusedRMSNorm)]
    mlps = [name for name, child in children.items() if isinstance(child, FusedMLP)]
    others = [name for name in children if name not in (*norms, *mlps)]
    dtypes = {child.weight.dtype for child in layer.modules() if isinstance(child, W8A8Linear)}
    if isinstance(layer, FusedDecoderLayer) or (len(norms), len(mlps), len(others)) != (2, 1, 1) or len(dtypes) > 1:
        return
    (mlp,), (attention,) = mlps, others
    module, roles = children[attention], vars(children[mlp])["fused_roles"]
    linears = {name: child for name, child in module.named_children() if isinstance(child, W8A8Linear)}
    head_norms = {name: child for name, child in module.named_children() if isinstance(child, FusedRMSNorm)}
    together = {name: child.shared for name, child in linears.items() if isinstance(child.shared, SharedInput)}
    shared = {name: group for name, group in together.items() if len(group.layers) == 3}
    is_known = all(hasattr(module, name) for name in ("config", "layer_idx", "scaling"))
    has_parts = len(linears) == 4 and len(shared) == 3 and roles.up is not None and not roles.is_packed
    if not is_known or not has_parts or len(head_norms) not in (0, 2):
        return
    if len({child.fused_eps for child in head_norms.values()}) > 1:
        return
    if len({child.fused_offset for child in (*(children[name] for name in norms), *head_norms.values())}) > 1:
        return
    names = {child: name for name, child in linears.items()}
    q, k, v = (names[child] for child in next(iter(shared.values())).layers)
    (o,) = linears.keys() - shared.keys()
    for norm, post_norm in itertools.permutations(norms):
        for heads in itertools.permutations(head_norms):
            yield Parts(norm, attention, post_norm, mlp, (q, k, v, o), heads)


def _capture_calls(model: PreTrainedModel, names: Any) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Arguments and result of every named layer in one pass over three tokens; only of those that return a tensor."""
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    calls = {}

    def keep(name: str, args: Any, kwargs: Any) -> None:
        given[name] = map_values(lambda tensor: tensor.detach().clone(), (args, kwargs))

    def capture(name: str, _args: Any, _kwargs: Any, output: Any) -> None:
        args, kwargs = given.pop(name)
        if isinstance(output, Tensor):
            calls[name] = (args, kwargs, output.clone())

    def run() -> None:
        with hooked({name: model.get_submodule(name) for name in names}, keep, capture):
            model(input_ids=torch.arange(3, device=model.device).unsqueeze(0), use_cache=False)

    # A model that wants other inputs runs module by module.
    return {} if isinstance(attempt(run, model), Failed) else calls
