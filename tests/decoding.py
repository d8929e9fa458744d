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


def draw_ids(engine, count, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, engine.vocab_size, count).astype(np.int32)


def check_no_trace(engines, ladders, num_draft: int, temperature: float) -> None:
    """Each ladder decodes the tokens of the target alone, and what the target says behind them is the same,
    to the bit. Of the drafts some are accepted, not all."""
    target, prompt = engines["target"], list(range(3, 30))
    sampling = Sampling(temperature, seed=3, rule="exact")
    plain = decode(engines, [], prompt, 60, sampling)
    after = draw_ids(target, 4)
    wanted = target.forward(after, len(prompt) + 50).copy()
    accepted = drafted = 0
    for ladder in ladders:
        out = decode(engines, [Rung(name, num_draft) for name in ladder], prompt, 60, sampling)
        assert out.tokens == plain.tokens, ladder
        assert np.array_equal(target.forward(after, len(prompt) + 50), wanted), ladder
        drafted, accepted = drafted + out.drafter.drafted, accepted + out.drafter.accepted
    assert 0 < accepted < drafted


def check_read_along(target, drafter) -> None:
    """A drafter in the target's cache reads a text as if it drafted from each place of it."""
    ids = draw_ids(target, 60)
    drafter.reserve(64)
    target.forward(ids, 0)
    single = []
    for start in range(len(ids)):
        single.append(drafter.forward(ids[start : start + 1], start)[0].copy())
        target.forward(ids[start : start + 1], start)
    assert np.array_equal(drafter.read_along(ids), np.stack(single))
    drafter.max_seq_len = len(ids)  # no room behind
    assert np.array_equal(drafter.read_along(ids), np.stack(single))


def random_costs(rng: np.random.Generator, names, rows: int = 65) -> dict[str, list[float]]:
    """Tables that rise in uneven stairs, some drafters cheap and some dearer than the target."""
    return {
        name: (rng.choice([0.02, 0.2, 0.6, 1.5]) + np.cumsum(rng.choice([0, 0.01, 0.3], rows))).tolist()
        for name in names
    }
