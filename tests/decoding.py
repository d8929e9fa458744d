"""Runs the shipped loop over engines, from a prompt to the end."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from draftsmith.speculate.binding import ffi
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.loop import Decoder
from draftsmith.speculate.settings import Sampling

GREEDY = Sampling()


@dataclass
class Decoding:
    blocks: list[list[int]]  # the tokens of each round
    decoder: Decoder

    @property
    def tokens(self) -> list[int]:
        return [token for block in self.blocks for token in block]

    @property
    def target(self) -> Any:
        """The target's counters."""
        return self.decoder.counters(len(self.decoder.levels) - 1)

    @property
    def drafter(self) -> Any:
        """Those of the level that drafts for the target."""
        return self.decoder.counters(len(self.decoder.levels) - 2)


def decode(
    engines,
    rungs: list[Rung],
    prompt,
    count: int,
    sampling: Sampling = GREEDY,
    eos=(),
    costs=None,
    verify=ffi.NULL,
) -> Decoding:
    decoder = build_ladder(rungs, engines.__getitem__, costs)
    decoder.begin(list(prompt), count, sampling, eos, verify)
    return Decoding(list(iter(decoder.step, [])), decoder)


def random_costs(rng: np.random.Generator, names, rows: int = 65) -> dict[str, list[float]]:
    """Tables that rise in uneven stairs, some drafters cheap and some dearer than the target."""
    return {
        name: (rng.choice([0.02, 0.2, 0.6, 1.5]) + np.cumsum(rng.choice([0, 0.01, 0.3], rows))).tolist()
        for name in names
    }
