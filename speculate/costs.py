"""What a call of an engine costs, by its rows and by what is in the cache: measured on one machine."""

import sys
from functools import cached_property
from itertools import pairwise
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from .loop import PREFILL_ROWS

FINITE = sys.float_info.max  # as an upper bound it refuses infinity
Milliseconds = Annotated[float, Meta(gt=0, le=FINITE)]
Overhead = Annotated[float, Meta(ge=0, le=FINITE)]
Axis = Annotated[tuple[int, ...], Meta(min_length=1)]


class Costs(Struct, frozen=True, dict=True):
    """Milliseconds of one call of every engine, measured at some row counts over some numbers of used cache
    slots. Linear in between; flat before the first figures, on a straight line behind the last."""

    rows: Axis
    contexts: Axis
    milliseconds: dict[str, tuple[tuple[Milliseconds, ...], ...]]  # engine -> [context][rows]
    overhead_ms: Overhead = 0.0  # of a round beside the calls: choice, text, bookkeeping

    def __post_init__(self) -> None:
        if any(low >= high for low, high in pairwise((0, *self.rows))):
            raise ValueError("rows must rise from 1 or more")
        if any(low >= high for low, high in pairwise((-1, *self.contexts))):
            raise ValueError("contexts must rise from 0 or more")
        if any(len(table) != len(self.contexts) for table in self.milliseconds.values()):
            raise ValueError("milliseconds must have one list for each entry of contexts")
        if any(len(row) != len(self.rows) for table in self.milliseconds.values() for row in table):
            raise ValueError("milliseconds must have one figure for each entry of rows")
        if any(
            (np.diff(table, axis=axis) < 0).any() for table in self.milliseconds.values() for axis in (0, 1)
        ):
            raise ValueError("milliseconds must not fall as rows or contexts rise")

    def of(self, engine: str, rows, context) -> np.ndarray:
        """Milliseconds of calls with `rows` rows behind `context` slots: numbers, or arrays of one shape."""
        table = self._tables[engine]
        slots, more_slots, beyond_slots = _place(context, self.contexts)
        few, many, beyond_few = _place(rows, self.rows)
        near, far = (
            (1 - beyond_few) * table[at, few] + beyond_few * table[at, many] for at in (slots, more_slots)
        )
        return near + beyond_slots * (far - near)

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        """[contexts, rows] by engine: every generation asks for them before its first token."""
        return {name: np.asarray(table) for name, table in self.milliseconds.items()}

    def spread(self, engine: str, num_rows: int, context: int) -> list[float]:
        """Of calls with 1 to num_rows rows, as the decode loop takes them."""
        return self.of(engine, np.arange(1, num_rows + 1), np.full(num_rows, context)).tolist()

    def of_reading(self, engine: str, num_tokens: int) -> float:
        """Milliseconds to read a prompt, as the decode loop does."""
        starts = np.arange(0, num_tokens, PREFILL_ROWS)
        return float(self.of(engine, np.minimum(num_tokens - starts, PREFILL_ROWS), starts).sum())


def _place(at, known: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Between which two of `known` (their indices), and how far from the first to the second."""
    points = np.asarray(known)
    low = np.clip(np.searchsorted(points, at) - 1, 0, max(0, len(points) - 2))
    high = np.minimum(low + 1, len(points) - 1)
    share = (at - points[low]) / np.maximum(points[high] - points[low], 1)
    return low, high, np.where(high > low, np.maximum(share, 0), 0)
