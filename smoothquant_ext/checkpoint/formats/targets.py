"""Which layers a list of targets means: the rule of compressed-tensors, for every name that a layer has.

A target is the name of a layer, ``re:`` and a regular expression that matches from the start of the name, or the name
of a class. Several may match a layer, and then it is not their order that counts (``compressed_tensors.utils.match``,
0.20): names go before expressions, expressions before classes; expressions are tried in alphabetical order, and a
target that stands in two groups belongs to the last. vLLM 0.33 differs in one point: it tries names and expressions in
the order of the file. The tool that wrote the file is followed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

LINEAR = ("Linear", "Module")
"""The classes of a linear layer that a target may name."""

# What a model of several modalities puts before the names of its language model, and what versions of transformers and
# of the model's authors leave out.
_WRAPPERS = ("model", "language_model", "text_model")
_PREFIXES = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
# vLLM's layers that join several of a checkpoint's.
_JOINED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


class Targets:
    """A list of targets, compiled: a mixture has tens of thousands of layers to compare with it."""

    def __init__(self, targets: Iterable[str]) -> None:
        distinct = list(dict.fromkeys(targets))
        self._plain = frozenset(target for target in distinct if not target.startswith("re:"))
        self._patterns = [(target, re.compile(target[3:])) for target in sorted(distinct) if target.startswith("re:")]

    def of_name(self, names: Collection[str]) -> list[str]:
        """The targets that match one of the names of a layer, the first of which counts."""
        plain = [name for name in names if name in self._plain]
        return plain + [target for target, pattern in self._patterns if any(pattern.match(name) for name in names)]

    def of_class(self, classes: Collection[str]) -> list[str]:
        """The targets that are a class of a layer, the first of which counts."""
        return [target for target in sorted(classes) if target in self._plain]

    def of_layer(self, names: Collection[str], classes: Collection[str]) -> list[str]:
        """The targets that may be meant for a layer, the first of which counts.

        More than one is returned where several names or expressions match, which versions of compressed-tensors and
        vLLM order differently. Another tool's spelling of a name counts only where no name does, a class last.
        """
        others = spellings(names)
        return (
            self.of_name(names)
            or self.of_name(others)
            or [name for name in joined([*names, *others]) if name in self._plain]
            or self.of_class(classes)[:1]
        )

    def may_mean(self, names: Collection[str]) -> bool:
        """Whether a target may be meant for a layer that it does not match.

        It may be another tool's spelling of its name, or the name of a module that holds it or of a layer that vLLM
        joins it with.
        """
        everything = [*names, *spellings(names)]
        if self.of_name(everything):
            return True
        holders = [*joined(everything), *(parent for name in everything for parent in _parents(name))]
        return not self._plain.isdisjoint(holders)


def spellings(names: Collection[str]) -> list[str]:
    """Names that other tools give a layer with these names.

    They differ in what comes before the names of a language model, ``model.language_model.layers`` and
    ``language_model.model.layers``, and in whether ``model.`` does, ``visual`` and ``model.visual``.
    """
    bares = []
    for name in names:
        parts = name.split(".")
        while len(parts) > 1 and parts[0] in _WRAPPERS:
            del parts[0]
        bares.append(".".join(parts))
    found = dict.fromkeys(prefix + bare for bare in bares for prefix in _PREFIXES)
    return [name for name in found if name not in names]


def joined(names: Iterable[str]) -> list[str]:
    """The names of the layers in which vLLM joins those with these names, if it does."""
    split = [name.rpartition(".") for name in names]
    return [f"{parent}{dot}{_JOINED[leaf]}" for parent, dot, leaf in split if leaf in _JOINED]


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name
