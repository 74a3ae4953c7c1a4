"""Scales that nothing uses refuse no checkpoint, a row of zeros may have a scale of 0, any other wrong one is named."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stored_files import change_config, change_tensors, tensors_of
from tiny_w8a8 import assert_same_model, logits, quantized, same_bits
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoothquant_ext import Recipe, SmoothQuantError, disable, enable, load, quantize, save
from smoothquant_ext.checkpoint.naming import quantized_layers
from smoothquant_ext.checkpoint.scales import wrong_scale
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.quantization.convert import quantize_weight, static_scale
from smoothquant_ext.quantization.rounding import round_weight
from smoothquant_ext.scheme import SCHEMES, SMALLEST_SCALE

Tensors = dict[str, Tensor]
UP = "model.layers.0.mlp.up_proj"
BAD = {"zero": 0.0, "NaN": torch.nan, "infinity": torch.inf, "negative": -1.0}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model with biases, in three schemes, and mixtures in one."""
    root = tmp_path_factory.mktemp("pristine")
    for scheme in ("int8", "int8-static", "fp8", "fp8-static"):
        save(quantized("qwen2", scheme), root / scheme)
    for name in ("mixtral", "deepseek_v3-moe"):
        model = tiny.build(name)
        save(quantize(model, [tiny.token_ids()], Recipe("int8-static", smooth=False), progress=False), root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copy(pristine: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(pristine[name], tmp_path / name))


def static_experts_(directory: Path) -> list[str]:
    """Makes the inputs of all experts static, as llm-compressor stores them; the names of their scales."""
    names: list[str] = []

    def add(tensors: Tensors) -> None:
        names.extend(name.removesuffix("weight_scale") + "input_scale" for name in tensors if "experts." in name
                     and name.endswith("weight_scale") and "shared" not in name)  # fmt: skip
        tensors.update({name: torch.tensor([0.05]) for name in names})

    change_tensors(directory, add)

    def every_layer_is_static(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        static = next(g for g in groups.values() if not g["input_activations"]["dynamic"])
        config["quantization_config"]["config_groups"] = {"group_0": static | {"targets": ["Linear"]}}

    change_config(directory, every_layer_is_static)
    return names


EXPERTS: dict[str, Callable[[Tensors, list[str]], Any]] = {
    "missing in one expert": lambda tensors, names: tensors.pop(names[5]),
    "missing in all": lambda tensors, names: [tensors.pop(name) for name in names],
    "of another shape": lambda tensors, names: tensors.update({names[1]: torch.ones(3)}),
    **{
        kind: lambda tensors, names, value=value: tensors.update({names[4]: torch.tensor([value])})
        for kind, value in BAD.items()
    },
}


@pytest.mark.parametrize("fault", EXPERTS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3-moe"])
def test_static_scales_of_experts_that_calibration_never_reached(
    name: str, fault: str, copy: Callable[[str], Path], pristine: dict[str, Path]
) -> None:
    directory = copy(name)
    names = static_experts_(directory)
    assert len(names) == 2 * 4 * 3
    change_tensors(directory, lambda tensors: EXPERTS[fault](tensors, names))
    with pytest.warns(UserWarning, match="inputs of experts get a scale per token") as caught:
        loaded = load(directory)
    assert len([warning for warning in caught if issubclass(warning.category, UserWarning)]) == 1
    assert_same_model(loaded, load(pristine[name]))
    enable()
    try:
        with pytest.warns(UserWarning, match="inputs of experts get a scale per token"):
            assert_same_model(AutoModelForCausalLM.from_pretrained(directory), loaded)
    finally:
        disable()


def test_a_static_scale_that_a_layer_uses_is_still_needed(copy: Callable[[str], Path]) -> None:
    directory = copy("deepseek_v3-moe")
    static_experts_(directory)
    shared = "model.layers.1.mlp.shared_experts.up_proj.input_scale"
    change_tensors(directory, lambda tensors: tensors.update({shared: torch.tensor([torch.nan])}))
    with pytest.raises(SmoothQuantError, match=f"{shared} holds nan, expected positive finite numbers"):
        load(directory)
    change_tensors(directory, lambda tensors: tensors.pop(shared))
    with pytest.raises(SmoothQuantError, match=f"activations are static but {shared} is missing"):
        load(directory)


def test_an_8_bit_layer_that_the_model_does_without_is_not_looked_at(copy: Callable[[str], Path]) -> None:
    directory = copy("deepseek_v3-moe")  # of which transformers never loads layer 61, a head for speculation
    expected = load(directory)
    last = "model.layers.61"
    change_tensors(
        directory,
        lambda tensors: tensors.update(
            {
                f"{last}.eh_proj.weight": torch.ones(4, 8, dtype=torch.int8),
                f"{last}.eh_proj.weight_scale": torch.tensor([torch.nan]),
                f"{last}.mlp.experts.0.up_proj.weight": torch.ones(4, 8, dtype=torch.float8_e4m3fn),
                f"{last}.shared_head.weight_scale": torch.zeros(4, 1),
                f"{last}.self_attn.kv_b_proj.input_scale": torch.zeros(1),
            }
        ),
    )
    with pytest.warns(
        UserWarning, match="2 scales that no layer here uses are left out: 1 input_scale, 1 weight_scale"
    ):
        assert_same_model(load(directory), expected)


UNUSED: dict[str, tuple[str, Tensors, str]] = {
    "of the cache and of attention": (
        "int8",
        {f"model.layers.{i}.self_attn.{kind}_scale": torch.zeros(1) for i in range(2) for kind in "qkv"},
        "6 scales .* 2 k_scale, 2 q_scale, 2 v_scale",
    ),
    "of outputs": (
        "fp8",
        {f"model.layers.{i}.self_attn.k_proj.output_scale": torch.tensor([torch.nan]) for i in range(2)},
        "2 scales .* 2 output_scale",
    ),
    "of dynamic inputs": (
        "int8",
        {f"{UP}.input_scale": torch.tensor([torch.nan]), f"{UP}.input_zero_point": torch.tensor([3])},
        "1 scales .* 1 input_scale",
    ),
    "of inputs, without a value": ("fp8", {f"{UP}.input_scale": torch.zeros(0)}, "1 scales .* 1 input_scale"),
    "of a layer in floating point": (
        "int8",
        {"lm_head.weight_scale": torch.zeros(96, 1)},
        "1 scales .* 1 weight_scale",
    ),
    "of the embedding": (
        "fp8-static",
        {f"model.embed_tokens.{kind}_scale": torch.full((1,), torch.nan) for kind in ("weight", "input")},
        "2 scales .* 1 input_scale, 1 weight_scale",
    ),
    "of a layer that is nowhere": (
        "int8-static",
        {"mtp.fc.weight_scale": torch.zeros(4, 1)},
        "1 scales .* 1 weight_scale",
    ),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_scales_that_nothing_uses(kind: str, copy: Callable[[str], Path], pristine: dict[str, Path]) -> None:
    scheme, added, sentence = UNUSED[kind]
    directory = copy(scheme)
    change_tensors(directory, lambda tensors: tensors.update(added))
    with pytest.warns(UserWarning, match=sentence) as caught:
        loaded = load(directory)
    assert len(caught) == 1
    assert_same_model(loaded, load(pristine[scheme]))
    assert not loaded._keys_to_ignore_on_load_unexpected


def test_zero_points_of_zero_need_no_sentence(copy: Callable[[str], Path]) -> None:
    directory = copy("int8-static")
    zero = {f"{UP}.weight_zero_point": torch.zeros(112, 1, dtype=torch.int8), f"{UP}.input_zero_point": torch.zeros(1)}
    change_tensors(directory, lambda tensors: tensors.update(zero))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(directory)
    for name in zero:
        change_tensors(
            directory, lambda tensors, name=name: tensors.update({name: torch.ones(1)} | zero | {name: torch.ones(1)})
        )
        with pytest.raises(SmoothQuantError, match=f"{name} is not zero, expected symmetric"):
            load(directory)  # fmt: skip


def with_row(scheme: str, row: int, value: float, codes: int) -> Callable[[Tensors], None]:
    """Sets a row of a weight to 0 or to other codes, and its scale."""

    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.weight"].view(torch.uint8)[row] = codes
        scale = tensors[f"{UP}.weight_scale"]
        (scale if scheme == "fp8-static" else scale[row]).fill_(value)

    return change


@pytest.mark.parametrize("value", [0.0, 1e-39, 1.0])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-static"])
def test_a_row_of_zeros_gives_the_bias_whatever_its_scale(
    scheme: str, value: float, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = copy(scheme)
    change_tensors(directory, with_row(scheme, 7, value, 0x80 if scheme == "fp8" else 0))  # FP8: -0
    bias = torch.randn(112)
    loaded = load(directory)
    layer = quantized_layers(loaded)[UP]
    layer.bias = bias
    for x in (torch.randn(3, 64), torch.zeros(1, 64), torch.full((2, 64), 3e38)):
        assert torch.equal(layer.product(x)[:, 7], bias[7].expand(len(x)))
    layer.bias = None
    save(loaded, tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), loaded)
    stored = tensors_of(tmp_path / "again")
    assert [name for name, tensor in tensors_of(directory).items() if not same_bits(stored[name], tensor)] == []


def test_a_weight_of_zeros_with_one_scale(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("fp8-static")
    change_tensors(directory, lambda tensors: [with_row("fp8-static", row, 0.0, 0)(tensors) for row in range(112)])
    loaded = load(directory)
    layer = quantized_layers(loaded)[UP]
    assert torch.equal(layer.product(torch.randn(3, 64)), torch.zeros(3, 112))
    save(loaded, tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), loaded)


WRONG = {
    "zero": (0.0, 1, r"holds 0\.0{at}, expected positive finite numbers, or 0 for a row of zeros"),
    "zero, of FP8 that is not a number": (0.0, 0x7F, r"holds 0\.0{at}"),
    "subnormal": (1e-39, 1, "holds 1.0.*e-39{at}"),
    "infinite": (torch.inf, 1, "holds inf{at}"),
    "infinite, of zeros": (torch.inf, 0, "holds inf{at}"),
    "not a number": (torch.nan, 1, "holds nan{at}"),
    "not a number, of zeros": (torch.nan, 0, "holds nan{at}"),
    "negative": (-1.0, 1, r"holds -1\.0{at}"),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-static"])
def test_a_wrong_scale_is_named_with_its_row(scheme: str, fault: str, copy: Callable[[str], Path]) -> None:
    value, codes, sentence = WRONG[fault]
    directory = copy(scheme)
    if scheme == "fp8-static":  # one scale: the row that counts is the only one that is not zero
        change_tensors(directory, lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8).fill_(0))
    change_tensors(directory, with_row(scheme, 7, value, codes))
    at = "" if scheme == "fp8-static" else " at row 7"
    with pytest.raises(SmoothQuantError, match=rf"{UP}\.weight_scale ({sentence.replace('{at}', at)})"):
        load(directory)


def test_an_fp16_scale_that_underflowed(copy: Callable[[str], Path]) -> None:
    directory = copy("int8")

    def halve(tensors: Tensors) -> None:
        tensors[f"{UP}.weight_scale"][3] = 1e-9
        tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].half()

    change_tensors(directory, halve)
    with pytest.raises(SmoothQuantError, match=rf"{UP}\.weight_scale holds 0\.0 at row 3"):
        load(directory)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("factor", [0.0, 1e-45, 1e-40, 1e-37], ids=str)
def test_our_own_rows_next_to_zero_come_back(scheme: str, factor: float, tmp_path: Path) -> None:
    model = tiny.build("qwen2")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] = factor  # a row
        model.model.layers[1].self_attn.o_proj.weight.fill_(factor)  # a whole weight
    model = quantize(model, [tiny.token_ids()], Recipe(scheme, smooth=False), progress=False)
    layers = quantized_layers(model)
    assert (
        wrong_scale(layers["model.layers.1.self_attn.o_proj"].weight_scale, lambda: torch.ones(64, 64).char()) is None
    )
    save(model, tmp_path / "model")
    assert_same_model(load(tmp_path / "model"), model)


@pytest.mark.parametrize("method", ["nearest", "clip", "gptq"])
def test_no_rounding_makes_a_subnormal_scale(method: Any) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2], weight[3], weight[4] = 0.0, 1e-45, 1e-39, 1.6e-36
    hessian = torch.eye(16) * 3
    for name in ("int8", "fp8"):
        codes, scale = round_weight(weight, SCHEMES[name], method, hessian)
        assert bool((scale >= SMALLEST_SCALE).all())
        dequantized = codes.float() * scale
        assert bool(((dequantized - weight).abs().amax(1) <= weight.abs().amax(1) / 16 + 128 * SMALLEST_SCALE).all())
    assert quantize_weight(torch.full((2, 4), 1e-45), SCHEMES["fp8-static"])[1].item() == 1.0
    assert static_scale(torch.tensor(1e-44), torch.int8).item() == 1.0


def test_an_expert_that_got_no_token_and_one_of_zeros(tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()  # every token goes to the first two of four
        model.model.layers[1].mlp.experts.gate_up_proj[3] = 0.0
        model.model.layers[1].mlp.experts.down_proj[2] = 1e-45
    model = quantize(model, [tiny.token_ids()], Recipe("int8-static"), progress=False)
    save(model, tmp_path / "model")
    assert_same_model(load(tmp_path / "model"), model)
    change_tensors(
        tmp_path / "model",
        lambda tensors: tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight_scale"].zero_(),
    )
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))


def test_saving_says_which_scale_is_wrong(tmp_path: Path) -> None:
    model = quantized("llama", "int8-static")
    layer: W8A8Linear = quantized_layers(model)[UP]
    layer.weight_scale[3] = 0.0
    with pytest.raises(SmoothQuantError, match=f"{UP}.weight_scale is not positive and finite everywhere"):
        save(model, tmp_path / "model")
    layer.weight_scale[3], layer.input_scale[0] = 1.0, torch.nan  # type: ignore[index]
    with pytest.raises(SmoothQuantError, match=f"{UP}.input_scale is not positive and finite everywhere"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
