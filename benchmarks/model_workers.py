"""The engines of bench_model.py, each run in a worker process.

Each has ``generate(prompts, answer)``, which answers greedily and returns two times in seconds: until the first token
of every answer, and for ``answer`` more tokens of each.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache
from workers import Unavailable

from smoothquant_ext import Recipe, load, quantize, save
from smoothquant_ext.models import load_model

Prompts = list[list[int]]  # all of one length
Seconds = tuple[float, float]


def prepare(original: Path, quantized: Path, source: str, shape: dict[str, Any] | None) -> None:
    """Writes a model in bf16 and, quantized, in the compressed-tensors format.

    Args:
        original: folder for the bf16 model.
        quantized: folder for the quantized model, unless it exists.
        source: a directory, hub id or GGUF file; unused for a shape.
        shape: settings of a Llama with random weights.
    """
    if shape is None:
        model = load_model(source, torch.bfloat16)[0]
    else:
        torch.manual_seed(0)
        config = LlamaConfig(**shape, max_position_embeddings=4096)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(original)
    if not quantized.exists():  # smoothing changes values, not speed
        save(quantize(model, torch.randint(1000, (1, 16)), Recipe("int8", smooth=False)), quantized)


class Transformers:
    """A model in transformers: quantized or the original."""

    def __init__(self, directory: Path, dtype: torch.dtype | None) -> None:
        """Loads the model; ``None`` loads a quantized one."""
        if dtype is None:
            self.model = load(directory)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    @torch.no_grad()
    def generate(self, prompts: Prompts, answer: int) -> Seconds:
        """Uses a growing cache, as transformers' ``generate`` does."""
        start = time.perf_counter()
        output = self.model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(answer):
            output = self.model(input_ids=token, past_key_values=output.past_key_values, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
        return middle - start, time.perf_counter() - middle


class Compiled(Transformers):
    """The original with a static cache, compiled for one token at a time."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        super().__init__(directory, dtype)
        self.compiled = torch.compile(self.model, dynamic=False)
        self.caches: dict[int, StaticCache] = {}

    @torch.no_grad()
    def generate(self, prompts: Prompts, answer: int) -> Seconds:
        """Runs the prompt eagerly and the answer compiled."""
        batch, length = len(prompts), len(prompts[0])
        if batch not in self.caches:
            self.caches[batch] = StaticCache(config=self.model.config, max_cache_len=length + answer)
        cache = self.caches[batch]
        cache.reset()
        start = time.perf_counter()
        logits = self.model(input_ids=torch.tensor(prompts), past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for position in range(length, length + answer):
            positions = torch.full((batch, 1), position)
            output = self.compiled(input_ids=token, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
        return middle - start, time.perf_counter() - middle


class Vllm:
    """vLLM's CPU engine."""

    def __init__(self, directory: Path, batch: int, prompt: int, answer: int) -> None:
        """Reserves memory for ``batch`` prompts, which are read in one step."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise Unavailable(f"vLLM cannot be imported ({error})") from None
        self.engine = LLM(
            model=str(directory),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=prompt + answer + 1,
            max_num_seqs=batch,
            max_num_batched_tokens=batch * prompt,
            enable_prefix_caching=False,
            seed=0,
        )

    def generate(self, prompts: Prompts, answer: int) -> Seconds:
        """Generates one token of each answer, then all tokens again; the difference is the time of the others."""
        first = self._seconds(prompts, 1)
        return first, self._seconds(prompts, 1 + answer) - first

    def _seconds(self, prompts: Prompts, tokens: int) -> float:
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        settings = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
        start = time.perf_counter()
        outputs = self.engine.generate(inputs, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return seconds
