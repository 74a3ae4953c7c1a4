"""The command line: what each command does."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys

import pytest
import torch
from command_line import SMALL, complaint, smoothquant
from command_line import work as work  # the fixture
from emulated_cuda import emulated_cuda
from emulation import ROOT
from safetensors.torch import load_file
from tiny_text import write_tiny_model
from typer.testing import CliRunner

from smoothquant_ext import cli
from smoothquant_ext.checkpoint.formats.registry import written_formats
from smoothquant_ext.scheme import SCHEMES

COMMANDS = ("quantize", "convert", "eval", "compare", "generate", "chat", "serve", "inspect", "report", "info")


def test_help_names_every_command_and_scheme_and_gives_examples():
    top = smoothquant("--help").stdout
    assert all(command in top for command in COMMANDS)
    for command in COMMANDS:
        text = smoothquant(command, "--help").stdout
        assert f"Example: smoothquant {command}" in text
    text = " ".join(smoothquant("quantize", "--help").stdout.replace("│", " ").split())
    assert all(scheme in text for scheme in SCHEMES)
    assert all(f"{name}, read by" in text for name in written_formats())
    assert re.search(r"Default: 0\.5\D+int8-static\W+0\.8", text), "the defaults of alpha"
    assert "'*.down_proj'" in text
    assert "NAME[/CONFIG][:SPLIT]" in text


def test_version_is_that_of_the_installed_package(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"9.8.7 of {name}")
    assert smoothquant("--version").stdout.strip() == "smoothquant-ext 9.8.7 of smoothquant-ext"


def test_without_arguments_it_shows_its_help():
    assert "quantize" in CliRunner().invoke(cli.app, []).output


def test_quantize_saves_a_model_and_says_what_it_did(work, tmp_path):
    target = tmp_path / "new" / "w8a8"
    result = smoothquant("quantize", work / "model", "-o", target, "--calib", work / "text.txt", *SMALL)
    assert "15 linear layers run in int8" in result.stdout
    assert "In 8 bits outside of the blocks: lm_head; it alone costs" in result.stdout
    assert "input_layernorm → q_proj, k_proj, v_proj" in result.stdout
    assert f"smoothquant compare {work / 'model'} {target} --text {work / 'text.txt'}" in result.stdout
    assert f'smoothquant generate {target} "' in result.stdout
    tensors = load_file(target / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16  # the model came in float32
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert (target / "tokenizer.json").exists()


def test_quantize_follows_its_options(work, tmp_path):
    options = ("--scheme", "fp8-static", "--alpha", "0.6", "--skip", "*.down_proj", "--skip", "layers.1.*")
    result = smoothquant(
        "quantize", work / "model", "-o", tmp_path / "out", "--calib", work / "text.txt", *SMALL, *options,
        "--dtype", "float32",
    )  # fmt: skip
    assert "6 linear layers run in fp8-static" in result.stdout
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.0.mlp.up_proj.input_scale"].shape == (1,)
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ((), ["inputs", "auto"]),
        (("--format", "smoothquant-ext"), ["inputs", "auto"]),
        (("--format", "compressed-tensors"), ["residual", "heads", "auto"]),
        (("--format", "lmdeploy"), ["residual", "heads", "auto"]),
        (("--alpha", "0.6"), ["inputs", "auto"]),
        (("--scheme", "int8-static"), ["residual", "heads", "auto"]),
        (("--explicit",), ["residual", "heads", "auto"]),
        (("--rotate", "inputs"), ["inputs"]),
        (("--fast",), ["inputs"]),
        (("--fast", "--format", "compressed-tensors"), []),
        (("--fast", "--scheme", "fp8"), []),
    ],
    ids=lambda value: "_".join(value) or "none",
)
def test_other_engines_are_given_what_they_can_run(work, tmp_path, options, kinds):
    quantize = ("quantize", work / "model", "-o", tmp_path / "out", "--calib", work / "text.txt")
    result = smoothquant(*quantize, *SMALL, *options)
    record = json.loads((tmp_path / "out" / "smoothquant.json").read_text())
    assert record["recipe"]["rotate"] == kinds
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    rotates = "transform_config" in config
    assert rotates or kinds != ["inputs"]
    assert not rotates or config["quantization_status"] == "smoothed"
    assert ("for smoothquant-ext alone" in result.stdout) == (rotates and "--format" not in options)


@pytest.mark.parametrize("fast", [(), ("--fast",)], ids=["", "fast"])
@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ((), "auto"),
        (("--rotate", "inputs"), "auto"),
        (("--explicit",), "auto"),
        (("--head", "float"), "float"),
        (("--head", "8bit", "--scheme", "fp8"), "8bit"),
        (("--rotate", "none"), "float"),
        (("--scheme", "fp8"), "float"),
        (("--scheme", "int8-static"), "float"),
        (("--format", "compressed-tensors"), "float"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else value,
)
def test_the_head_has_8_bits_where_nobody_else_reads_the_checkpoint(work, tmp_path, options, bits, fast):
    quantize = ("quantize", work / "model", "-o", tmp_path / "out", "--calib", work / "text.txt")
    result = smoothquant(*quantize, *SMALL, *options, *fast)
    assert json.loads((tmp_path / "out" / "smoothquant.json").read_text())["recipe"]["head"] == bits
    has_8_bits = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype.itemsize == 1
    assert has_8_bits == (bits != "float")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quantization_status"] == "smoothed") or not has_8_bits
    assert ("for smoothquant-ext alone" in result.stdout) or not has_8_bits


@pytest.mark.parametrize("bits", ["8bit", "auto"])
@pytest.mark.parametrize("name", ["compressed-tensors", "lmdeploy"])
def test_a_head_that_the_format_has_no_place_for(work, tmp_path, name, bits):
    quantize = ("quantize", work / "model", "-o", tmp_path / "out", "--calib", work / "text.txt")
    said = complaint(*quantize, *SMALL, "--format", name, "--head", bits)
    assert f"format '{name}' cannot store a token embedding in 8 bits, which --head float avoids" in said
    assert not (tmp_path / "out").exists()


def test_what_interrupted_runs_left_is_removed_once_the_output_is_there(work, tmp_path):
    left = tmp_path / ".out.search" / "of-another-recipe"
    left.mkdir(parents=True)
    (left / "model.layers.0.rounded.safetensors").write_bytes(b"large")
    smoothquant("quantize", work / "model", "-o", tmp_path / "out", "--calib", work / "text.txt", *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_enough_text_is_read_for_the_widest_layer(work, tmp_path):
    quantize = ("quantize", work / "model", "-o", tmp_path / "out", "--calib", work / "text.txt", "--seqlen", "8")
    smoothquant(*quantize)
    record = json.loads((tmp_path / "out" / "smoothquant.json").read_text())
    wide = load_file(work / "model" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].shape[1]
    assert record["calibration"]["windows"] == 4 * wide / 8 > 16


def test_quantize_searches_skips_and_says_so(work, tmp_path):
    result = smoothquant(
        *("quantize", work / "model", "-o", tmp_path / "auto", "--calib", work / "text.txt", *SMALL),
        *("--alpha", "auto", "--auto-skip", "10%"),
    )
    record = json.loads((tmp_path / "auto" / "smoothquant.json").read_text())
    assert record["recipe"]["rounding"] == "gptq"
    assert {group["alpha"] for group in record["groups"]} - {0.5}
    skipped = [reason for reason in record["skipped"].values() if "KL divergence" in reason]
    assert len(skipped) == len(record["quantized"] + skipped) // 10
    assert "KL divergence" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["auto"], "the journal is removed"


def test_a_searched_model_keeps_its_perplexity(work, tmp_path):
    smoothquant(
        *("quantize", work / "model", "-o", tmp_path / "fine", "--calib", work / "text.txt", *SMALL),
        *("--max-ppl-increase", "50%", "--rounding", "clip"),
    )
    record = json.loads((tmp_path / "fine" / "smoothquant.json").read_text())
    assert record["recipe"]["max_ppl_increase"] == 0.5
    assert record["sensitivity"]


def test_explicit_smoothing_needs_a_format_that_has_it(work, tmp_path):
    quantize = ("quantize", work / "model", "-o", tmp_path / "explicit", "--calib", work / "text.txt", "--explicit")
    for fmt in ("compressed-tensors", "lmdeploy"):
        assert "has no place for explicit smoothing" in complaint(*quantize, "--format", fmt, *SMALL)
    smoothquant(*quantize, "--skip", "v_proj", *SMALL)
    config = json.loads((tmp_path / "explicit" / "config.json").read_text())["quantization_config"]
    assert (config["quantization_status"], config["format"]) == ("smoothed", "int-quantized-smoothed")


def test_e5m2_is_stored_in_the_format_that_has_it(work, tmp_path):
    smoothquant(
        "quantize", work / "model", "-o", tmp_path / "out", "--calib", work / "text.txt", *SMALL,
        "--scheme", "fp8-e5m2", "--no-smooth", "--only", "*.mlp.*",
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "smooth_quant"


def test_a_16_bit_model_keeps_its_dtype(tmp_path, work):
    from tiny import build
    from tiny_text import tiny_tokenizer

    build("llama", dtype=torch.float16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    smoothquant("quantize", tmp_path / "half", "-o", tmp_path / "out", "--calib", work / "text.txt", *SMALL)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float16


def test_eval_gives_perplexity_and_agreement(work):
    alone = smoothquant("eval", work / "w8a8", "--text", work / "text.txt", *SMALL, "--json")
    (own,) = json.loads(alone.stdout)
    assert own["tokens"] == 4 * 23
    assert own["kl"] is None
    both = smoothquant(
        "eval", work / "w8a8", "--reference", work / "model", "--text", work / "text.txt", *SMALL, "--json"
    )
    reference, model = json.loads(both.stdout)
    assert (reference["kl"], reference["top1"]) == (0.0, 1.0)
    assert model["perplexity"] == own["perplexity"]
    assert 0 < model["kl"] < 0.05


def test_compare_puts_all_measures_side_by_side(work):
    arguments = ("compare", work / "model", work / "w8a8", "--text", work / "text.txt", *SMALL)
    result = smoothquant(*arguments, "--prefill", 16, "--decode", 2, "--rounds", 1, "--json")
    base, quantized = json.loads(result.stdout)
    assert 0.25 < quantized["decoder_bytes"] / base["decoder_bytes"] < 0.3
    assert quantized["prefill_tokens_per_second"] > 0
    assert quantized["speed"]["prompt"] == 16
    table = smoothquant(*arguments, "--rounds", 0).stdout
    assert all(word in table for word in ("perplexity", "KL", "top-1", "size", "decode", "nats"))


def test_generate_prints_the_answer_on_stdout_and_the_rest_on_stderr(work):
    first = smoothquant("generate", work / "w8a8", "once upon", "--max-new-tokens", 8)
    assert smoothquant("generate", work / "w8a8", "once upon", "--max-new-tokens", 8).stdout == first.stdout
    assert "tokens in" in first.stderr
    assert "once upon" not in first.stdout
    warm = [
        smoothquant("generate", work / "model", "a", "--max-new-tokens", 20, "--temperature", 9, "--seed", s).stdout
        for s in (1, 1, 2)
    ]
    assert warm[0] == warm[1] != warm[2]


def test_generate_keeps_its_cache_in_8_bits_if_told_to(work, monkeypatch):
    from smoothquant_ext.nn.int8_kv_cache import Int8Layer

    seen = []
    for name in ("update", "reserve"):  # module by module, and in fused layers
        plain = getattr(Int8Layer, name)
        monkeypatch.setattr(Int8Layer, name, lambda *a, plain=plain, **k: seen.append(a) or plain(*a, **k))
    for model in ("model", "w8a8"):
        arguments = ("generate", work / model, "once upon", "--max-new-tokens", 3)
        smoothquant(*arguments)
        assert not seen
        smoothquant(*arguments, "--kv-cache", "int8")
        assert len(seen) == 2 * 3
        seen.clear()
    assert complaint(*arguments, "--kv-cache", "int4") == "--kv-cache is 'int4', expected one of auto, int8"


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")
def test_generate_runs_where_it_is_told_to(work, monkeypatch):
    from smoothquant_ext import models

    seen = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *a, **k: seen.append(load(*a, **k)) or seen[-1])
    for model in ("model", "w8a8"):
        arguments = ("generate", work / model, "once upon", "--max-new-tokens", 4)
        expected = smoothquant(*arguments).stdout
        with emulated_cuda():
            for device in ("auto", "cuda"):
                assert smoothquant(*arguments, "--device", device).stdout == expected
            assert smoothquant(*arguments, "--device", "cpu").stdout == expected
            assert "the last of the GPUs here is cuda:0" in complaint(*arguments, "--device", "cuda:7")
    assert [network.device.type for network, _ in seen] == ["cpu", "cuda", "cuda", "cpu"] * 2


def test_servers_and_chats_run_where_they_are_told_to(monkeypatch):
    from smoothquant_ext.integrations import serving

    seen = []
    monkeypatch.setattr(serving, "serve", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(serving, "chat", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr("smoothquant_ext.models.loads_as_here", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("serve", "chat"):
        smoothquant(command, "a model")
        smoothquant(command, "a model", "--device", "cpu")
        assert "cuda" in complaint(command, "a model", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    smoothquant("serve", "a model", "--compile")
    smoothquant("chat", "a model")
    devices = [next(name for name in arguments if name in ("cpu", "cuda")) for arguments in seen]
    assert devices == ["cpu", "cpu", "cpu", "cpu", "cuda", "cuda"]
    assert seen[4] == ("a model", "127.0.0.1", 8000, "auto", "cuda", None, True)
    assert "CUDA graphs of its own" in complaint("serve", "a model", "--compile", "--continuous-batching")


def test_generate_answers_with_the_chat_template_of_the_model(work, tmp_path):
    from transformers import AutoTokenizer

    assert "has no chat template" in complaint("generate", work / "model", "hello", "--chat")
    write_tiny_model(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = smoothquant("generate", tmp_path / "chat", "hello", "--chat", "--max-new-tokens", 6).stdout
    assert chat == smoothquant("generate", tmp_path / "chat", "[user: hello]", "--max-new-tokens", 6).stdout


def test_inspect_shows_outliers_as_a_table_and_a_picture(work, tmp_path):
    plot = tmp_path / "outliers.png"
    result = smoothquant("inspect", work / "model", "--calib", work / "text.txt", *SMALL, "--plot", plot)
    assert "model.layers.1" in result.stdout
    assert "down_proj" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_info_names_every_op():
    text = smoothquant("info").stdout
    for op in ("quantize_per_token", "quantize_static", "prepack_weight", "w8a8_gemm", "w8a8_linear"):
        assert op in text


def test_help_does_not_wait_for_transformers():
    code = "import sys, smoothquant_ext.cli; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def test_the_package_shows_its_public_names_and_functions_not_modules():
    code = (
        "import smoothquant_ext as s, smoothquant_ext.quantization.pipeline, smoothquant_ext.evaluation.accuracy\n"
        "assert callable(s.quantize) and callable(s.evaluate) and callable(s.info), (s.quantize, s.evaluate)\n"
        "assert {'quantize', 'load', 'save', 'Recipe'} <= set(dir(s)) and all(hasattr(s, n) for n in s.__all__)\n"
        "assert not hasattr(s, 'nonsense')\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
