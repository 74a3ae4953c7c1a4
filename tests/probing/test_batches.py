"""Batches in every form that people pass: the token ids that come of them, or the sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BertConfig, BertModel

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.probing.batches import Batches
from smoothquant_ext.probing.lookups import Limits

MODEL = tiny.build("llama")
IDS = tiny.token_ids(3, 8)
LIMITS = Limits(tiny.VOCAB, None, 128, 64)


def read(batches: Any, limits: Limits = LIMITS, model: nn.Module = MODEL) -> list[Any]:
    return list(Batches(model, batches, limits))


def assert_same(found: list[Any], expected: list[Tensor]) -> None:
    assert all(isinstance(batch, Tensor) and batch.dtype == torch.int64 for batch in found)
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in expected]


ROWS = list(IDS.split(1))
RAGGED = [IDS[0].tolist(), IDS[1, :5].tolist()]
AS_RAGGED = [IDS[:1], IDS[1:2, :5]]

PLAIN: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {
    "a tensor of windows": (lambda: IDS, ROWS),
    "a tensor of one window": (lambda: IDS[0], IDS[:1].split(1)),
    "a tensor of batches": (lambda: IDS[None], [IDS]),
    "an array of windows": (lambda: IDS.numpy(), ROWS),
    "a tuple of batches": (lambda: (IDS, IDS[:1]), [IDS, IDS[:1]]),
    "one dict": (lambda: {"input_ids": IDS}, [IDS]),
    "one BatchEncoding of lists": (lambda: BatchEncoding({"input_ids": IDS.tolist()}), [IDS]),
    "a list of ids": (lambda: IDS[0].tolist(), [IDS[:1]]),
    "a list of lists of ids": (lambda: RAGGED, AS_RAGGED),
    "a batch of ragged lists": (lambda: [RAGGED], AS_RAGGED),
    "a batch of ragged tensors": (lambda: [[IDS[0], IDS[1, :5]]], AS_RAGGED),
    "a batch of equal arrays": (lambda: [[row.numpy() for row in IDS]], [IDS]),
    "windows without a first dimension": (lambda: list(IDS), ROWS),
    "int32": (lambda: [IDS.to(torch.int32)], [IDS]),
    "int16": (lambda: [IDS.to(torch.int16)], [IDS]),
    "uint8": (lambda: [IDS.to(torch.uint8)], [IDS]),
    "uint16 of numpy": (lambda: IDS.numpy().astype(np.uint16), ROWS),
    "not contiguous": (lambda: [IDS.T.contiguous().T], [IDS]),
    "rows of a dataset": (lambda: [{"input_ids": row, "attention_mask": [1] * len(row)} for row in RAGGED], AS_RAGGED),
    "ragged dict": (lambda: {"input_ids": RAGGED, "attention_mask": [[1] * len(row) for row in RAGGED]}, AS_RAGGED),
    "ragged dict without a mask": (lambda: [{"input_ids": RAGGED}], AS_RAGGED),
    "a field that is None": (lambda: [{"input_ids": IDS, "labels": None, "position_ids": None}], [IDS]),
    "labels of the rows": (lambda: [{"input_ids": IDS, "labels": torch.zeros(3)}], [IDS]),
    "what a tokenizer adds": (lambda: [{"input_ids": IDS, "length": [8] * 3, "special_tokens_mask": IDS}], [IDS]),
    "a data loader of tensors": (lambda: DataLoader(IDS, batch_size=2), [IDS[:2], IDS[2:]]),
    "a data loader of a TensorDataset": (lambda: DataLoader(TensorDataset(IDS), batch_size=2), [IDS[:2], IDS[2:]]),
    "a data loader of dicts": (lambda: DataLoader([{"input_ids": row} for row in IDS], batch_size=3), [IDS]),
    "an array that is read only": (lambda: np.frombuffer(IDS.numpy().tobytes(), np.int64).reshape(3, 8), ROWS),
    "a column of lists": (lambda: [np.array([np.array(row) for row in RAGGED], dtype=object)], AS_RAGGED),
    "a column of a dataset": (lambda: datasets.Dataset.from_dict({"input_ids": RAGGED})["input_ids"], AS_RAGGED),
    "a dataset": (lambda: datasets.Dataset.from_dict({"input_ids": RAGGED}), AS_RAGGED),
    "a generator": (lambda: (row for row in IDS), ROWS),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", PLAIN)
def test_what_has_a_plain_meaning_is_converted(form: str) -> None:
    make, expected = PLAIN[form]
    assert_same(read(make()), list(expected))


EMBEDDINGS = torch.randn(3, 8, 64)
BAD: dict[str, tuple[Any, str]] = {
    "None": (None, r"the calibration batches are None: expected token ids \[B, T\]"),
    "text": ("hello", r"the calibration batches are a text: make token ids .* token_windows\(tokenizer, text"),
    "a number": (5, "the calibration batches are 5: expected token ids"),
    "an object": (object(), "are of type object, expected an iterable"),
    "texts": (["hello", "world"], "calibration batch 1 is text, expected token ids"),
    "a text among tensors": ([IDS, "world"], "calibration batch 2 is text, expected token ids"),
    "texts in a batch": ([["hello", "world"]], "calibration batch 1 is text, expected token ids"),
    "None among tensors": ([IDS, None], "calibration batch 2 is None, expected token ids"),
    "None in a list": ([[5, None]], "calibration batch 1 is of type int, expected token ids"),
    "no dimension": ([IDS[0, 0]], r"calibration batch 1 is torch\.int64 \[\], expected token ids"),
    "three dimensions": ([IDS[None]], r"calibration batch 1 is torch\.int64 \[1, 3, 8\], expected token ids"),
    "floats": ([IDS.float()], r"calibration batch 1 is torch\.float32 \[3, 8\], expected token ids"),
    "all floats": (IDS.float(), r"the calibration batches are torch\.float32 \[3, 8\], expected token ids"),
    "bools": ([IDS > 5], r"calibration batch 1 is torch\.bool \[3, 8\], expected token ids"),
    "floats in a dict": ([{"input_ids": IDS.float()}], r"'input_ids' of calibration batch 1 is torch\.float32 \[3,"),
    "negative ids": ([IDS, -IDS], r"calibration batch 2 holds token -\d+ and the model has a vocabulary of 96"),
    "large ids": ([IDS, IDS[:1] * 0 + 96], "calibration batch 2 holds token 96 and the model has a vocabulary of 96"),
    "huge ids": ([[2**70]], "calibration batch 1 is of type int, expected token ids"),
    "a pair": ([(IDS, torch.ones_like(IDS))], "batch 1 is a tuple of 2 tensors, and which is which is not known"),
    "no ids": ([{"text": "hello"}], r"calibration batch 1 has no field 'input_ids' \(its fields: 'text'\): tokenize"),
    "no fields": ([{}], r"no field 'input_ids' \(its fields: none\)"),
    "a text for ids": ([{"input_ids": "hello"}], "'input_ids' of calibration batch 1 is text, expected token ids"),
    "ids and embeddings": ([{"input_ids": IDS, "inputs_embeds": EMBEDDINGS}], "both 'input_ids' and 'inputs_embeds'"),
    "embeddings of ids": ([{"inputs_embeds": IDS[0]}], r"'inputs_embeds' of .* 1 is torch\.int64 \[8\], expected"),
    "embeddings of another width": ([{"inputs_embeds": EMBEDDINGS[..., :5]}], "1 has 5 channels and the model's embed"),
    "complex numbers": ([IDS * 1j], r"calibration batch 1 is torch\.complex64 \[3, 8\], expected token ids"),
    "a mask of another shape": ([{"input_ids": IDS, "attention_mask": IDS[:, :5] * 0 + 1}],
                                r"attention_mask of calibration batch 1 is \[3, 5\], expected \[3, 8\] as 'input_ids'"),
    "a mask to add": ([{"input_ids": IDS, "attention_mask": torch.full((3, 8), -1e4)}], "values other than 0 and 1"),
    "a mask of segments": ([{"input_ids": IDS, "attention_mask": IDS}], "values other than 0 and 1"),
    "a mask of NaN": ([{"input_ids": IDS, "attention_mask": torch.full((3, 8), torch.nan)}], "values other than 0 and"),
    "no values": ([IDS.to("meta")], "calibration batch 1 is on the meta device and has no values"),
    "sparse": ([IDS.to_sparse()], r"calibration batch 1 has the layout torch\.sparse_coo, expected token ids"),
    "objects of numpy": ([np.array(["a", None])], "calibration batch 1 is text, expected token ids"),
    "different shapes": ([[IDS, IDS[0].tolist()]], r"1 is a list of tensors of different shapes \(\[3, 8\], \[8\]\)"),
}  # fmt: skip


@pytest.mark.parametrize("form", BAD)
def test_what_has_none_is_one_sentence_that_names_the_batch(form: str) -> None:
    batches, complaint = BAD[form]
    with pytest.raises(SmoothQuantError, match=complaint) as caught:
        read(batches)
    assert "\n" not in str(caught.value)


def test_a_source_that_fails_is_named_with_the_batch_and_the_reason() -> None:
    def failing() -> Iterator[Tensor]:
        yield IDS
        raise KeyError("x\ny")

    drawn = iter(Batches(MODEL, failing(), LIMITS))
    assert torch.equal(next(drawn), IDS)
    with pytest.raises(SmoothQuantError, match=r"calibration batch 2 cannot be drawn .* \(KeyError: ") as caught:
        next(drawn)
    assert "\n" not in str(caught.value)

    def interrupted() -> Iterator[Tensor]:
        raise KeyboardInterrupt
        yield IDS

    with pytest.raises(KeyboardInterrupt):
        read(interrupted())


@pytest.mark.parametrize("empty", [IDS[:0], IDS[:, :0], [[], []], {"input_ids": IDS, "attention_mask": IDS * 0}])
def test_what_holds_no_token_is_left_out_with_one_sentence(empty: Any) -> None:
    with pytest.warns(UserWarning, match="(calibration batch|row 1 of calibration batch) 2 .* left out") as caught:
        assert_same(read([IDS, empty, empty]), [IDS])
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("text", ["a", "b", "c"]), ("idx", IDS[:, 0]), ("return_dict", False), ("images", [None])]
)
def test_fields_that_the_model_does_not_take_are_named(field: str, value: Any) -> None:
    with pytest.warns(UserWarning, match=f"calibration batch 1: '{field}' is not data that the model takes"):
        assert_same(read([{"input_ids": IDS, field: value}]), [IDS])


def test_a_list_is_checked_before_anything_runs_and_counted() -> None:
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    batches = Batches(MODEL, [IDS, {"input_ids": IDS, "attention_mask": mask}], LIMITS)
    assert len(batches) == len(list(batches)) == 4
    with pytest.raises(TypeError):
        len(Batches(MODEL, iter([IDS]), LIMITS))


# Padding.


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.bool, torch.int64, torch.int32, torch.float32, torch.uint8]),
)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_rows_have_exactly_the_tokens_that_the_mask_attends_to(pattern: list[list[bool]], dtype: torch.dtype) -> None:
    mask = torch.tensor(pattern)
    expected = [row[kept].tolist() for row, kept in zip(IDS, mask, strict=True) if kept.any()]
    found = read([{"input_ids": IDS, "attention_mask": mask.to(dtype)}])
    assert [row.tolist() for batch in found for row in batch] == expected
    assert all(isinstance(batch, Tensor) for batch in found)


def padded(**more: Any) -> dict[str, Any]:
    mask = torch.ones_like(IDS)
    mask[0, :3] = mask[1, 5:] = mask[2, 3:5] = 0  # left, right, a hole
    return {"input_ids": IDS, "attention_mask": mask} | more


def test_what_belongs_to_tokens_or_rows_is_cut_alike() -> None:
    positions, types = torch.arange(8)[None], torch.arange(24).view(3, 8) % 2
    batch = padded(position_ids=positions, token_type_ids=types, labels=IDS)
    bert = tiny_bert()
    kept = batch["attention_mask"].bool()
    for row, piece in enumerate(read([batch], model=bert)):
        assert piece["input_ids"].tolist() == [IDS[row][kept[row]].tolist()]
        assert piece["position_ids"].tolist() == [positions[0][kept[row]].tolist()]
        assert piece["token_type_ids"].tolist() == [types[row][kept[row]].tolist()]
        assert piece["attention_mask"].all()  # transformers would take a jump of positions for the end of a text
        assert "labels" not in piece


def tiny_bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return BertModel(BertConfig(vocab_size=tiny.VOCAB, **sizes)).eval()


def test_embeddings_are_cut_like_ids() -> None:
    batch = padded(inputs_embeds=EMBEDDINGS)
    del batch["input_ids"]
    kept = batch["attention_mask"].bool()
    for row, piece in enumerate(read([batch])):
        assert torch.equal(piece["inputs_embeds"], EMBEDDINGS[row][kept[row]][None])


def test_embeddings_have_the_dtype_of_the_model() -> None:
    (piece,) = read([{"inputs_embeds": EMBEDDINGS.double().numpy()}], model=tiny.build("llama", torch.bfloat16))
    assert torch.equal(piece["inputs_embeds"], EMBEDDINGS.bfloat16())


def test_positions_of_three_axes_are_cut_by_their_last() -> None:
    positions = torch.arange(72).view(3, 3, 8)
    kept = padded()["attention_mask"].bool()
    for row, piece in enumerate(read([padded(position_ids=positions)])):
        assert torch.equal(piece["position_ids"], positions[:, row : row + 1, kept[row]])


class Seeing(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> None: ...


def test_rows_with_images_stay_together_with_a_sentence_and_one_row_is_cut() -> None:
    images = torch.zeros(5, 3, 4, 4)
    with pytest.warns(
        UserWarning, match="has padding and 'pixel_values', so its rows stay together and padding counts"
    ):
        (piece,) = read([padded(pixel_values=images)], model=Seeing())
    assert torch.equal(piece["attention_mask"], padded()["attention_mask"])
    one = {"input_ids": IDS[:1], "attention_mask": padded()["attention_mask"][:1], "pixel_values": images}
    (piece,) = read([one], model=Seeing())
    assert torch.equal(piece["input_ids"], IDS[:1, 3:])
    assert torch.equal(piece["pixel_values"], images)


def test_masks_of_four_dimensions_stay_with_a_sentence() -> None:
    mask = torch.zeros(3, 1, 8, 8)
    with pytest.warns(UserWarning, match="its attention_mask has 4 dimensions and stays"):
        (piece,) = read([{"input_ids": IDS, "attention_mask": mask}])
    assert torch.equal(piece["attention_mask"], mask)


def test_columns_of_padding_alone_are_cut_without_cutting_rows_apart() -> None:
    mask = torch.ones_like(IDS)
    mask[:, :2] = mask[:, 7] = 0
    assert_same(read([{"input_ids": IDS, "attention_mask": mask}]), [IDS[:, 2:7]])


def test_padding_outside_the_vocabulary_is_padding() -> None:
    mask = padded()["attention_mask"]
    ids = IDS.masked_fill(mask == 0, -100)
    found = read([{"input_ids": ids, "attention_mask": mask}])
    assert [row.tolist() for row in found] == [[row[row >= 0].tolist()] for row in ids]


@pytest.mark.parametrize("batch", [IDS, {"input_ids": IDS}, {"inputs_embeds": EMBEDDINGS}, padded()])
def test_rows_longer_than_the_positions_of_the_model_are_cut_with_a_sentence(batch: Any) -> None:
    with pytest.warns(UserWarning, match=r"has \d tokens a row and the model 4 positions: rows are cut to 4"):
        found = read([batch], Limits(tiny.VOCAB, 4))
    for piece in found:
        for value in piece.values() if isinstance(piece, dict) else [piece]:
            assert value.shape[1] == 4


def test_rows_longer_than_the_model_was_made_for_are_used_with_a_sentence() -> None:
    with pytest.warns(UserWarning, match="has 8 tokens a row, and the model was made for 4"):
        assert_same(read([IDS], Limits(tiny.VOCAB, None, 4)), [IDS])
