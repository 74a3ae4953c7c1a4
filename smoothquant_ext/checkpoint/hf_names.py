"""The names of tensors and layers in a transformers model and in its checkpoints, converted both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion

from ..errors import SmoothQuantError
from ..nn.experts import NAMES
from ..probing.experts import ExpertsLayout
from ..probing.trying import in_words


def plain_tensors(model: nn.Module, besides: tuple[type[nn.Module], ...]) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model by name, each storage once, without those of some modules.

    Of tied tensors, the one that ``from_pretrained`` ties the others to is kept.

    Args:
        model: the model.
        besides: the classes of the modules to leave out.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    named: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, besides):
            continue
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                named[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    kept: dict[str, Tensor] = {}
    storages = set()
    for name in sorted(named, key=lambda name: name in tied):
        tensor = named[name]
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or tensor.is_meta or identity not in storages:
            kept[name] = tensor
            storages.add(identity)
    return kept


def is_kept_in_fp32(model: nn.Module, tensor: str, dtype: torch.dtype = torch.float16) -> bool:
    """Whether transformers loads a tensor in fp32 though ``dtype`` is asked for."""
    kinds = {torch.float16: ("", "_strict"), torch.bfloat16: ("_strict",)}.get(dtype, ())
    patterns = [pattern for kind in kinds for pattern in getattr(model, f"_keep_in_fp32_modules{kind}", None) or ()]
    return any(re.search(pattern.replace("*", ".*"), tensor) for pattern in patterns)


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model as ``from_pretrained(dtype=dtype)`` does: what transformers keeps in fp32 stays.

    A model that has this dtype already is left as it is: what is fp32 in it is so on purpose.
    """
    if getattr(model, "dtype", None) == dtype:
        return
    kept = {
        name: tensor.data
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dtype == torch.float32 and is_kept_in_fp32(model, name, dtype)
    }
    model.to(dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept:
            tensor.data = kept[name]


def to_checkpoint_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts tensors from a model's names and shapes to those of its checkpoints: renames, splits and merges them.

    Raises:
        SmoothQuantError: transformers fails at that.
    """
    try:
        converted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    except (IndexError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise SmoothQuantError(
            f"transformers cannot say how {type(model).__name__} is stored ({in_words(error)}): quantize fewer of its "
            "layers with --only or --skip"
        ) from error
    return converted


def to_checkpoint_modules(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The name in checkpoints of each of the linear layers ``names`` of a model."""
    markers = {name: torch.empty(0, device="meta") for name in names}
    stored = to_checkpoint_tensors(model, {f"{name}.weight": marker for name, marker in markers.items()})
    by_identity = {id(marker): name.removesuffix(".weight") for name, marker in stored.items()}
    return {name: by_identity.get(id(marker), name) for name, marker in markers.items()}


def expert_names(model: nn.Module, path: str, reading: ExpertsLayout) -> dict[str, str]:
    """The names in checkpoints of an expert's layers, by the part of ``W8A8Experts`` that each is.

    Where transformers stores the experts fused, these are the names that llm-compressor gives them.

    Args:
        model: the model.
        path: the path of the module that holds all experts, still in floating point.
        reading: how its weights are arranged.
    """
    parts = reading.parts
    rows: dict[str, list[str]] = {}  # of the parameters of an expert with one channel: which layer each is
    for name in sorted(parts, key=lambda name: parts[name].rows.start or 0):
        rows.setdefault(parts[name].name, []).append(name)
    numbers = {name: float(number) for number, name in enumerate(parts)}
    tensors = {}
    for parameter, names in rows.items():
        weight = torch.tensor([[[numbers[name]] for name in names]], device="cpu")
        is_transposed = parts[names[0]].is_transposed
        tensors[f"{path}.{parameter}"] = weight.transpose(1, 2) if is_transposed else weight
    try:
        stored = to_checkpoint_tensors(model, tensors) if isinstance(model, PreTrainedModel) else {}
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError):  # a conversion that needs the real sizes
        stored = {}
    names_in_files = {
        name: match[1]
        for key, tensor in stored.items()
        if (match := re.fullmatch(r".*\.0\.(\w+)\.weight", key)) and tensor.numel() == 1
        for name in parts
        if numbers[name] == float(tensor)
    }
    return names_in_files if names_in_files.keys() == parts.keys() else {name: NAMES[name] for name in parts}


def to_model_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str | None]:
    """The name in the model of each tensor of a checkpoint, ``None`` for those that are split or merged on loading."""
    return {name: None if is_converted else place for name, (place, is_converted) in _places(model, names).items()}


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The name in the model of each tensor of a checkpoint; of those that are split or merged that of the whole."""
    return {name: place for name, (place, _) in _places(model, names).items()}


def _places(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    places: dict[str, tuple[str, bool]] = {}
    for name in names:
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, converter = rename_source_key(name, [], [], model.base_model_prefix, state)
        places[name] = target, converter is not None
    return places


def renamed_alone(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The name that each tensor of a checkpoint would have in the model if none were split or merged on loading."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in names}


class ExpertKey(NamedTuple):
    """A tensor of one layer of one expert: ``path.expert.layer.kind``."""

    path: str
    expert: int
    layer: str
    kind: str


def expert_key(name: str) -> ExpertKey | None:
    """The parts of the name of an expert's tensor, ``None`` for the name of another tensor."""
    match = _EXPERT_KEY.fullmatch(name)
    return ExpertKey(match[1], int(match[2]), match[3], match[4]) if match else None


_EXPERT_KEY = re.compile(r"(.+)\.(\d+)\.(\w+)\.(\w+)")


class ExpertRenaming(WeightRenaming):
    """A renaming that keeps transformers from merging the experts named in ``targets``: (path, layer) -> part.

    It is one dictionary because transformers would try one pattern per layer on each of tens of thousands of names.
    """

    __slots__ = ("targets",)

    def __init__(self, targets: Mapping[tuple[str, str], str]) -> None:
        super().__init__(source_patterns="expert", target_patterns="expert_")  # required, but not used
        self.targets = targets

    def reverse_transform(self) -> ExpertRenaming:
        """An empty renaming, because ``W8A8Experts`` names its tensors itself; transformers up to 5.3 asks for it."""
        return ExpertRenaming({})

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in the model, and this renaming's source pattern if that name differs from ``source_key``."""
        key = expert_key(source_key)
        if key is None or (key.path, key.layer) not in self.targets:
            return source_key, None
        layer = self.targets[key.path, key.layer]
        return f"{key.path}.expert_{key.expert}.{layer}.{key.kind}", self.source_patterns[0]
