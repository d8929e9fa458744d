"""Predict the speed of any ladder from one recorded run, without running it.

Under greedy decoding the output is the target's own text whatever drafts. So one plain run of the target,
each drafter's greedy choice at every position of that text, and the cost of one call of every engine
determine the calls that any ladder with any draft lengths would make: the replay walks them. The one thing
it cannot know is what an inner level proposes after its outer level has already left the target's text;
there it counts on nothing being accepted, and those tokens are rejected anyway.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

SUFFIX = "suffix"


@dataclass(frozen=True)
class Trace:
    """The target's greedy continuation of one prompt, T tokens, and what each drafter would have said."""

    misses: Mapping[str, np.ndarray]
    """engine -> int [T]: the first position >= t at which its greedy choice is not the target's; T: none"""
    suffix_drafted: np.ndarray
    """int [T]: tokens that the suffix drafter proposes at position t, asked for as many as it has"""
    suffix_matched: np.ndarray
    """int [T]: how many of those are the target's"""

    def __len__(self) -> int:
        return len(self.suffix_drafted)


@dataclass(frozen=True)
class CallCosts:
    """Milliseconds of one call of each engine, measured at some row counts and linear between them."""

    rows: Sequence[int]
    milliseconds: Mapping[str, Sequence[float]]

    def of(self, engine: str, rows: int) -> float:
        return float(np.interp(rows, self.rows, self.milliseconds[engine]))


@dataclass(frozen=True)
class Plan:
    """A ladder (innermost first, the target implied), what each level proposes per call, and its predicted
    speed.
    """

    ladder: tuple[str, ...]
    num_speculative_tokens: Mapping[str, int]
    tokens_per_second: float
    tokens_per_target_call: float


def next_misses(agrees: np.ndarray) -> np.ndarray:
    """bool [T] -> int [T]: the first position >= t that does not agree, T where there is none."""
    count = len(agrees)
    misses = np.where(agrees, count, np.arange(count))
    return np.minimum.accumulate(misses[::-1])[::-1]


def replay(
    trace: Trace, ladder: Sequence[str], lengths: Mapping[str, int], costs: CallCosts
) -> tuple[int, float]:
    """Walk one trace. Returns the number of target calls and the milliseconds that they and the drafting
    take.
    """

    def propose(level: int, start: int, count: int) -> tuple[int, int, float]:
        """What `level` proposes for `count` tokens at `start`: how many are right, how many there are, and
        their cost.
        """
        name = ladder[level]
        if name == SUFFIX:
            drafted = min(count, int(trace.suffix_drafted[start]))
            return min(drafted, int(trace.suffix_matched[start])), drafted, 0.0
        right = min(count, int(trace.misses[name][start]) - start)
        have, spent = 0, 0.0
        while have < count:
            room = count - have - 1
            accepted, drafted = 0, 0
            if level > 0 and room > 0 and have <= right:
                correct, drafted, inner = propose(
                    level - 1, start + have, min(lengths[ladder[level - 1]], room)
                )
                accepted = min(correct, right - have)
                spent += inner
            spent += costs.of(name, drafted + 1)
            have += accepted + 1
        return right, count, spent

    position, calls, spent = 1, 0, 0.0
    while position < len(trace):
        right, drafted, inner = 0, 0, 0.0
        room = len(trace) - position - 1
        if ladder and room > 0:
            right, drafted, inner = propose(len(ladder) - 1, position, min(lengths[ladder[-1]], room))
        spent += inner + costs.of("target", drafted + 1)
        calls += 1
        position += right + 1
    return calls, spent


def predict(
    traces: Iterable[Trace], ladder: Sequence[str], lengths: Mapping[str, int], costs: CallCosts
) -> Plan:
    """The pooled speed of one setting over all traces."""
    traces = list(traces)
    totals = [replay(trace, ladder, lengths, costs) for trace in traces]
    tokens = sum(len(trace) - 1 for trace in traces)
    calls = sum(call for call, _ in totals)
    spent = sum(ms for _, ms in totals)
    used = {name: lengths[name] for name in ladder}
    return Plan(tuple(ladder), used, 1e3 * tokens / spent, tokens / calls)


def best_plan(
    traces: Sequence[Trace], ladder: Sequence[str], options: Mapping[str, Sequence[int]], costs: CallCosts
) -> Plan:
    """The fastest draft lengths for `ladder`, by trying every combination of `options` (level -> lengths)."""
    settings = product(*(options[name] for name in ladder))
    plans = [predict(traces, ladder, dict(zip(ladder, lengths, strict=True)), costs) for lengths in settings]
    return max(plans, key=lambda plan: plan.tokens_per_second)
