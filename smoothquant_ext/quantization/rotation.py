"""Rotates the activations of a model, so that the outliers of a few channels are spread over all.

Two rotations cost nothing at run time, because both they and their inverses are folded into weights (QuaRot, Ashkboos
et al. 2024, section 4; SpinQuant's names):

- **R1, the residual stream**: whatever is added to it is rotated, whatever reads it is rotated back. The weights of the
  norms in between are folded into the readers before, since they scale channel by channel. A norm that subtracts the
  mean commutes with rotations that leave a vector of equal elements alone.
- **R2, the heads of attention**: the values are rotated, and the projection behind the attention is rotated back. A
  rotation within a head commutes with the averages that attention takes over tokens.

Each is found by running the blocks (``probing/residual.py``, ``probing/smoothing_groups.py``), folded into a copy of
the block in a higher precision, and dropped if the block then computes something else.

- **R4, what else layers read**, such as the input of ``down_proj``, behind an activation function. No layer before them
  can be rotated, so the kernels rotate the input while they quantize it, and the weight is rotated alike. Nothing
  changes in the model in floating point: it is a property of the 8-bit layer. The input of any layer can be rotated so,
  that of a norm's reader too (QuIP, Chee et al. 2023, rotates them all). With a scale per token it is smoothed before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from ..probing.blocks import Batch, probe_batch
from ..probing.structure import Structure
from .head_rotation import rotate_heads_
from .online_rotation import find_all, find_online
from .placement import Placement
from .report import Rotations
from .residual_rotation import ResidualRotator


def rotate_(
    structure: Structure,
    batch: Batch,
    kinds: Collection[str],
    placement: Placement,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    seed: int = 0,
) -> Rotations:
    """Rotates a model, whose parameters are exchanged for rotated ones; what cannot be rotated stays as it is.

    Args:
        structure: of the model in floating point.
        batch: whose first tokens show how the model is wired.
        kinds: some of ``recipe.ROTATIONS``.
        placement: where the blocks run.
        progress: wraps the iterable of blocks.
        seed: of the rotations.
    """
    result = Rotations()
    blocks = placement.blocks_of(structure).blocks
    hints: dict[tuple[type, str, int], Any] = {}
    headless: set[tuple[type, str, int]] = set()
    rotator = ResidualRotator(structure, blocks) if "residual" in kinds else None
    for name in progress(structure.called):
        if rotator is not None and not rotator.refused:
            rotator.examine(name, seed)
        if "heads" in kinds:
            rotate_heads_(structure, blocks[name], seed + 1, hints, headless, result)
        if "inputs" in kinds:
            result.inputs |= find_all(blocks[name], result.heads)
        elif "down" in kinds:
            result.inputs |= find_online(blocks[name], result.heads)
    if rotator is not None:
        with placement.running(structure):
            rotator.rotate_(probe_batch(batch), result)
    return result
