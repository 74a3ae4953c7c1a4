"""transformers with 8-bit kernels: after ``enable()``, its own ``from_pretrained`` runs W8A8 checkpoints on ours.

transformers looks up the ``quant_method`` of a checkpoint in a table. ``enable`` puts itself in the entries under which
W8A8 is found: what is W8A8 it loads, everything else it hands on to whoever was there before.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..checkpoint.formats.registry import parse_quantization_config, quant_methods
from ..checkpoint.hf_quantizer import W8A8Config
from ..errors import SmoothQuantError
from .lora import forget_adapters, use_adapters


class _Entry:
    """Takes the place of a configuration class in transformers' table; ``former`` is that class, if there was one."""

    def __init__(self, method: str, former: Any) -> None:
        self.method = method
        self.former = former

    def from_dict(self, config: dict[str, Any], **kwargs: Any) -> Any:
        """Our configuration if the checkpoint is W8A8, else the former class's."""
        try:
            parse_quantization_config(config, "config.json")
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

    From then on ``AutoModelForCausalLM.from_pretrained(directory_or_hub_id, ...)``, and whatever calls it (pipelines,
    the server, PEFT), gives a model like that of ``smoothquant_ext.load``. Float weights never exist while it loads;
    ``device_map`` and ``dtype`` work as ever, and ``save_pretrained`` writes compressed-tensors. Checkpoints that are
    quantized in other ways load as before. A ``quantization_config`` beside a W8A8 checkpoint is refused. PEFT, if it
    is installed, learns to put LoRA adapters on the 8-bit layers. Calling it again changes nothing.
    """
    use_adapters()
    for method in quant_methods():
        former = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if not isinstance(former, _Entry):
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _Entry(method, former)


def disable() -> None:
    """Takes back ``enable``: transformers loads W8A8 checkpoints in its own ways again."""
    forget_adapters()
    for method, entry in list(AUTO_QUANTIZATION_CONFIG_MAPPING.items()):
        if isinstance(entry, _Entry):
            if entry.former is None:
                del AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            else:
                AUTO_QUANTIZATION_CONFIG_MAPPING[method] = entry.former
