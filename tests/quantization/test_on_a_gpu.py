"""Quantization on a GPU, emulated: the whole model there, or one block at a time, with the CPU's results."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import tiny
import torch
from discover_once import discover_once as discover_once  # a fixture
from emulated_cuda import emulated_cuda
from torch import nn

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.nn.embedding import shares_head
from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.quantization import pipeline, placement
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.placement import Placement, bytes_needed, place_
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.reporting.outliers import measure_outliers

DATA = [tiny.token_ids(1, 12, seed) for seed in range(5)]
RECIPES = {
    "plain": Recipe(smooth=False),
    "explicit": Recipe(explicit=True),
    "searched": Recipe(alpha="auto", rounding="nearest"),
    "static": Recipe("int8-static", rounding="gptq", clipping="auto", auto_skip=3),
    "rotated": Recipe(alpha="auto", rotate=("residual", "heads")),
    "inputs": Recipe(rounding="gptq", rotate="inputs"),
    "head": Recipe(rotate="inputs", head="8bit"),
    "clip": Recipe("fp8", rounding="clip"),
    "fp8-static": Recipe("fp8-static", clipping="kl", max_ppl_increase=0.05),
    "fp8-e5m2": Recipe("fp8-e5m2", skip=("*.o_proj",)),
}
SMALL = 1 << 20  # bytes of a GPU that nothing fits on


def build(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Attention as torch computes it alike on both devices."""
    model = tiny.build(architecture, dtype)
    if architecture == "llama":
        tiny.amplify_outliers(model)
    model.set_attn_implementation("eager")
    return model


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, also what was measured, except with FP8, whose sums are in another order there."""
    a, b = actual.smoothquant_record, expected.smoothquant_record
    measured = set() if b["recipe"]["scheme"].startswith("int8") else {"layers", "blocks", "sensitivity"}
    for key in a.keys() - {"seconds", "fused"} - measured:
        assert a[key] == b[key], key
    a, b = actual.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert a[name].dtype == value.dtype, name
        assert torch.equal(a[name].cpu().view(torch.uint8), value.view(torch.uint8)), name


@pytest.fixture(params=["there", "whole", "block by block"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The model is on the GPU from the start; it moves there; or it is too large for that."""
    with emulated_cuda(memory=SMALL if request.param == "block by block" else 80 << 30):
        yield request.param


def on_gpu(model: nn.Module, place: str, recipe: Recipe, progress: bool = False) -> nn.Module:
    if place == "there":
        return quantize(model.cuda(), DATA, recipe, progress)
    return quantize(model, DATA, recipe, progress, device="cuda")


@pytest.mark.usefixtures("discover_once")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gives_what_the_cpu_gives(recipe: str, place: str) -> None:
    expected = quantize(build(), DATA, RECIPES[recipe], progress=False)
    model = on_gpu(build(), place, RECIPES[recipe])
    assert_same(model, expected)
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    assert devices == {"cpu" if place == "block by block" else "cuda"}


@pytest.mark.parametrize("place", ["whole", "block by block"], indirect=True)
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2", "opt", "mixtral", "qwen2_moe", "llama4_text"])
def test_every_architecture_gives_what_the_cpu_gives(architecture: str, place: str) -> None:
    expected = quantize(build(architecture), DATA, progress=False)
    assert_same(on_gpu(build(architecture), place, Recipe()), expected)


def test_a_head_that_the_token_embedding_reads(place: str) -> None:
    def tied() -> nn.Module:
        model = tiny.build("gemma3_text", tie_word_embeddings=True)
        model.set_attn_implementation("eager")
        return model

    recipe = Recipe(head="8bit")
    expected = quantize(tied(), DATA, recipe, progress=False)
    model = on_gpu(tied(), place, recipe)
    assert_same(model, expected)
    assert shares_head(model)
    with torch.no_grad():
        ids = DATA[0].to(model.device)
        assert torch.equal(model.get_input_embeddings()(ids).cpu(), expected.get_input_embeddings()(DATA[0]))


@pytest.mark.usefixtures("discover_once")
def test_a_norm_of_16_bits_block_by_block() -> None:
    """Whose rounded weight decides what the layers behind it are multiplied by, also where one of them is left out."""
    recipe, dtype = Recipe(auto_skip=6), torch.bfloat16
    expected = quantize(build(dtype=dtype), DATA, recipe, progress=False)
    assert len(expected.smoothquant_report.skipped) > 3
    with emulated_cuda(memory=SMALL):
        assert_same(quantize(build(dtype=dtype), DATA, recipe, progress=False, device="cuda"), expected)


def cuda_bytes() -> int:
    """Of all tensors on the GPU that anything in this process refers to."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.is_cuda]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.usefixtures("discover_once")
def test_of_a_block_nothing_is_left_on_the_gpu_when_the_next_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after_each = cuda_bytes(), []
    copy = Placement.copy

    def noted(self: Placement, block: object) -> object:
        after_each.append(cuda_bytes() - before)
        return copy(self, block)  # type: ignore[arg-type]

    monkeypatch.setattr(Placement, "copy", noted)
    with emulated_cuda(memory=SMALL):
        model = quantize(build(), DATA, RECIPES["static"], progress=False, device="cuda")
    assert len(after_each) >= 2
    assert not any(after_each)
    assert cuda_bytes() == before
    assert model.device.type == "cpu"


@pytest.mark.usefixtures("discover_once")
def test_what_a_block_returns_waits_on_the_gpu_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    keep = Placement.keep

    def noted(self: Placement, value: torch.Tensor) -> torch.Tensor:
        places.append(keep(self, value).device.type)
        return keep(self, value)

    monkeypatch.setattr(Placement, "keep", noted)
    whole, room = bytes_needed(build())
    for memory, expected in ((room + whole // 2, "cuda"), (room, "cpu")):
        places.clear()
        with emulated_cuda(memory=memory):
            quantize(build(), DATA, Recipe(rounding="gptq"), progress=False, device="cuda")
        assert set(places) == {expected}


@pytest.mark.usefixtures("discover_once")
def test_blocks_stay_on_the_gpu_during_calibration_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy = [0], placement._copy_on

    def counted(*args: object) -> nn.Module:
        copies[0] += 1
        return copy(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(placement, "_copy_on", counted)
    whole, room = bytes_needed(build())
    others = 2 + 2  # while looking for groups, and while quantizing
    for memory, expected in ((room + whole // 2, 2 + others), (room - 1, 2 * len(DATA) + others)):
        copies[0] = 0
        with emulated_cuda(memory=memory), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "discover", discover)
            quantize(build(), DATA, progress=False, device="cuda")
        assert copies[0] == expected


def test_it_says_whether_the_model_moves(capsys: pytest.CaptureFixture[str]) -> None:
    for memory, said in (
        (80 << 30, "it moves there"),
        (SMALL, "one block at a time goes there"),
    ):
        with emulated_cuda(memory=memory):
            place_(build(), "cuda", show=True)
            place_(build(), "cuda", show=False)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert f" {memory / 1e9:.1f} are free on cuda: {said}" in lines[0]


@pytest.mark.usefixtures("gpu")
def test_where_a_model_is_placed() -> None:
    assert place_(build(), None, False) == Placement(torch.device("cpu"))
    assert place_(build(), "cpu", False) == Placement(torch.device("cpu"))
    assert place_(build().cuda(), "cuda", False).device == torch.device("cuda:0")
    model = build().cuda()
    assert place_(model, "cpu", False) == Placement(torch.device("cpu"))
    assert model.device.type == "cpu"
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(SmoothQuantError, match="spread over several devices"):
        place_(model, "cuda", False)


@pytest.mark.usefixtures("discover_once")
def test_outliers_are_those_of_the_cpu(place: str) -> None:
    expected = measure_outliers(build(), DATA)
    actual = measure_outliers(build(), DATA, device="cuda")
    assert [layer.linears for layer in actual] == [layer.linears for layer in expected]
    for layer, other in zip(actual, expected, strict=True):
        assert torch.equal(layer.before, other.before)
        assert torch.equal(layer.after, other.after)
