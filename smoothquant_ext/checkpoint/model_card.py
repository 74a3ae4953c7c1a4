"""The model card of a checkpoint, README.md: its content, what runs it, how it was made, what was measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..evaluation.accuracy import Evaluation
from ..evaluation.agreement import Agreement
from ..layer_names import by_reason
from ..scheme import Scheme, dtype_name
from .atomic import replace_file
from .completeness import counted
from .formats.base import Format
from .formats.compressed_tensors import Smoothed
from .formats.registry import parse_quantization_config
from .model_classes import CAUSAL_LM, task_of
from .other_files import MODULES
from .reading import read_checkpoint
from .record import RECORD, package_version, read_record

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def model_card(
    name: str,
    fmt: Format,
    schemes: Collection[Scheme],
    layers: int,
    record: Mapping[str, Any] | None,
    blocks: Mapping[int, int] = MappingProxyType({}),
    kind: str = "",
) -> str:
    """The text of a model card, which begins with the metadata that the Hugging Face hub reads.

    Args:
        name: the name of the model, which is the title.
        fmt: the format of the checkpoint.
        schemes: the schemes of its layers, the commonest first.
        layers: the number of layers that run in 8 bits.
        record: the content of smoothquant.json (see ``Report.to_record``); ``None`` for a checkpoint that another tool
            quantized.
        blocks: how many layers' inputs are rotated at run time, by the size of the rotated blocks.
        kind: the name of the model's class.
    """
    record = record or {}
    task, auto = task_of(kind)
    is_sentence_transformer = MODULES in (record.get("files") or ())
    how_to_run = (blocks and fmt.how_to_run_rotated) or fmt.how_to_run
    if task not in (CAUSAL_LM, "image-text-to-text") and fmt.name != Smoothed.name:
        how_to_run = ""  # of engines for language models
    base = str(record.get("base") or "")
    on_hub = base.count("/") == 1
    dtypes = list(dict.fromkeys(dtype_name(scheme.dtype) for scheme in schemes))
    data = ModelCardData(
        library_name="sentence-transformers" if is_sentence_transformer else "transformers",
        pipeline_tag="sentence-similarity" if is_sentence_transformer else task,
        base_model=base if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        tags=["smoothquant", "w8a8", *dtypes, fmt.quant_method],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        base=base,
        on_hub=on_hub,
        what="causal language model" if task == CAUSAL_LM else kind or "model",
        loader=("sentence_transformers", "SentenceTransformer") if is_sentence_transformer else ("transformers", auto),
        how_to_run=how_to_run.format(name=name),
        schemes=[_describe(scheme) for scheme in dict.fromkeys(schemes)],
        layers=layers,
        recipe=record.get("recipe"),
        calibration=record.get("calibration") or {},
        rotated=_rotated(record.get("rotations") or {}),
        at_run_time=[_at_run_time(block, count) for block, count in sorted(blocks.items())],
        head=_head_in_8_bits(record),
        groups=len(record.get("groups") or ()),
        skipped={reason: len(names) for reason, names in by_reason(record.get("skipped") or {}).items()},
        is_static=any(scheme.is_static for scheme in schemes),
        per_token=sum(layer["per_token"] for layer in _quantized_layers(record)),
        measured=[row for row in record.get("measured") or () if "perplexity" in row],
        agreement=[row for row in record.get("measured") or () if "perplexity" not in row],
        package=record.get("package") or package_version(),
    )
    return str(card).rstrip() + "\n"


def measured_facts(text: str, reference: str, evaluation: Evaluation | Agreement) -> dict[str, Any]:
    """A row of ``record["measured"]``.

    Args:
        text: the name of the text that was measured on.
        reference: the name of the model that was compared with.
        evaluation: the results.
    """
    if isinstance(evaluation, Agreement):
        return {"text": text, "reference": reference, **asdict(evaluation)}
    return {
        "text": text,
        "reference": reference,
        "tokens": evaluation.tokens,
        "perplexity": evaluation.perplexity,
        "change": evaluation.change,
        "kl": evaluation.kl,
        "top1": evaluation.top1,
    }


def add_measured(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds measurements to a checkpoint's record and model card; those on the same text are replaced.

    Raises:
        SmoothQuantError: the checkpoint has no record, or cannot be written.
    """
    record = read_record(directory)
    texts = {row["text"] for row in rows}
    record["measured"] = [row for row in record.get("measured", ()) if row["text"] not in texts] + list(rows)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantization = parse_quantization_config(config["quantization_config"], str(directory / "config.json"))
    schemes = [scheme for _, scheme in quantization.groups if scheme is not None]
    rotated = read_checkpoint(directory).layers.values() if quantization.transforms else ()
    blocks = Counter(layer.rotate for layer in rotated if layer.rotate)
    name, kind = directory.resolve().name, next(iter(config.get("architectures") or ()), "")
    text = model_card(name, quantization.fmt, schemes, len(record["quantized"]), record, blocks, kind)
    replace_file(directory / RECORD, json.dumps(record, indent=1) + "\n")
    replace_file(directory / CARD, text)


def _rotated(rotations: Mapping[str, Any]) -> list[str]:
    names = {"residual": "the residual stream", "heads": "the values of attention"}
    return [name for key, name in names.items() if rotations.get(key)]


def _head_in_8_bits(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    head: Mapping[str, Any] = record.get("head") or {}
    return head if head.get("name") in (record.get("quantized") or ()) else None


def _at_run_time(block: int, count: int) -> str:
    return f"the {'input' if count == 1 else 'inputs'} of {counted(count, 'layer')} in blocks of {block}"


def _quantized_layers(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    layers = record.get("layers") or {}
    return [layers[name] for name in record.get("quantized") or () if name in layers]


def _describe(scheme: Scheme) -> dict[str, str]:
    asymmetric = "" if scheme.symmetric else ", asymmetric"
    activation = "one scale per layer, from calibration" if scheme.is_static else "a scale per token, at run time"
    return {
        "name": scheme.name,
        "weights": f"{dtype_name(scheme.dtype)}, a scale per {scheme.weight}",
        "activations": f"{dtype_name(scheme.dtype)}, {activation}{asymmetric}",
    }
