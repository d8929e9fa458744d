"""Sampled output follows the target's law exactly, through the whole decode loop and at any depth of ladder.

The first half enumerates: the native verdict is replaced by a branch over all its outcomes, whose
probabilities come from the papers' formulas, and the loop is run along every branch. The second half runs the
shipped code, with all its settings on, over many seeds.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from draftsmith.speculate import verdict
from draftsmith.speculate.decode import decode
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.level import EngineLevel, Proposal
from draftsmith.speculate.sequence import Sequence
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine


def list_verdicts(rule, p, q, draft):
    """All outcomes (probability, accepted, next token) of a rule for one draft: an oracle in plain numpy."""
    p, draft = np.asarray(p), list(draft)
    n = len(draft)
    if q is None:
        q = np.eye(p.shape[1])[draft]
    ratios = [p[i, x] / q[i, x] for i, x in enumerate(draft)]
    if rule == "token":
        reach = np.cumprod([1.0] + [min(1, r) for r in ratios])
        ends = [reach[i] - reach[i + 1] for i in range(n)] + [reach[n]]
        weights = [1.0] * n
    else:
        prefix = [1.0]
        for r in ratios:
            prefix.append(min(1.0, prefix[-1] * r))
        keep = [1.0]
        for i in range(1, n + 1):
            if i == n:
                keep.append(prefix[n])
            else:
                s = np.maximum(prefix[i] * p[i] - q[i], 0).sum()
                keep.append(1.0 if s + 1 - prefix[i] == 0 else s / (s + 1 - prefix[i]))
        ends = [keep[i] * math.prod(1 - h for h in keep[i + 1 :]) for i in range(n + 1)]
        weights = prefix[:n]
    for i, end in enumerate(ends):
        if end <= 0:
            continue
        after = p[n] if i == n else np.maximum(weights[i] * p[i] - q[i], 0)
        if after.sum() == 0:
            after = p[i]
        for token, mass in enumerate(after / after.sum()):
            if mass > 0:
                yield end * mass, i, token


class Branches:
    """Stands in for the native verdict and walks, run by run, through every sequence of outcomes."""

    def __init__(self):
        self.script = []

    def __iter__(self):
        while True:
            self.at, self.weight = 0, 1.0
            self.widths = []
            yield self
            self.script = self.script[: self.at]
            while self.script and self.script[-1] + 1 == self.widths[len(self.script) - 1]:
                self.script.pop()
            if not self.script:
                return
            self.script[-1] += 1

    def chain_of_laws(self, rule, p, q, draft, uniforms):
        outcomes = list(list_verdicts(rule, p, q, draft))
        if self.at == len(self.script):
            self.script.append(0)
        probability, accepted, token = outcomes[self.script[self.at]]
        self.widths.append(len(outcomes))
        self.at += 1
        self.weight *= probability
        return accepted, token


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - max(logits))
    return weights / weights.sum()


def enumerate_target(target, prompt, length, eos):
    """The exact law of the target's first `length` tokens."""
    law = {(): 1.0}
    for _ in range(length):
        grown = {}
        for tokens, mass in law.items():
            if tokens and tokens[-1] in eos:
                grown[tokens] = mass
                continue
            for token, p in enumerate(softmax(target.logits_after([*prompt, *tokens]))):
                grown[(*tokens, token)] = mass * p
        law = grown
    return law


def enumerate_loop(monkeypatch, engines, ladder, rule, prompt, length, eos, level_type=None):
    """The exact law of what the decode loop gives."""
    law = Counter()
    branches = Branches()
    monkeypatch.setattr(verdict.verify, "chain_of_laws", branches.chain_of_laws)
    for run in branches:
        tokens = Sequence.begin(prompt, len(prompt) + length, frozenset(eos))
        target = build_ladder(ladder, engines.__getitem__, Sampling(1.0, rule=rule), len(prompt) + length)
        if level_type and target.inner:
            target.inner.__class__ = level_type
        output = tuple(itertools.chain.from_iterable(decode(tokens, target, length)))
        law[output] += run.weight
    return law


def largest_error(law, expected):
    return max(abs(law.get(key, 0) - expected.get(key, 0)) for key in law.keys() | expected.keys())


def three_engines(vocab_size, seed):
    return {
        "target": FakeEngine(vocab_size, seed, scale=1),
        "int8": FakeEngine(vocab_size, seed, noise=0.6, own=1, scale=1),
        "tiny": FakeEngine(vocab_size, seed, noise=1.2, own=2, scale=1),
    }


LADDERS = [
    ([Rung("int8", 2)], 4),
    ([Rung("suffix", 2)], 5),
    ([Rung("suffix", 2), Rung("int8", 3)], 4),
    ([Rung("tiny", 2), Rung("int8", 2)], 4),
    ([Rung("suffix", 1), Rung("tiny", 1), Rung("int8", 2)], 4),
]


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    ("ladder", "length"), LADDERS, ids=lambda x: "-".join(r.name for r in x) if isinstance(x, list) else None
)
def test_the_law_of_the_whole_loop_is_exact(monkeypatch, rule, ladder, length):
    engines, prompt = three_engines(2, seed=5), [0, 1, 0, 1, 1, 0, 1]
    law = enumerate_loop(monkeypatch, engines, ladder, rule, prompt, length, eos=())
    assert math.isclose(sum(law.values()), 1, abs_tol=1e-12)
    assert largest_error(law, enumerate_target(engines["target"], prompt, length, ())) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
def test_an_end_of_text_inside_a_draft_keeps_the_law(monkeypatch, rule):
    engines, prompt = three_engines(3, seed=2), [0, 1, 0]
    ladder = [Rung("tiny", 1), Rung("int8", 2)]
    law = enumerate_loop(monkeypatch, engines, ladder, rule, prompt, 4, eos=(2,))
    assert largest_error(law, enumerate_target(engines["target"], prompt, 4, (2,))) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_draft_is_accepted_as_often_as_its_law_allows(monkeypatch, rule):
    # Judged as if it had not been sampled, a draft keeps the law too, but Σ pq are accepted, not Σ min(p, q).
    engines, prompt = three_engines(3, seed=5), [0, 1, 2]
    branches = Branches()
    monkeypatch.setattr(verdict.verify, "chain_of_laws", branches.chain_of_laws)
    accepted = 0.0
    for run in branches:
        tokens = Sequence.begin(prompt, len(prompt) + 3)
        target = build_ladder([Rung("int8", 1)], engines.__getitem__, Sampling(1.0, rule=rule), 6)
        list(itertools.islice(decode(tokens, target, 3), 2))
        accepted += run.weight * target.drafts.accepted
    wanted = 0.0
    for first, mass in enumerate(softmax(engines["target"].logits_after(prompt))):
        p, q = (softmax(engines[name].logits_after([*prompt, first])) for name in ("target", "int8"))
        wanted += mass * np.minimum(p, q).sum()
    assert accepted == pytest.approx(wanted, abs=1e-12)


class EndsWithARound(EngineLevel):
    """Proposes what one inner round gave, however many tokens those are."""

    def propose(self, sequence, length, count):
        have = self.advance(sequence, length, count)
        return Proposal(sequence.ids[length : length + have], self.judge.laws[:have])


class DropsTheCorrection(EngineLevel):
    """The tempting mistake: propose only what was accepted of the inner draft."""

    def propose(self, sequence, length, count):
        have = self.advance(sequence, length, count) - 1
        return Proposal(sequence.ids[length : length + have], self.judge.laws[:have])


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_proposal_may_end_with_a_round_but_not_without_its_correction(monkeypatch, rule):
    # Given that a round of a lossless rule goes on behind token i, token i+1 still follows the law: that is
    # what is left of Π p without the rounds that end at i, which draw i+1 afresh. Not so where i+1 itself
    # decides the end.
    engines, prompt = three_engines(2, seed=5), [0, 1, 0, 1, 1, 0, 1]
    ladder = [Rung("tiny", 2), Rung("int8", 3)]
    expected = enumerate_target(engines["target"], prompt, 5, ())
    law = enumerate_loop(monkeypatch, engines, ladder, rule, prompt, 5, (), EndsWithARound)
    assert largest_error(law, expected) < 1e-12
    law = enumerate_loop(monkeypatch, engines, ladder, rule, prompt, 5, (), DropsTheCorrection)
    assert largest_error(law, expected) > 1e-3


def g_statistic(counts, law, total):
    """Wilks' G against an exact law, and a bound that a sound sample stays under but for one time in 10^6."""
    keys = [key for key, p in law.items() if p * total >= 5]
    rest = 1 - sum(law[key] for key in keys)
    cells = [(counts[key], law[key]) for key in keys]
    if rest * total >= 1:
        cells.append((total - sum(counts[key] for key in keys), rest))
    g = 2 * sum(n * math.log(n / (total * p)) for n, p in cells if n)
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile; 4.75 is the normal one of 1 - 10^-6.
    return g, freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


def process(logits, temperature, top_k, top_p):
    """transformers' warpers for one row without ties, in plain numpy."""
    scores = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scores)
    if top_k:
        scores[order[top_k:]] = -np.inf
    law = softmax(scores)
    before = np.cumsum(law[order]) - law[order]
    law[order[before >= top_p]] = 0
    return law / law.sum()


SETTINGS = [(1.0, 0, 1.0), (0.8, 4, 0.9)]


@pytest.mark.parametrize("rule", ["token", "block", "exact"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_shipped_loop_samples_the_processed_law(rule, settings):
    temperature, top_k, top_p = settings
    vocab_size, length, total, prompt = 5, 4, 1500, [0, 1, 2, 0, 1]
    engines = three_engines(vocab_size, seed=11)
    ladder = [Rung("suffix", 2), Rung("tiny", 2), Rung("int8", 3)]
    counts = Counter()
    for seed in range(total):
        tokens = Sequence.begin(prompt, len(prompt) + length)
        sampling = Sampling(temperature, top_k, top_p, seed, rule)
        target = build_ladder(ladder, engines.__getitem__, sampling, len(prompt) + length)
        counts[tuple(itertools.chain.from_iterable(decode(tokens, target, length)))] += 1
    law = {(): 1.0}
    for _ in range(length):
        law = {
            (*tokens, token): mass * p
            for tokens, mass in law.items()
            for token, p in enumerate(
                process(engines["target"].logits_after([*prompt, *tokens]), temperature, top_k, top_p)
            )
            if p > 0
        }
    assert counts.keys() <= law.keys(), "a token outside the processed law was emitted"
    g, bound = g_statistic(counts, law, total)
    assert g < bound


def test_the_drafter_is_far_enough_from_the_target_to_matter():
    """Were the drafter's own law emitted, the test above would see it."""
    engines, prompt, total = three_engines(5, seed=11), [0, 1, 2, 0, 1], 1500
    wrong, right = (process(engines[n].logits_after(prompt), 1.0, 0, 1.0) for n in ("int8", "target"))
    counts = Counter({(i,): round(total * p) for i, p in enumerate(wrong)})
    g, bound = g_statistic(counts, {(i,): p for i, p in enumerate(right)}, total)
    assert g > 2 * bound
