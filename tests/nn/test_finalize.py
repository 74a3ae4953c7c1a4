"""The last step of making a quantized model: frozen parameters, and methods that raise a sentence."""

from __future__ import annotations

import pytest
import tiny
from tiny_w8a8 import quantized

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.nn.finalize import finalize_


def test_a_quantized_model_is_frozen_and_refuses() -> None:
    model = quantized("llama")
    finalize_(model, refused={"push_to_hub": "there is no hub"})
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(SmoothQuantError, match="cannot use gradient checkpointing; train adapters without it"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={})
    with pytest.raises(SmoothQuantError, match="there is no hub"):
        model.push_to_hub("name", private=True)


def test_a_float_model_stays_as_it_is() -> None:
    model = tiny.build("llama")
    finalize_(model, refused={"save_pretrained": "no"})
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not {"save_pretrained", "gradient_checkpointing_enable"} & vars(model).keys()
