"""Orthogonal matrices that spread outliers: Hadamard matrices with random signs, and others where there are none."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

BLOCKS = (256, 128, 64, 32, 16)
"""The sizes of blocks that the ops rotate."""


@functools.cache
def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix, int8 [n, n] of 1 and -1 with orthogonal rows; ``None`` where no construction is known here.

    It is on the CPU, whatever device is torch's default: transformers builds models with ``meta`` as that.

    Constructions: Sylvester's product of smaller ones, and Paley's two for a prime q, of order q + 1 (q = 3 mod 4) and
    2 (q + 1) (q = 1 mod 4) (Paley 1933, "On orthogonal matrices").
    """
    with torch.device("cpu"):
        return _hadamard(n)


def _hadamard(n: int) -> Tensor | None:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if n == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if n % 4:
        return None
    for small in (2, *(divisor for divisor in range(4, math.isqrt(n) + 1, 4) if n % divisor == 0)):
        left, right = hadamard(small), hadamard(n // small)
        if left is not None and right is not None:
            return torch.kron(left, right)
    if _is_prime(n - 1):
        skew: Tensor = torch.eye(n, dtype=torch.int8) + _conference(n - 1, -1)
        return skew
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        symmetric = _conference(q, 1)
        plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        return torch.kron(symmetric, plus) + torch.kron(torch.eye(q + 1, dtype=torch.int8), diagonal)
    return None


def rotation(n: int, seed: int, fixes_ones: bool = False) -> Tensor:
    """An orthogonal matrix that spreads each channel over all others.

    Args:
        n: its size.
        seed: of the random signs or numbers.
        fixes_ones: whether a vector of equal elements has to stay what it is, so that the mean of a vector does, too.

    Returns:
        fp64 [n, n]: a Hadamard matrix over sqrt(n) with random signs of its rows (QuaRot, Ashkboos et al. 2024, section
        2), where one is known and may be taken; else the orthogonal factor of a random matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = None if fixes_ones else hadamard(n)
    if matrix is not None:
        signs = torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
        return matrix.double() * signs / math.sqrt(n)
    size = n - 1 if fixes_ones else n
    factor: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    if not fixes_ones:
        return factor
    # A reflection exchanges the first axis and the diagonal; between two of them the diagonal is left alone.
    mirror = torch.full((n,), -1 / math.sqrt(n), dtype=torch.float64)
    mirror[0] += 1
    reflection = torch.eye(n, dtype=torch.float64)
    if n > 1:
        reflection -= 2 * torch.outer(mirror, mirror) / mirror.dot(mirror)
    turned: Tensor = reflection @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), factor) @ reflection
    return turned


def rotate_blocks(values: Tensor, block: int) -> Tensor:
    """Multiplies each block of ``block`` values by Sylvester's Hadamard matrix over sqrt(block), its own inverse.

    It is the rotation of ``ops.quantize_per_token``, summed in another order.

    Args:
        values: floating point [..., K].
        block: a power of two that divides K, or 0 for no rotation.

    Returns:
        [..., K], at least fp32; ``values`` themselves for 0.
    """
    if block == 0:
        return values
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    matrix = hadamard(block)
    assert matrix is not None
    turn = matrix.to(wide) / math.sqrt(block)
    return (wide.reshape(*values.shape[:-1], values.shape[-1] // block, block) @ turn).reshape(values.shape)


def block_size(width: int) -> int:
    """The largest block that the ops rotate and that divides a width; 0 if there is none."""
    return next((block for block in BLOCKS if width % block == 0), 0)


def _conference(q: int, sign: int) -> Tensor:
    """Paley's conference matrix, int8 [q + 1, q + 1], with a zero diagonal; symmetric for sign 1, else skew."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0, *(1 if i in squares else -1 for i in range(1, q))], dtype=torch.int8)
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
