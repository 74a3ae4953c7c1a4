"""Static activation scales: how much of the range of an input to keep.

One scale serves every value that an input will ever take: with the largest calibrated magnitude as its limit nothing
saturates, but a rare outlier makes the steps coarse for all. The candidates come from a histogram of magnitudes, which
is collected in fixed memory; the best one is measured on the output of the decoder block, as for alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..hadamard import rotate_blocks
from ..probing.blocks import BlockCall
from ..probing.hooks import hooked
from ..scheme import QMAX, Scheme
from .alpha_search import Trial
from .recipe import Clipping

BINS = 8192
PERCENTILES = (99.9, 99.99, 99.999)
HEADROOM = (1.1, 1.25, 1.5)  # times the absmax: values to come may be larger than the calibrated ones
RATIOS = tuple(step / 64 for step in range(1, 65))  # of the absmax: where MSE and KL look for their optimum
GAIN = 0.9  # of the error with the absmax: less is taken for chance. Saturation is rare, and then costs much.
LEVELS = 128  # magnitudes that 8 bits can distinguish


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
    rules = {
        "percentile": [histogram.percentile(percent) for percent in PERCENTILES],
        "mse": [histogram.mse_limit(scheme.dtype)],
        "kl": [histogram.kl_limit()],
    }
    chosen = [value for values in rules.values() for value in values] if clipping == "auto" else rules[clipping]
    headroom = [ratio * histogram.limit for ratio in HEADROOM] if clipping == "auto" else []
    return list(dict.fromkeys([histogram.limit, *headroom, *chosen]))


def choose_clips_(
    trial: Trial, calls: Sequence[BlockCall], inputs: Mapping[str, Sequence[str]], clipping: Clipping
) -> dict[str, float]:
    """Chooses the limit of each input of a block, one after the other, and gives it to the trial.

    Args:
        trial: the quantized block, folded as it will stay.
        calls: arguments of the original block for the windows to collect histograms from.
        inputs: for each input, by the name of its first consumer, all its consumers; model-wide names.
        clipping: the rule; with ``"auto"`` each input gets the candidate of all rules with the least error of the
            block's output, with another rule the limit of this rule, or the absmax if that is better.

    Returns:
        The limits by the names of the inputs, of those for which the absmax is not good enough.
    """
    histograms: dict[str, Histogram] = {}
    for name, consumers in inputs.items():
        limit = max((float(trial.smoothed_absmax(each).max()) for each in consumers if each in trial.absmax), default=0)
        if limit > 0:
            histograms[name] = Histogram(limit)
    scales = {name: trial.input_scale(name) for name in histograms}

    def count(name: str, args: tuple[Tensor, ...], _kwargs: object) -> None:
        x, scale = rotate_blocks(args[0], trial.rotated.get(name, 0)), scales[name]
        histograms[name].add(x if scale is None else x.float() / scale.to(x.device))

    with hooked({name: trial.block.find(name) for name in histograms}, before=count):
        for call in calls:
            call.replay(trial.block.module)

    chosen: dict[str, float] = {}
    for name, histogram in histograms.items():
        errors: dict[float, float] = {}
        for limit in limits(histogram, clipping, trial.scheme):
            trial.clip_(inputs[name], limit)
            errors[limit] = trial.block_error()
        best = min(errors, key=errors.__getitem__)
        if errors[best] < GAIN * errors[histogram.limit]:
            chosen[name] = best
        trial.clip_(inputs[name], chosen.get(name, histogram.limit))
    return chosen
