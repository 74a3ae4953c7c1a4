"""Checks that a checkpoint asks for no rotation at run time but of the inputs of its 8-bit layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn
from transformers import PreTrainedModel

from ..errors import SmoothQuantError
from .formats.base import CONVERT_AGAIN
from .formats.targets import LINEAR
from .naming import names_of_layers
from .reading import Checkpoint


def check_rotations(model: PreTrainedModel, checkpoint: Checkpoint, stored: Collection[str]) -> None:
    """Refuses a checkpoint of which only a part would be rotated at run time as it asks for.

    Args:
        model: the model, on the meta device, before its layers are replaced.
        checkpoint: with its layers, whose ``rotate`` is known.
        stored: the names of all 8-bit layers in the files, those included that the model has no place for.

    Raises:
        SmoothQuantError: a rotation means a module that is not in 8 bits, or no layer at all.
    """
    transforms = checkpoint.quantization.transforms
    if not transforms:
        return
    quantized = names_of_layers(model, checkpoint.layers)
    known = {name for all_names in quantized.values() for name in all_names}
    for names, classes, kind in _others(model, checkpoint, known):
        for transform in transforms:
            if transform.means(names, classes):
                raise SmoothQuantError(
                    f"{checkpoint.directory}: {transform.group} of its transform_config rotates at run time the input "
                    f"of {names[0]}, {kind} in floating point, which is not supported; {CONVERT_AGAIN}"
                )
    for transform in transforms:
        if not any(transform.means(quantized.get(name, (name,))) for name in stored):
            raise SmoothQuantError(
                f"{checkpoint.directory}: {transform.group} of its transform_config rotates at run time the inputs of "
                f"{', '.join(transform.targets)}, which is the name of no 8-bit layer here; {CONVERT_AGAIN}"
            )


def _others(
    model: PreTrainedModel, checkpoint: Checkpoint, quantized: set[str]
) -> Iterator[tuple[tuple[str, ...], set[str], str]]:
    """The names, the names of the classes and a description of everything besides the layers ``quantized``.

    A matrix may have been a linear layer where the checkpoint was made, as a router or an expert, whatever it is here.
    """
    modules = dict(model.named_modules())
    matrices = [
        name.removesuffix(".weight")
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name.removesuffix(".weight") not in quantized
    ]
    of_matrices = names_of_layers(model, matrices)
    for names in of_matrices.values():
        module = next((modules[name] for name in names if name in modules), None)
        classes = _classes(module)
        if not isinstance(module, nn.Embedding):
            classes |= set(LINEAR)
        yield names, classes, "a matrix" if module is None else type(module).__name__
    known = {name for names in of_matrices.values() for name in names} | quantized
    for path, module in modules.items():
        if path and path not in known:
            yield (path,), _classes(module), type(module).__name__


def _classes(module: nn.Module | None) -> set[str]:
    return (
        {kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module)} if module is not None else set()
    )
