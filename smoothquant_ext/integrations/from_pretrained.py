"""transformers with 8-bit kernels: after ``enable()``, its ``from_pretrained`` runs W8A8 checkpoints on them.

transformers looks up the ``quant_method`` of a checkpoint in a table of configuration classes. ``enable`` replaces the
entries that can hold W8A8. Such an entry loads W8A8 checkpoints and passes all others to the class that it replaced.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..checkpoint.formats.base import NotExecutable
from ..checkpoint.formats.registry import parse_quantization_config, quant_methods
from ..checkpoint.hf_quantizer import W8A8Config
from ..errors import SmoothQuantError
from ..ops.backends import check_cpu_isa
from .lora import forget_adapters, use_adapters


class _Entry:
    """Replaces a configuration class in transformers' table; ``former`` is that class, if there was one."""

    def __init__(self, method: str, former: Any) -> None:
        self.method = method
        self.former = former

    def from_dict(self, config: dict[str, Any], **kwargs: Any) -> Any:
        """Returns a ``W8A8Config`` if the checkpoint is W8A8, else the former class's configuration.

        Raises:
            SmoothQuantError: the former class would leave out what the outputs need.
        """
        try:
            parse_quantization_config(config, "config.json")
        except NotExecutable:
            raise
        except SmoothQuantError:
            if self.former is None:
                raise
            return self.former.from_dict(config, **kwargs)
        return W8A8Config()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "former":  # as copying and pickling ask for
            raise AttributeError(name)
        return getattr(self.former, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.former(*args, **kwargs)


def enable() -> None:
    """Makes transformers load W8A8 checkpoints into 8-bit kernels, in this process, until ``disable``.

    ``AutoModelForCausalLM.from_pretrained(directory_or_hub_id, ...)``, and everything that calls it (pipelines, the
    server, PEFT), then returns a model like that of ``smoothquant_ext.load``. Loading never creates the float weights.
    ``device_map`` and ``dtype`` keep working, and ``save_pretrained`` writes compressed-tensors. Checkpoints with other
    quantization load as before. The argument ``quantization_config`` raises an error for a W8A8 checkpoint. If PEFT is
    installed, it can put LoRA adapters on the 8-bit layers. A second call changes nothing.
    """
    check_cpu_isa()
    use_adapters()
    for method in quant_methods():
        former = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if not isinstance(former, _Entry):
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _Entry(method, former)


def disable() -> None:
    """Undoes ``enable``: transformers loads W8A8 checkpoints as without this package."""
    forget_adapters()
    for method, entry in list(AUTO_QUANTIZATION_CONFIG_MAPPING.items()):
        if isinstance(entry, _Entry):
            if entry.former is None:
                del AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            else:
                AUTO_QUANTIZATION_CONFIG_MAPPING[method] = entry.former
