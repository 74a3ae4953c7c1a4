"""Rotations on every architecture: the function stays, outliers go; what cannot be rotated is said and left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from smoothquant_ext import Recipe, SmoothQuantError, load, quantize, save
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization import pipeline
from smoothquant_ext.quantization.placement import Placement
from smoothquant_ext.quantization.recipe import TRIED
from smoothquant_ext.quantization.report import Rotations
from smoothquant_ext.quantization.rotation import rotate_

WIDTH, HEAD = 64, 16
BOTH = ("residual", "heads")
DATA = [tiny.token_ids(seed=seed) for seed in range(2, 6)]
IDS = tiny.token_ids(seed=9)
# A rotation and its inverse are each rounded once to fp32 in a weight; two blocks have four writers and four readers,
# and norms, softmax and the residual sums are computed anew from the rounded values. Measured: up to 9e-7.
SAME = 64 * torch.finfo(torch.float32).eps

# Why the residual stream is not rotated; every other architecture's is.
POST_NORM = "model.layers.0 has a norm, {}, between a matrix and the residual stream"
REFUSED = {
    "gemma2": POST_NORM.format("post_attention_layernorm"),
    "gemma3_text": POST_NORM.format("post_attention_layernorm"),
    "glm4": POST_NORM.format("post_self_attn_layernorm"),
    "olmo2": POST_NORM.format("post_attention_layernorm"),
    "bloom": "the model has a norm, transformer.word_embeddings_layernorm, between a matrix and the residual stream",
}
NO_HEADS = {"olmo-clipped"}  # a clamp follows v_proj


def rotate(model: nn.Module, *kinds: str) -> Rotations:
    structure = find_structure(model, DATA[0])
    return rotate_(structure, DATA[0], kinds or BOTH, Placement(torch.device("cpu")))


def parameters_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    return {name: (p, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[nn.Parameter, Tensor]]) -> None:
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    for name, (parameter, values) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, values), name


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_a_rotated_model_computes_the_same(architecture: str) -> None:
    model = tiny.build(architecture)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected, before = tiny.logits(model, IDS), parameters_of(model)
    rotations = rotate(model)
    assert rotations.refused == REFUSED.get(architecture, "")
    assert rotations.residual == (architecture not in REFUSED)
    assert set(rotations.heads.values()) == (set() if architecture in NO_HEADS else {HEAD})
    assert tiny.relative_error(model, expected, IDS) <= SAME
    moved = {name for name, p in model.named_parameters(remove_duplicate=False) if p is not before[name][0]}
    assert moved
    if rotations.residual and tied:
        assert rotations.untied == model.get_output_embeddings().weight.nbytes
        assert not model.config.tie_word_embeddings
    else:
        assert rotations.untied == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_16_bit_models_are_rotated_in_their_dtype(architecture: str, dtype: torch.dtype) -> None:
    model = tiny.build(architecture, dtype)
    expected = tiny.logits(model.float(), IDS)
    model.to(dtype)
    own = tiny.relative_error(model, expected, IDS)
    assert rotate(model).residual
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # The rotated weights are rounded once more than the model's own, to the same dtype.
    assert tiny.relative_error(model, expected, IDS) <= 4 * own


def test_outliers_are_spread() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 50  # an outlier channel of the stream itself
    plain = quantize(copy.deepcopy(model), DATA, Recipe(smooth=False), progress=False).smoothquant_record["layers"]
    record = quantize(model, DATA, Recipe(smooth=False, rotate=BOTH), progress=False).smoothquant_record["layers"]
    for layer in ("self_attn.q_proj", "mlp.up_proj"):
        before, after = plain[f"model.layers.0.{layer}"], record[f"model.layers.0.{layer}"]
        assert after["ratio_before"] < before["ratio_before"] / 2
        assert after["error"] < before["error"] / 2


class Block(nn.Module):
    """A block whose parts the cases below exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(nn.functional.silu(self.up(self.norm(hidden))))


class NormInTheStream(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return normed + self.down(nn.functional.silu(self.up(normed)))


class ScaledByChannel(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.scale * self.down(nn.functional.silu(self.up(self.norm(hidden))))


class ReadsAPart(Block):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(WIDTH // 2, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.part(self.norm(hidden)[..., : WIDTH // 2])


class Clamped(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).clamp(-0.5, 0.5)


class DeadChannel(Block):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.norm.weight[3] = 0.0


class NoStream(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(self.norm(hidden))))


class CausalLM(nn.Module):
    """What is around the blocks."""

    def __init__(
        self, make: Callable[[], nn.Module] = Block, positions: bool = False, linear_head: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(tiny.VOCAB, WIDTH)
        self.layers = nn.ModuleList([make(), make()])
        self.head = nn.Linear(WIDTH, tiny.VOCAB, bias=False) if linear_head else None
        self.positions = nn.Parameter(torch.randn(128, WIDTH)) if positions else None
        self.projector: nn.Module | None = None

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        if self.positions is not None:
            hidden = hidden + self.positions[: input_ids.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden)
        logits = hidden @ self.embed.weight.t() if self.head is None else self.head(hidden)
        return CausalLMOutput(logits=logits)


def with_projector() -> nn.Module:
    model = CausalLM()
    model.projector = nn.Linear(32, WIDTH)  # of images, which no text runs
    return model


def sharing() -> nn.Module:
    model = CausalLM()
    model.layers[1].up.weight = model.layers[0].up.weight
    return model


def idle_block() -> nn.Module:
    model = CausalLM()
    model.extra = nn.ModuleList([Block()])
    return model


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm in the stream": (lambda: CausalLM(NormInTheStream), "does not pass its input on"),
    "a scale for each channel": (lambda: CausalLM(ScaledByChannel), "adds a function of the output of down"),
    "a reader of some channels": (lambda: CausalLM(ReadsAPart), "hands part a part of its residual stream"),
    "a clamp": (lambda: CausalLM(Clamped), "layers.0 "),
    "a norm with a weight of 0": (lambda: CausalLM(DeadChannel), "has a norm, norm, with a weight of 0"),
    "no residual stream": (lambda: CausalLM(NoStream), "layers.0 "),
    "positions in a parameter": (lambda: CausalLM(positions=True), "hands layers.0 something else"),
    "a head without a module": (lambda: CausalLM(linear_head=False), "does not commute with rotations"),
    "a projector that no text runs": (with_projector, "did not run projector"),
    "a weight in two places": (sharing, "uses the weight of layers.0.up in another place too"),
    "a block that no text runs": (idle_block, "extra.0 did not run"),
}


def test_a_plain_block_of_no_library_is_rotated() -> None:
    model = CausalLM()
    expected = tiny.logits(model, IDS)
    assert rotate(model).residual
    assert tiny.relative_error(model, expected, IDS) <= SAME


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_rotated_is_said_and_left_alone(case: str) -> None:
    make, reason = REASONS[case]
    model = make()
    before = parameters_of(model)
    rotations = rotate(model)
    assert not rotations.residual
    assert reason in rotations.refused
    assert_unchanged(model, before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "deepseek_v2-lite", "bloom"])
@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_a_rotated_checkpoint_round_trips(architecture: str, scheme: str, tmp_path: Path) -> None:
    model = quantize(tiny.build(architecture), DATA, Recipe(scheme, rotate=BOTH), progress=False)
    expected = tiny.logits(model, IDS)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(tiny.logits(loaded, IDS), expected)
    assert loaded.smoothquant_record["rotations"]["residual"] == (architecture not in REFUSED)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("the residual stream, the values of attention" in card) == (architecture not in REFUSED)


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_a_failure_leaves_the_model_as_it_was(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(architecture)
    before, tied = parameters_of(model), model.config.tie_word_embeddings

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize_blocks", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, DATA, Recipe(rotate=BOTH), progress=False)
    assert_unchanged(model, before)
    assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize(
    "rotate", ["spin", ("spin",), ["residual", "spin"], "residual,,heads", "none,heads", 3, {"residual": 1}, [None]]
)
def test_an_unknown_kind_is_refused(rotate: Any) -> None:
    with pytest.raises(SmoothQuantError, match=r"rotate (is|holds) .*, expected auto, none, or some of residual"):
        Recipe(rotate=rotate)


@pytest.mark.parametrize("rotate", ["residual, heads", ["residual", "heads"], ("residual", "heads", "residual")])
def test_kinds_are_a_list_or_one_text(rotate: Any) -> None:
    assert Recipe(rotate=rotate).rotate == BOTH
    assert Recipe(rotate="").rotate == Recipe(rotate=None).rotate == Recipe(rotate="none").rotate == ()


@pytest.mark.parametrize(
    ("rotate", "kinds", "chooses"),
    [
        ("auto", TRIED, True),
        ("auto,residual,heads", BOTH, True),
        (["heads", "auto"], ("heads",), True),
        ("down", ("down",), False),
        ("none", (), False),
    ],
)
def test_auto_tries_all_kinds_or_the_given_ones(rotate: Any, kinds: tuple[str, ...], chooses: bool) -> None:
    recipe = Recipe(rotate=rotate)
    assert (recipe.rotations, recipe.chooses_rotation) == (kinds, chooses)


class SmallHeads(nn.Module):
    """Attention of four heads of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, 32, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(32, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(hidden_states).unflatten(-1, (4, 8)).transpose(1, 2) for layer in layers)
        values = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(values.transpose(1, 2).flatten(2)), None


def test_blocks_of_one_class_may_have_heads_of_other_sizes() -> None:
    model = tiny.build("llama", num_hidden_layers=3)
    model.model.layers[1].self_attn = SmallHeads()
    expected = tiny.logits(model, IDS)
    rotations = rotate(model)
    assert list(rotations.heads.values()) == [HEAD, 8, HEAD]
    assert tiny.relative_error(model, expected, IDS) <= SAME


def test_one_kind_leaves_the_other_alone() -> None:
    model = tiny.build("llama")
    before = parameters_of(model)
    rotations = rotate(model, "heads")
    assert (rotations.residual, rotations.refused) == (False, "")
    moved = {name for name, p in model.named_parameters() if p is not before[name][0]}
    assert {name.split(".")[-2] for name in moved} == {"v_proj", "o_proj"}
