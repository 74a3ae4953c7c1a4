"""What a model of transformers says of itself; here so that nobody needs transformers to ask."""

from __future__ import annotations

from typing import Any


def predicts_next_token(model: Any) -> bool:
    """Whether a model is a causal language model, by what transformers says of its class; others may be anything."""
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    if can_generate is None or config is None:
        return True
    reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return bool(can_generate()) and reads_text and not getattr(config, "is_encoder_decoder", False)


def embedding_of(model: Any, kind: str) -> Any:
    """The ``"input"`` or ``"output"`` embedding of a model; ``None`` if it has none, or nothing that says so."""
    find = getattr(model, f"get_{kind}_embeddings", None)
    try:
        return find() if find is not None else None
    except (AttributeError, NotImplementedError):  # of classes that read no tokens
        return None
