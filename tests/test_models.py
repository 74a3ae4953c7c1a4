"""Loading a model from wherever a user keeps it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_files import change_tensors, with_zeros
from tiny_w8a8 import assert_same_model, layers_of, quantized
from tiny_words import tokenizer, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from smoothquant_ext import models as models_under_test
from smoothquant_ext.checkpoint import saving
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.models import load_model


@pytest.fixture
def float_directory(tmp_path: Path) -> Path:
    tiny.build("llama", torch.bfloat16).save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_a_directory(float_directory: Path) -> None:
    model, words = load_model(float_directory)
    assert model.dtype == torch.bfloat16  # the checkpoint's own
    assert not model.training
    assert words("w3 w7").input_ids[-2:] == [3, 7]
    assert_same_model(model, tiny.build("llama", torch.bfloat16))
    assert load_model(str(float_directory), dtype=torch.float32)[0].dtype == torch.float32


def test_a_device(float_directory: Path, device: str) -> None:
    model, _ = load_model(float_directory, device=device)
    assert {parameter.device.type for parameter in model.parameters()} == {torch.device(device).type}


def test_a_quantized_directory(tmp_path: Path) -> None:
    expected = quantized("llama", "int8")
    saving.save(expected, tmp_path / "model", tokenizer())
    model, words = load_model(tmp_path / "model")
    assert_same_model(model, expected)
    assert words.get_vocab() == tokenizer().get_vocab()
    half, _ = load_model(tmp_path / "model", dtype=torch.float16)
    assert half.dtype == torch.float16
    assert layers_of(half)


def test_a_gguf_file(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    model, words = load_model(tmp_path / "tiny.gguf")
    assert model.dtype == torch.float32
    assert_same_model(model, expected)
    assert "w7" in words.get_vocab()
    # Nothing of GGUF is left: it is a float model that can be quantized and saved.
    assert not hasattr(model, "hf_quantizer")
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "again")
    words.save_pretrained(tmp_path / "again")
    assert_same_model(load_model(tmp_path / "again")[0], expected)
    assert load_model(tmp_path / "tiny.gguf", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def refuses(source: str | Path, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=message) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_gguf_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses(tmp_path / "absent.gguf", r"absent\.gguf does not exist; name an existing \.gguf file")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or so it says")
    refuses(tmp_path / "broken.gguf", r"broken\.gguf: transformers cannot load this model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuses(tmp_path / "broken.gguf", r"needs the package gguf to be read; install smoothquant-ext\[gguf\]")


def test_directories_that_cannot_be_read(float_directory: Path, tmp_path: Path) -> None:
    refuses(float_directory / "config.json", r"config\.json is neither a directory nor a \.gguf file")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses(empty, r"empty/config\.json does not exist; name the directory of a saved model")

    config = float_directory / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"llama"', '"llama99"'))
    refuses(
        float_directory,
        r"config\.json says model_type 'llama99', which transformers .* does not have; pip install -U transformers",
    )
    config.write_text(original.replace('"llama"', '"t5"'))
    refuses(
        float_directory,
        "model_type 't5', but architectures LlamaForCausalLM, which is of another type; correct one of them",
    )
    config.write_text(original[:-3] + ', "quantization_config": {"quant_method": "awq"}}')
    refuses(float_directory, "quantized with AWQ: .*, which is not W8A8")
    config.write_text(original)

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (float_directory / name).unlink()
    refuses(float_directory, "float has no tokenizer that transformers can load")
    tokenizer().save_pretrained(float_directory)
    (float_directory / "model.safetensors").write_bytes(b"")
    refuses(float_directory, r"model\.safetensors is truncated or not a safetensors file")


@pytest.mark.parametrize("name", ["/no/such/directory", "./missing", "a/b/c", "two words", ""])
def test_what_is_not_even_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    message = "does not exist" if name == "" else "is neither a directory here nor a model on the hub; name a directory"
    refuses(name, message)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(*arguments: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models_under_test, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refuses("nobody/nothing", "nobody/nothing is neither a directory here nor a model on the hub that can be reached")


@pytest.mark.parametrize("kind", ["float", "w8a8"])
def test_a_hub_id(kind: str, float_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is replaced by a directory: what is tested is which way each kind of model takes."""
    saving.save(quantized("llama"), tmp_path / "w8a8", tokenizer())
    directory = tmp_path / kind
    asked = []

    def snapshot_download(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs["local_files_only"]))
        return str(directory)

    def from_pretrained(auto_class: Any) -> Any:
        original = auto_class.from_pretrained

        def redirect(source: Any, *arguments: Any, **kwargs: Any) -> Any:
            return original(directory if source == "someone/something" else source, *arguments, **kwargs)

        return redirect

    monkeypatch.setattr(models_under_test, "_is_offline", lambda: False)
    monkeypatch.setattr(models_under_test, "snapshot_download", snapshot_download)
    monkeypatch.setattr(models_under_test, "cached_file", lambda *_, **__: None)  # no hf_quant_config.json
    for auto_class in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto_class, "from_pretrained", from_pretrained(auto_class))
    model, _ = load_model("someone/something")
    assert bool(layers_of(model)) is (kind == "w8a8")
    assert asked == ([("someone/something", False)] if kind == "w8a8" else [])
    change_tensors(directory, with_zeros(**{"mtp.fc.weight": (4, 8)}))
    refuses("someone/something", r"holds 1 tensor .*no place for: mtp\.fc\.weight; leave it out with --drop 'mtp\.\*'")
    assert_same_model(load_model("someone/something", drop=["mtp.*"])[0], model)


def test_a_failing_download(float_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.save(quantized("llama"), tmp_path / "w8a8", tokenizer())
    config = models_under_test.AutoConfig.from_pretrained(tmp_path / "w8a8")

    def fail(*arguments: object, **kwargs: object) -> None:
        raise OSError("connection reset\nand more")

    monkeypatch.setattr(models_under_test, "_is_offline", lambda: False)
    monkeypatch.setattr(models_under_test.AutoConfig, "from_pretrained", lambda *arguments, **kwargs: config)
    monkeypatch.setattr(models_under_test, "snapshot_download", fail)
    refuses("someone/something", r"someone/something cannot be downloaded from the hub \(connection reset\)")


def test_a_hub_id_of_a_model_with_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **kwargs: object) -> None:
        raise ValueError("The repository contains custom code.\nPass the argument `trust_remote_code=True`")

    monkeypatch.setattr(models_under_test, "_is_offline", lambda: False)
    monkeypatch.setattr(models_under_test.AutoConfig, "from_pretrained", fail)
    refuses("someone/something", r"^someone/something is one whose code comes with the model \(auto_map\): such code")


def test_whether_the_network_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: asked.append(host))
    monkeypatch.setattr(models_under_test, "getproxies", dict)
    assert not models_under_test._is_offline()
    assert len(asked) == 1
    monkeypatch.setattr(models_under_test, "getproxies", lambda: {"https": "proxy", "http": "proxy"})
    assert not models_under_test._is_offline()
    assert len(asked) == 1  # a proxy resolves names itself


def test_output_stays_quiet(float_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    load_model(float_directory)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    AutoTokenizer.from_pretrained(float_directory)
