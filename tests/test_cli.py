"""The command line: what each command does, what bad input gets, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import some_text, write_tiny_model
from typer.testing import CliRunner

from smoothquant_ext import cli
from smoothquant_ext.scheme import SCHEMES

COMMANDS = ("quantize", "convert", "eval", "compare", "generate", "chat", "serve", "inspect", "report", "info")
SMALL = ("--samples", "4", "--seqlen", "24")


def smoothquant(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def complaint(*arguments: object) -> str:
    """Runs a command that must fail with exit code 2, and returns the one sentence it said."""
    result = smoothquant(*arguments, code=2)
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert result.stderr.rstrip().endswith(said[0]), "the error must be the last thing said"
    return said[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, a text and the model quantized."""
    path = tmp_path_factory.mktemp("cli")
    write_tiny_model(path / "model")
    (path / "text.txt").write_text(some_text(2_000))
    smoothquant("quantize", path / "model", "-o", path / "w8a8", "--calib", path / "text.txt", *SMALL)
    return path


@pytest.fixture
def no_loading(monkeypatch):
    """Makes loading a model fail the test: what is wrong must be said before such work begins."""

    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("smoothquant_ext.models.load_model", refuse)


def test_help_names_every_command_and_scheme_and_gives_examples():
    top = smoothquant("--help").stdout
    assert all(command in top for command in COMMANDS)
    for command in COMMANDS:
        text = smoothquant(command, "--help").stdout
        assert f"Example: smoothquant {command}" in text
    text = " ".join(smoothquant("quantize", "--help").stdout.replace("│", " ").split())
    assert all(scheme in text for scheme in SCHEMES)
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
    assert "14 linear layers run in int8" in result.stdout
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
    from smoothquant_ext.int8_cache import Int8Layer

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


def test_an_instruction_set_that_is_not_there_is_one_sentence(monkeypatch):
    def refuse() -> None:
        raise RuntimeError("SMOOTHQUANT_CPU_ISA is 'mmx', expected one of portable\nsome frames of C++")

    monkeypatch.setattr("smoothquant_ext.ops.info", refuse)
    assert complaint("info") == "SMOOTHQUANT_CPU_ISA is 'mmx', expected one of portable"


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--scheme", "int4"), "unknown scheme 'int4', expected one of int8"),
        (("--alpha", "1.5"), "alpha is 1.5, expected a number between 0 and 1"),
        (("--alpha", "much"), "--alpha is 'much', expected a number"),
        (("--auto-skip", "-1"), "auto_skip is -1.0, expected a number of layers or a share below 1"),
        (("--auto-skip", "nan"), "auto_skip is nan, expected a number of layers or a share below 1"),
        (("--auto-skip", "inf"), "auto_skip is inf, expected a number of layers or a share below 1"),
        (("--auto-skip", "100%"), "--auto-skip is '100%', expected a percentage below 100"),
        (("--max-ppl-increase", "nan"), "max_ppl_increase is nan, expected a number above 0"),
        (("--auto-skip", "2.5"), "auto_skip is 2.5, expected a number of layers or a share below 1"),
        (("--max-ppl-increase", "0%"), "max_ppl_increase is 0.0, expected a number above 0"),
        (("--rounding", "up"), "rounding is 'up', expected one of nearest, clip, gptq"),
        (("--clipping", "most"), "clipping is 'most', expected one of absmax"),
        (("--format", "gguf"), "--format is 'gguf', expected one of auto, compressed-tensors, lmdeploy"),
        (("--scheme", "fp8-e5m2", "--format", "compressed-tensors"), "cannot store scheme 'fp8-e5m2'"),
        (("--scheme", "int8-static", "--format", "lmdeploy"), "no static activation scales"),
        (("--dtype", "int8"), "--dtype is 'int8', expected one of auto, float32"),
    ],
)
def test_bad_options_are_said_before_any_work(tmp_path, options, expected):
    assert expected in complaint("quantize", "any-model", "-o", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_loading")
def test_a_directory_in_use_is_refused_before_any_work_and_left_alone(tmp_path):
    (tmp_path / "diary.docx").write_text("dear diary")
    assert "already holds diary.docx" in complaint("quantize", "any-model", "-o", tmp_path)
    assert "is a file" in complaint("quantize", "any-model", "-o", tmp_path / "diary.docx")
    assert [path.name for path in tmp_path.iterdir()] == ["diary.docx"]


@pytest.mark.usefixtures("no_loading")
def test_a_picture_without_a_folder_is_refused_before_any_work(tmp_path):
    assert "does not exist, make it first" in complaint("inspect", "any", "--plot", tmp_path / "no" / "o.png")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ("too short", "has 9 tokens, fewer than one window of 24: give more text"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_calibration_text_leaves_nothing_behind(work, tmp_path, content, expected):
    text = tmp_path / "bad.txt"
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = complaint("quantize", work / "model", "-o", tmp_path / "out", "--calib", text, *SMALL)
    assert expected in said
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_little_text_is_used_with_a_warning(work, tmp_path):
    text = tmp_path / "little.txt"
    text.write_text(some_text(60))
    result = smoothquant("eval", work / "model", "--text", text, *SMALL)
    assert "warning: " in result.stderr
    assert "holds 2 windows of 24 tokens, not the 4 asked for" in result.stderr


def test_bad_models_are_named(work, tmp_path):
    assert "missing.gguf does not exist" in complaint("eval", tmp_path / "missing.gguf")
    assert "no linear layer" in complaint(
        "quantize", work / "w8a8", "-o", tmp_path / "o", "--calib", work / "text.txt", *SMALL
    )
    assert "matches no linear layer" in complaint(
        "quantize", work / "model", "-o", tmp_path / "o", "--calib", work / "text.txt", *SMALL, "--skip", "nothing"
    )
    assert not (tmp_path / "o").exists()


def test_a_model_that_is_damaged_is_named_with_its_layer(work, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    AutoTokenizer.from_pretrained(work / "model").save_pretrained(tmp_path / "damaged")
    calib = ("--calib", work / "text.txt", *SMALL)
    said = complaint("quantize", tmp_path / "damaged", "-o", tmp_path / "out", *calib)
    assert "model.layers.1.mlp.up_proj.weight holds 1 non-finite" in said
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_refused(work):
    assert "the prompt is empty" in complaint("generate", work / "model", "")


def test_a_comparison_longer_than_the_model_is_refused(work):
    said = complaint("compare", work / "model", work / "w8a8", "--text", work / "text.txt", *SMALL)
    assert "has 128 positions, fewer than 512 + 32 tokens" in said


@pytest.mark.parametrize("arguments", [["quantize"], ["compare", "one"], ["nonsense"], ["eval", "m", "--samples", "0"]])
def test_wrong_usage_exits_with_2(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    def break_down(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("smoothquant_ext.models.load_model", break_down)
    result = CliRunner().invoke(cli.app, ["eval", "any"])
    assert isinstance(result.exception, ZeroDivisionError)


ENTRY = [sys.executable, "-c", "import sys; from smoothquant_ext.cli import main; sys.argv[0] = 'smoothquant'; main()"]


def test_as_a_program_it_fails_in_one_line(tmp_path):
    missing = tmp_path / "none.gguf"
    done = subprocess.run([*ENTRY, "eval", str(missing)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"error: {missing} does not exist; name an existing .gguf file"
    assert "Traceback" not in done.stderr


def test_as_a_program_it_ends_quietly_when_interrupted(work):
    prompt = [*ENTRY, "generate", str(work / "model"), "go", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        prompt, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it has begun to talk
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in stderr


def test_help_does_not_wait_for_torch_or_transformers():
    code = "import sys, smoothquant_ext.cli as c; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_shows_its_public_names_and_functions_not_modules():
    code = (
        "import smoothquant_ext as s, smoothquant_ext.quantize, smoothquant_ext.evaluate\n"
        "assert callable(s.quantize) and callable(s.evaluate) and callable(s.info), (s.quantize, s.evaluate)\n"
        "assert {'quantize', 'load', 'save', 'Recipe'} <= set(dir(s)) and all(hasattr(s, n) for n in s.__all__)\n"
        "assert not hasattr(s, 'nonsense')\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
