"""Calibration and test data at the door: whatever a user passes becomes batches that a model runs on, without padding.

What leaves here is token ids, int64 [B, T], or a dict of tensors: the keyword arguments of ``forward``. A batch with
padding is cut into its rows, and these to the tokens that the mask attends to, so that nothing behind the door ever
sees a padded position. What cannot be cut, converted or run is said in a sentence that names the batch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmoothQuantError
from .blocks import Batch
from .lookups import Limits
from .tensors import has_numbers, is_array, read_tensor

NOT_DATA = "expected token ids [B, T], or a dict of the arguments of the model's forward"
TOKENS = ("input_ids", "inputs_embeds")  # one of them gives the rows and tokens of a batch
MASK, POSITIONS = "attention_mask", "position_ids"
EXPECTED = {
    "input_ids": "expected token ids, whole numbers [B, T]",
    "inputs_embeds": "expected floating-point values [B, T, D]",
    MASK: "expected ones and zeros [B, T]",
}
# What tokenizers and data loaders add, and no forward pass depends on.
BY_PRODUCTS = {"special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length", "use_cache"}


class Batches(Iterable[Batch]):
    """The batches of a user, ready to run. A list is checked as a whole at once, anything else while it is drawn.

    Data that is not attended to leaves a sentence, once a kind: rows without tokens, rows that were shortened, fields
    that the model does not take, padding that cannot be cut away.
    """

    def __init__(self, model: nn.Module, batches: Any, limits: Limits, what: str = "calibration batch") -> None:
        """Takes batches in any form that ``batches`` of ``quantize`` may have.

        Args:
            model: decides which fields of a dict are used.
            batches: the data.
            limits: of the model.
            what: a batch is called in sentences.

        Raises:
            SmoothQuantError: the data has no form that has a plain meaning.
        """
        self._limits, self._what = limits, what
        self._arguments = _arguments(model)
        self._dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
        is_decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._unread = BY_PRODUCTS | ({"labels"} if is_decoder else set())
        self._said: set[str] = set()
        self._raw = _split(batches, what)
        self._pieces: list[Batch] | None = None
        self._pieces_of_first = 1
        if isinstance(self._raw, (list, tuple)):
            self._pieces = [piece for number, raw in enumerate(self._raw, 1) for piece in self._read(raw, number)]

    def __len__(self) -> int:
        """The number of batches; of data that is not in memory an estimate from its first batch."""
        if self._pieces is not None:
            return len(self._pieces)
        return len(self._raw) * self._pieces_of_first  # type: ignore[arg-type]  # a TypeError says that it has none

    def __iter__(self) -> Iterator[Batch]:
        return self._drawn() if self._pieces is None else iter(self._pieces)

    def _drawn(self) -> Iterator[Batch]:
        source, number = iter(self._raw), 0
        while True:
            number += 1
            try:
                raw = next(source)
            except StopIteration:
                return
            except (SmoothQuantError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise SmoothQuantError(
                    f"{self._what} {number} cannot be drawn from the data given ({reason})"
                ) from error
            pieces = self._read(raw, number)
            if number == 1:
                self._pieces_of_first = max(1, len(pieces))
            yield from pieces

    def _say(self, kind: str, sentence: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(sentence, stacklevel=2)

    def _read(self, raw: Any, number: int) -> list[Batch]:
        """The batches without padding that one batch of the user's gives."""
        where = f"{self._what} {number}"
        tensors = self._fields(raw, where) if isinstance(raw, Mapping) else _tokens(raw, where)
        main = _main(tensors)
        if main is None:
            return [tensors]
        tensors = _as_rows(tensors, main, f"{main!r} of {where}" if isinstance(raw, Mapping) else where)
        pieces = [
            self._shortened(piece, main, where)
            for piece in self._cut(tensors, main, where)
            if piece[main].shape[0] and piece[main].shape[1]
        ]
        if not pieces:
            self._say("empty", f"{where} has no token that counts: it is left out, as are others like it")
        for piece in pieces:
            self._check(piece, where)
        return [piece["input_ids"] if list(piece) == ["input_ids"] else piece for piece in pieces]

    def _fields(self, raw: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """The arguments of ``forward`` that a dict holds, as tensors."""
        given = {str(name): value for name, value in raw.items() if value is not None and str(name) not in self._unread}
        used = {name: value for name, value in given.items() if self._arguments is None or name in self._arguments}
        data = {name: value for name, value in used.items() if name in TOKENS or has_numbers(value)}
        options = [name for name, value in used.items() if isinstance(value, (bool, int, float))]
        data = {name: value for name, value in data.items() if name not in options}
        if not data:
            fields = ", ".join(repr(name) for name in raw) or "none"
            raise SmoothQuantError(f"{where} has no field 'input_ids' (its fields: {fields}): tokenize the text first")
        if set(TOKENS) <= set(data):
            raise SmoothQuantError(f"{where} has both 'input_ids' and 'inputs_embeds': leave one of them out")
        if lost := [name for name in given if name not in data and name not in options and name != MASK]:
            fields = ", ".join(map(repr, lost))
            self._say("fields", f"{where}: {fields} is not data that the model takes, and is left out")
        tensors: dict[str, Tensor] = {}
        for name, value in data.items():
            label, expected = f"{name!r} of {where}", EXPECTED.get(name, "expected numbers")
            tensors[name], lengths = read_tensor(value, label, expected)
            if name == "inputs_embeds" and tensors[name].is_floating_point():
                tensors[name] = tensors[name].to(self._dtype)
            if lengths is not None and name in TOKENS and MASK not in data:
                tensors[MASK] = _mask_of(lengths)
        if isinstance(given.get(MASK), Mapping):  # a mask for each kind of layer, as transformers prepares them
            self._say("mask", f"{where}: its attention_mask is a dict and is left out; padding, if any, counts")
        return tensors

    def _cut(self, tensors: dict[str, Tensor], main: str, where: str) -> list[dict[str, Tensor]]:
        """Rows without padding: all in one where they stay equally long, one by one otherwise."""
        mask = tensors.get(MASK)
        if mask is None:
            return [tensors]
        rows, length = tensors[main].shape[:2]
        if mask.dim() > 2:
            self._say(
                "mask", f"{where}: its attention_mask has {mask.dim()} dimensions and stays; padding, if any, counts"
            )
            return [tensors]
        kept = _kept(mask, rows, length, where)
        if kept.shape != (rows, length):
            raise SmoothQuantError(
                f"attention_mask of {where} is {list(mask.shape)}, expected {[rows, length]} as {main!r} has"
            )
        tensors = {name: value for name, value in tensors.items() if name != MASK}
        if POSITIONS in tensors:
            # Where positions are given and no mask, transformers takes a jump of positions for the end of a text.
            tensors[MASK] = torch.ones_like(kept, dtype=torch.int64)
        everywhere = torch.arange(rows)
        columns = kept.any(0).nonzero().flatten()
        trimmed = {name: _picked(value, rows, length, everywhere, columns) for name, value in tensors.items()}
        inside = kept[:, columns]
        if bool(inside.all()):
            return [trimmed]
        uncut = [name for name, value in tensors.items() if _relation(value, rows, length) == ""]
        if uncut:
            self._say(
                "uncut", f"{where} has padding and {uncut[0]!r}, so its rows stay together and padding counts: "
                "give one row a batch"
            )  # fmt: skip
            return [trimmed | {MASK: inside.to(torch.int64)}]
        pieces = []
        for row in range(rows):
            columns = kept[row].nonzero().flatten()
            if not len(columns):
                self._say(
                    "empty", f"row {row + 1} of {where} is masked completely: it is left out, as are others like it"
                )
                continue
            only = torch.tensor([row])
            pieces.append({name: _picked(value, rows, length, only, columns) for name, value in tensors.items()})
        return pieces

    def _shortened(self, tensors: dict[str, Tensor], main: str, where: str) -> dict[str, Tensor]:
        rows, length = tensors[main].shape[:2]
        most, trained = self._limits.positions, self._limits.trained
        if most is None or length <= most:
            if trained is not None and length > trained:
                self._say("long", f"{where} has {length} tokens a row, and the model was made for {trained}")
            return tensors
        self._say("long", f"{where} has {length} tokens a row and the model {most} positions: rows are cut to {most}")
        first = torch.arange(most)
        return {name: _picked(value, rows, length, torch.arange(rows), first) for name, value in tensors.items()}

    def _check(self, tensors: dict[str, Tensor], where: str) -> None:
        width, embeds = self._limits.width, tensors.get("inputs_embeds")
        if embeds is not None and width not in (None, embeds.shape[-1]):
            raise SmoothQuantError(
                f"'inputs_embeds' of {where} has {embeds.shape[-1]} channels and the model's embedding has {width}"
            )
        ids, vocabulary = tensors.get("input_ids"), self._limits.vocabulary
        if ids is None or vocabulary is None:
            return
        least, largest = (int(end) for end in ids.aminmax())
        if least < 0 or largest >= vocabulary:
            raise SmoothQuantError(
                f"{where} holds token {least if least < 0 else largest} and the model has a vocabulary of "
                f"{vocabulary}: use the tokenizer that belongs to the model"
            )


def _split(batches: Any, what: str) -> Iterable[Any]:
    """The batches one by one: the only place that knows what a single tensor, dict or list of numbers stands for."""
    if batches is None or isinstance(batches, (str, bytes, int, float)):
        is_text = isinstance(batches, (str, bytes))
        remedy = "make token ids of a text with token_windows(tokenizer, text, ...)" if is_text else NOT_DATA
        given = "a text" if is_text else repr(batches)
        raise SmoothQuantError(f"the {what}es are {given}: {remedy}")
    if isinstance(batches, Mapping):
        return [batches]
    if is_array(batches):
        whole, _ = read_tensor(batches, f"the {what}es", NOT_DATA)
        if whole.dim() == 0 or whole.is_floating_point() or whole.dtype == torch.bool:
            raise SmoothQuantError(f"the {what}es are {_shape(whole)}, {NOT_DATA}")
        return list(whole.split(1) if whole.dim() == 2 else whole if whole.dim() > 2 else [whole])
    if isinstance(batches, (list, tuple)):
        return [batches] if batches and all(isinstance(item, int) for item in batches) else batches
    try:
        iter(batches)
    except TypeError:
        kind = type(batches).__name__
        raise SmoothQuantError(f"the {what}es are of type {kind}, expected an iterable: {NOT_DATA}") from None
    known: Iterable[Any] = batches
    return known


def _arguments(model: nn.Module) -> set[str] | None:
    """The names that ``forward`` takes; ``None`` for any."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = {each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters)
    return None if takes_any and "input_ids" not in named else named


def _tokens(raw: Any, where: str) -> dict[str, Tensor]:
    """Token ids that come without a name."""
    ids, lengths = read_tensor(raw, where, NOT_DATA)
    if ids.is_floating_point():
        raise SmoothQuantError(f"{where} is {_shape(ids)}, {NOT_DATA}")
    return {"input_ids": ids} if lengths is None else {"input_ids": ids, MASK: _mask_of(lengths)}


def _mask_of(lengths: Tensor) -> Tensor:
    """int64 [B, T]: 1 for the first tokens of each row, as many as it has."""
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(torch.int64)


def _main(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the tensor that has the tokens; ``None`` for a model that reads something else."""
    return next((name for name in TOKENS if name in tensors), None)


def _as_rows(tensors: dict[str, Tensor], main: str, where: str) -> dict[str, Tensor]:
    """The same with the rows of a batch as first dimension, where it was left out, and int64 token ids."""
    tokens, is_ids = tensors[main], main == "input_ids"
    wanted = 2 if is_ids else 3
    is_whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.dim() not in (wanted, wanted - 1) or (tokens.numel() > 0 and is_ids != is_whole):
        raise SmoothQuantError(f"{where} is {_shape(tokens)}, {EXPECTED[main]}")
    if tokens.dim() == wanted - 1:
        length = tokens.shape[0]
        tensors = {name: value[None] if value.shape[:1] == (length,) else value for name, value in tensors.items()}
    rows, length = tensors[main].shape[:2]
    if main == "input_ids":
        tensors["input_ids"] = tensors["input_ids"].to(torch.int64)
    return {
        name: value.expand(rows, length) if rows > 1 and value.shape == (1, length) else value
        for name, value in tensors.items()
    }


def _kept(mask: Tensor, rows: int, length: int, where: str) -> Tensor:
    """bool [B, T], on the CPU: the positions that a mask of ones and zeros attends to."""
    values = mask.to("cpu")
    if not bool(((values == 0) | (values == 1)).all()):
        raise SmoothQuantError(
            f"attention_mask of {where} has values other than 0 and 1: give 1 for each token, 0 for padding"
        )
    return values.bool().reshape(rows, length) if values.numel() == rows * length else values.bool()


def _relation(value: Tensor, rows: int, length: int) -> str:
    """How a tensor of a batch relates to its rows and tokens: by its first dimensions."""
    shape = tuple(value.shape)
    if shape[:2] == (rows, length):
        return "rows, tokens"
    if len(shape) == 3 and shape[1:] == (rows, length):
        return "axes, rows, tokens"  # positions of several axes, as Qwen2-VL has
    if shape == (rows,) or shape == ():
        return "rows" if shape else "all"
    return ""


def _picked(value: Tensor, rows: int, length: int, row: Tensor, columns: Tensor) -> Tensor:
    """Of a tensor of a batch the part that belongs to some rows and some of their tokens."""
    relation, row, columns = _relation(value, rows, length), row.to(value.device), columns.to(value.device)
    if relation == "rows, tokens":
        return value.index_select(0, row).index_select(1, columns)
    if relation == "axes, rows, tokens":
        return value.index_select(1, row).index_select(2, columns)
    return value.index_select(0, row) if relation == "rows" else value


def _shape(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"
