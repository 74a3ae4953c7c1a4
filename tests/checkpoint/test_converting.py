"""Conversion between formats loses nothing: every tensor, key and file is where it was, or is named."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import tiny
import tiny_mixtures
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_files import change_config, change_tensors, names_in, tensors_of
from tiny_w8a8 import assert_same_model, config_of, logits, quantized, same_bits
from torch import Tensor

from smoothquant_ext import Recipe, SmoothQuantError, load, quantize, save
from smoothquant_ext.checkpoint.converting import convert
from smoothquant_ext.checkpoint.hf_names import cast_
from smoothquant_ext.checkpoint.reading import CONFIG, INDEX

Tensors = dict[str, Tensor]
UP = "model.layers.0.mlp.up_proj"


def assert_same_tensors(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not same_bits(left[name], right[name])] == []


@pytest.mark.parametrize(
    ("model_type", "scheme"),
    [
        *((kind, "int8") for kind in ("llama", "gpt2", "gpt_neox", "phi4-mini", "opt", "qwen2", "falcon-new")),
        ("qwen2", "fp8"),
        ("gpt2", "fp8"),
    ],
)
def test_it_writes_what_loading_and_saving_writes(model_type: str, scheme: str, tmp_path: Path) -> None:
    save(quantized(model_type, scheme), tmp_path / "ours")
    for fmt in ("lmdeploy", "compressed-tensors"):
        save(load(tmp_path / "ours"), tmp_path / "oracle" / fmt, format=fmt)
        convert(tmp_path / "ours", tmp_path / fmt, fmt)
        assert_same_tensors(tensors_of(tmp_path / fmt), tensors_of(tmp_path / "oracle" / fmt))
        assert config_of(tmp_path / fmt) == config_of(tmp_path / "oracle" / fmt)
    convert(tmp_path / "lmdeploy", tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "ours"))
    assert config_of(tmp_path / "back") == config_of(tmp_path / "ours")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3-moe", "granitemoe", "qwen2_moe"])
@pytest.mark.parametrize("skip", [(), ("layers.0.*.experts",)], ids=["all experts", "some experts"])
def test_mixtures(name: str, skip: tuple[str, ...], tmp_path: Path) -> None:
    model = quantize(tiny.build(name), [tiny.token_ids()], Recipe("int8", smooth=False, skip=skip), progress=False)
    save(model, tmp_path / "ours")
    for fmt in ("lmdeploy", "compressed-tensors"):
        save(load(tmp_path / "ours"), tmp_path / "oracle" / fmt, format=fmt)
        done = convert(tmp_path / "ours", tmp_path / fmt, fmt)
        assert_same_tensors(tensors_of(tmp_path / fmt), tensors_of(tmp_path / "oracle" / fmt))
        theirs, ours = (config_of(path)["quantization_config"] for path in (tmp_path / "oracle" / fmt, tmp_path / fmt))
        for config in (theirs, ours):
            key = "ignore" if fmt == "compressed-tensors" else "modules_to_not_convert"
            config[key] = sorted(config[key])
        assert ours == theirs
        assert torch.equal(logits(load(tmp_path / fmt)), logits(model))
    assert (done.unknown, done.dropped, done.left_out) == ((), (), ())


@pytest.mark.parametrize("scheme", ["int8-static", "fp8-static"])
def test_static_experts_are_read_as_load_reads_them(scheme: str, tmp_path: Path) -> None:
    model = quantize(tiny.build("mixtral"), [tiny.token_ids()], Recipe(scheme, smooth=False), progress=False)
    save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "ours"))
    assert_same_model(load(tmp_path / "again"), load(tmp_path / "ours"))


FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
FOREIGN: dict[str, Callable[[Path], Any]] = {
    "vLLM's fp8": lambda path: foreign.write_fp8(
        tiny.build("llama"), path, FP8, ("weight_scale", "input_scale"), False
    ),
    "transformers' fp8": lambda path: foreign.write_fp8(
        tiny.build("qwen2"), path, FP8, ("weight_scale_inv", "activation_scale"), False
    ),
    "FBGEMM": lambda path: foreign.write_fp8(
        tiny.build("llama"), path, {"quant_method": "fbgemm_fp8"}, ("weight_scale", None), True
    ),
    "ModelOpt": lambda path: foreign.write_fp8(
        tiny.build("llama"), path, MODELOPT, ("weight_scale", "input_scale"), False
    ),
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_other_tools(tool: str, tmp_path: Path) -> None:
    FOREIGN[tool](tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert config_of(tmp_path / "ours")["quantization_config"]["quant_method"] == "compressed-tensors"
    assert_same_model(load(tmp_path / "ours"), load(tmp_path / "theirs"))


@pytest.mark.parametrize("scheme", ["int8-static-asymmetric", "int8-dynamic", "fp8-static"])
def test_llm_compressor(scheme: str, tmp_path: Path) -> None:
    source = Path(__file__).parent / "data" / "llmcompressor" / f"qwen2-{scheme}"
    done = convert(source, tmp_path / "ours")
    assert_same_tensors(load(tmp_path / "ours").state_dict(), load(source).state_dict())
    assert "recipe.yaml" in names_in(tmp_path / "ours")
    assert done.left_out == ("expected.safetensors",)


def with_mtp_(directory: Path) -> Tensors:
    """Adds what the model's class has no place for: a block for multi-token prediction, partly in 8 bits."""
    codes = torch.arange(-32, 32, dtype=torch.int8)
    added = {
        "mtp.fc.weight": codes.repeat(16, 1),
        "mtp.fc.weight_scale": torch.rand(16, 1) + 0.1,
        "mtp.fc.bias": torch.rand(16),
        "mtp.norm.weight": torch.rand(64, dtype=torch.float64),
        "mtp.head.weight": torch.rand(8, 64).half(),
        "mtp.steps": torch.tensor([1 << 40]),
        "mtp.mask": torch.tensor([True, False, True]),
        "mtp.nothing": torch.zeros(0, 3),
    }
    change_tensors(directory, lambda tensors: tensors.update(added))
    return added


def test_what_the_model_does_not_know_goes_along(tmp_path: Path) -> None:
    save(quantized("llama"), tmp_path / "source")
    before = tensors_of(tmp_path / "source")
    added = with_mtp_(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "lmdeploy", "lmdeploy")
    assert set(done.unknown) == added.keys()
    stored = tensors_of(tmp_path / "lmdeploy")
    renamed = {name.replace(".weight_scale", ".scale"): tensor for name, tensor in (before | added).items()}
    assert_same_tensors(stored, renamed)
    ignored = config_of(tmp_path / "lmdeploy")["quantization_config"]["modules_to_not_convert"]
    assert "mtp.head" in ignored
    assert "mtp.fc" not in ignored
    back = convert(tmp_path / "lmdeploy", tmp_path / "back", "compressed-tensors", max_shard_size="20KB")
    assert set(back.unknown) == {name.replace(".weight_scale", ".scale") for name in done.unknown}
    assert_same_tensors(tensors_of(tmp_path / "back"), before | added)
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["weight_map"].keys() == (before | added).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in (before | added).values())
    with pytest.raises(SmoothQuantError, match=r"holds 8 tensors that LlamaForCausalLM has no place for: mtp\.fc"):
        load(tmp_path / "back")
    assert torch.equal(logits(load(tmp_path / "back", drop=["mtp.*"])), logits(quantized("llama")))


def test_a_block_that_transformers_leaves_out_by_itself_goes_along(tmp_path: Path) -> None:
    model = quantize(tiny.build("deepseek_v3-moe"), [tiny.token_ids()], Recipe(smooth=False), progress=False)
    save(model, tmp_path / "source")
    block = "model.layers.61"
    added = {
        f"{block}.mlp.experts.{i}.{kind}_proj.{what}": tensor
        for i in range(2)
        for kind in ("gate", "up", "down")
        for what, tensor in {
            "weight": torch.ones(4, 8, dtype=torch.int8) * i,
            "weight_scale": torch.full((4, 1), 0.5),
        }.items()
    } | {f"{block}.enorm.weight": torch.rand(8)}
    change_tensors(tmp_path / "source", lambda tensors: tensors.update(added))
    done = convert(tmp_path / "source", tmp_path / "again", "compressed-tensors")
    assert set(done.unknown) == added.keys()
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "source"))


def test_what_is_not_known_can_be_dropped(tmp_path: Path) -> None:
    save(quantized("llama"), tmp_path / "source")
    before = tensors_of(tmp_path / "source")
    added = with_mtp_(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "again", "compressed-tensors", drop=["mtp.fc.*", "model.*"])
    assert set(done.dropped) == {name for name in added if name.startswith("mtp.fc.")}
    assert_same_tensors(
        tensors_of(tmp_path / "again"), before | {name: added[name] for name in added if name not in done.dropped}
    )


def test_no_tensor_changes_its_dtype(tmp_path: Path) -> None:
    """Norms and routers in fp32 and biases in fp16 of a model in bf16: loading would cast them."""
    save(quantized("qwen2").bfloat16(), tmp_path / "source")

    def mix(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-5
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.rand(64).half()
        tensors["model.layers.1.input_layernorm.weight"] = torch.rand(64, dtype=torch.float64)

    change_tensors(tmp_path / "source", mix)
    before = tensors_of(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "lmdeploy", "lmdeploy")
    convert(tmp_path / "lmdeploy", tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), before)
    assert config_of(tmp_path / "back") == config_of(tmp_path / "source")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_stay_tied(tied: bool, tmp_path: Path) -> None:
    save(quantized("llama", tie_word_embeddings=tied), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "again", "lmdeploy")
    assert ("lm_head.weight" in tensors_of(tmp_path / "again")) is not tied
    assert config_of(tmp_path / "again")["tie_word_embeddings"] is tied
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(tmp_path / "source")))


def test_keys_that_transformers_does_not_know_stay(tmp_path: Path) -> None:
    save(quantized("llama"), tmp_path / "source")
    added = {"of_ours": {"a": [1, None]}, "nothing": None, "torch_dtype": "float32"}
    change_config(tmp_path / "source", lambda config: config.update(added))
    before = config_of(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "again", "lmdeploy")
    after = config_of(tmp_path / "again")
    assert list(after) == list(before)
    assert {key: after[key] for key in after if key != "quantization_config"} == {
        key: before[key] for key in before if key != "quantization_config"
    }


def test_a_configuration_beside_config_json_is_replaced(tmp_path: Path) -> None:
    FOREIGN["ModelOpt"](tmp_path / "source")
    config = config_of(tmp_path / "source")
    quantization = {"quantization": config.pop("quantization_config")}
    (tmp_path / "source" / "hf_quant_config.json").write_text(json.dumps(quantization))
    (tmp_path / "source" / CONFIG).write_text(json.dumps(config))
    done = convert(tmp_path / "source", tmp_path / "again")
    assert not (tmp_path / "again" / "hf_quant_config.json").exists()
    assert done.left_out == ()
    assert_same_model(load(tmp_path / "again"), load(tmp_path / "source"))


def test_metadata_of_files_stays(tmp_path: Path) -> None:
    save(quantized("llama"), tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "made_by": "somebody"})
    convert(tmp_path / "source", tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "made_by": "somebody"}


REFUSED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "an 8-bit tensor that is no layer's weight": (
        lambda tensors: tensors.update({"mtp.experts.gate_up_proj": torch.ones(2, 4, 4, dtype=torch.int8)}),
        r"mtp\.experts\.gate_up_proj is I8 \[2, 4, 4\] and not the weight of a linear layer",
    ),
    "an unknown layer in another scheme": (
        lambda tensors: tensors.update(
            {"mtp.fc.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "mtp.fc.weight_scale": torch.ones(4, 1)}
        ),
        r"mtp\.fc\.weight is F8_E4M3 \[4, 4\], expected I8",
    ),
    "an unknown layer without its scale": (
        lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(4, 4, dtype=torch.int8)}),
        r"mtp\.fc\.weight is I8 but mtp\.fc\.weight_scale is missing",
    ),
    "a lost norm": (lambda tensors: tensors.pop("model.norm.weight"), r"lacks model\.norm\.weight, which config"),
    "a lost layer": (lambda tensors: tensors.pop(f"{UP}.weight"), r"weight_scale is stored but .*weight is missing"),
    "a wrong shape": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
        r"model\.norm\.weight is \[3\], but config\.json makes it \[64\]",
    ),
    "a wrong scale": (
        lambda tensors: tensors[f"{UP}.weight_scale"].fill_(torch.nan),
        r"up_proj\.weight_scale holds nan at row 0",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_converted_is_named_and_nothing_is_written(fault: str, tmp_path: Path) -> None:
    save(quantized("llama"), tmp_path / "source")
    change, sentence = REFUSED[fault]
    change_tensors(tmp_path / "source", change)
    with pytest.raises(SmoothQuantError, match=sentence) as caught:
        convert(tmp_path / "source", tmp_path / "target")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == ["source"]


def test_scales_that_nothing_uses_are_named(tmp_path: Path) -> None:
    save(quantized("llama"), tmp_path / "source")
    before = tensors_of(tmp_path / "source")
    unused = {"model.layers.0.self_attn.k_scale": torch.ones(1), f"{UP}.input_scale": torch.zeros(1)}
    zero = {f"{UP}.weight_zero_point": torch.zeros(112, 1, dtype=torch.int8)}
    change_tensors(tmp_path / "source", lambda tensors: tensors.update(unused | zero))
    with pytest.warns(UserWarning, match="2 scales that no layer here uses are left out: 1 input_scale, 1 k_scale"):
        convert(tmp_path / "source", tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_leave_in_fp32_what_transformers_keeps_there(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = tiny_mixtures.build("deepseek_v3", dtype).state_dict()
    model = tiny_mixtures.build("deepseek_v3", torch.float32)
    cast_(model, dtype)
    assert_same_tensors(model.state_dict(), expected)
    assert {tensor.dtype for tensor in expected.values()} == {dtype, torch.float32}
    model.model.norm.float()  # by somebody, on purpose
    cast_(model, dtype)
    assert model.model.norm.weight.dtype == torch.float32


def test_nothing_is_said_where_nothing_is_lost(tmp_path: Path) -> None:
    save(quantized("llama"), tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(tmp_path / "source", tmp_path / "again")
    shutil.rmtree(tmp_path / "again")
