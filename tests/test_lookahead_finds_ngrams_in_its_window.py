"""Lookahead decoding: a window of guesses that the target reads in the tree, and n-grams found in it."""

from itertools import pairwise

import numpy as np
import pytest
from draftsmith.speculate.drafters import Sources
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine

GOLDEN = (5**0.5 - 1) / 2


def paths_of(tokens, parents):
    paths = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


class Lookahead:
    """The definition, over lists and dictionaries: a pool without bounds, columns of guesses."""

    def __init__(self, prompt, num_levels, num_columns):
        self.text, self.num_levels, self.pool = list(prompt), num_levels, {}
        self.window = [[prompt[int((i + 1) * GOLDEN % 1 * len(prompt))]] for i in range(num_columns)]
        for end in range(5, len(prompt) + 1):
            self.put(prompt[end - 5 : end])

    def put(self, gram):
        known = self.pool.setdefault(gram[0], [])
        if tuple(gram[1:]) in known:
            known.remove(tuple(gram[1:]))
        known.insert(0, tuple(gram[1:]))

    def append(self, tokens):
        for token in tokens:
            self.text.append(token)
            self.put(self.text[-5:])

    def columns(self):
        """Of each, the path of its last guess."""
        firsts = [column[0] for column in self.window]
        return [(*firsts[: i + 1], *column[1:]) for i, column in enumerate(self.window)]

    def grams(self):
        return [gram[: self.num_levels] for gram in self.pool.get(self.text[-1], [])]

    def step(self, said):
        for column, token in zip(self.window, said, strict=True):
            if len(column) == self.num_levels:
                self.put([*column, token])
                del column[0]
            column.append(token)


@pytest.mark.parametrize("nodes, levels, columns", [(64, 4, 8), (31, 3, 5), (15, 3, 2), (8, 2, 2), (2, 2, 1)])
def test_the_window_makes_its_jacobi_steps_and_its_columns_become_ngrams(nodes, levels, columns):
    engine = FakeEngine(300, 2)
    rng, drafter = np.random.default_rng(nodes), Sources().open("lookahead-tree", 300)
    for _ in range(2):  # a second generation begins anew
        prompt = rng.integers(300, size=40).tolist()
        drafter.begin(200)
        drafter.append(prompt)
        truth, grams = Lookahead(prompt, levels, columns), 0
        for _ in range(15):
            tokens, parents, chances = drafter.draft_tree([], nodes, nodes)
            paths = paths_of(tokens, parents)
            assert len(set(paths)) == len(paths) <= nodes and all(0 < chance < 1 for chance in chances)
            window = {path[:n] for path in truth.columns() for n in range(1, len(path) + 1)}
            assert window <= set(paths)
            offered = {gram[:n] for gram in truth.grams() for n in range(1, len(gram) + 1)}
            assert set(paths) - window <= offered
            assert len(paths) > nodes - levels or offered <= set(paths)
            grams += len(offered - window)
            rows = [truth.text, *([*truth.text, *path] for path in paths)]
            logits = np.stack([engine.logits_after(row) for row in rows])
            drafter.observe([truth.text[-1], *tokens], logits, parents)
            truth.step([int(engine.logits_after([*truth.text, *path]).argmax()) for path in truth.columns()])
            next_token = int(rng.choice([column[0] for column in truth.window]))  # of which there are n-grams
            drafter.append([next_token])
            truth.append([next_token])
        assert grams > 5 or nodes == 2


def test_a_column_that_was_not_read_waits():
    """A tree cut short, or one in which others have the first rows: guesses are found by their path."""
    drafter = Sources().open("lookahead-tree", 20)

    def propose():
        return set(paths_of(*drafter.draft_tree([], 31, 31)[:2]))

    def say(tokens, parents, said):
        logits = np.zeros((len(tokens), 20), np.float32)
        logits[np.arange(len(tokens)), said] = 1
        drafter.observe(tokens, logits, parents)

    drafter.begin(50)
    drafter.append([1, 2, 3, 4, 5, 6, 7])
    first = propose()
    chain = [path[-1] for path in sorted(first, key=len)]
    say([7], [], [9])
    assert propose() == first
    say([7, 18, chain[0]], [-1, -1], [9, 9, 11])
    assert propose() == first | {(chain[0], 11)}


def test_rows_beyond_a_narrower_vocabulary_or_without_numbers_are_no_guesses():
    drafter = Sources().open("lookahead-tree", 5)
    drafter.begin(50)
    drafter.append([1, 2, 3, 4])
    tokens, parents, _ = drafter.draft_tree([], 8, 8)
    logits = np.zeros((len(tokens) + 1, 9), np.float32)
    logits[:, 8] = 1
    logits[1] = np.nan
    drafter.observe([4, *tokens], logits, parents)
    assert max(drafter.draft_tree([], 8, 8)[0]) < 5


def test_a_window_finds_what_the_text_has_not_said_yet():
    """A target that knows the last token only: what it says anywhere in the window, it says in the text."""
    order = np.random.default_rng(3).permutation(200).tolist()
    after = dict(pairwise([*order, order[0]]))
    engine = FakeEngine(200)
    engine.logits_after = lambda tokens: np.eye(200, dtype=np.float32)[after[int(tokens[-1])]]
    prompt = [order[45], order[30], order[15], order[0]]  # places that the text will come to
    rounds = {}
    for name in ("lookahead", "lookahead-tree"):
        decoder = build_ladder([Rung(name, 31)], {"target": engine}.__getitem__)
        decoder.begin(prompt, 60, Sampling())
        tokens = [token for block in iter(decoder.step, []) for token in block]
        assert len(set(tokens)) == 60, "a text that repeats itself has n-grams of its own"
        rounds[name] = decoder.counters(1).rounds
    assert rounds["lookahead"] == 60 > 1.5 * rounds["lookahead-tree"]
