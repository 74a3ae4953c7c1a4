"""The interface of a checkpoint format, and functions that the parsers of several formats share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SmoothQuantError
from ...scheme import Scheme, dtype_name
from .targets import LINEAR, Targets

if TYPE_CHECKING:
    from torch import Tensor

    from ...nn.linear import W8A8Linear

CONVERT_AGAIN = "quantize the original model with smoothquant-ext instead"
LAYERS, EXPERTS = "layers", "experts"
"""What may be rotated at run time: the inputs of linear layers, and of those of experts."""
WITHOUT_ROTATION = "which --rotate residual,heads does without"


class FloatWeights(SmoothQuantError):
    """A ``quantization_config`` that quantizes no weights: the model is one in floating point."""


class NotExecutable(SmoothQuantError):
    """A configuration asks for something at run time that is not done here, and without which outputs are wrong."""


@dataclass(frozen=True)
class TensorNames:
    """The suffixes of a layer's tensors, besides ``weight`` and ``bias``; ``None`` where the format has no such tensor.

    The fields are the buffers of ``W8A8Linear``, and ``weight_zero_point``, which must be zero.
    """

    weight_scale: str = "weight_scale"
    input_scale: str | None = None
    input_zero_point: str | None = None
    smooth: str | None = None
    weight_zero_point: str | None = None

    @property
    def is_state_dict(self) -> bool:
        """Whether every tensor has the name of its buffer, so that a state dict is already in this format."""
        return all(name in (None, buffer) for buffer, name in asdict(self).items())


class Format:
    """One checkpoint format: reads its ``quantization_config`` and, if it is also written, writes it.

    A format is a subclass in a file of its own and an entry of ``registry.FORMATS``.

    Attributes:
        name: what ``save(format=...)`` and ``--format`` call it.
        quant_method: the ``quant_method`` of its ``quantization_config``.
        tensors: the names of a layer's tensors.
        config_file: the file that holds the configuration where config.json has none, ``None`` for most formats.
        config_file_goes_first: whether that file is read even where config.json has a configuration.
        weight_scale_is_per_channel: whether a weight's scale is [N, 1] even where the scheme has one scale per tensor.
        dtypes: the 8-bit dtypes it can store; empty for a format that is only read.
        rotates: what it can say is rotated at run time, of ``LAYERS`` and ``EXPERTS``.
        shares_head: whether a token embedding can read the weight of an 8-bit output embedding.
        rotations_ignored_by: the programs that read it without doing these rotations, so that their output is nonsense.
        read_by: the programs that read it, for ``--help``; of a format that is written.
        how_to_run: the paragraph of the model card that says what runs the checkpoint, Markdown, with ``{name}`` for
            the model's name; of a format that is written.
        how_to_run_rotated: the same for a model that is rotated at run time, if others run such models differently.
    """

    name: str
    quant_method: str
    tensors = TensorNames()
    config_file: str | None = None
    config_file_goes_first = False
    weight_scale_is_per_channel = False
    dtypes: tuple[torch.dtype, ...] = ()
    rotates: tuple[str, ...] = ()
    shares_head = False
    rotations_ignored_by = ""
    read_by = ""
    how_to_run = how_to_run_rotated = ""

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether ``config`` is a ``quantization_config`` of this format."""
        return bool(config.get("quant_method") == self.quant_method)

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        """Reads a ``quantization_config`` that the format recognizes.

        Args:
            config: the ``quantization_config``.
            where: the name of its file, for messages.

        Raises:
            SmoothQuantError: it describes something other than W8A8 with scales per channel or tensor, which it names.
        """
        raise NotImplementedError

    def variant(self, tensors: Collection[str]) -> Format:
        """The format with the tensor names that a checkpoint uses, where several tools share a ``quant_method``.

        Args:
            tensors: the names of all tensors of the checkpoint.
        """
        return self

    def cannot_store(
        self, schemes: Sequence[Scheme], explicit: bool, rotated: Collection[str] = (), shared: bool = False
    ) -> str:
        """Why the format cannot store a model, to follow its name in a sentence; ``""`` if it can.

        Args:
            schemes: the schemes of the model's layers.
            explicit: whether a layer has an explicit smoothing scale.
            rotated: what is rotated at run time, of ``LAYERS`` and ``EXPERTS``.
            shared: whether the token embedding reads the weight of an 8-bit output embedding.
        """
        if shared and not self.shares_head:
            return "cannot store a token embedding in 8 bits, which --head float avoids"
        if explicit and self.tensors.smooth is None:
            return "has no place for explicit smoothing scales"
        for scheme in schemes:
            if scheme.dtype not in self.dtypes:
                return f"cannot store scheme {scheme.name!r} ({dtype_name(scheme.dtype)})"
            if scheme.is_static and self.tensors.input_scale is None:
                return f"has no static activation scales, which scheme {scheme.name!r} needs"
            if not scheme.symmetric and self.tensors.input_zero_point is None:
                return f"has symmetric activations only, and scheme {scheme.name!r} has not"
        if lacking := sorted(set(rotated) - set(self.rotates)):
            return f"has no place for rotations of {' and '.join(lacking)} at run time, {WITHOUT_ROTATION}"
        return ""

    def quantization_config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of config.json.

        Args:
            schemes: the scheme of each quantized layer, by its name in the checkpoint; ``cannot_store`` said ``""``.
            ignore: the names of the linear layers that stay in floating point.
        """
        raise NotImplementedError

    def rotation_config(self, blocks: Mapping[str, int], ignore: Sequence[str]) -> dict[str, Any]:
        """What ``quantization_config`` says besides of rotations at run time, nothing if there are none.

        Args:
            blocks: the size of the blocks of each quantized layer's input that are rotated at run time, 0 for none, by
                every name of the layer; 0 for other modules, too.
            ignore: as in ``quantization_config``.
        """
        return {}

    def matrices(self, blocks: Mapping[str, int]) -> dict[str, Tensor]:
        """The matrices of rotations that a checkpoint stores, by name.

        Args:
            blocks: as in ``rotation_config``, by the name of each layer in the checkpoint alone.
        """
        return {}

    def stored_scale(self, layer: W8A8Linear) -> Tensor:
        """The weight's scale as the format stores it, fp32 [N, 1] or [1], whether or not the layer is packed."""
        scale = layer.weight_scale.reshape(-1, 1)
        if layer.scheme.weight == "channel" or self.weight_scale_is_per_channel:
            return scale.expand(layer.out_features, 1)
        return scale[0]

    def small_tensors(self, layer: W8A8Linear) -> dict[str, Tensor]:
        """The tensors of a layer besides its weight, by the suffixes of their names."""
        zero_point = layer.input_zero_point
        tensors = {
            self.tensors.weight_scale: self.stored_scale(layer),
            self.tensors.input_scale: layer.input_scale,
            self.tensors.input_zero_point: None if zero_point is None else zero_point.to(torch.int8),
            self.tensors.smooth: layer.smooth,
            "bias": layer.bias,
        }
        return {suffix: tensor for suffix, tensor in tensors.items() if suffix is not None and tensor is not None}


@dataclass(frozen=True)
class Transform:
    """A rotation of the inputs of layers at run time.

    Attributes:
        group: its name in the configuration.
        targets: the layers, as ``targets`` describes.
        ignore: those of the targets that are not meant.
        block: how many channels are rotated together; ``None`` for all of a layer.
    """

    group: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    block: int | None

    def means(self, names: Collection[str], classes: Collection[str] = LINEAR) -> bool:
        """Whether a layer with these names, that in the files first, is rotated."""
        return bool(self._targets.of_layer(names, classes) and not self._ignore.of_layer(names, classes))

    @property
    def matrix(self) -> str:
        """What follows the name of a layer in the name of its stored matrix."""
        return f"{self.group}_input.weight"

    @cached_property
    def _targets(self) -> Targets:
        return Targets(self.targets)

    @cached_property
    def _ignore(self) -> Targets:
        return Targets(self.ignore)


@dataclass(frozen=True)
class QuantizationMap:
    """The content of a ``quantization_config``: the format, and the scheme of each layer.

    A layer has several names, in the files and in the model, and a configuration may mean any of them: the methods take
    them all, that in the files first.

    Attributes:
        fmt: the format.
        groups: (targets, scheme); a target is what ``targets`` describes. The scheme is ``None`` where the group
            quantizes something other than weights.
        ignore: targets that stay in floating point whatever ``groups`` says.
        complete: true if every linear layer that is targeted and not ignored must be quantized, and the granularity
            of the scales is that of ``groups``; else the files decide both.
        notes: what is read differently from what the configuration asks for, a sentence each.
        weight_only: if weights have 8 bits and activations none, who reads that; ``groups`` then quantize activations
            per token, which is another model than that in the files. Empty for W8A8.
        transforms: the rotations of inputs at run time.
    """

    fmt: Format
    groups: tuple[tuple[tuple[str, ...], Scheme | None], ...]
    ignore: tuple[str, ...] = ()
    complete: bool = False
    notes: tuple[str, ...] = ()
    weight_only: str = ""
    transforms: tuple[Transform, ...] = ()

    def ignores(self, *names: str, classes: Collection[str] = LINEAR) -> bool:
        """Whether the configuration says that a linear layer stays in floating point."""
        return bool(self._ignore.of_name(names) or self._ignore.of_class(classes))

    def scheme_of(self, *names: str, classes: Collection[str] = LINEAR) -> Scheme | None:
        """The scheme of a linear layer, ``None`` if it is ignored or not targeted."""
        return next(iter(self.schemes_of(*names, classes=classes)), None)

    def schemes_of(self, *names: str, classes: Collection[str] = LINEAR) -> list[Scheme]:
        """The schemes that a linear layer may have, the first being that of compressed-tensors' rule.

        There are several where names and expressions of several groups match; the files show which was meant.
        """
        if self.ignores(*names, classes=classes):
            return []
        return [self._schemes[target] for target in self._targets.of_layer(names, classes)]

    def expects(self, *names: str, classes: Collection[str] = LINEAR) -> bool:
        """Whether a linear layer whose weight is in floating point contradicts the configuration.

        It need not if a name in ``ignore`` may be meant for the layer, or a group that quantizes no weights.
        """
        if not self.complete or self.ignores(*names, classes=classes) or self._ignore.may_mean(names):
            return False
        targets = self._all_targets.of_name(names) or self._all_targets.of_class(classes)[:1]
        return bool(targets) and all(self._all_schemes[target] is not None for target in targets)

    @cached_property
    def _ignore(self) -> Targets:
        return Targets(self.ignore)

    @cached_property
    def _all_schemes(self) -> dict[str, Scheme | None]:
        return {target: scheme for targets, scheme in self.groups for target in targets}

    @cached_property
    def _all_targets(self) -> Targets:
        return Targets(self._all_schemes)

    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        return {target: scheme for targets, scheme in self.groups if scheme is not None for target in targets}

    @cached_property
    def _targets(self) -> Targets:
        return Targets(self._schemes)


def all_linears(scheme: Scheme) -> tuple[tuple[tuple[str, ...], Scheme], ...]:
    """The groups of a map that gives every linear layer the same scheme."""
    return ((("Linear",), scheme),)


def parse_targets(value: object, where: str) -> tuple[str, ...]:
    """A list of names and ``re:`` patterns, ``None`` being an empty one.

    Raises:
        SmoothQuantError: it is something else, or holds an invalid regular expression.
    """
    value = [] if value is None else value
    try:
        if isinstance(value, list) and all(isinstance(target, str) for target in value):
            for target in value:
                re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
            return tuple(value)
    except re.error:
        pass
    raise SmoothQuantError(f"{where} is {value!r}, expected a list of names or 're:' patterns; {CONVERT_AGAIN}")


CACHE_NOTE = "the cache of keys and values is kept in floating point, not in 8 bits"


def cache_notes(scheme: object) -> tuple[str, ...]:
    """The note on an 8-bit cache of keys and values, if the configuration has a ``scheme`` for one."""
    return (CACHE_NOTE,) if scheme else ()


def not_read(subject: str, content: str, readers: str) -> SmoothQuantError:
    """The error for a checkpoint that is W8A8, but stored as only ``readers`` read it: ``subject`` has ``content``."""
    return SmoothQuantError(f"{subject} has {content}, which is read by {readers} only; {CONVERT_AGAIN}")


def not_w8a8(subject: str, content: str, readers: str) -> SmoothQuantError:
    """The error for a checkpoint that others can read: ``subject`` has ``content``."""
    return SmoothQuantError(f"{subject} has {content}, which is not W8A8 but is read by {readers}; {CONVERT_AGAIN}")
