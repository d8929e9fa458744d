"""Token Recycling keeps after each token the likeliest of the latest logits seen there and drafts by them."""

import numpy as np
import pytest
from draftsmith.speculate.binding import check, ffi, lib
from draftsmith.speculate.drafters import Drafter, Sources
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine
from peaks import find_peaks

WIDTH = lib.DS_RECYCLING_WIDTH


def make(vocab: int) -> Drafter:
    drafter = Sources().open("recycling", vocab)
    drafter.begin(100)
    return drafter


def candidates(drafter: Drafter, token: int) -> list[int]:
    out = ffi.new("int32_t[]", WIDTH)
    return list(out[0 : check(lib.ds_recycling_candidates(drafter.handle, token, out))])


@pytest.mark.parametrize("has_peaks", [False, True])
@pytest.mark.parametrize("padding", [0, 50, -40])
@pytest.mark.parametrize("vocab", [1, 3, 8, 64, 65, 200, 1000])
def test_candidates_are_the_largest_of_the_latest_logits(vocab, padding, has_peaks):
    """Of equals the first; whatever NaN and infinities are about, whether or not peaks show the way, and
    where the level above has more logits than the drafter has tokens, or fewer."""
    width = max(1, vocab + padding)
    rng, drafter, latest = np.random.default_rng(vocab), make(vocab), {}
    for trial in range(60):
        tokens = rng.integers(vocab, size=int(rng.integers(1, 6))).tolist()
        logits = (
            rng.normal(size=(len(tokens), width)) if trial % 2 else rng.integers(-2, 3, (len(tokens), width))
        )
        logits = logits.astype(np.float32)
        if trial % 5 == 0:
            logits[rng.random(logits.shape) < 0.2] = np.nan
            logits[rng.random(logits.shape) < 0.2] = -np.inf
        drafter.observe(tokens, logits, peaks=find_peaks(logits) if has_peaks else None)
        for token, row in zip(tokens, logits, strict=True):
            order = np.argsort(-np.nan_to_num(row[:vocab], nan=-np.inf), kind="stable")
            latest[token] = [int(x) for x in order[:WIDTH] if row[x] > -np.inf]
    for token in range(vocab):
        assert candidates(drafter, token) == latest.get(token, [])


def test_what_stands_comes_first_and_falls_back_one_by_one():
    drafter = make(20)
    drafter.append([1, 2, 1, 3])
    assert candidates(drafter, 1) == [3, 2]
    drafter.append([1])
    drafter.append([2])
    assert candidates(drafter, 1) == [2, 3] and candidates(drafter, 3) == [1]
    for token in range(5, 5 + WIDTH):
        drafter.append([1, token])
    assert candidates(drafter, 1) == list(range(5 + WIDTH - 1, 4, -1))


def test_a_draft_follows_the_first_candidates_from_the_last_token():
    drafter = make(10)
    assert drafter.draft([], 5)[0] == []
    drafter.append([1, 2, 3, 1])
    assert drafter.draft([], 5)[0] == [2, 3, 1, 2, 3]
    assert drafter.draft([7, 2], 2)[0] == [3, 1]
    assert drafter.draft([7], 5)[0] == []
    logits = np.zeros((1, 10), np.float32)
    logits[0, 9] = 1
    drafter.observe([3], logits)
    assert drafter.draft([], 5)[0] == [2, 3, 9]
    drafter.begin(5)
    assert drafter.draft([1], 5)[0] == []


def test_rejected_drafts_are_learnt_from_too():
    """A target that knows the last token only: whatever was once drafted after is known for good."""
    engine = FakeEngine(30, 4)
    table = {i: engine.logits_after([i]) for i in range(30)}
    engine.logits_after = lambda tokens: table[int(tokens[-1])]
    decoder = build_ladder([Rung("recycling", 6)], {"target": engine}.__getitem__)
    decoder.begin([0], 60, Sampling())
    tokens = [token for block in iter(decoder.step, []) for token in block]
    drafts = decoder.counters(0)
    period = len(set(tokens))
    assert drafts.accepted > 0 and decoder.counters(1).rounds <= period + 60 / 7 + 2
