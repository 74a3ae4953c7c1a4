"""A model that runs in another process, whose logits come through a pipe: logits_server.py is the other side."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smoothquant_ext import SmoothQuantError


class ServedModel(nn.Module):
    """Has the logits of a causal LM, and no weights: ``evaluate_all`` compares it like any other model."""

    def __init__(self, command: list[Any], name: str, size: int | None = None) -> None:
        """Starts the worker.

        Args:
            command: starts a worker that calls ``logits_server.serve``.
            name: of the model, in errors.
            size: bytes of its checkpoint, if known.

        Raises:
            SmoothQuantError: the worker ended before it had the model.
        """
        super().__init__()
        self.name, self.size = name, size
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.vocabulary = int(np.frombuffer(self._read(4), np.int32)[0])
        # As evaluate_all asks a model for it: how many tokens it knows, and on which device it takes them.
        self.tokens = nn.Embedding(self.vocabulary, 1)

    def get_input_embeddings(self) -> nn.Module:
        """The table that says how many tokens there are."""
        return self.tokens

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits, fp32 [1, T, V], of one window of token ids [1, T]."""
        window = input_ids[0].to(torch.int32).numpy()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(np.int32(len(window)).tobytes() + window.tobytes())
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        answer = self._read(4 * len(window) * self.vocabulary)
        logits = torch.frombuffer(bytearray(answer), dtype=torch.float32)
        return SimpleNamespace(logits=logits.view(1, len(window), self.vocabulary))

    def close(self) -> None:
        """Ends the worker."""
        self.process.communicate()

    def _read(self, count: int) -> bytes:
        assert self.process.stdout is not None
        answer = self.process.stdout.read(count)
        if len(answer) < count:
            raise self._ended()
        return answer

    def _ended(self) -> SmoothQuantError:
        program = Path(str(self.process.args[1])).name  # type: ignore[index]
        return SmoothQuantError(
            f"{self.name}: {program} ended with status {self.process.wait()}; see what it said above"
        )
