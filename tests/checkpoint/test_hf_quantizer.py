"""Loading makes 8-bit layers straight from the files; plain transformers reads the same weights from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_w8a8 import COMPRESSED, layers_of, logits, quantized
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from smoothquant_ext.checkpoint import loading, saving

WARNS_THAT_THE_DIRECTORY_DECIDES = "ignore:You passed `quantization_config` or equivalent parameters"


class FloatsOfShapes(TorchDispatchMode):
    """Counts the tensors that an operation makes, by kind, among those as large as a quantized weight."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.floats: list[str] = []
        self.integers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and not tensor.is_meta and tuple(tensor.shape) in self.shapes:
                if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
                    self.floats.append(str(func))
                else:
                    self.integers += 1
        return result


@pytest.mark.filterwarnings(WARNS_THAT_THE_DIRECTORY_DECIDES)
def test_float_weights_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.save(quantized("llama", vocab_size=97), tmp_path / "model")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees one thread
    shapes = {(64, 64), (32, 64), (112, 64), (64, 112)}
    with FloatsOfShapes(shapes) as made:
        loading.load(tmp_path / "model")
    assert made.floats == []
    assert made.integers >= 14
    with FloatsOfShapes(shapes) as made:
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert made.floats  # it would have noticed


@pytest.mark.filterwarnings(WARNS_THAT_THE_DIRECTORY_DECIDES)
@pytest.mark.parametrize(
    ("model_type", "scheme"),
    [
        *((model_type, scheme) for model_type in ("llama", "gpt_neox") for scheme in COMPRESSED),
        ("qwen2", "int8-static"),
        ("opt", "int8-static"),
    ],
)
def test_plain_transformers_reads_the_same_weights(model_type: str, scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = quantized(model_type, scheme)
    saving.save(model, tmp_path / "model")
    reference = tiny.build(model_type)  # the same seed: only the quantized layers differ
    for name, layer in layers_of(model).items():
        weight = layer.plain_weight().float() * layer.weight_scale
        reference.get_submodule(name).weight.data = weight
    dequantize = CompressedTensorsConfig(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=dequantize)
    for name, parameter in reference.state_dict().items():
        assert torch.equal(plain.state_dict()[name], parameter), name
    assert torch.equal(logits(plain), logits(reference))
    # Left in 8 bits it rounds the activations too, on a grid whose steps are 0.4 % from ours: the error it makes is
    # another one, but as large. Twice leaves room for chance; a wrong scale or a wrong layer would be far outside.
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    error, ours = (logits(rounded) - logits(reference)).norm(), (logits(model) - logits(reference)).norm()
    assert ours / 2 < error < ours * 2
