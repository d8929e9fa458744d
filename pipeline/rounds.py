"""Time generations round by round, alone or in turn with others."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..speculate.generate import Run


@dataclass(frozen=True)
class Rounds:
    """One generation. A round is one call of the target with the drafting before it; the first reads the
    prompt. Greedy rounds are the same work whenever they are repeated.
    """

    tokens: list[int]  # that each round gave
    milliseconds: list[float]  # that each round took, as its caller sees it
    token_ids: list[int]
    stats: dict[str, Any]

    @property
    def token_times(self) -> list[float]:
        """Seconds from the start to each token; those of one round arrive together."""
        times, now = [], 0.0
        for count, ms in zip(self.tokens, self.milliseconds, strict=True):
            now += ms / 1e3
            times += [now] * count
        return times


def decode_in_turn(runs: Sequence[Run], between: Callable[[], object] = lambda: None) -> list[Rounds]:
    """Decode all of `runs` at the same time, one computing at a time: the next round is always that of the
    run which has the fewest tokens, and of equals they go first in turn (ABBA…). So they read the same
    passage at nearly the same moment, whatever their round lengths, and what slows the machine for a while
    slows all alike.

    between: called wherever all have the same number of tokens.
    """
    count = len(runs)
    tokens: list[list[int]] = [[] for _ in runs]
    milliseconds: list[list[float]] = [[] for _ in runs]
    ids: list[list[int]] = [[] for _ in runs]
    live = set(range(count))
    meetings = 0
    try:
        while live:
            if len({len(ids[index]) for index in range(count)}) == 1 and len(live) == count:
                between()
                meetings += 1
            order = range(count) if meetings % 2 else range(count - 1, -1, -1)
            index = min((i for i in order if i in live), key=lambda i: len(ids[i]))
            started = time.perf_counter()
            piece = next(runs[index], None)
            spent = 1e3 * (time.perf_counter() - started)
            if piece is None:
                live.discard(index)
                continue
            tokens[index].append(len(piece.token_ids))
            milliseconds[index].append(spent)
            ids[index] += piece.token_ids
    finally:
        for run in runs:
            run.close()  # of an interrupted one, so that its bundle can be used again
    return [Rounds(tokens[i], milliseconds[i], ids[i], run.stats.to_dict()) for i, run in enumerate(runs)]
