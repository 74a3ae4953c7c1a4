"""Tensors from what people hold numbers in: lists, ragged ones too, tuples and arrays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import SmoothQuantError


def is_array(value: Any) -> bool:
    """Whether a value is a tensor or, like numpy's, an array of numbers."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def has_numbers(value: Any) -> bool:
    """Whether a value can be a tensor, by its first element."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return is_array(value) or isinstance(value, (int, float)) or value in ([], ())


def read_tensor(value: Any, where: str, expected: str) -> tuple[Tensor, Tensor | None]:
    """A tensor with the numbers of a value, and the lengths of its rows if they differ.

    Args:
        value: a tensor, an array, or lists of these or of numbers, nested in any way.
        where: names the value in an error.
        expected: says in an error what it should have been.

    Returns:
        The tensor, of an integer dtype if it is empty, and ``None``; or rows that were filled up with zeros, and how
        long each was.

    Raises:
        SmoothQuantError: the value is no array of numbers.
    """
    if str(getattr(value, "dtype", "")) == "object":  # a column of pandas with a list in each row
        value = list(value)
    if isinstance(value, (list, tuple)):
        tensor, lengths = _from_list(value, where, expected)
    else:
        tensor, lengths = _from_array(value, where, expected), None
    if tensor.is_meta or tensor.layout != torch.strided:
        what = "is on the meta device and has no values" if tensor.is_meta else f"has the layout {tensor.layout}"
        raise SmoothQuantError(f"{where} {what}, {expected}")
    return tensor.detach() if tensor.numel() else tensor.new_empty(tensor.shape, dtype=torch.int64), lengths


def _from_array(value: Any, where: str, expected: str) -> Tensor:
    try:
        if isinstance(value, (Tensor, list)) or not is_array(value):
            return torch.as_tensor(value)
        array = value.__array__()
        return torch.as_tensor(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise SmoothQuantError(f"{where} is {_described(value)}, {expected}") from None


def _from_list(value: list[Any] | tuple[Any, ...], where: str, expected: str) -> tuple[Tensor, Tensor | None]:
    items = list(value)
    if len(items) == 1 and is_array(items[0]) and len(items[0].shape) >= 2:
        return _from_array(items[0], where, expected), None  # what a TensorDataset gives
    if not any(is_array(item) or isinstance(item, (list, tuple)) for item in items):
        return _from_array(items, where, expected), None
    if len(items) > 1 and all(is_array(item) and len(item.shape) >= 2 for item in items):
        raise SmoothQuantError(
            f"{where} is a {type(value).__name__} of {len(items)} tensors, and which is which is not known, {expected}"
        )
    rows = [read_tensor(item, where, expected)[0] for item in items]
    if len({row.shape for row in rows}) == 1:
        return torch.stack(rows), None
    if any(row.dim() != 1 for row in rows):
        shapes = ", ".join(str(list(row.shape)) for row in rows[:3])
        raise SmoothQuantError(f"{where} is a list of tensors of different shapes ({shapes}), {expected}")
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def _described(value: Any) -> str:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return "text" if isinstance(value, (str, bytes)) else "None" if value is None else f"of type {type(value).__name__}"
