"""Quantizes a tiny random model of every class of transformers, and writes docs/models.md."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import multiprocessing
import random
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from smoothquant_ext import Recipe, SmoothQuantError, load, quantize, save
from smoothquant_ext.checkpoint.naming import count_quantized
from smoothquant_ext.evaluation.agreement import agree_all
from smoothquant_ext.probing.blocks import run_model
from smoothquant_ext.probing.example_inputs import example_inputs
from smoothquant_ext.probing.trying import in_words
from smoothquant_ext.probing.values import tensors_in

ROOT = Path(__file__).parent.parent
RESULTS, TARGET = ROOT / "benchmarks" / "results" / "sweep.json", ROOT / "docs" / "models.md"
SECONDS, MOST_PARAMETERS = 180, 20_000_000  # of one class
ROWS, TOKENS, VOCAB, FIRST_SPECIAL = 2, 16, 96, 80
SUSPICIOUS, HEADING = 0.3, "## Results"  # a relative error; of the page
TASKS = "CausalLM Seq2SeqLM ImageTextToText MaskedLM SequenceClassification SpeechSeq2Seq CTC AudioClassification"
TASKS += " ImageClassification ZeroShotImageClassification"
AUTO = (*(f"AutoModelFor{task}" for task in TASKS.split()), "AutoModel")  # the last: of types without a causal LM

# The largest value of a setting, by patterns of its name: the first that matches; None leaves it alone.
LENGTHS: tuple[tuple[int | None, str], ...] = (
    (None, r"type_vocab_size|num_(feat_extract|lstm)_layers|num_encoder_blocks|max_window_layers|iou_head_depth"),
    (64, r"codebook_size"),
    (VOCAB, r"\w*vocab_size\w*|num_embeddings|encoder_hash_byte_group_vocab|num_hash_buckets"),
    (50, r"max_source_positions"),
    (128, r"\w*(max_position_embeddings|_positions|n_ctx|max_seq_len|context_length|max_length|max_text_len)"),
    (0, r"num_kv_shared_layers|num_nextn_predict_layers|num_dense_layers"),
    (2, r"\w*(encoder|decoder|num\w*|n|mit|attn|conf)_(\w+_)?(layers?|blocks)|layers|\w*depth|\w*hidden_layers"),
    (2, r"num_experts_per_tok(en)?|moe_(topk|k|top_k)|top_k_experts|\w*(layer_period|attention_interval)"),
    (2, r"\w*(every_n_layers|sliding_window_pattern)"),
    (4, r"\w*num_(local_|routed_)?experts|n_routed_experts|moe_num_experts"),
    (1, r"(n|num_expert)_groups?|topk_group|first_k_dense_replace|\w*sparse_step|\w*layer_offset"),
    (8, r"\w*sliding_window(_size)?|attention_chunk_size|local_attention|attention_window|num_queries|prompt_length"),
    (8, r"num_query_tokens|latent_query_num|resampler_n_latents"),
)
WIDTHS: tuple[tuple[int | None, str], ...] = (
    (128, r"\w*(intermediate_size|ffn_dim|d_ff|dff|mlp_dim|n_inner|d_inner|ffn_hidden_size|linear_units)\w*"),
    (128, r"feed_?forward_dim|dim_feedforward|dim_ff|encoder_ffn_embed_dim|\w*feed_forward_hidden_size"),
    (None, r"num_attention_heads_per_stage|num_key_value_groups"),
    (8, r"\w*mamba_(n|num)_heads|n_mamba_heads|qk_rope_head_dim|rotary_dim"),
    (2, r"linear_num_key_heads"),
    (4, r"\w*(attention_heads|num_heads|n_heads?|_heads|value_heads)"),
    (24, r"qk_head_dim|q_lora_rank"),
    (32, r"kv_lora_rank|o_lora_rank|conv_dim|tdnn_dim|image_size|input_size|img_size|crop_size"),
    (16, r"\w*(head_dim|d_kv|d_head|dim_head|head_size|kv_channels)|\w*(d_state|state_size)|mamba_dt_rank"),
    (64, r"\w*(hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size|hidden_dim)(_\w+)?|dim|emb"),
    (64, r"\w*(project(ion)?_(dim|size)|pooler_output_size|pooler_hidden_size|adapter_out_dim)"),
    (8, r"patch_size"),
)
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_decoder_layers")
STAGES = r"depths|num_blocks_per_stage|blocks_per_stage|num_block_repeats|layers_per_stage"

# Settings that no rule finds, by model type.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    **{f"{name}_text": {"rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]}} for name in (
        "glm4v", "glm_image", "glm_ocr", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni")},
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    **{name: {"vocab_size": 96, "pad_token_id": 1} for name in ("esm", "wav2vec2-bert", "wav2vec2-conformer")},
    "bamba": {"attn_layer_indices": [1]}, "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "num_hidden_layers": 6,
             "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"]},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 24, "n_group": 1, "per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16}, "mamba2": {"num_heads": 8, "n_groups": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]}, "jamba": {"expert_layer_period": 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8}, "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, "mimi": {"upsample_groups": 64},
    "nemotron": {"num_key_value_heads": 2}, "xmod": {"default_language": "en_XX"},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2, "ngram_vocab_size_base": 96},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "num_buckets": 4},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
              "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 2},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16, "kv_channels": 16,
               "num_query_groups": 4, "hybrid_layer_ids": [1]},
}  # fmt: skip


def shrink(settings: dict[str, Any], narrow: bool = True) -> dict[str, Any]:
    """The settings of a configuration and of those in it: few layers, and narrow ones."""
    settings = {key: settings[key] for key in settings if key not in ("out_features", "out_indices", "stage_names")}
    depth = next((settings[key] for key in DEPTHS if type(settings.get(key)) is int), 0)
    lists = {key: each for key, each in settings.items() if isinstance(each, (list, tuple)) and len(each) == depth > 1}
    kept = _layers_to_keep(list(lists.values()), depth)
    settings |= {key: [each[index] for index in kept] for key, each in lists.items()}
    specials = itertools.count(FIRST_SPECIAL + 1)
    small = {key: _shrunk(key, value, len(kept), specials, narrow) for key, value in settings.items()}
    small |= {key: len(kept) for key in DEPTHS if kept and type(settings.get(key)) is int}
    for key, value in settings.items():
        if re.fullmatch(r"\w*(kv_heads|key_value_heads|kv_n_heads)", key) and isinstance(value, int) and narrow:
            small[key] = min(value, 4 if value == settings.get(key.replace("key_value", "attention")) else 2)
    if small.get("pad_token_id", 0) is None and "vocab_size" in small:
        small["pad_token_id"] = 0
    if "per_layer_config" in small:
        layers = {int(key): value for key, value in small["per_layer_config"].items()}
        small["per_layer_config"] = {str(new): layers[old] for new, old in enumerate(kept) if old in layers}
    if settings.get("qk_rope_head_dim") and settings["qk_rope_head_dim"] == settings.get("head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    _fit_rotations(small)
    return small | (SPECIAL.get(str(settings.get("model_type")), {}) if narrow else {})


def _shrunk(key: str, value: Any, depth: int, specials: Iterator[int], narrow: bool) -> Any:
    """One setting."""
    if isinstance(value, dict):
        return shrink(value, narrow) if key not in ("id2label", "label2id") else value
    if isinstance(value, (list, tuple)):
        if re.fullmatch(STAGES, key):
            return [1] * len(value)
        numbers = all(type(each) is int for each in value) and len(set(value)) == len(value)
        if numbers and re.fullmatch(r"\w*(indices|indexes|idxs|layer_ids|_layers)", key):
            return sorted({min(each, max(depth, 1) - 1) for each in value})
        return [_shrunk(key, each, depth, specials, narrow) for each in value]
    if type(value) is not int:
        return value
    if re.fullmatch(r"\w*token_(id|index)", key):
        return value if value < FIRST_SPECIAL else min(next(specials), VOCAB - 1)
    rules = (*LENGTHS, *WIDTHS) if narrow else LENGTHS
    limit = next((limit for limit, pattern in rules if re.fullmatch(pattern, key)), None)
    if limit is not None and value > limit:
        return limit
    return 2 if "heads" in key and value == 3 and narrow else value


def _layers_to_keep(lists: list[Any], depth: int) -> list[int]:
    """Numbers of two layers, or of up to four of which no two are of one kind, as lists of a value a layer tell."""
    lists = [each for each in lists if len(set(map(str, each))) < depth]
    first: dict[str, int] = {}
    for index in range(depth):
        first.setdefault(str([each[index] for each in lists]), index)
    kinds = sorted(first.values())[:4]
    others = [index for index in range(depth) if index not in kinds]
    return sorted(kinds + others[: max(0, 2 - len(kinds))])


def _fit_rotations(small: dict[str, Any]) -> None:
    """Sections of rotary embeddings add up to half a head."""
    whole = small.get("hidden_size", 0) // (small.get("num_attention_heads") or 1) if "mrope" in str(small) else 0
    wide = small.get("qk_rope_head_dim") or small.get("head_dim") or whole
    for rope in (small, small.get("rope_parameters"), small.get("rope_scaling")):
        if isinstance(rope, dict) and isinstance(sections := rope.get("mrope_section"), list) and wide:
            half = int(wide // 2 * rope.get("partial_rotary_factor", 1))
            parts = [max(1, half * each // sum(sections)) for each in sections[1:]]
            rope["mrope_section"] = [half - sum(parts), *parts]


def tiny_models(name: str, model_type: str) -> Iterator[nn.Module]:
    """Random models of a class, the smallest first, with weights that are the same each time."""
    kind: Any = getattr(transformers, name)
    config_class = kind.config_class or CONFIG_MAPPING[model_type]
    build = kind._from_config if hasattr(kind, "_from_config") else kind
    for narrow in (True, False):
        config = config_class.from_dict(shrink(config_class().to_dict(), narrow))
        with torch.device("meta"):
            size = sum(each.numel() for each in build(copy.deepcopy(config)).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size / 1e6:.0f} million parameters after shrinking")
        torch.manual_seed(0)
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():  # some classes leave some of them as the memory was
                if not bool(parameter.isfinite().all()) or float(parameter.abs().max()) > 1e4:
                    parameter.normal_(0, 0.02)
        yield model.float().eval()


def inputs_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Arguments for ``forward``, the likeliest first: random tokens, images and sounds."""
    generator = torch.Generator().manual_seed(1)
    find, names = partial(_find, model.config), inspect.signature(model.forward).parameters
    embeddings = [each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)]
    vocabulary = min([FIRST_SPECIAL, *(size for size in embeddings if size > 24)])

    def numbers(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator)

    def tokens(count: int = TOKENS) -> Tensor:
        ids = torch.randint(3, vocabulary, (ROWS, count), generator=generator)
        if getattr(model.config, "is_encoder_decoder", False) and type(find("eos_token_id")) is int:
            ids[:, -1] = find("eos_token_id")  # what classifiers look at
        return ids

    size, patch, bins = find("image_size", 32), find("patch_size", 8), find("num_mel_bins feature_size input_dim", 80)
    size, patch = (each if isinstance(each, int) else max(each) for each in (size, patch))
    channels, flat = find("num_channels in_channels in_chans", 3), find("temporal_patch_size", 1) * patch * patch
    image, patches = numbers(channels, size, size), numbers(16, channels * flat)
    video, frames = numbers(find("num_frames frames_per_clip", 4), channels, size, size), numbers(64, bins)
    known: dict[str, list[Tensor]] = {
        "pixel_values": [image, patches.flatten(0, 1), patches, video, numbers(channels, 64, 64), image[:, None]],
        "hidden_states": [patches.flatten(0, 1), numbers(TOKENS, find("hidden_size", 64))],
        "pixel_values_videos": [video, patches.flatten(0, 1)],
        "input_features": [frames, frames.mT, frames[:, None], numbers(64, 160)],
        "input_values": [numbers(4000), numbers(1, 4000), frames],
        "past_values": [numbers(find("context_length", 32), 1), numbers(32)],
        "bbox": [torch.ones(ROWS, TOKENS, 4, dtype=torch.long)],
        "spatial_shapes": [torch.full((ROWS, 2), 4)],
        **{name: [torch.tensor([[1, 4, 4]] * ROWS)] for name in ("grid_thw", "image_grid_thw")},
        **{name: [tokens()] for name in ("input_ids", "decoder_input_ids", "qformer_input_ids")},
        **{name: [numbers(TOKENS, find("hidden_size d_model", 64))] for name in ("inputs_embeds", "query_embeds")},
    }
    special = find("image_token_id image_token_index")
    if "pixel_values" in names and isinstance(special, int):
        grids = {name: known[name][0] for name in ("image_grid_thw", "grid_thw", "spatial_shapes") if name in names}
        for pixels, count in itertools.product(known["pixel_values"][:-2], (16, 4, 1, 64, 17)):
            ids = tokens(count + 8)
            ids[:, 2 : count + 2] = special
            types = {"mm_token_type_ids": (ids == special).long()} if "mm_token_type_ids" in names else {}
            yield {"input_ids": ids, "pixel_values": pixels} | types | grids
    for each in example_inputs(model):
        yield {key: numbers(*value.shape[1:]) if value.is_floating_point() else tokens() for key, value in each.items()}
    needed = [key for key, each in names.items() if each.default is each.empty and each.kind.value == 1]
    main = getattr(model, "main_input_name", "input_ids")
    for extra in ([], ["decoder_input_ids"], ["bbox"], ["pixel_values"], ["decoder_input_ids", "bbox"]):
        wanted = dict.fromkeys([*([main] if main in names else []), *needed, *extra])
        if wanted and set(wanted) <= set(names) & set(known):
            for index in range(max(len(known[name]) for name in wanted)):
                yield {name: known[name][min(index, len(known[name]) - 1)] for name in wanted}


def _find(config: Any, names: str, default: Any = None) -> Any:
    """A setting of a configuration, or of those in it, by the first of its names."""
    for name in names.split():
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    inner = (_find(value, names) for value in vars(config).values() if hasattr(value, "to_dict"))
    return next((found for found in inner if found is not None), default)


def runnable(name: str, model_type: str) -> tuple[nn.Module, dict[str, Tensor]] | dict[str, str]:
    """A tiny model and inputs that it runs on; without these, what the sweep lacks."""
    outcome, reasons = "cannot be built tiny", ["no argument that the sweep knows"]
    try:
        for model in tiny_models(name, model_type):
            outcome = "no input found"
            for inputs in inputs_of(model):
                if not (reason := failure(model, inputs)):
                    return model, inputs
                reasons.append(reason)
    except Exception as error:
        reasons.append(in_words(error))
    return {"outcome": outcome, "sentence": tidy(reasons[:2][-1])}


def failure(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Why a model does not run on inputs, or ''."""
    try:
        outputs = run(lambda: model(**inputs))
        return "its outputs are not numbers" if any(bool(each.isnan().any()) for each in outputs) else ""
    except Exception as error:
        return in_words(error)


@torch.no_grad()
def run(call: Callable[[], Any]) -> list[Tensor]:
    """All tensors that a call returns, with the same random numbers each time."""
    torch.manual_seed(0)
    random.seed(0)
    return tensors_in(call())


def try_class(name: str, model_type: str) -> dict[str, Any]:
    """Quantizes, saves, loads and compares a tiny model of a class; what came of it."""
    if isinstance(found := runnable(name, model_type), dict):
        return found
    stage, facts, (model, inputs) = "copy", {}, found
    try:
        facts["inputs"] = ", ".join(f"{key} {list(value.shape)}" for key, value in inputs.items())
        reference = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as folder:
            stage = "quantize"
            model = quantize(model, [inputs] * 4, Recipe(rotate="inputs,auto"), progress=False)
            stage = "save"
            save(model, Path(folder) / "model")
            stage = "load"
            loaded = load(Path(folder) / "model")
        stage = "compare"
        error = agree_all({"loaded": loaded}, [inputs], reference)["loaded"].error
        facts |= {"layers": count_quantized(model), "error": float(f"{error:.3g}")}
        if sentence := difference(loaded, model, inputs):
            return {"outcome": "differs", **facts, "sentence": sentence}
        return {"outcome": "works" if error <= SUSPICIOUS else f"error > {SUSPICIOUS}", **facts}
    except SmoothQuantError as error:
        outcome = "refused" if stage != "load" else "saved, not loaded"
        return {"outcome": outcome, "stage": stage, **facts, "sentence": tidy(str(error))}
    except Exception as error:
        frames = [each for each in traceback.extract_tb(error.__traceback__) if "smoothquant_ext" in each.filename]
        place = f"{tidy(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
        return {"outcome": "traceback", "stage": stage, **facts, "sentence": tidy(in_words(error)), "frame": place}


def difference(loaded: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """How a loaded model differs from what was saved, or ''; as copies, whose floats lie alike in memory."""
    if list(loaded.state_dict()) != list(model.state_dict()):
        keys = sorted(set(loaded.state_dict()) ^ set(model.state_dict()))
        return f"the keys of the state dict differ: {', '.join(keys[:5]) or 'their order'}"
    first, again, other = (run(partial(run_model, each, inputs)) for each in map(copy.deepcopy, (model, model, loaded)))
    if not all(map(torch.equal, first, again)):
        return ""  # chance that no seed of ours governs
    wrong = [index for index, pair in enumerate(zip(first, other, strict=False)) if not torch.equal(*pair)]
    return f"outputs {wrong} of {len(first)} and {len(other)} differ" if wrong or len(first) != len(other) else ""


def tidy(text: str) -> str:
    """One line without the paths of this machine."""
    for folder in (tempfile.gettempdir(), str(Path(transformers.__file__).parents[1]), str(ROOT)):
        text = text.replace(f"{folder}/", "")
    return " ".join(re.sub(r"\btmp\w{8}/", "", text).split())[:400]


def cases() -> Iterator[tuple[str, str, str]]:
    """Auto class, class and model type of everything that is swept, each class once."""
    seen: set[str] = set()
    mappings = {auto: getattr(transformers, auto)._model_mapping._model_mapping for auto in AUTO}
    for auto, mapping in mappings.items():
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                if name not in seen and not (auto == "AutoModel" and model_type in mappings["AutoModelForCausalLM"]):
                    seen.add(name)
                    yield auto, name, model_type


def main(
    only: Annotated[str, typer.Option(help="Pattern of 'AutoClass Class model_type'.")] = "",
    limit: Annotated[int, typer.Option(help="The most classes to try; with 0 the page is written alone.")] = 10_000,
    again: Annotated[bool, typer.Option("--again", help="Try also classes that have a result.")] = False,
) -> None:
    """Tries every class of transformers that has no result yet, and writes docs/models.md."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"records": {}}
    known, pool, spawn = results["records"], None, multiprocessing.get_context("spawn")
    chosen = [case for case in cases() if re.search(only, " ".join(case)) and (again or case[1] not in known)]
    for auto, name, model_type in chosen[:limit]:
        pool = pool or futures.ProcessPoolExecutor(1, spawn, transformers.logging.set_verbosity_error)
        try:
            record = pool.submit(try_class, name, model_type).result(SECONDS)
        except (futures.TimeoutError, futures.BrokenExecutor) as error:
            slow = isinstance(error, futures.TimeoutError)
            record = {"outcome": "timeout" if slow else "traceback", "sentence": "" if slow else "the process died"}
            for process in multiprocessing.active_children():
                process.kill()
            pool = None
        known[name] = {"auto": auto, "type": model_type, **record}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in sorted(known.items()))
        packages = json.dumps({each: version(each) for each in ("smoothquant-ext", "torch", "transformers")})
        head = f'{{"date": "{datetime.now(timezone.utc).date()}", "versions": {packages}, "records": {{\n'
        RESULTS.write_text(f"{head}{lines}\n}}}}\n", encoding="utf-8")
        print(auto, name, record, flush=True)
    TARGET.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page: its introduction stays, the rest comes from the results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    counts = Counter(record["outcome"] for record in results["records"].values())
    lines = [TARGET.read_text(encoding="utf-8").partition(HEADING)[0] + HEADING, ""]
    lines += [f"With transformers {results['versions']['transformers']}, of {len(results['records'])} classes:", ""]
    lines += [f"- {count} *{outcome}*" for outcome, count in counts.most_common()]
    for outcome in sorted(counts, key=lambda each: (each != "works", each != "refused", each)):
        lines += ["", f"### {outcome.capitalize()}", "", "| auto class | classes | |", "|---|---|---|"]
        for auto in AUTO:
            each_of = {key: each for key, each in results["records"].items() if each["auto"] == auto}
            found = {key: each for key, each in each_of.items() if each["outcome"] == outcome}
            types = Counter(each["type"] for each in found.values())
            text = ", ".join(f"{key} ({count})" if count > 1 else key for key, count in sorted(types.items()))
            if outcome in ("works", "cannot be built tiny", "no input found"):
                found = {str(len(found)): {"sentence": text}} if found else {}
            lines += [f"| {auto} | {key} | {each.get('sentence', each.get('error'))} |" for key, each in found.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
