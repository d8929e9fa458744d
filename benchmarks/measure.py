"""Figures that can be compared: taken in turn in one run, and given as medians with their spread."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)


def time_in_turn(
    calls: Mapping[Key, Callable[[], object]], rounds: int, warm_calls: int = 1
) -> dict[Key, list[float]]:
    """Milliseconds of every call in every round. Each is timed right after `warm_calls` of its own kind, as
    it would run in a decode loop; the first round is thrown away."""
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    for round_number in range(rounds + 1):
        for key, call in calls.items():
            for _ in range(warm_calls):
                call()
            started = time.perf_counter()
            call()
            if round_number:
                samples[key].append(1e3 * (time.perf_counter() - started))
    return samples


def ratios(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, so that what slows a whole round falls out."""
    return [sample / reference for sample, reference in zip(samples, base, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """median (p10-p90)."""
    low, high = np.percentile(values, [10, 90])
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table with straight columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
