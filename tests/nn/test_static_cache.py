"""The static cache: asked for by one call, and a step of decoding as one graph that serves every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_w8a8
import torch
from emulation import ROOT
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import CompileConfig, StaticCache

from smoothquant_ext import SmoothQuantError, ops, use_static_cache_

PROMPT = tiny.token_ids(1, 8)


@pytest.fixture(params=["cpu", "cuda"])
def place(request: pytest.FixtureRequest) -> str:
    """The CPU and the emulated GPU."""
    if request.param == "cuda":
        if not (ROOT / "csrc").is_dir():
            pytest.skip("the sources are not here")
        request.getfixturevalue("gpu")
    where: str = request.param
    return where


@pytest.fixture
def graphs() -> list[torch.fx.GraphModule]:
    """Every graph that ``compiler`` was given."""
    torch._dynamo.reset()
    return []


def compiler(graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    def compile_(graph: torch.fx.GraphModule, inputs: Any, **_options: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return compile_


def test_generate_uses_it(place: str) -> None:
    model = tiny_w8a8.quantized("llama").to(place)
    prompt = PROMPT.to(place)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    expected = model.generate(prompt, **options)
    use_static_cache_(model, tokens=40)
    output = model.generate(prompt, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, expected)
    cache = getattr(output, "cache", None) or output.past_key_values
    assert isinstance(cache, StaticCache)
    assert cache.layers[0].keys.shape[2] == 40
    model.generation_config.cache_implementation = model.generation_config.max_cache_len = None
    assert torch.equal(model.generate(prompt, **options), expected)


def test_what_cannot_have_one_is_told() -> None:
    with pytest.raises(SmoothQuantError, match="Linear cannot have a static cache: it needs a causal LM"):
        use_static_cache_(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = tiny.build("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(SmoothQuantError, match="LlamaForCausalLM cannot have a static cache"):
        use_static_cache_(model)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "opt"])
def test_one_graph_serves_every_step(architecture: str, place: str, graphs: list[torch.fx.GraphModule]) -> None:
    model = tiny_w8a8.quantized(architecture).to(place)
    expected = decoded(model, model)
    compiled = torch.compile(model.__call__, backend=compiler(graphs), fullgraph=True)
    assert torch.equal(decoded(model, compiled), expected)
    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes]
    layers = 2 if architecture in ("llama", "qwen3", "gemma") else 0
    assert targets.count(ops.w8a8_decoder_layer_) == layers
    assert (ops.w8a8_linear in targets) == (layers == 0)


def decoded(model: Any, step: Callable[..., Any]) -> Tensor:
    """The logits of a prompt, and of five steps after it, by ``step``."""
    cache, place = StaticCache(config=model.config, max_cache_len=32), model.device
    logits = []
    with torch.no_grad():
        for end in range(8, 14):
            new = PROMPT if end == 8 else tiny.token_ids(1, 6)[:, end - 9 : end - 8]
            inputs = model.prepare_inputs_for_generation(
                new.to(place),
                cache=cache,
                past_key_values=cache,
                attention_mask=torch.ones(1, end, dtype=torch.long, device=place),
                position_ids=torch.arange(end - new.shape[1], end, device=place)[None],
                use_cache=True,
            )
            inputs.pop("past_key_values" if "cache" in inputs else "cache", None)
            logits.append((model if end == 8 else step)(**inputs).logits[:, -1].cpu())
    return torch.cat(logits)


@pytest.mark.usefixtures("gpu")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")
def test_generate_compiles_on_a_gpu(graphs: list[torch.fx.GraphModule]) -> None:
    model = tiny_w8a8.quantized("llama").to("cuda")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(PROMPT.to("cuda"), **options)
    use_static_cache_(model)
    options["compile_config"] = CompileConfig(backend=compiler(graphs), fullgraph=True)
    assert torch.equal(model.generate(PROMPT.to("cuda"), **options), expected)
    assert len(graphs) == 1
    assert torch.equal(model.generate(PROMPT.to("cuda"), **options), expected)
    assert len(graphs) == 1
