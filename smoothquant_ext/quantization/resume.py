"""Keeps the results of long work on the disk, so that a run that was cut off resumes where it stopped.

A small file per decoder block for a search, and one with its 8-bit weights for GPTQ, written atomically, in a folder
beside the output. The folder's name holds a
fingerprint of everything that decides the result: another model, recipe or calibration text starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import SmoothQuantError

SAMPLED = 64  # numbers of each weight that go into the fingerprint


class SearchState:
    """Keeps the results of long work by name in a folder; ``None`` as the folder keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and facts that were written under a name, or ``None``; a damaged file counts as none."""
        if self.folder is None:
            return None
        try:
            with safe_open(self._file(name), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Writes tensors and facts under a name, whole or not at all.

        Raises:
            SmoothQuantError: the file cannot be written.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._file(name).with_suffix(".unfinished")
            contiguous = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
            save_file(contiguous, unfinished, metadata={"facts": json.dumps(dict(facts))})
            unfinished.replace(self._file(name))
        except (OSError, SafetensorError) as error:
            raise SmoothQuantError(f"{self.folder} cannot be written to ({error}); free some space there") from error

    def remove(self) -> None:
        """Removes the folder, and the folder of all searches if this was the last one."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name or 'model'}.safetensors"


def fingerprint(model: nn.Module, measured: Mapping[str, Tensor], settings: str) -> str:
    """Sixteen hex digits that change with the model's weights, what calibration measured, and the settings."""
    digest = hashlib.sha256(settings.encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.numpy().tobytes())
    for name, values in measured.items():
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
