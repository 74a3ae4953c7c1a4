"""The files of a model's directory that are not its weights: tokenizers, templates, processors, code, licences."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import SmoothQuantError

# Weights in other formats, which a new checkpoint replaces: copied, they would be another model in its directory.
_WEIGHTS = frozenset(
    f".{suffix}"
    for suffix in "safetensors bin pt pth ckpt gguf ggml onnx onnx_data h5 msgpack tflite ot npz pkl pickle".split()  # noqa: SIM905
)
_WEIGHT_INDEX = ".index.json"
MODULES = "modules.json"  # of sentence-transformers: what follows the model, each with a folder of its own
_OF_TOOLS = frozenset((".git", ".cache", ".huggingface", "__pycache__"))


def other_files(directory: Path, besides: frozenset[str] = frozenset()) -> Iterator[tuple[Path, bool]]:
    """The files in a directory and in those below it, relative to it, and whether each belongs in a copy of the model.

    Below the directory, safetensors are parts of pipelines and belong to the model. Links to files are the files; links
    to directories are left out.

    Args:
        directory: of the model.
        besides: names of files right in the directory that are written anew.

    Raises:
        SmoothQuantError: a link leads nowhere.
    """
    of_modules = folders_of_modules(directory)
    for folder, folders, files in os.walk(directory):
        place = Path(folder).relative_to(directory)
        for name in sorted(folders):
            if name in _OF_TOOLS or (Path(folder) / name).is_symlink():
                folders.remove(name)
                yield place / name, False
        folders.sort()
        is_top = place == Path()
        for name in sorted(files):
            if is_top and name in besides:
                continue
            path = Path(folder) / name
            if not path.exists():
                raise SmoothQuantError(f"{path} is a link that leads nowhere; copy or download the model again")
            is_part = not is_top and (path.suffix == ".safetensors" or place.parts[0] in of_modules)
            is_weight = path.suffix in _WEIGHTS or name.endswith(_WEIGHT_INDEX)
            yield place / name, path.is_file() and (is_part or not is_weight)


def folders_of_modules(directory: Path) -> frozenset[str]:
    """The folders of a sentence-transformer's modules, besides the model: their weights may be in any format."""
    try:
        modules = json.loads((directory / MODULES).read_text(encoding="utf-8"))
        return frozenset(str(module["path"]).split("/")[0] for module in modules) - {""}
    except (OSError, ValueError, TypeError, KeyError):
        return frozenset()


def copy_files(source: Path, target: Path, files: list[Path]) -> None:
    """Copies files byte for byte, with the folders that they are in; what links lead to, not the links."""
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
