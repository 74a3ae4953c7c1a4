"""How the server generates: transformers' two ways, one request after the other and continuous batching, with what they
leave out: limits of length, stop strings, seeds, and the end of a request whose client has left.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import Any

import torch
from fastapi import HTTPException
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import (
    CBGenerateManager,
    GenerateManager,
    _StreamError,
    get_response_template,
)

from .request_checks import MAX_TOKENS

DEFAULT_TOKENS = 1024  # of an answer for which nobody says more, as in transformers' server

# The body of the request that runs in this context. transformers hands its managers a GenerationConfig only, which has
# no place for a seed and does not say what the client asked for.
asked: ContextVar[dict[str, Any]] = ContextVar("asked")

OURS = ("seed",)  # fields that are not passed on, see Seeded


class Room:
    """The number of tokens that a prompt and its answer may have together.

    Args:
        positions: of the model; ``None`` if it has no limit.
        vocabulary: the number of tokens that the model knows; ``None`` if prompts hold others, such as images.
        cache: tokens in the cache of continuous batching; ``None`` without.
    """

    def __init__(self, positions: int | None, vocabulary: int | None = None, cache: int | None = None) -> None:
        self.positions, self.vocabulary, self.cache = positions, vocabulary, cache

    def fit_(self, input_ids: Any, config: GenerationConfig) -> None:
        """Sets ``config.max_new_tokens``, to what the client asked or to what is left.

        Args:
            input_ids: the prompt, a list or ids [1, tokens].
            config: of the request.

        Raises:
            HTTPException: 400, the prompt is empty or has unknown tokens, or it and the answer are too long.
        """
        ids = input_ids if isinstance(input_ids, list) else input_ids.flatten().tolist()
        prompt = len(ids)
        if prompt == 0:
            raise HTTPException(400, "the prompt is empty: it has no tokens, so there is nothing to continue")
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            raise HTTPException(400, f"the prompt has token {max(ids)}, but the model knows {self.vocabulary} tokens")
        wanted = next((asked.get()[field] for field in MAX_TOKENS if field in asked.get()), None)
        usual = wanted or config.max_new_tokens or DEFAULT_TOKENS
        limits = {
            "the model has {} positions": self.positions,
            "the cache holds {} tokens (--cache-tokens)": self.cache,
        }
        known = [(tokens, what.format(tokens)) for what, tokens in limits.items() if tokens is not None]
        if known:
            tokens, what = min(known)
            left, there = tokens - prompt, f"the prompt has {prompt} tokens"
            if left < 1:
                raise HTTPException(400, f"{there}, but {what}, one of them for the answer: shorten it")
            if wanted is not None and wanted > left:
                raise HTTPException(400, f"{there}, the answer may have {wanted}, but {what}: ask for {left} or fewer")
            usual = min(usual, left)
        config.max_new_tokens = usual


def apply_(config: GenerationConfig) -> None:
    """Puts into ``config`` what the client asked for and transformers' server leaves out."""
    body = asked.get()
    config.num_beams = config.num_return_sequences = 1  # one answer, token by token, as OpenAI's
    if "temperature" in body or "top_p" in body:  # transformers samples only if the model's own config says so
        config.do_sample = body.get("temperature", 1.0) > 0
    if "logit_bias" in body:
        biases = {(int(token),): float(bias) for token, bias in body["logit_bias"].items()}
        config.sequence_bias = biases or None


class Left(StoppingCriteria):
    """Ends ``generate`` once its client has left."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Seeded:
    """A model whose random numbers begin anew, in the thread and at the time of its ``generate``.

    transformers sets the seed when a request arrives, in the middle of the answer to another one.
    """

    def __init__(self, model: Any, seed: int) -> None:
        self._model, self._seed = model, seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **inputs: Any) -> Any:
        torch.manual_seed(self._seed)
        return self._model.generate(**inputs)


class OneByOne(GenerateManager):
    """Answers one request after the other."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room = room
        self._cutting: set[asyncio.Task[None]] = set()  # the event loop alone would not keep them alive

    def failure(self) -> str | None:
        """Why it answers no more."""
        return None if self._thread._thread.is_alive() else "the thread that generates has ended"

    def _prepare(self, model: Any, inputs: Any, config: GenerationConfig) -> tuple[Any, dict[str, Any], Left]:
        self.room.fit_(inputs["input_ids"], config)
        apply_(config)
        left = Left()
        if "seed" in asked.get():
            model = Seeded(model, asked.get()["seed"])
        return model, {**inputs, "stopping_criteria": StoppingCriteriaList([left])}, left

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[Any, Any]:
        model, inputs, _ = self._prepare(model, inputs, gen_config)
        tokenizer = getattr(processor, "tokenizer", processor)  # stop strings need its vocabulary
        queue, streamer = super().generate_streaming(model, tokenizer, inputs, gen_config, request_id, response_parser)
        stops = _stops()
        if not stops:
            return queue, streamer
        cut: asyncio.Queue[Any] = asyncio.Queue()
        task = asyncio.create_task(_cut(queue, cut, stops))
        self._cutting.add(task)
        task.add_done_callback(self._cutting.discard)
        return cut, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        model, inputs, left = self._prepare(model, inputs, gen_config)
        tokenizer = getattr(processor, "tokenizer", processor)
        try:
            text, prompt, ids = await super().generate_non_streaming(model, tokenizer, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            left.event.set()
            raise
        stops = _stops()
        end = first_of(stops, text)
        if end is not None and get_response_template(processor, model) is not None:  # it reads ids, not the text
            raw = tokenizer.decode(ids, skip_special_tokens=False)
            ids = tokenizer.encode(raw[: first_of(stops, raw)], add_special_tokens=False)
        return text[:end], prompt, ids


class Batched(CBGenerateManager):
    """Continuous batching. It starts with the server: transformers would start it with the first request, whose
    sampling all later ones would get.

    Args:
        room: for a prompt and its answer.
        batching: the ``ContinuousBatchingConfig``.
        model: the model.
        sampling: what all requests share, see ``shared_sampling``.
    """

    def __init__(self, room: Room, batching: Any, model: Any, sampling: GenerationConfig) -> None:
        super().__init__(cb_config=batching)
        self.room = room
        self.init_cb(model, sampling)

    def failure(self) -> str | None:
        """Why it answers no more."""
        status, thread = self._cb.background_thread_status, self._cb._generation_thread
        if status.fatal_error is not None:
            return f"the worker of continuous batching has died ({status.fatal_error})"
        return None if thread is not None and thread.is_alive() else "the worker of continuous batching has ended"

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[Any, Any]:
        self.room.fit_(inputs["input_ids"], gen_config)
        started: tuple[Any, Any] = super().generate_streaming(
            model, processor, inputs, gen_config, request_id, response_parser
        )
        return started

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        self.room.fit_(inputs["input_ids"], gen_config)
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            self._cb.cancel_request(request_id)
            raise


def shared_sampling(config: GenerationConfig, temperature: float | None) -> GenerationConfig:
    """The settings of all requests of a batch: the model's own, but for a temperature that the server was given."""
    shared = GenerationConfig(**config.to_dict())
    shared.use_cache = False  # continuous batching has a cache of its own
    shared.num_return_sequences = 1
    if temperature is not None:
        shared.do_sample, shared.temperature = temperature > 0, temperature or 1.0
    return shared


def sampling_of(config: GenerationConfig) -> dict[str, float]:
    """The same under the names of the requests' fields."""
    values: dict[str, float | None] = {
        "do_sample": float(bool(config.do_sample)),
        "temperature": (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "repetition_penalty": 1.0,  # it does not work in a batch: transformers drops it and says so
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _stops() -> list[str]:
    stop = asked.get().get("stop", [])
    return stop if isinstance(stop, list) else [stop]


def first_of(stops: list[str], text: str) -> int | None:
    """Where the first of some strings begins."""
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)


def held_back(stops: list[str], text: str) -> int:
    """The number of characters at the end of a text that may be the beginning of one of some strings."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


async def _cut(source: asyncio.Queue[Any], target: asyncio.Queue[Any], stops: list[str]) -> None:
    """Moves the parts of a streamed answer, up to the first stop string; transformers would send that too."""
    held: Any = ""
    while True:
        item = await source.get()
        if isinstance(item, str) and (not held or type(held) is type(item)):  # str or transformers' ReasoningText
            text = type(item)(held + item)
            end = first_of(stops, text)
            keep = len(text) - held_back(stops, text) if end is None else end
            if keep:
                target.put_nowait(type(item)(text[:keep]))
            held = type(item)(text[keep:])
            if end is None:
                continue
            while item is not None and not isinstance(item, _StreamError):
                item = await source.get()
            held = ""
        if held:
            target.put_nowait(held)
        held = ""
        target.put_nowait(item)
        if item is None or isinstance(item, _StreamError):
            return
