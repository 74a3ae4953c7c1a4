"""Files that do not hold the model their configuration describes: refused by name, or dropped by name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_files import Change as Change
from model_files import change_config, change_tensors, prefixed, said, with_zeros, without, write
from safetensors.torch import load_file, save_file
from tiny_w8a8 import assert_same_model, quantized
from tiny_words import tokenizer, write_gguf
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import smoothquant_ext
from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.checkpoint.completeness import load_complete
from smoothquant_ext.models import load_model, loads_as_here

MTP = with_zeros(**{"mtp.0.norm.weight": (64,), "mtp.0.up_proj.weight": (4, 4), "mtp.1.norm.weight": (64,)})
BLOCK = "model.layers.1.{}.weight"

# What is done to a Llama of two layers -> what is said about it after its directory.
INCOMPLETE: dict[str, tuple[Change, dict[str, object], str]] = {
    "lost tensor": (
        without(BLOCK.format("mlp.up_proj")),
        {},
        " lacks 1 tensor that its configuration calls for: model.layers.1.mlp.up_proj.weight; ",
    ),
    "no head": (
        without("lm_head.weight"),
        {},
        " lacks 1 tensor that its configuration calls for: lm_head.weight; ",
    ),
    "more layers than stored": (
        dict,
        {"num_hidden_layers": 12},
        " lacks 90 tensors that its configuration calls for: model.layers.2-11.input_layernorm.weight (10), ",
    ),
    "fewer layers than stored": (
        dict,
        {"num_hidden_layers": 1},
        " holds 9 tensors that LlamaForCausalLM has no place for: model.layers.1.input_layernorm.weight, ",
    ),
    "multi-token prediction": (
        MTP,
        {},
        " holds 3 tensors that LlamaForCausalLM has no place for: mtp.0-1.norm.weight (2), mtp.0.up_proj.weight; ",
    ),
    "a bias too many": (
        with_zeros(**{"model.layers.1.self_attn.q_proj.bias": (64,)}),
        {},
        " holds 1 tensor that LlamaForCausalLM has no place for: model.layers.1.self_attn.q_proj.bias; leave it out",
    ),
    "a bias too few": (
        dict,
        {"attention_bias": True},
        " lacks 8 tensors that its configuration calls for: model.layers.0-1.self_attn.k_proj.bias (2), ",
    ),
    "DataParallel": (
        prefixed("module."),
        {},
        ": the names of 21 tensors start with 'module.', as torch's DataParallel does, so LlamaForCausalLM finds none",
    ),
    "torch.compile": (
        prefixed("_orig_mod."),
        {},
        ": the names of 21 tensors start with '_orig_mod.', as torch",
    ),
    "PEFT": (prefixed("base_model.model."), {}, ": the names of 21 tensors start with 'base_model.model.', as PEFT"),
    "somebody's": (prefixed("student."), {}, ": the names of 21 tensors start with 'student.', so LlamaForCausalLM"),
    "resized vocabulary": (
        dict,
        {"vocab_size": 100},
        ": lm_head.weight is [96, 64], but config.json makes it [100, 64], and 1 other tensor of another shape; ",
    ),
    "another width": (
        dict,
        {"intermediate_size": 128},
        ": model.layers.0.mlp.down_proj.weight is [64, 112], but config.json makes it [64, 128], and 5 other tensors",
    ),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pristine")
    write(tiny.build("llama"), root / "float")
    saving.save(quantized("llama"), root / "w8a8", tokenizer())
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copy(pristine: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(pristine[kind], tmp_path / kind))


@pytest.mark.parametrize("fault", INCOMPLETE)
def test_a_float_model(fault: str, copy: Callable[[str], Path]) -> None:
    change, settings, message = INCOMPLETE[fault]
    directory = copy("float")
    change_tensors(directory, change)
    change_config(directory, **settings)
    assert said(lambda: load_model(directory)).startswith(f"{directory}{message}")


# The shapes and the completeness of 8-bit layers are checked before, by tests/checkpoint/test_reading.py.
@pytest.mark.parametrize(
    "fault",
    ["no head", "multi-token prediction", "more layers than stored", "fewer layers than stored", "DataParallel"],
)
def test_an_8_bit_model(fault: str, copy: Callable[[str], Path]) -> None:
    """The same rule, whichever way it is loaded; through transformers nobody can say what may be dropped."""
    change, settings, message = INCOMPLETE[fault]
    directory = copy("w8a8")
    change_tensors(directory, change)
    change_config(directory, **settings)
    for kinds, count in (("9 tensors", 16), ("21 tensors", 35)):  # 8-bit layers have a scale too
        message = message.replace(kinds, f"{count} tensors")
    for load in (loading.load, load_model):
        assert said(lambda load=load: load(directory)).startswith(f"{directory}{message}")
    smoothquant_ext.enable()
    try:
        if "holds" in message:
            with pytest.warns(UserWarning, match=r"holds \d+ tensors .*: left out"):
                model = AutoModelForCausalLM.from_pretrained(directory)
            assert_same_model(model, loading.load(directory, drop=["mtp.*", "model.layers.1.*"]))
        else:
            assert message in said(lambda: AutoModelForCausalLM.from_pretrained(directory))
    finally:
        smoothquant_ext.disable()


@pytest.mark.parametrize("kind", ["float", "w8a8"])
def test_what_is_dropped_by_name_changes_nothing_else(kind: str, copy: Callable[[str], Path]) -> None:
    directory = copy(kind)
    expected, _ = load_model(directory)
    change_tensors(directory, MTP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for patterns in (["mtp.*"], ["mtp.0.*", "mtp.1.norm.weight"], ["*"]):
            assert_same_model(load_model(directory, drop=patterns)[0], expected)
    assert "holds 1 tensor that LlamaForCausalLM has no place for: mtp.1.norm.weight" in said(
        lambda: load_model(directory, drop=["mtp.0.*"])
    )
    with pytest.warns(UserWarning, match="to drop") as caught:
        assert_same_model(load_model(directory, drop=["mtp.*", "model.norm.*", "mpt.*"])[0], expected)
    assert [str(warning.message).partition(": ")[2] for warning in caught] == [
        "the pattern 'model.norm.*' to drop names tensors that the model needs, so it has no effect",
        "the pattern 'mpt.*' to drop matches no tensor, so it has no effect",
    ]


def test_the_option_that_is_printed_works(copy: Callable[[str], Path]) -> None:
    directory = copy("float")
    change_config(directory, num_hidden_layers=1)
    change_tensors(directory, lambda tensors: MTP(tensors) | {"model.extra": torch.ones(1)})
    sentence = said(lambda: load_model(directory))
    patterns = json.loads(sentence.rpartition("drop=")[2].replace("'", '"'))
    assert patterns == ["model.extra", "model.layers.1.*", "mtp.*"]
    assert sentence.count("--drop") == 3
    model, _ = load_model(directory, drop=patterns)
    state = tiny.build("llama").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


OLD_BUFFERS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "rotary frequencies": (
        "llama",
        {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,), "model.rotary_emb.inv_freq": (8,)},
    ),
    "all buffers of a trainer": (
        "mistral",
        {f"model.layers.0.self_attn.rotary_emb.{name}_cached": (128, 16) for name in ("cos", "sin")},
    ),
    "masks of GPT-2": ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.1.attn.masked_bias": ()}),
    "masks of GPT-NeoX": (
        "gpt_neox",
        {"gpt_neox.layers.0.attention.bias": (1, 1, 8, 8), "gpt_neox.layers.0.attention.masked_bias": ()},
    ),
    "position ids": ("opt", {"model.decoder.position_ids": (1, 128)}),
}


@pytest.mark.parametrize("case", OLD_BUFFERS)
def test_buffers_that_models_used_to_store(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    architecture, buffers = OLD_BUFFERS[case]
    write(tiny.build(architecture), tmp_path / "model")
    change_tensors(tmp_path / "model", with_zeros(**buffers))
    assert_same_model(load_model(tmp_path / "model")[0], tiny.build(architecture))
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == []


def test_a_bias_of_an_attention_is_no_mask(tmp_path: Path) -> None:
    """GPT-2 has a layer whose bias ends like the name of its old mask."""
    write(tiny.build("gpt2"), tmp_path / "model")
    change_tensors(tmp_path / "model", without("transformer.h.1.attn.c_attn.bias"))
    assert "lacks 1 tensor that its configuration calls for: transformer.h.1.attn.c_attn.bias" in said(
        lambda: load_model(tmp_path / "model")
    )


def test_tensors_that_transformers_leaves_out_by_itself_are_named(tmp_path: Path) -> None:
    write(tiny.build("deepseek_v3"), tmp_path / "model")
    change_tensors(tmp_path / "model", with_zeros(**{"model.layers.61.enorm.weight": (64,)}))
    with pytest.warns(UserWarning, match=r"holds 1 tensor .*: model\.layers\.61\.enorm\.weight: left out"):
        load_model(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path / "model", drop=["model.layers.61.*"])


def test_names_that_transformers_understands(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """The base model's prefix twice or never, tied weights once, twice or under the other name."""
    directory = copy("float")
    change_tensors(directory, prefixed("model."))
    assert_same_model(load_model(directory)[0], tiny.build("llama"))
    write(tiny.build("gpt2"), tmp_path / "gpt2")
    change_tensors(tmp_path / "gpt2", lambda ts: {name.removeprefix("transformer."): t for name, t in ts.items()})
    assert_same_model(load_model(tmp_path / "gpt2")[0], tiny.build("gpt2"))
    tied = tiny.build("llama", tie_word_embeddings=True)
    for name, change in {
        "once": dict,
        "twice": lambda ts: ts | {"lm_head.weight": ts["model.embed_tokens.weight"]},
        "head": lambda ts: {key.replace("model.embed_tokens", "lm_head"): t for key, t in ts.items()},
    }.items():
        write(tied, tmp_path / name)
        change_tensors(tmp_path / name, change)
        assert_same_model(load_model(tmp_path / name)[0], tied)


@pytest.mark.parametrize("architecture", sorted(tiny.CONFIGS))
def test_every_architecture(architecture: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """As transformers writes it, it is complete; without any one of a few tensors it is not."""
    model = tiny.build(architecture)
    directory = write(model, tmp_path / "model")
    assert_same_model(load_model(directory)[0], model)
    assert [str(warning.message) for warning in recwarn if " tensor" in str(warning.message)] == []
    tensors = load_file(directory / "model.safetensors")
    for name in sorted(tensors)[:: max(1, len(tensors) // 3)]:
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, directory / "model.safetensors")
        lost = "2 tensors" if name in model.all_tied_weights_keys.values() else "1 tensor"  # with the head tied to it
        sentence = said(lambda: load_model(directory))
        assert f" lacks {lost} that " in sentence, name
        assert sentence.partition(": ")[2].partition(";")[0].rpartition(".")[2] == name.rpartition(".")[2]


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map: Any, copy: Callable[[str], Path]) -> None:
    directory = copy("float")
    change_tensors(directory, without("model.norm.weight"))
    assert "lacks 1 tensor that its configuration calls for: model.norm.weight" in said(
        lambda: load_complete(AutoModelForCausalLM, directory, device_map=device_map)
    )
    change_tensors(directory, lambda tensors: MTP(tensors) | {"model.norm.weight": torch.ones(64)})
    assert "--drop 'mtp.*'" in said(lambda: load_complete(AutoModelForCausalLM, directory, device_map=device_map))


def test_shards(tmp_path: Path) -> None:
    whole = write(tiny.build("llama"), tmp_path / "whole", max_shard_size="60KB")
    shard = sorted(whole.glob("model-*"))[1]
    lost = Path(shutil.copytree(whole, tmp_path / "lost"))
    (lost / shard.name).unlink()
    assert f"{lost / shard.name} is missing, though model.safetensors.index.json names it" in said(
        lambda: load_model(lost)
    )

    unnamed = Path(shutil.copytree(whole, tmp_path / "unnamed"))
    index = json.loads((unnamed / "model.safetensors.index.json").read_text())
    gone = [name for name, file in index["weight_map"].items() if file == shard.name]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    (unnamed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match=rf"holds {shard.name}, which model.safetensors.index.json does not name"):
        sentence = said(lambda: load_model(unnamed))
    assert f"{unnamed} lacks {len(gone)} tensors that its configuration calls for: " in sentence

    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    tensors = load_file(cut / shard.name)
    name, _ = tensors.popitem()
    save_file(tensors, cut / shard.name, {"format": "pt"})
    assert f"{cut / shard.name} lacks the tensor {name}" in said(lambda: load_model(cut))
    assert_same_model(load_model(whole)[0], tiny.build("llama"))


def test_a_leftover_shard_beside_the_whole_model(copy: Callable[[str], Path]) -> None:
    directory = copy("float")
    shutil.copy(directory / "model.safetensors", directory / "model-00001-of-00002.safetensors")
    with pytest.warns(UserWarning, match=r"model-00001-of-00002\.safetensors, which model\.safetensors does not name"):
        assert_same_model(load_model(directory)[0], tiny.build("llama"))


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_an_expert_that_lost_a_tensor(part: str, tmp_path: Path) -> None:
    write(tiny.build("mixtral"), tmp_path / "model")
    name = f"model.layers.1.block_sparse_moe.experts.2.{part}.weight"
    change_tensors(tmp_path / "model", without(name))
    assert f" lacks 1 tensor that other experts have: {name}; " in said(lambda: load_model(tmp_path / "model"))


def test_hundreds_of_names_are_one_sentence(tmp_path: Path) -> None:
    write(tiny.build("mixtral"), tmp_path / "model")
    change_config(tmp_path / "model", num_hidden_layers=1)
    sentence = said(lambda: load_model(tmp_path / "model"))
    assert len(sentence) < 600
    assert sentence.endswith("leave them out with --drop 'model.layers.1.*', in Python drop=['model.layers.1.*']")


def rewritten(original: Any, keep: Callable[[str], bool]) -> Any:
    return lambda writer, name, *rest, **options: original(writer, name, *rest, **options) if keep(name) else None


@pytest.mark.parametrize(
    ("blocks", "lost", "message"),
    [
        (3, "", "lacks 9 tensors that its configuration calls for: model.layers.2.input_layernorm.weight, "),
        (
            2,
            "blk.1.ffn_up.weight",
            "lacks 1 tensor that its configuration calls for: model.layers.1.mlp.up_proj.weight",
        ),
        (1, "", "holds 9 tensors that the model of its header has no place for: blk.1.attn_k.weight, "),
    ],
)
def test_gguf_files(blocks: int, lost: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    with monkeypatch.context() as patch:
        add_count, add_tensor = gguf.GGUFWriter.add_block_count, gguf.GGUFWriter.add_tensor
        patch.setattr(gguf.GGUFWriter, "add_block_count", lambda writer, _: add_count(writer, blocks))
        patch.setattr(gguf.GGUFWriter, "add_tensor", rewritten(add_tensor, lambda name: name != lost))
        expected = write_gguf(file)
    assert said(lambda: load_model(file)).startswith(f"{file} {message}")
    if blocks == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, _ = load_model(file, drop=["blk.1.*"])
        state = expected.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["float", "w8a8"])
def test_whoever_else_loads_it(kind: str, copy: Callable[[str], Path]) -> None:
    """The server and the chat call transformers, which loads anything."""
    directory = copy(kind)
    expected, _ = load_model(directory)
    before = LlamaForCausalLM.from_pretrained.__func__
    smoothquant_ext.enable()
    try:
        with loads_as_here(str(directory)):
            assert_same_model(AutoModelForCausalLM.from_pretrained(directory), expected)
        change_tensors(directory, MTP)
        with loads_as_here(str(directory)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert "--drop 'mtp.*'" in said(lambda: LlamaForCausalLM.from_pretrained(directory))
        with loads_as_here(str(directory), ["mtp.*"]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same_model(LlamaForCausalLM.from_pretrained(directory), expected)
        change_tensors(directory, without("model.norm.weight"))
        with loads_as_here(str(directory)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert "lacks 1 tensor" in said(lambda: AutoModelForCausalLM.from_pretrained(directory))
    finally:
        smoothquant_ext.disable()
    assert LlamaForCausalLM.from_pretrained.__func__ is before
