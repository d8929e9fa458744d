"""Whether one series of timings is slower than another: a ratio, its bounds, and a verdict with three
outcomes.

Greedy decoding does the same work at every repetition, so a round has many timings and what differs between
them is the machine. Disturbances only ever add time, so the calmer half of a round's timings stands for it.
Rounds add up to passages, and bounds come from resampling passages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PASSAGE_TOKENS = 8  # at least; neighbouring rounds are disturbed together, so they are resampled together
MIN_PASSAGES = 8
RESAMPLES = 4000
CONFIDENCE = 0.95  # of each bound by itself

Metric = Literal["tpot", "ttft", "itl", "e2el"]
Outcome = Literal["pass", "regression", "cannot tell", "not compared"]


@dataclass(frozen=True)
class Series:
    """One prompt decoded one way: the tokens of each round, and milliseconds that stand for each."""

    tokens: list[int]
    milliseconds: list[float]


@dataclass(frozen=True)
class Comparison:
    baseline_ms: float  # of the metric
    candidate_ms: float
    lower: float  # bounds of candidate / baseline, each at `CONFIDENCE`
    upper: float
    passages: int

    @property
    def ratio(self) -> float:
        return self.candidate_ms / self.baseline_ms

    def slower_than(self, max_regression: float, floor_ms: float) -> bool:
        """Whether it is surely slower by more than both the ratio and the floor."""
        return self.lower > 1 + max_regression and (self.lower - 1) * self.baseline_ms > floor_ms

    def surely_within(self, max_regression: float, floor_ms: float) -> bool:
        return self.upper <= 1 + max_regression or (self.upper - 1) * self.baseline_ms <= floor_ms

    def tells(self, max_regression: float, floor_ms: float) -> bool:
        """Whether a slowdown of twice what is allowed would have been found: else passing means nothing."""
        resolution = max(max_regression, 0.02)
        sharp = self.ratio - self.lower <= resolution or self.surely_within(max_regression, floor_ms)
        return self.passages >= MIN_PASSAGES and sharp


def settle(repeats: Sequence[Sequence[float]]) -> list[float]:
    """Milliseconds [R, rounds] of the same rounds, repeated -> the mean of each round's calmer half."""
    calm = np.sort(np.asarray(repeats, float), axis=0)[: (len(repeats) + 1) // 2]
    return calm.mean(axis=0).tolist()


def compare(
    baseline: Sequence[Series], candidate: Sequence[Series], metric: Metric, seed: int = 0
) -> Comparison:
    """The metric of `candidate` over that of `baseline`, prompt by prompt the same text.

    Bounds: percentile bootstrap over passages, which end where both series have the same number of tokens.
    """
    rows = [row for old, new in zip(baseline, candidate, strict=True) for row in _cut(old, new, metric)]
    passages = np.array(rows, float).reshape(-1, 4)  # milliseconds and units of both
    drawn = np.random.default_rng(seed).integers(len(passages), size=(RESAMPLES, len(passages)))
    ratios = _ratio(passages[drawn].sum(axis=1))
    lower, upper = np.quantile(ratios, [1 - CONFIDENCE, CONFIDENCE])
    old_ms, old_units, new_ms, new_units = passages.sum(axis=0)
    bounds = float(lower), float(upper)
    return Comparison(float(old_ms / old_units), float(new_ms / new_units), *bounds, len(passages))


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    old_ms, old_units, new_ms, new_units = sums.T
    return (new_ms / new_units) / (old_ms / old_units)


def _cut(old: Series, new: Series, metric: Metric) -> list[tuple[float, float, float, float]]:
    """Passages of one prompt: milliseconds and units (tokens, rounds or requests) of old and new."""
    if metric == "ttft":
        return [(old.milliseconds[0], 1, new.milliseconds[0], 1)]
    if metric == "e2el":
        return [(sum(old.milliseconds), 1, sum(new.milliseconds), 1)]
    ends = [np.cumsum(series.tokens) for series in (old, new)]
    meetings = np.intersect1d(ends[0], ends[1])
    rows, start = [], ends[0][0]
    for end in meetings[1:]:  # the first round reads the prompt and gives one token on both sides
        if end - start < PASSAGE_TOKENS and end != meetings[-1]:
            continue
        row: list[float] = []
        for series, at in zip((old, new), ends, strict=True):
            inside = (at > start) & (at <= end)
            row += [float(np.asarray(series.milliseconds)[inside].sum())]
            row += [float(end - start) if metric == "tpot" else float(inside.sum())]
        rows.append((row[0], row[1], row[2], row[3]))
        start = end
    return rows
