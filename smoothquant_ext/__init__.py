"""W8A8 for PyTorch: SmoothQuant with real INT8 and FP8 kernels. Importing it registers ``torch.ops.sq``."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.loading import load
    from .checkpoint.saving import save
    from .errors import SmoothQuantError
    from .evaluation.accuracy import evaluate
    from .integrations.from_pretrained import disable, enable
    from .nn.int8_kv_cache import Int8Cache, use_int8_cache_
    from .nn.linear import W8A8Linear
    from .nn.static_cache import use_static_cache_
    from .ops import info
    from .quantization.pipeline import quantize
    from .quantization.recipe import Recipe
    from .scheme import SCHEMES, Scheme

# Imported when first used: importing transformers takes seconds, and calls of ops do not need it.
_HOME = {
    "SCHEMES": "scheme",
    "Int8Cache": "nn.int8_kv_cache",
    "Recipe": "quantization.recipe",
    "Scheme": "scheme",
    "SmoothQuantError": "errors",
    "W8A8Linear": "nn.linear",
    "disable": "integrations.from_pretrained",
    "enable": "integrations.from_pretrained",
    "evaluate": "evaluation.accuracy",
    "info": "ops",
    "load": "checkpoint.loading",
    "quantize": "quantization.pipeline",
    "save": "checkpoint.saving",
    "use_int8_cache_": "nn.int8_kv_cache",
    "use_static_cache_": "nn.static_cache",
}

__all__ = [
    "SCHEMES",
    "Int8Cache",
    "Recipe",
    "Scheme",
    "SmoothQuantError",
    "W8A8Linear",
    "disable",
    "enable",
    "evaluate",
    "info",
    "load",
    "quantize",
    "save",
    "use_int8_cache_",
    "use_static_cache_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if Path(__file__).with_name("_C.so").is_file():
    import_module(".ops", __name__)
else:
    warnings.warn(
        "smoothquant_ext is not compiled, so there is no torch.ops.sq: run 'pip install .' in its source folder",
        stacklevel=2,
    )
