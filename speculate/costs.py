"""What a call of an engine costs, by its rows and by what is in the cache: measured on one machine."""

from functools import cached_property
from itertools import pairwise
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .loop import PREFILL_ROWS

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Costs(BaseModel):
    """Milliseconds of one call of every engine, measured at some row counts over some numbers of used cache
    slots. Linear in between; flat before the first context, on a straight line behind the last."""

    model_config = ConfigDict(frozen=True, extra="allow")

    rows: tuple[int, ...] = Field(min_length=1)
    contexts: tuple[int, ...] = Field(min_length=1)
    milliseconds: dict[str, tuple[tuple[Milliseconds, ...], ...]]  # engine -> [context][rows]
    overhead_ms: float = 0.0  # of a round beside the calls: choice, text, bookkeeping

    @model_validator(mode="after")
    def _check_table(self) -> Self:
        if any(low >= high for low, high in pairwise((0, *self.rows))):
            raise ValueError("rows must rise from 1 or more")
        if any(low >= high for low, high in pairwise((-1, *self.contexts))):
            raise ValueError("contexts must rise from 0 or more")
        if any(len(table) != len(self.contexts) for table in self.milliseconds.values()):
            raise ValueError("milliseconds must have one list for each entry of contexts")
        if any(len(row) != len(self.rows) for table in self.milliseconds.values() for row in table):
            raise ValueError("milliseconds must have one figure for each entry of rows")
        return self

    def of(self, engine: str, rows, context) -> np.ndarray:
        """Milliseconds of calls with `rows` rows behind `context` slots: numbers, or arrays of one shape."""
        at = np.stack([np.interp(rows, self.rows, row) for row in self.milliseconds[engine]])
        if len(self.contexts) == 1:
            return at[0]
        known = self._known
        low = np.clip(np.searchsorted(known, context) - 1, 0, len(known) - 2)
        share = np.maximum((context - known[low]) / (known[low + 1] - known[low]), 0)
        below, above = (np.take_along_axis(at, index[None], 0)[0] for index in (low, low + 1))
        return below + share * (above - below)

    def spread(self, num_rows: int, context: int) -> dict[str, list[float]]:
        """By engine, of calls with 1 to num_rows rows, as the decode loop takes them."""
        rows = np.arange(1, num_rows + 1)
        slots = np.full(num_rows, context)
        return {name: self.of(name, rows, slots).tolist() for name in self.milliseconds}

    def of_reading(self, engine: str, num_tokens: int) -> float:
        """Milliseconds to read a prompt, as the decode loop does."""
        starts = np.arange(0, num_tokens, PREFILL_ROWS)
        return float(self.of(engine, np.minimum(num_tokens - starts, PREFILL_ROWS), starts).sum())

    @cached_property
    def _known(self) -> np.ndarray:
        return np.asarray(self.contexts)
