"""transformers' server behind our boundary: its parts put together."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.cli.serve import Serve

from ..nn.embedding import vocabulary_size
from .generating import Batched, OneByOne, Room, sampling_of, shared_sampling
from .guard import Guard
from .request_checks import Served


class GuardedServer(Serve):
    """transformers' ``Serve``, whose argument ``force_model`` is needed here.

    Args:
        temperature: of all answers under continuous batching; ``None`` is the model's.
        options: the arguments of ``Serve``.
    """

    def __init__(self, temperature: float | None = None, **options: Any) -> None:
        self.temperature = temperature
        super().__init__(**options)

    def start_server(self) -> None:
        """``Serve`` calls this once the model is loaded and before the port is open."""
        models, state = self._model_manager, self._generation_state
        name = models.process_model_name(models.force_model)
        model, processor = models.load_model_and_processor(name)
        batches = state.use_continuous_batching(model, models.get_model_modality(model, processor=processor))
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        known = vocabulary_size(model)
        sampling = shared_sampling(model.generation_config, self.temperature)
        self.served = Served(
            model=models.force_model,
            template=_template(processor),
            template_arguments=_arguments(processor),
            vocabulary=known,
            text_only=isinstance(processor, PreTrainedTokenizerBase),
            streams=hasattr(getattr(processor, "tokenizer", processor), "_tokenizer"),
            sampling=sampling_of(sampling) if batches else None,
        )
        self.manager: Any
        if batches:
            config = state._cb_config
            room = Room(positions, known, config.num_blocks * config.block_size)
            self.manager = Batched(room, config, model, sampling)
            state._cb_manager, state._cb_model_id = self.manager, name
        else:
            self.manager = OneByOne(Room(positions, known if self.served.text_only else None))
            state._generate_managers[name] = self.manager
        self.server.config.app = Guard(self.server.config.app, self.served, self.failure)
        super().start_server()

    def failure(self) -> str | None:
        """Why requests are answered no more, as a part of a sentence."""
        return self.manager.failure()  # type: ignore[no-any-return]


def _template(processor: Any) -> str | None:
    """The chat template; all of them together if there are several, such as one for tools."""
    template = getattr(processor, "chat_template", None)
    return "\n".join(template.values()) if isinstance(template, dict) else template


def _arguments(processor: Any) -> frozenset[str]:
    """The names that transformers' server itself gives to ``apply_chat_template``, or that would change its result."""
    names = inspect.signature(processor.apply_chat_template).parameters if _template(processor) else ()
    return frozenset(names) | {"messages", "add_generation_prompt", "load_audio_from_video"}
