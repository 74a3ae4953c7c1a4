"""Rotations at run time, as compressed-tensors' ``transform_config`` describes them (``compressed_tensors.transform``).

    {"config_groups": {"R4": {"type": "hadamard", "head_dim": 128, "randomize": false, "precision": "torch.float32",
     "apply": [{"location": "input", "targets": ["re:(.*\\.)?down_proj$"], "ignore": [], "inverse": false}]}}}

A transform at ``input`` multiplies each block of ``head_dim`` channels of a layer's input by Sylvester's Hadamard
matrix over sqrt(head_dim) before it is quantized, which is ``W8A8Linear.rotate``. Without ``head_dim`` the block is the
whole input. Those at ``weight_input`` and ``weight_output`` are in the stored weights already. The matrix may be
stored, unscaled, as ``<layer>.<group>_input.weight``; one that several layers share is stored once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import SmoothQuantError
from ...hadamard import BLOCKS, hadamard
from .base import CONVERT_AGAIN, Transform, not_read, parse_targets

CONFIG_KEY = "transform_config"
INPUT, OFFLINE = "input", ("weight_input", "weight_output")
# What is transformed at run time at the other locations, and by other matrices, and who does so.
OTHER_LOCATIONS = {
    "output": ("the outputs of layers", "vLLM"),
    "q_attn": ("the queries of attention", "compressed-tensors"),
    "k_cache": ("the keys of attention", "compressed-tensors"),
}
OTHER_MATRICES = {"random-hadamard": "vLLM", "random-matrix": "vLLM"}
GROUP_KEYS = {"type", "apply", "randomize", "requires_grad", "head_dim", "precision"}
APPLY_KEYS = {"targets", "location", "inverse", "ignore"}


def parse_transforms(config: object, where: str) -> tuple[Transform, ...]:
    """Reads the value of ``transform_config``; none for ``None`` and for transforms of weights alone.

    Raises:
        SmoothQuantError: it holds a transform at run time that is not a rotation of inputs by Sylvester's matrix in
            blocks of ``BLOCKS``, or something that it is not known to hold.
    """
    if not config:
        return ()
    where = f"{where}: {CONFIG_KEY}"
    groups = _object(config, where, {"config_groups"}).get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise SmoothQuantError(f"{where} has config_groups {groups!r}, expected an object; {CONVERT_AGAIN}")
    return tuple(
        transform
        for name, group in groups.items()
        for transform in _parse_group(str(name), _object(group, f"{where}: {name}", GROUP_KEYS), f"{where}: {name}")
    )


def block_of(transforms: Iterable[Transform], names: Collection[str], width: int, where: str) -> int:
    """How many channels of an 8-bit layer's input are rotated together, 0 for none.

    Args:
        transforms: from ``parse_transforms``.
        names: all names of the layer, that in the files first.
        width: K.
        where: the name of its file, for messages.

    Raises:
        SmoothQuantError: its input is rotated twice, or in blocks of a size that cannot be.
    """
    found = [transform for transform in transforms if transform.means(names)]
    if not found:
        return 0
    layer = next(iter(names))
    if len(found) > 1:
        groups = " and ".join(transform.group for transform in found)
        raise SmoothQuantError(
            f"{where}: the input of {layer} is transformed twice, by {groups}, which is not supported; {CONVERT_AGAIN}"
        )
    block = width if found[0].block is None else found[0].block
    if block not in BLOCKS or width % block:
        raise SmoothQuantError(
            f"{where}: {found[0].group} rotates the input of {layer}, {width} wide, in blocks of {block}, expected a "
            f"divisor among {_list(BLOCKS)}; {CONVERT_AGAIN}"
        )
    return block


def is_sylvester(matrix: Tensor) -> bool:
    """Whether a stored matrix [block, block], of any dtype, is the one that the ops rotate by, unscaled."""
    expected = hadamard(len(matrix))
    return expected is not None and torch.equal(matrix.float(), expected.float())


def transform_config(blocks: Mapping[str, int], others: Collection[str]) -> dict[str, Any]:
    """The value of ``transform_config``, ``{}`` if nothing is rotated at run time.

    vLLM renames the layers of a model of several modalities, but not these targets. So they are expressions for the end
    of a name, the shortest that mean no other layer.

    Args:
        blocks: the size of the blocks of each quantized layer's input that are rotated, 0 for none, by every name.
        others: the names of the other linear layers.
    """
    names = [*blocks, *(name for name in others if name not in blocks)]
    groups = {
        group: {
            "type": "hadamard",
            "apply": [
                {
                    "targets": _expressions([name for name in blocks if blocks[name] == block], names),
                    "location": INPUT,
                    "inverse": False,
                    "ignore": [],
                }
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": block,
            "precision": "torch.float32",
        }
        for block, group in _groups(blocks).items()
    }
    return {"config_groups": groups} if groups else {}


def stored_matrices(blocks: Mapping[str, int]) -> dict[str, Tensor]:
    """The matrices that a checkpoint stores, fp32 [block, block], by name: each once, at the first layer that has it.

    Args:
        blocks: as in ``transform_config``, by the names in the checkpoint alone.
    """
    matrices = {}
    for block, group in _groups(blocks).items():
        layer = next(name for name in blocks if blocks[name] == block)
        matrix = hadamard(block)
        assert matrix is not None
        matrices[f"{layer}.{Transform(group, (), (), block).matrix}"] = matrix.float()
    return matrices


def _groups(blocks: Mapping[str, int]) -> dict[int, str]:
    """The name of the group of each size of blocks; R4 is what SpinQuant (Liu et al. 2024) calls such a rotation."""
    sizes = sorted(set(blocks.values()) - {0})
    return {size: "R4" if len(sizes) == 1 else f"R4_{size}" for size in sizes}


def _parse_group(name: str, group: Mapping[str, Any], where: str) -> Iterator[Transform]:
    entries = group.get("apply") or []
    if not isinstance(entries, list):
        raise SmoothQuantError(f"{where} has apply {entries!r}, expected a list; {CONVERT_AGAIN}")
    for entry in (_object(entry, f"{where}: apply", APPLY_KEYS) for entry in entries):
        location = entry.get("location")
        if location in OFFLINE:
            continue
        if str(location) in OTHER_LOCATIONS:
            what, readers = OTHER_LOCATIONS[str(location)]
            raise not_read(where, f"a transform of {what} at run time", readers)
        if location != INPUT:
            raise SmoothQuantError(f"{where} has the location {location!r}, expected {INPUT!r}; {CONVERT_AGAIN}")
        _check_kind(group, where)
        targets, ignore = (
            parse_targets([value] if isinstance(value, str) else value, f"{where}: {key}")
            for key, value in (("targets", entry.get("targets")), ("ignore", entry.get("ignore")))
        )
        if targets:
            yield Transform(name, targets, ignore, group.get("head_dim"))


def _check_kind(group: Mapping[str, Any], where: str) -> None:
    """Refuses a group whose matrix is not Sylvester's, which is its own inverse, in blocks that the ops rotate."""
    kind = str(group.get("type"))
    if kind in OTHER_MATRICES:
        raise not_read(where, f"a transform of inputs at run time by a matrix of type {kind!r}", OTHER_MATRICES[kind])
    if kind != "hadamard":
        raise SmoothQuantError(f"{where} has the type {kind!r}, expected 'hadamard'; {CONVERT_AGAIN}")
    if group.get("randomize"):
        raise not_read(where, "a transform of inputs at run time by randomized matrices", "compressed-tensors")
    block = group.get("head_dim")
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block not in BLOCKS):
        raise SmoothQuantError(f"{where} has head_dim {block!r}, expected one of {_list(BLOCKS)}; {CONVERT_AGAIN}")


def _object(value: object, where: str, keys: set[str]) -> Mapping[str, Any]:
    """``value``, if it is an object with no other keys: one that is not known may change what a transform means."""
    if not isinstance(value, Mapping):
        raise SmoothQuantError(f"{where} is {value!r}, expected an object; {CONVERT_AGAIN}")
    unknown = sorted(str(key) for key in value if key not in keys and value[key] is not None)
    if unknown:
        raise SmoothQuantError(f"{where} has {unknown[0]}, which is not known; {CONVERT_AGAIN}")
    return value


def _expressions(wanted: Collection[str], names: Collection[str]) -> list[str]:
    """Targets that match all of the names ``wanted`` and no other of ``names``."""
    left, wanted, targets = dict.fromkeys(wanted), frozenset(wanted), []
    others = [name for name in names if name not in wanted]
    failed: set[str] = set()
    while left:
        name = next(iter(left))
        for expression in _ends(name):
            pattern = re.compile(expression)
            if expression in failed or any(pattern.match(other) for other in others):
                failed.add(expression)
                continue
            targets.append(f"re:{expression}")
            left = {other: None for other in left if not pattern.match(other)}
            break
        else:  # another layer's name ends in the whole of this one
            targets.append(name)
            del left[name]
    return targets


def _ends(name: str) -> Iterator[str]:
    """Expressions for names that end as ``name`` does, the shortest first, with any numbers and with its own."""
    parts = name.split(".")
    for start in reversed(range(len(parts))):
        end = parts[start:]
        exact = [re.escape(part) for part in end]
        any_number = [r"\d+" if part.isdigit() else re.escape(part) for part in end]
        last = max((index for index, part in enumerate(end) if part.isdigit()), default=0)
        any_last = exact[:last] + any_number[last : last + 1] + exact[last + 1 :]
        for parts_of_end in dict.fromkeys((tuple(any_number), tuple(any_last), tuple(exact))):
            yield r"(.*\.)?" + r"\.".join(parts_of_end) + "$"


def _list(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))
