"""W8A8 for PyTorch: SmoothQuant with real INT8 and FP8 kernels."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load, save
    from .errors import SmoothQuantError
    from .evaluate import evaluate
    from .int8_cache import Int8Cache, use_int8_cache_
    from .modules import W8A8Linear
    from .ops import info
    from .quantize import quantize
    from .runtime import disable, enable
    from .scheme import SCHEMES, Recipe, Scheme

# Imported when first used: transformers takes seconds, and `smoothquant --help` should not.
_HOME = {
    "SCHEMES": "scheme",
    "Int8Cache": "int8_cache",
    "Recipe": "scheme",
    "Scheme": "scheme",
    "SmoothQuantError": "errors",
    "W8A8Linear": "modules",
    "disable": "runtime",
    "enable": "runtime",
    "evaluate": "evaluate",
    "info": "ops",
    "load": "checkpoint",
    "quantize": "quantize",
    "save": "checkpoint",
    "use_int8_cache_": "int8_cache",
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
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps ``smoothquant_ext.quantize`` the function: importing the module of that name would bind it here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
