"""The experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .declare import op

__all__ = ["w8a8_experts"]


@op("gemm", cuda=("quantize", "norm_activation", "experts_int8", "experts_fp8"))
def w8a8_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    rotate: Sequence[int] = (),
) -> Tensor:
    """The experts of a mixture of 8-bit MLPs: ``y = sum over slots s of top_k_weights[s] * mlp_e(x)``.

    e is ``top_k_index[s]``. Each token is quantized once, with a scale of its own, for all its experts. An expert
    computes what ``w8a8_mlp`` does, but its output stays fp32; the sum is taken in fp32, slot by slot, and rounded
    once. So a token's bits depend neither on the other tokens nor on the number of threads; in FP8 on a GPU, on how
    many tokens there are, which chooses the kernel. The GPU's kernels never wait for the device, so that a CUDA graph
    can capture them.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        top_k_index: int64 [..., slots]: the expert of each slot of a token, or E for none.
        top_k_weights: fp32, bf16 or fp16, of the same shape.
        weight: (gate, up, down) or (first, down) of E experts, 8 bits of one dtype, plain or packed (see
            ``prepack_weight``): [E, I, K], and [E, N, I] of down.
        weight_scale: fp32, one for each weight, of one element for each of its E * N rows, or of E where it is plain.
        bias: fp32, bf16 or fp16, one [E, N] for each weight, or ``None`` where the layers have none; ``None`` or an
            empty list if no layer has one.
        activation: as in ``w8a8_mlp``.
        rotate: the same.

    Returns:
        y, of the dtype of ``x`` [..., N]; 0 for a token without an expert. The GPU's kernels give NaN to a token with
        an index that is not in [0, E].

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, an index that is not in [0, E] and can be looked at
            without waiting, or another activation.
    """
    down, scale = weight[-1], weight_scale[-1]
    n = down.shape[1] if down.dim() == 3 else scale.numel() // down.shape[0]
    return x.new_empty((*x.shape[:-1], n))
