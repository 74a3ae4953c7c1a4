"""Checkpoints whose token embedding reads the 8-bit output embedding: one weight on the disk, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny
import torch
from stored_files import change_tensors, tensors_of
from tiny_w8a8 import IDS, assert_same_model, config_of, logits
from transformers import AutoModelForCausalLM, Blip2Config, Blip2ForConditionalGeneration, PreTrainedModel

from smoothquant_ext import Recipe, disable, enable, load, quantize, save
from smoothquant_ext.checkpoint.converting import convert
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.evaluation.size import model_bytes
from smoothquant_ext.nn import embedding
from smoothquant_ext.nn.embedding import shares_head

EMBEDDING = "model.embed_tokens"


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    disable()
    yield
    disable()


def shared(architecture: str = "llama", dtype: torch.dtype = torch.float32, recipe: str = "int8") -> PreTrainedModel:
    model = tiny.build(architecture, dtype, tie_word_embeddings=True)
    return quantize(model, [IDS[:1], IDS[1:]], Recipe(recipe, head="8bit"), progress=False)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = shared("gemma3_text")
    save(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_the_weight_is_stored_once(saved: tuple[PreTrainedModel, Path]) -> None:
    model, directory = saved
    tensors = tensors_of(directory)
    assert f"{EMBEDDING}.weight" not in tensors
    assert tensors["lm_head.weight"].dtype == torch.int8
    assert tensors[f"{EMBEDDING}.factor"].tolist() == [8.0]
    config = config_of(directory)
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["quantization_status"] == "smoothed", "which no other program reads"
    matrices = sum(tensor.nbytes for name, tensor in tensors.items() if "R4" in name)
    assert model_bytes(model).total == sum(tensor.nbytes for tensor in tensors.values()) - matrices
    assert "the token embedding reads its weight" in (directory / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = shared("gemma3_text", dtype)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.get_input_embeddings().factor.dtype == dtype
    assert_same_model(loaded, model)


def test_other_ways_to_load_and_save(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, directory = saved
    model.save_pretrained(tmp_path / "by transformers")
    assert_same_model(load(tmp_path / "by transformers"), model)
    save(load(directory), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    convert(directory, tmp_path / "converted")
    assert_same_model(load(tmp_path / "converted"), model)
    enable()
    assert_same_model(AutoModelForCausalLM.from_pretrained(directory), model)


@pytest.mark.parametrize("name", ["compressed-tensors", "lmdeploy"])
def test_formats_that_have_no_place_for_it(name: str, saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, directory = saved
    expected = (
        f"format '{name}' cannot store a token embedding in 8 bits, which --head float avoids; use format 'smooth"
    )
    for action in (
        lambda: save(model, tmp_path / "other", format=name),
        lambda: convert(directory, tmp_path / "o", name),
    ):
        with pytest.raises(SmoothQuantError) as error:
            action()
        assert str(error.value).startswith(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_checkpoint_without_its_factor(saved: tuple[PreTrainedModel, Path]) -> None:
    _, directory = saved
    change_tensors(directory, lambda tensors: tensors.pop(f"{EMBEDDING}.factor"))
    with pytest.raises(
        SmoothQuantError, match=r"lm_head is quantized, .* token embedding, whose factor is missing; copy or"
    ):
        load(directory)


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (torch.ones(64), "F32 [64]"),
        (torch.ones(0), "F32 [0]"),
        (torch.tensor([torch.nan]), "F32 [1] [nan]"),
        (torch.tensor([torch.inf]), "F32 [1] [inf]"),
        (torch.zeros(1), "F32 [1] [0.0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_factor_that_is_no_number(saved: tuple[PreTrainedModel, Path], factor: torch.Tensor, said: str) -> None:
    _, directory = saved
    change_tensors(directory, lambda tensors: tensors.update({f"{EMBEDDING}.factor": factor}))
    for action in (lambda: load(directory), lambda: convert(directory, directory.with_name("converted"))):
        with pytest.raises(SmoothQuantError) as error:
            action()
        assert f"{EMBEDDING}.factor is {said}, expected one finite number other than 0; copy or" in str(error.value)


def test_an_embedding_besides(saved: tuple[PreTrainedModel, Path]) -> None:
    _, directory = saved
    change_tensors(directory, lambda tensors: tensors.update({f"{EMBEDDING}.weight": torch.ones(tiny.VOCAB, 64)}))
    with pytest.raises(SmoothQuantError, match=rf"{EMBEDDING}\.weight"):
        load(directory)


def test_loading_computes_no_table_of_embeddings(saved: tuple[PreTrainedModel, Path]) -> None:
    _, directory = saved
    rows: list[int] = []
    unpack = embedding.unpack_rows

    def noted(packed: torch.Tensor, tokens: torch.Tensor, width: int) -> torch.Tensor:
        rows.append(tokens.numel())
        return unpack(packed, tokens, width)

    with patch.object(embedding, "unpack_rows", noted):
        load(directory)
    assert max(rows, default=0) < tiny.VOCAB, "it would take the memory of the floating-point weight, twice"


def test_a_language_model_within_another_model(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 16, "patch_size": 8}
    reader = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny.SIZES | tiny.CONFIGS["opt"] | {"model_type": "opt", "tie_word_embeddings": True}
    parts = {
        "vision_config": vision | sizes,
        "qformer_config": reader | {"encoder_hidden_size": 32},
        "text_config": text,
    }
    config = Blip2Config(**parts, num_query_tokens=2, image_token_index=1)
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration._from_config(config).eval()
    ids = torch.cat([torch.full((1, 2), 1), IDS[:1]], 1)
    batch = {"pixel_values": torch.randn(1, 3, 16, 16), "input_ids": ids}
    quantize(model, [batch] * 2, Recipe(head="8bit"), progress=False)
    assert shares_head(model)
    model.tie_weights()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert shares_head(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_head_that_is_not_tied_has_its_own_weight(tmp_path: Path) -> None:
    model = quantize(tiny.build("llama"), IDS, Recipe(head="8bit"), progress=False)
    save(model, tmp_path / "model")
    assert f"{EMBEDDING}.weight" in tensors_of(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert not shares_head(loaded)
    assert torch.equal(logits(loaded), logits(model))
