"""Statistics of a block: shared inputs, rows, ranges and Hessians, against what hooks on the whole model see."""

from __future__ import annotations

import pytest
import tiny
import torch
from block_cases import recorded
from tiny_blocks import WIDTH, ExpertBlock, InPlaceBlock, Stack, batches
from torch import Tensor, nn

from smoothquant_ext.probing.blocks import Batch, BlockCall, find_blocks, run_model
from smoothquant_ext.probing.linears import find_linears
from smoothquant_ext.quantization.block_statistics import (
    MOST_ROWS,
    BlockInput,
    BlockStatistics,
    Windows,
    collect_statistics,
)


def input_of(statistics: BlockStatistics, consumer: str) -> BlockInput:
    return next(each for each in statistics.inputs.values() if consumer in each.consumers)


def statistics_of(
    model: nn.Module, data: list[Batch], held_out: set[int], train: set[int], hessians: bool = True
) -> BlockStatistics:
    """Of the first block."""
    recorder = recorded(model, data)
    name = recorder.names[0]
    block = find_blocks(model)[name]
    return collect_statistics(block, find_linears(block), recorder.calls(name, []), Windows(held_out, train), hessians)


def inputs_by_hook(model: nn.Module, data: list[Batch]) -> dict[str, list[Tensor]]:
    """What each linear layer of the first block is handed, [tokens, K] for each batch, at its first run."""
    block = next(iter(find_blocks(model).values()))
    seen: dict[str, list[Tensor]] = {}
    for window, batch in enumerate(data):

        def note(name: str, x: Tensor, window: int = window) -> None:
            rows = seen.setdefault(name, [])
            rows += [torch.empty(0, x.shape[-1])] * (window - len(rows))
            if len(rows) == window:
                rows.append(x.detach().clone().reshape(-1, x.shape[-1]))

        handles = [
            linear.register_forward_pre_hook(lambda _m, args, name=name, note=note: note(name, args[0]))
            for name, linear in find_linears(block).items()
        ]
        run_model(model, batch)
        for handle in handles:
            handle.remove()
    return {name: rows + [torch.empty(0, rows[0].shape[-1])] * (len(data) - len(rows)) for name, rows in seen.items()}


def assert_matches(
    statistics: BlockStatistics, inputs: dict[str, list[Tensor]], held_out: set[int], train: set[int]
) -> None:
    assert sorted(name for each in statistics.inputs.values() for name in each.consumers) == sorted(inputs)
    for name, windows in inputs.items():
        each = input_of(statistics, name)
        x = torch.cat([windows[window] for window in sorted(train)])
        rows = torch.cat([windows[window] for window in sorted(held_out)])
        assert torch.equal(torch.cat([*each.rows, rows[:0]]), rows)
        assert each.absmax is None if len(x) == 0 else torch.equal(each.absmax, x.abs().amax(0))
        exact = x.double().T @ x.double()
        size = (x.double().abs().T @ x.double().abs()).max() if len(x) else 1.0
        hessian = torch.zeros_like(exact) if each.hessian is None else each.hessian.double()
        # A sum of len(x) fp32 products: each addition rounds once.
        assert float((hessian - exact).abs().max()) <= (len(x) + 1) * torch.finfo(torch.float32).eps * size


SHARED = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "gptj": [["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"], ["attn.out_proj"], ["mlp.fc_out"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
}


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize(("held_out", "train"), [({0, 2}, {1}), ({0}, {0}), ({1}, {0, 2})])
def test_against_hooks(architecture: str, held_out: set[int], train: set[int]) -> None:
    model, data = tiny.build(architecture), [tiny.token_ids(2, tokens, seed) for seed, tokens in enumerate((9, 13, 1))]
    statistics = statistics_of(model, data, held_out, train)
    assert sorted(sorted(each.consumers) for each in statistics.inputs.values()) == sorted(
        map(sorted, SHARED[architecture])
    )
    assert all(first == each.consumers[0] for first, each in statistics.inputs.items())
    assert_matches(statistics, inputs_by_hook(model, data), held_out, train)


def test_outputs_are_what_the_block_returns() -> None:
    model, data = Stack(order=(0, 1)), batches(3)
    statistics = statistics_of(model, data, {0}, {1, 2})
    with torch.no_grad():
        for batch, outputs in zip(data, statistics.outputs, strict=True):
            assert torch.equal(outputs[0], model.layers[0](model.embed(batch)))


def test_an_input_that_is_changed_in_place_later_is_seen_as_it_was() -> None:
    model, data = Stack(make=InPlaceBlock), batches(3)
    statistics = statistics_of(model, data, {0}, {1, 2})
    assert [each.consumers for each in statistics.inputs.values()] == [["first"], ["second"]]
    assert_matches(statistics, inputs_by_hook(model, data), {0}, {1, 2})


@pytest.mark.parametrize("calls_empty", [True, False])
@pytest.mark.parametrize("lonely", [0, 1, 2])
def test_experts_without_tokens(calls_empty: bool, lonely: int) -> None:
    """One window alone has tokens for the second expert; in the others it gets no row, or is not called at all."""
    model = Stack(make=lambda: ExpertBlock(calls_empty))
    positive = model.embed.weight[:, 0] > 0
    ids = torch.arange(tiny.VOCAB)
    data: list[Batch] = [ids[~positive][None, start : start + 6] for start in range(3)]
    data[lonely] = torch.cat([ids[positive][None, :4], ids[~positive][None, :3]], 1)
    held_out, train = {0}, {1, 2}
    statistics = statistics_of(model, data, held_out, train)
    assert_matches(statistics, inputs_by_hook(model, data), held_out, train)
    second = input_of(statistics, "experts.1")
    assert sum(map(len, second.rows)) == (4 if lonely == 0 else 0)


def test_hessians_are_only_made_when_asked_for() -> None:
    statistics = statistics_of(Stack(), batches(2), {0}, {1}, hessians=False)
    assert all(each.hessian is None and each.absmax is not None for each in statistics.inputs.values())


@pytest.mark.parametrize(("windows", "tokens"), [(1, 400), (1, 513), (1, 1023), (4, 300), (7, 150)])
def test_rows_are_few_and_spread_over_all_held_out_windows(windows: int, tokens: int) -> None:
    linear = nn.Linear(WIDTH, 8)
    data = torch.arange(windows * tokens).float()[:, None].expand(-1, WIDTH).reshape(windows, 1, tokens, WIDTH)
    calls = [BlockCall((x,), {}) for x in data]
    block = nn.Sequential(linear)
    statistics = collect_statistics(block, {"0": linear}, calls, Windows(set(range(windows)), {0}), hessians=False)
    rows = torch.cat(statistics.inputs["0"].rows)[:, 0]
    assert min(windows * tokens, MOST_ROWS) / 2 <= len(rows) <= MOST_ROWS
    assert len(set((rows // tokens).tolist())) == windows
    assert len(set((rows[1:] - rows[:-1]).tolist()) - {1.0}) <= 2  # one step, and another between windows


@pytest.mark.parametrize("shape", [(1, 9), (3, 9)])
@pytest.mark.parametrize("at", [0, 5, 8])
def test_massive_tokens(shape: tuple[int, int], at: int) -> None:
    """Of the largest over the median token, and where in its window that token is, whichever row it is in."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(WIDTH, 8))
    x = torch.randn(*shape, WIDTH)
    x[-1, at] *= 1000
    held_out = [BlockCall((torch.randn(*shape, WIDTH),), {}), BlockCall((x,), {})]
    ignored = BlockCall((x * torch.linspace(0, 1e6, WIDTH),), {})
    statistics = collect_statistics(block, {"0": block[0]}, [*held_out, ignored], Windows({0, 1}, {2}), hessians=False)
    tokens = x.abs().amax(-1).flatten()
    ratio, position = statistics.inputs["0"].massive
    assert ratio == pytest.approx(float(tokens.max() / tokens.median()))
    assert position == at


def test_silence_is_not_massive() -> None:
    block = nn.Sequential(nn.Linear(WIDTH, 8))
    calls = [BlockCall((torch.zeros(1, 5, WIDTH),), {})]
    statistics = collect_statistics(block, {"0": block[0]}, calls, Windows({0}, {0}), hessians=True).inputs["0"]
    assert statistics.massive == (1.0, 0)
    assert statistics.absmax is not None
    assert not statistics.absmax.any()
    assert statistics.hessian is not None
    assert not statistics.hessian.any()


def test_hooks_are_removed_when_the_block_fails() -> None:
    block = nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8))  # the second does not fit
    with pytest.raises(RuntimeError):
        collect_statistics(
            block, find_linears(block), [BlockCall((torch.ones(2, WIDTH),), {})], Windows({0}, {0}), hessians=False
        )
    assert not any(linear._forward_pre_hooks for linear in block)
