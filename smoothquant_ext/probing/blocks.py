"""Decoder blocks: finding them, capturing what they are called with, and running one again by itself."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmoothQuantError
from .hooks import hooked
from .linears import find_linears
from .trying import NOT_OF_THE_MODULE, in_words, repeatable, uncompiled
from .values import map_values, tensors_in, version_of

Batch = Tensor | Mapping[str, Tensor]

# Arguments of ``forward`` with a value for each token of each row, of which the first tokens are a shorter text.
SEQUENCES = (
    *("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"),
    *("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "labels"),
)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks by name: children, with linear layers, of the outermost ``ModuleList``s.

    A model without such a list is one block, itself.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = {
        f"{name}.{index}": block
        for name in outermost
        for index, block in model.get_submodule(name).named_children()
        if find_linears(block)
    }
    return blocks or {"": model}


def run_model(model: nn.Module, batch: Batch, all_logits: bool = True) -> Any:
    """One forward pass without a cache.

    Args:
        model: any model.
        batch: token ids [B, T], or the keyword arguments of ``forward``, floating-point ones in any dtype.
        all_logits: ``False`` computes the logits of the last token alone, where the model can leave out the others.

    Raises:
        SmoothQuantError: the model raises something, other than that memory is exhausted.
    """
    device = device_of(model)
    dtype = getattr(model, "dtype", None)

    def placed(tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and isinstance(dtype, torch.dtype) and dtype.is_floating_point
        return tensor.to(device, dtype if is_cast else None)

    inputs = map_values(placed, {"input_ids": batch} if isinstance(batch, Tensor) else batch)
    if _takes(model, "use_cache", or_any=hasattr(model, "config")):
        inputs = {"use_cache": False, **inputs}
    if not all_logits and _takes(model, "logits_to_keep") and "labels" not in inputs:
        inputs = {"logits_to_keep": 1, **inputs}
    try:
        with torch.no_grad(), uncompiled():
            return model(**inputs)
    except (*NOT_OF_THE_MODULE, SmoothQuantError):
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if isinstance(value, Tensor))
        raise SmoothQuantError(f"{type(model).__name__} fails on a batch of {shapes} ({in_words(error)})") from error


def _takes(model: nn.Module, argument: str, or_any: bool = False) -> bool:
    """Whether a model's ``forward`` has an argument of this name, or one for any other."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(each.name == argument or (or_any and each.kind is each.VAR_KEYWORD) for each in parameters)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module that is on one device; the CPU of one without tensors."""
    return next(itertools.chain(module.parameters(), module.buffers()), torch.empty(0)).device


def token_ids(batch: Batch) -> Tensor:
    """The token ids [B, T] of a batch; of forward arguments without any, the first tensor among these."""
    return batch if isinstance(batch, Tensor) else batch.get("input_ids", next(iter(batch.values())))


def count_tokens(batch: Batch) -> int:
    """How many tokens of a batch are attended to; of images and sounds, how many there are."""
    if not isinstance(batch, Tensor) and not any(name in batch for name in SEQUENCES[:2]):
        return len(token_ids(batch))
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.count_nonzero())
    return token_ids(batch).shape[:2].numel()


@dataclass(frozen=True)
class BlockCall:
    """The arguments a block was called with, kept so that it can be run again alone."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Runs ``block`` on copies of the captured arguments, floating-point ones as ``dtype``; its output tensors.

        Of a block that returns none, the arguments that it wrote into. The copies are on the device of the block,
        wherever the arguments were captured. Random numbers are the same each time.
        """
        device = device_of(block)
        given: list[tuple[Tensor, int]] = []

        def fresh(tensor: Tensor) -> Tensor:
            kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            copied = tensor.detach().to(device, kind, copy=True)
            given.append((copied, version_of(copied)))
            return copied

        args, kwargs = map_values(fresh, (self.args, self.kwargs))
        with torch.no_grad(), uncompiled(), repeatable(device):
            output = block(*args, **kwargs)
        return tensors_in(output) or [tensor for tensor, version in given if version_of(tensor) != version]


def capture_calls(model: nn.Module, blocks: Mapping[str, nn.Module], batch: Batch) -> dict[str, BlockCall]:
    """Runs the model once and captures the first call of each block, in running order.

    A block that was not called has no entry.
    """
    calls: dict[str, BlockCall] = {}

    def capture(name: str, args: Any, kwargs: Any) -> None:
        if name not in calls:
            calls[name] = BlockCall(*map_values(lambda tensor: tensor.detach().clone(), (args, kwargs)))

    with hooked(blocks, before=capture):
        run_model(model, batch)
    return calls


def probe_batch(batch: Batch, rows: int = 2, tokens: int = 12) -> Batch:
    """The first few tokens of a batch: enough to show how a block is wired, cheap enough to run hundreds of times."""
    if isinstance(batch, Tensor):
        return batch[:rows, :tokens]
    main = next((batch[name] for name in SEQUENCES[:2] if name in batch), None)
    if main is None or any(
        name not in SEQUENCES or value.dim() < 2 or len(value) != len(main) for name, value in batch.items()
    ):
        return batch  # images, of which ids among the tokens speak, or masks and positions of other shapes
    return {name: value[:rows, :tokens] for name, value in batch.items()}
