"""Serves a model's logits to another process, so that models of other environments run on the same windows.

The worker's side of served_model.py. It needs numpy alone: it runs in the environments of peers. All numbers are in
the machine's byte order. The worker first sends an int32, the size V of its vocabulary. Then, for each window: it reads
an int32, the number T of tokens, and T int32 token ids, and answers with float32 [T, V].
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt


def serve(vocabulary: int, logits: Callable[[npt.NDArray[np.int32]], npt.NDArray[np.float32]]) -> None:
    """Answers windows on stdin with logits on stdout until stdin ends.

    Args:
        vocabulary: V, the number of tokens that the model knows.
        logits: gives the logits, float32 [T, V], of all positions of token ids [T].
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not get between the numbers
    answers.write(np.int32(vocabulary).tobytes())
    answers.flush()
    while header := sys.stdin.buffer.read(4):
        count = int(np.frombuffer(header, np.int32)[0])
        window = np.frombuffer(sys.stdin.buffer.read(4 * count), np.int32)
        found = logits(window)
        if found.dtype != np.float32 or found.shape != (count, vocabulary):
            given = f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"the model gave logits of {given}, expected float32 [{count}, {vocabulary}]")
        answers.write(found.tobytes())
        answers.flush()
