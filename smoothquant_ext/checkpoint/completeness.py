"""Refuses a model whose files do not hold exactly the tensors that its class needs.

transformers fills what is missing with random numbers and leaves out what it has no place for. Every loader comes here.
"""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from ..compat import quiet_transformers
from ..errors import SmoothQuantError
from .hf_names import to_model_names

SHOWN = 4  # families of names in a sentence
_REMEDY = "copy or download the model again, or correct config.json"

# Buffers that older versions of transformers, and trainers that store every buffer, keep in files; models compute them.
_COMPUTED = re.compile(r"(^|\.)(inv_freq|(cos|sin)_cached|rope\.freqs|position_ids|masked_bias)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # the causal mask, unless the attention has a weight of that name
# Frequencies of rotary embeddings in a GGUF file: transformers takes them from the configuration.
_ROPE = r"^rope_(freqs|factors_\w+)\.weight$"
# Zero points, which are zero, and scales of caches that are kept in floating point.
_DISPENSABLE = re.compile(r"(_zero_point|\.[kvq]_scale|\.kv_scale|\.output_scale|\.input_scale_ub)$")

# Who puts such a prefix before the names of all tensors.
_PREFIXES: Mapping[str, str] = {
    "module.": "as torch's DataParallel does",
    "_orig_mod.": "as torch.compile does",
    "base_model.model.": "as PEFT does",
    "_forward_module.": "as Lightning does",
}


def load_complete(
    model_class: Any, source: object, drop: Sequence[str] = (), stored: Collection[str] = (), **options: Any
) -> PreTrainedModel:
    """``model_class.from_pretrained(source, **options)``, for complete models only.

    Args:
        model_class: a model class or auto class of transformers.
        source: of the model, as ``from_pretrained`` takes it.
        drop: shell patterns for names of tensors that the model has no place for and that may be left out.
        stored: the names of all tensors in the files, if the caller knows them.
        options: for ``from_pretrained``.

    Raises:
        SmoothQuantError: as ``check_complete``.
    """
    model, info = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    where = str(Path(str(source)) / options["gguf_file"]) if "gguf_file" in options else str(source)
    check_complete(where, model, info, drop, stored)
    return cast(PreTrainedModel, model)


@contextmanager
def only_complete_models(drop: Sequence[str] = ()) -> Iterator[None]:
    """Within it every ``from_pretrained`` of a model of transformers is ``load_complete``, whoever calls it."""
    former = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, source: object, *arguments: Any, **options: Any) -> PreTrainedModel:
        def load(_: object, **more: Any) -> Any:
            return former.__func__(cls, source, *arguments, **more)

        with quiet_transformers():  # its report of what is missing
            return load_complete(_Loader(load), source, drop, **options)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = former


class _Loader:
    def __init__(self, from_pretrained: Callable[..., Any]) -> None:
        self.from_pretrained = from_pretrained


def check_complete(
    where: str,
    model: PreTrainedModel,
    info: Mapping[str, Any],
    drop: Sequence[str] = (),
    stored: Collection[str] = (),
) -> None:
    """Checks what transformers says about a model that it has loaded.

    Args:
        where: the model's name, for messages.
        model: the model.
        info: ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``, from ``output_loading_info``.
        drop: shell patterns for names of tensors that may be left out.
        stored: the names of all tensors in the files, if known. Those that transformers leaves out by its own lists,
            which are not in ``info``, get a warning.

    Raises:
        SmoothQuantError: a tensor is missing, has another shape, or has no place in the model and matches no pattern of
            ``drop``.
    """
    kind = type(model).__name__
    needed = set(model.state_dict())
    unexpected = {name for name in info["unexpected_keys"] if not _is_computed(name, needed)}
    unexpected = {name for name in unexpected if not re.search(_ROPE, name)}
    if info["missing_keys"]:
        raise SmoothQuantError(_missing(where, kind, info["missing_keys"], unexpected))
    if info["mismatched_keys"]:
        raise SmoothQuantError(_mismatched(where, info["mismatched_keys"]))
    listed = re.compile("|".join([_ROPE, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]))
    known = {name for name in stored if listed.search(name) and not _is_computed(name, needed)}
    known = {name for name, renamed in to_model_names(model, known).items() if renamed not in needed}
    for pattern in drop:
        if not _matches(pattern, known | set(info["unexpected_keys"])):
            what = "names tensors that the model needs" if _matches(pattern, needed) else "matches no tensor"
            warnings.warn(f"{where}: the pattern {pattern!r} to drop {what}, so it has no effect", stacklevel=3)
    left, known = ({name for name in names if not is_dropped(name, drop)} for names in (unexpected, known))
    if left:
        raise SmoothQuantError(unexpected_tensors(where, kind, left, needed))
    if known:
        warnings.warn(f"{_unexpected(where, kind, known)}: left out", stacklevel=3)


def check_loaded(where: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """``check_complete`` where nobody can say what may be dropped: unexpected tensors get a warning.

    Raises:
        SmoothQuantError: a tensor is missing.
    """
    needed = set(model.state_dict())
    unexpected = {name for name in info["unexpected_keys"] if not _is_computed(name, needed)}
    if info["missing_keys"]:
        raise SmoothQuantError(_missing(where, type(model).__name__, info["missing_keys"], unexpected))
    if unexpected:
        warnings.warn(f"{_unexpected(where, type(model).__name__, unexpected)}: left out", stacklevel=3)


def name_families(names: Iterable[str]) -> str:
    """The first names in natural order; those that differ in numbers alone are shown as one, with their count."""
    families: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        families.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    shown = [_family(family, members) for family, members in list(families.items())[:SHOWN]]
    more = f" and {counted(len(families) - SHOWN, 'more kind')}" if len(families) > SHOWN else ""
    return ", ".join(shown) + more


def _missing(where: str, kind: str, missing: Collection[str], unexpected: Collection[str]) -> str:
    prefix = _prefix(missing, unexpected)
    if prefix is not None:
        who = f", {_PREFIXES[prefix]}" if prefix in _PREFIXES else ""
        return (
            f"{where}: the names of {counted(len(unexpected), 'tensor')} start with {prefix!r}{who}, so {kind} finds "
            "none of them; save the model below that wrapper, or rename the tensors"
        )
    lacks = (
        f"{where} lacks {counted(len(missing), 'tensor')} that its configuration calls for: {name_families(missing)}"
    )
    if unexpected:
        lacks += f"; it holds {len(unexpected)} that {kind} has no place for: {name_families(unexpected)}"
    return f"{lacks}; {_REMEDY}"


def _mismatched(where: str, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    shapes = {name: (list(stored), list(expected)) for name, stored, expected in mismatched}
    first = min(shapes, key=_natural)
    stored, expected = shapes[first]
    more = f", and {counted(len(shapes) - 1, 'other tensor')} of another shape" if len(shapes) > 1 else ""
    return f"{where}: {first} is {stored}, but config.json makes it {expected}{more}; {_REMEDY}"


def _prefix(missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """What stands before the name of each unexpected tensor, if those without it are the missing ones."""
    wanted = set(missing)
    prefixes = {name[: -len(suffix)] for name in unexpected for suffix in _suffixes(name) if suffix in wanted}
    common = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in unexpected)]
    return min(common, key=len) if common else None


def _suffixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[index:]) for index in range(1, len(parts)))


def _unexpected(where: str, kind: str, names: Collection[str]) -> str:
    return f"{where} holds {counted(len(names), 'tensor')} that {kind} has no place for: {name_families(names)}"


def unexpected_tensors(where: str, kind: str, names: Collection[str], needed: Collection[str]) -> str:
    """The sentence about tensors that a class has no place for, with the option that lets them be left out."""
    patterns = drop_patterns(names, needed)
    option = " ".join(f"--drop '{pattern}'" for pattern in patterns)
    them = "it" if len(names) == 1 else "them"
    return f"{_unexpected(where, kind, names)}; leave {them} out with {option}, in Python drop={patterns}"


def drop_patterns(names: Iterable[str], needed: Collection[str]) -> list[str]:
    """Short shell patterns that match all ``names`` and none of ``needed``."""
    inner = {".".join(name.split(".")[:end]) for name in needed for end in range(1, name.count(".") + 2)}
    patterns: dict[str, None] = {}
    for name in sorted(names, key=_natural):
        parts = name.split(".")
        end = next((end for end in range(1, len(parts)) if ".".join(parts[:end]) not in inner), len(parts))
        exact = glob.escape(".".join(parts[:end])) + (".*" if end < len(parts) else "")
        wide = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", exact)
        patterns[exact if _matches(wide, needed) else wide] = None
    return list(patterns)


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def is_dropped(name: str, drop: Iterable[str]) -> bool:
    """Whether a name matches one of the shell patterns ``drop``."""
    return any(fnmatchcase(name, pattern) for pattern in drop)


def _is_computed(name: str, needed: Collection[str]) -> bool:
    """Whether a model needs no such tensor, whatever its class."""
    is_mask = bool(_MASK.search(name)) and f"{name.removesuffix('.bias')}.weight" not in needed
    return is_mask or bool(_COMPUTED.search(name) or _DISPENSABLE.search(name))


def _family(family: str, members: Sequence[str]) -> str:
    """``layers.2-3.weight (2)``: numbers that all members share, or that follow each other, are named."""
    if len(members) == 1:
        return members[0]
    numbers = zip(*(map(int, re.findall(r"(?<=\.)\d+(?=\.|$)", name)) for name in members), strict=True)
    for values in (sorted(set(column)) for column in numbers):
        is_range = values == list(range(values[0], values[-1] + 1))
        span = str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}" if is_range else "**"
        family = re.sub(r"(?<=\.)\*(?=\.|$)", span, family, count=1)
    return f"{family.replace('**', '*')} ({len(members)})"


def _natural(name: str) -> list[tuple[int, str]]:
    """The key of an order in which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def counted(number: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
