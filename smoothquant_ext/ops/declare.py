"""The declaration of an op: one function is its signature, its documentation and its fake kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Declaration(NamedTuple):
    """The facts of an op besides its function."""

    fake: Callable[..., Any]
    """The declared function."""
    cpu: str
    """The family of its CPU kernels, as ``torch.ops.sq.cpu_kernel`` takes it; "gemm" is gemm_int8 and gemm_fp8."""
    cuda: tuple[str, ...]
    """The families of CUDA kernels that it needs, likewise; none for an op of the CPU alone."""
    why_not_cuda: str
    """Why an op needs no CUDA kernels."""


DECLARED: dict[str, Declaration] = {}
"""Every op by its name, module by module in the order of the declarations."""


def op(cpu: str, cuda: tuple[str, ...] = (), why_not_cuda: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares the compiled op of a function's name; see ``Declaration`` for the arguments.

    The function's body is the fake kernel, for ``torch.compile`` and meta tensors: it makes empty results of the right
    shapes and dtypes, and looks neither at values nor, by turning symbolic sizes into numbers, at sizes. Tensors on
    different devices are refused before it runs.

    The compiled op takes the place of the function, under the function's signature and docstring: a call runs no
    Python of ours.
    """

    def declare(fake: Callable[P, R]) -> Callable[P, R]:
        name, signature = fake.__name__, inspect.signature(fake)

        def checked_fake(*args: P.args, **kwargs: P.kwargs) -> R:
            _check_devices(name, signature.bind(*args, **kwargs).arguments)
            return fake(*args, **kwargs)

        compiled: Any = getattr(torch.ops.sq, name).default  # looked up once: it costs as much as a small kernel
        torch.library.register_fake(f"sq::{name}", checked_fake)
        compiled.__doc__, compiled.__signature__ = fake.__doc__, signature
        DECLARED[name] = Declaration(fake, cpu, cuda, why_not_cuda)
        result: Callable[P, R] = compiled
        return result

    return declare


def _check_devices(name: str, arguments: dict[str, Any]) -> None:
    """Raises ``RuntimeError`` for a tensor that is on another device than the first one."""
    (first, x), *others = _tensors(arguments)
    for other, tensor in others:
        if tensor.device != x.device:
            raise RuntimeError(f"{name}: {other} is on {tensor.device}, but {first} is on {x.device}")


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments, those in lists as ``weight[1]``."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from ((f"{name}[{i}]", each) for i, each in enumerate(value) if isinstance(each, Tensor))
