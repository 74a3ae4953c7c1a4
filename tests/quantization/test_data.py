"""Calibration data in the forms that people have gives the model that plain rows of token ids give, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from tiny_blocks import Stack
from torch import Tensor, nn

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.quantization.calibration import CalibrationData
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.reporting.outliers import measure_outliers

LENGTHS = [9, 24, 13, 17, 5, 20, 11, 8, 24, 3, 16, 7]
ROWS = [tiny.token_ids(1, length, seed=seed) for seed, length in enumerate(LENGTHS)]
LOUD = 4  # a token whose embedding is far from the others': what one uncounted pad does to a range


def padded(side: str, dtype: torch.dtype = torch.int64, size: int = 4) -> list[dict[str, Tensor]]:
    """The rows, ``size`` a batch, filled up with a loud token."""
    batches = []
    for start in range(0, len(ROWS), size):
        some = ROWS[start : start + size]
        ids = torch.full((len(some), 26), LOUD)
        mask = torch.zeros(len(some), 26)
        for row, tokens in enumerate(some):
            length = tokens.shape[1]
            places = {"right": range(length), "left": range(26 - length, 26), "holes": spread(length)}[side]
            ids[row, list(places)], mask[row, list(places)] = tokens[0], 1
        batches.append({"input_ids": ids, "attention_mask": mask.to(dtype)})
    return batches


def spread(length: int) -> list[int]:
    return torch.randperm(26, generator=torch.Generator().manual_seed(length))[:length].sort().values.tolist()


def loud(architecture: str) -> nn.Module:
    model = tiny.build(architecture)
    tiny.amplify_outliers(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[LOUD] *= 1000
    return model


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    record, expected = (copy.deepcopy(each.smoothquant_record) for each in (model, other))
    assert record["calibration"] == expected["calibration"]


RECIPES = {
    "dynamic": Recipe("int8"),
    "static": Recipe("int8-static"),
    "auto": Recipe("int8-static", alpha="auto"),
    "gptq": Recipe("int8", rounding="gptq"),
    "fp8": Recipe("fp8-static", clipping="mse"),
    "skips": Recipe("int8", auto_skip=2, max_ppl_increase=0.001),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_no_bit(recipe: str, side: str) -> None:
    expected = quantize(loud("llama"), list(ROWS), RECIPES[recipe], progress=False)
    assert_equal(quantize(loud("llama"), padded(side), RECIPES[recipe], progress=False), expected)
    assert expected.smoothquant_record["calibration"] == {"windows": len(ROWS), "tokens": sum(LENGTHS)}


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "qwen3_moe", "mixtral", "gemma3_text"])
def test_padding_changes_no_bit_of_other_architectures(architecture: str) -> None:
    """Learned positions, biases of attention, experts, sliding windows."""
    recipe = Recipe("int8-static", rounding="gptq")
    expected = quantize(loud(architecture), list(ROWS), recipe, progress=False)
    assert_equal(quantize(loud(architecture), padded("left", torch.bool), recipe, progress=False), expected)


def drawn(batches: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    yield from batches


def test_data_that_is_drawn_as_it_is_used_gives_the_same_ranges() -> None:
    expected = quantize(loud("llama"), list(ROWS), Recipe("int8-static"), progress=False)
    model = quantize(
        loud("llama"), drawn(padded("right", torch.float32, size=5)), Recipe("int8-static"), progress=False
    )
    assert_equal(model, expected)


FORMS = {
    "lists": lambda: [row[0].tolist() for row in ROWS],
    "arrays": lambda: [row[0].numpy() for row in ROWS],
    "a ragged batch": lambda: [[row[0].tolist() for row in ROWS]],
    "rows of a dataset": lambda: [{"input_ids": row[0].tolist(), "attention_mask": [1] * row.shape[1]} for row in ROWS],
    "int32": lambda: [row.to(torch.int32) for row in ROWS],
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_change_no_bit(form: str) -> None:
    recipe = Recipe("int8-static", alpha="auto")
    expected = quantize(loud("llama"), list(ROWS), recipe, progress=False)
    assert_equal(quantize(loud("llama"), FORMS[form](), recipe, progress=False), expected)


def test_embeddings_instead_of_ids_change_no_bit() -> None:
    table = loud("llama").get_input_embeddings().weight.detach()
    embedded = [{"inputs_embeds": table[row]} for row in ROWS]
    recipe = Recipe("int8-static", rounding="gptq", auto_skip=1)
    expected = quantize(loud("llama"), list(ROWS), recipe, progress=False)
    assert_equal(quantize(loud("llama"), embedded, recipe, progress=False), expected)


def test_embeddings_have_no_perplexity() -> None:
    table = loud("llama").get_input_embeddings().weight.detach()
    embedded = [{"inputs_embeds": table[row]} for row in ROWS]
    with pytest.raises(SmoothQuantError, match="a perplexity needs token ids"):
        quantize(loud("llama"), embedded, Recipe(max_ppl_increase=0.01), progress=False)


@pytest.mark.parametrize(
    ("batches", "complaint"),
    [
        (None, "the calibration batches are None"),
        (["some text"], "calibration batch 1 is text, expected token ids"),
        ([ROWS[0], ROWS[1] + 90], r"calibration batch 2 holds token \d+ and the model has a vocabulary of 96"),
        (lambda: drawn([{"input_ids": ROWS[0]}, {"text": "some"}]), "calibration batch 2 has no field 'input_ids'"),
        ([], "there is no calibration batch"),
    ],
)
@pytest.mark.parametrize("call", [quantize, measure_outliers])
def test_bad_data_leaves_the_model_as_it_was(call: Any, batches: Any, complaint: str) -> None:
    model = tiny.build("llama").train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with pytest.raises(SmoothQuantError, match=complaint):
        call(model, batches() if callable(batches) else batches, progress=False)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert call is measure_outliers or model.training


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mpt"])
def test_rows_are_cut_to_the_positions_of_the_model(architecture: str) -> None:
    def build() -> nn.Module:
        return tiny.build(
            architecture, **({"max_seq_len": 16} if architecture == "mpt" else {"max_position_embeddings": 16})
        )

    rows = [tiny.token_ids(1, 40, seed=seed) for seed in range(3)]
    with pytest.warns(
        UserWarning, match="calibration batch 1 has 40 tokens a row and the model 16 positions"
    ) as caught:
        model = quantize(build(), rows, Recipe("int8-static"), progress=False)
    assert len([each for each in caught if "positions" in str(each.message)]) == 1
    assert_equal(model, quantize(build(), [row[:, :16] for row in rows], Recipe("int8-static"), progress=False))


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "qwen2_moe"])
def test_windows_of_few_tokens(architecture: str, tokens: int) -> None:
    rows = [tiny.token_ids(1, tokens, seed=seed) for seed in range(3)]
    model = quantize(tiny.build(architecture), rows, Recipe("int8-static", alpha="auto"), progress=False)
    assert model.smoothquant_report.quantized


def test_a_model_without_a_configuration_has_its_limits_found_by_use() -> None:
    with pytest.raises(
        SmoothQuantError, match="calibration batch 1 holds token 96 and the model has a vocabulary of 96"
    ):
        quantize(Stack(), [torch.tensor([[96, 5]])], progress=False)


def test_the_number_of_batches_to_come_is_that_of_rows_after_cutting() -> None:
    data = CalibrationData(tiny.build("llama"), torch.utils.data.DataLoader(padded("left"), batch_size=None))
    assert len(data) == len(ROWS)
    assert len(list(data)) == len(ROWS)
