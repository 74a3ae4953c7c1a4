"""Static activation scales: how much of the range of an input to keep.

One scale for every value an input will ever take: with the largest magnitude seen as its limit nothing saturates, but a
rare outlier makes the steps coarse for all. The candidates come from a histogram of magnitudes, collected while the
data streams by in fixed memory; which one is best is measured on the output of the decoder block, as for alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..probing.blocks import BlockCall
from ..scheme import QMAX, Scheme
from .alpha_search import Trial
from .recipe import Clipping

BINS = 8192
PERCENTILES = (99.9, 99.99, 99.999)
HEADROOM = (1.1, 1.25, 1.5)  # times the absmax: what is still to come may be larger than what has been seen
RATIOS = tuple(step / 64 for step in range(1, 65))  # of the absmax: where MSE and KL look for their optimum
GAIN = 0.9  # of the damage that the absmax does: less is taken for chance. Saturation is rare, and then costs much.
LEVELS = 128  # magnitudes that 8 bits tell apart


class Histogram:
    """Counts of the magnitudes of an input whose largest one is known."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Counts the values of x, any shape; those beyond the limit fall into the last bin."""
        magnitude = x.detach().float().abs().clamp_(max=self.limit)
        self.counts += torch.histc(magnitude, BINS, 0.0, self.limit).double().cpu()

    @property
    def centres(self) -> Tensor:
        """fp64 [BINS]: the magnitude in the middle of each bin."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.limit / BINS)

    def percentile(self, percent: float) -> float:
        """The magnitude below which so many percent of the values lie."""
        total = self.counts.cumsum(0)
        index = int(torch.searchsorted(total, total[-1] * (percent / 100)))
        return (min(index, BINS - 1) + 1) * self.limit / BINS

    def mse_limit(self, dtype: torch.dtype) -> float:
        """The limit with the least squared error of rounding and saturation."""
        return min((ratio * self.limit for ratio in RATIOS), key=lambda limit: self._squared_error(limit, dtype))

    def kl_limit(self) -> float:
        """The limit whose quantized histogram has the least KL divergence from the saturated one (TensorRT's rule)."""
        return min((ratio * self.limit for ratio in RATIOS), key=self._divergence)

    def _squared_error(self, limit: float, dtype: torch.dtype) -> float:
        steps = (self.centres * (QMAX[dtype] / limit)).clamp(max=QMAX[dtype])
        kept = (steps.round() if dtype == torch.int8 else steps.float().to(dtype).double()) * (limit / QMAX[dtype])
        return float((self.counts * (kept - self.centres).square()).sum())

    def _divergence(self, limit: float) -> float:
        bins = max(LEVELS, round(limit / self.limit * BINS))
        within = self.counts[:bins]
        p = within.clone()
        p[-1] += self.counts[bins:].sum()  # saturates; the quantized histogram is of what does not
        level = torch.arange(bins) * LEVELS // bins
        filled = (within > 0).double()
        sums, sizes = (torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, v) for v in (within, filled))
        q = (sums / sizes.clamp(min=1))[level] * filled
        present = (p > 0) & (q > 0)
        p, q = p / p.sum().clamp(min=1), q / q.sum().clamp(min=1)
        missing = float(p[~present].sum())  # mass that the quantized histogram gives no place
        return float((p[present] * (p[present] / q[present]).log()).sum()) + missing


def limits(histogram: Histogram, clipping: Clipping, scheme: Scheme) -> list[float]:
    """The candidates for the largest magnitude that an input's static scale represents, the absmax first."""
    found = {
        "percentile": [histogram.percentile(percent) for percent in PERCENTILES],
        "mse": [histogram.mse_limit(scheme.dtype)],
        "kl": [histogram.kl_limit()],
    }
    chosen = [value for values in found.values() for value in values] if clipping == "auto" else found[clipping]
    headroom = [ratio * histogram.limit for ratio in HEADROOM] if clipping == "auto" else []
    return list(dict.fromkeys([histogram.limit, *headroom, *chosen]))


def choose_clips_(
    trial: Trial,
    block: nn.Module,
    calls: Sequence[BlockCall],
    inputs: Mapping[str, Sequence[str]],
    clipping: Clipping,
) -> dict[str, float]:
    """Chooses the limit of each input of a block, one after the other, and gives it to the trial.

    Args:
        trial: the quantized block, folded as it will stay.
        block: the original block, unsmoothed.
        calls: its arguments for the windows to collect histograms from.
        inputs: for each input, by the name of its first reader within the block, all its readers.
        clipping: the rule; with ``"auto"`` each input gets the candidate of all rules that damages the output least,
            with another rule what this one says, or the absmax if that is better.

    Returns:
        The limits by the names of the inputs, of those for which the absmax is not good enough.
    """
    histograms = {
        name: Histogram(max(float(trial.smoothed_absmax(trial.prefix + reader).max()) for reader in quantized))
        for name, readers in inputs.items()
        if (quantized := [reader for reader in readers if trial.prefix + reader in trial.absmax])
    }
    histograms = {name: histogram for name, histogram in histograms.items() if histogram.limit > 0}

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        scale = trial.input_scale(trial.prefix + name)

        def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            histograms[name].add(args[0] if scale is None else args[0].float() / scale.to(args[0].device))

        return count

    handles = [block.get_submodule(name).register_forward_pre_hook(counter(name)) for name in histograms]
    try:
        for call in calls:
            call.replay(block)
    finally:
        for handle in handles:
            handle.remove()

    chosen: dict[str, float] = {}
    for name, histogram in histograms.items():
        errors: dict[float, float] = {}
        for limit in limits(histogram, clipping, trial.scheme):
            trial.clip_(inputs[name], limit)
            errors[limit] = trial.damage()
        best = min(errors, key=errors.__getitem__)
        if errors[best] < GAIN * errors[histogram.limit]:
            chosen[name] = best
        trial.clip_(inputs[name], chosen.get(name, histogram.limit))
    return chosen
