"""The suffix drafter continues the longest, most recent match, as a search through the whole text does."""

import time
from itertools import pairwise

import numpy as np
import pytest
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.suffix import SuffixDrafter

CAP = 64  # DS_SUFFIX_MAX_MATCH


def search(text: list[int], shortest: int, longest: int, max_draft: int) -> tuple[list[int], int]:
    """The definition: (draft, match length), by trying every length and every place."""
    n = len(text)
    for length in range(min(longest, n - 1), shortest - 1, -1):
        for end in range(n - 1, length - 1, -1):
            if text[end - length : end] == text[n - length :]:
                drafted = list(text)
                for i in range(max_draft):
                    drafted.append(drafted[end + i])
                return drafted[n:], length
    return [], 0


def check_draft(drafter: SuffixDrafter, committed: list[int], tail: list[int], max_draft: int) -> None:
    expected = search(committed + tail, drafter.prompt_lookup_min, drafter.prompt_lookup_max, max_draft)
    assert (drafter.draft(tail, max_draft), drafter.match_length) == expected


@pytest.mark.parametrize("alphabet", [1, 2, 3, 5])
def test_drafts_equal_a_search_on_thousands_of_random_texts(alphabet):
    """Tokens come one by one, by bunches and as tails that are never committed."""
    rng = np.random.default_rng(alphabet)
    for _ in range(700):
        shortest = int(rng.integers(1, 4))
        drafter = SuffixDrafter(shortest, int(rng.integers(shortest, shortest + 8)))
        committed: list[int] = []
        for _ in range(int(rng.integers(1, 12))):
            bunch = rng.integers(0, alphabet, int(rng.choice([0, 1, 1, 2, 5]))).tolist()
            drafter.append(bunch)
            committed += bunch
            tail = rng.integers(0, alphabet + 1, int(rng.choice([0, 0, 1, 3, 8]))).tolist()
            check_draft(drafter, committed, tail, int(rng.integers(0, 9)))
        assert len(drafter) == len(committed)


def repetitive_text(rng: np.random.Generator, length: int) -> list[int]:
    """Copies of earlier stretches with few changes, so that matches are long."""
    text = rng.integers(0, 4, 8).tolist()
    while len(text) < length:
        start = int(rng.integers(len(text)))
        text += text[start : start + int(rng.integers(1, 150))]
        if rng.random() < 0.5:
            text.append(int(rng.integers(0, 4)))
    return text[:length]


@pytest.mark.parametrize("longest", [1, 5, CAP - 1, CAP])
def test_matches_longer_than_the_cap_still_find_the_most_recent_place(longest):
    rng = np.random.default_rng(longest)
    for trial in range(30):
        text = (
            repetitive_text(rng, 400) if trial % 2 else (rng.integers(0, 3, trial + 1).tolist() * 400)[:400]
        )
        drafter = SuffixDrafter(1, longest)
        for start, stop in pairwise([0, *np.sort(rng.integers(0, 400, 12)).tolist(), 400]):
            drafter.append(text[start:stop])
            check_draft(drafter, text[:stop], [], 10)
            check_draft(drafter, text[:stop], text[stop : stop + 80], 10)
            start = int(rng.integers(400))
            check_draft(drafter, text[:stop], text[start : start + 80], 10)


def test_a_match_survives_many_growths_of_the_index():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50_000, 9000).tolist()
    drafter = SuffixDrafter()
    for start in range(0, 9000, 250):
        drafter.append(text[start : start + 250])
        source = int(rng.integers(start + 225))
        assert drafter.draft(text[source : source + 20], 5) == text[source + 20 : source + 25]
        assert drafter.match_length == 20


@pytest.mark.parametrize(
    "text, tail, settings, max_draft, expected",
    [
        ([], [], (1, 8), 4, []),  # nothing yet
        ([7], [], (1, 8), 4, []),  # nothing before
        ([7], [7], (1, 8), 3, [7, 7, 7]),  # a match that ends where the tail begins
        ([], [1, 2, 1], (1, 8), 4, [2, 1, 2, 1]),  # all in the tail, past its end
        ([1, 2, 3], [], (1, 8), 4, []),  # no token twice
        ([5, 1, 2, 9, 1, 2], [], (2, 8), 2, [9, 1]),
        ([5, 1, 2, 9, 1, 2], [], (3, 8), 2, []),  # a match shorter than the minimum
        ([1, 2, 3, 1, 2, 4, 1, 2], [], (1, 8), 1, [4]),  # the most recent of two
        ([0, 1, 2, 3, 9, 1, 2, 4, 0, 1, 2], [], (1, 8), 1, [3]),  # the longer before the more recent
        ([0, 1, 2, 3, 9, 1, 2, 4, 0, 1, 2], [], (1, 2), 1, [4]),  # unless it may not be longer
        ([1, 2, 3, 1, 2, 3, 1], [], (1, 8), 7, [2, 3, 1, 2, 3, 1, 2]),  # periodic text goes on
        ([4, 4, 4], [], (1, 8), 5, [4, 4, 4, 4, 4]),  # overlapping itself
        ([1, 2, 3, 4], [1], (1, 8), 0, []),  # a match, but nothing is wanted
        ([2**31 - 1, 0, 2**31 - 1], [], (1, 8), 1, [0]),  # the largest id
    ],
)
def test_small_cases(text, tail, settings, max_draft, expected):
    drafter = SuffixDrafter(*settings)
    drafter.append(text)
    assert drafter.draft(tail, max_draft) == expected
    assert search(text + tail, *settings, max_draft)[0] == expected


def test_a_tail_leaves_nothing_behind():
    drafter = SuffixDrafter(1, 8)
    drafter.append([1, 2, 3])
    assert drafter.draft([9, 8, 9], 1) == [8]
    assert drafter.draft([9], 1) == []
    assert len(drafter) == 3


def test_reset_forgets():
    drafter = SuffixDrafter(1, 8)
    drafter.append([1, 2, 1])
    assert drafter.draft([], 1) == [2] and drafter.match_length == 1
    drafter.reset()
    assert len(drafter) == 0 and drafter.match_length == 0
    drafter.append([1])
    assert drafter.draft([], 1) == []


@pytest.mark.parametrize("period", [1, 2, 7, 100])
def test_appending_costs_the_same_however_repetitive_and_long_the_text(period):
    """A walk over the whole chain of suffixes for each token would take minutes here."""
    text = np.tile(np.arange(period, dtype=np.int32), 200_000 // period + 1)[:200_000]
    start = time.perf_counter()
    drafter = SuffixDrafter()
    drafter.append(text)
    assert drafter.draft([], 3) == [int((200_000 + i) % period) for i in range(3)]
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda d: SuffixDrafter(0, 4), "prompt_lookup_min 0"),
        (lambda d: SuffixDrafter(5, 4), "prompt_lookup_max 4"),
        (lambda d: SuffixDrafter(1, CAP + 1), "<= 64"),
        (lambda d: d.append([1, -1]), "token 1 is -1"),
        (lambda d: d.append([2**31]), "beyond any vocabulary"),
        (lambda d: d.append([-(2**40)]), "not a token id"),
        (lambda d: d.append([0.5]), "flat list of token ids"),
        (lambda d: d.append([[1, 2]]), "flat list of token ids"),
        (lambda d: d.append([True]), "flat list of token ids"),
        (lambda d: d.draft([-1], 2), "token 0 is -1"),
        (lambda d: d.draft([], -1), "max_draft is -1"),
    ],
)
def test_what_is_wrong_with_an_input_is_said(act, message):
    drafter = SuffixDrafter()
    drafter.append([1, 2])
    with pytest.raises(BundleError, match=message):
        act(drafter)
    assert len(drafter) == 2
