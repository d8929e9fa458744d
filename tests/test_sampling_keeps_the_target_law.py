"""Sampled output follows the target's law exactly, through the whole decode loop and at any depth of ladder.

The first half enumerates: the rule is replaced by a branch over all its outcomes, whose probabilities come
from the papers' formulas, and the shipped loop is run along every branch. The second half runs it with all
its settings on, over many seeds.
"""

import math
from collections import Counter

import numpy as np
import pytest
from decoding import decode
from draftsmith.speculate.binding import ffi
from draftsmith.speculate.ladder import Rung
from draftsmith.speculate.settings import Sampling
from draftsmith.speculate.verify import RULES, TREE_RULES
from fake_engine import FakeEngine, FakeGuest, FakeLearner

# The loop asks the rules for trees, which on a chain are those for chains.
RULE_NAMES = {TREE_RULES["rrs"]: "token", TREE_RULES["traversal"]: "block", RULES["exact"]: "exact"}


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
    """Stands in for the rules and walks, run by run, through every sequence of outcomes."""

    def __init__(self, list_outcomes=list_verdicts):
        self.script = []
        self.known = {}  # outcomes, by proposal: the same come in many runs
        self.list_outcomes = list_outcomes
        self.verify = ffi.callback("ds_verify_function", self._verify, error=-1)

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

    def _verify(self, rule, n, vocab, p, q, tokens, parents, uniforms, path, num_accepted, next_token):
        q = None if q == ffi.NULL else read_laws(q, n, vocab)
        p = read_laws(p, n + 1, vocab)
        tokens, parents = list(tokens[0:n]), list(parents[0:n])
        proposal = rule, p.tobytes(), None if q is None else q.tobytes(), *tokens, *parents
        if proposal not in self.known:
            self.known[proposal] = list(self.list_verdicts(rule, p, q, tokens, parents))
        outcomes = self.known[proposal]
        if self.at == len(self.script):
            self.script.append(0)
        probability, accepted, next_token[0] = outcomes[self.script[self.at]]
        num_accepted[0], path[0 : len(accepted)] = len(accepted), accepted
        self.widths.append(len(outcomes))
        self.at += 1
        self.weight *= probability
        return 0

    def list_verdicts(self, rule, p, q, tokens, parents):
        """All outcomes (probability, accepted nodes, next token) for one proposal: here, a chain."""
        assert parents == list(range(-1, len(tokens) - 1))
        for probability, count, token in self.list_outcomes(RULE_NAMES[rule], p, q, tokens):
            yield probability, list(range(count)), token


def read_laws(pointer, rows, vocab):
    return np.frombuffer(ffi.buffer(pointer, 8 * rows * vocab)).reshape(rows, vocab).copy()


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - max(logits))
    return weights / weights.sum()


def enumerate_law(law_after, prompt, length, eos):
    """The exact law of the first `length` tokens, where law_after gives that of the one after some tokens."""
    law = {(): 1.0}
    for _ in range(length):
        grown = {}
        for tokens, mass in law.items():
            if tokens and tokens[-1] in eos:
                grown[tokens] = mass
                continue
            for token, p in enumerate(law_after([*prompt, *tokens])):
                grown[(*tokens, token)] = mass * p
        law = grown
    return law


def enumerate_target(target, prompt, length, eos):
    return enumerate_law(lambda tokens: softmax(target.logits_after(tokens)), prompt, length, eos)


def enumerate_loop(engines, ladder, rule, prompt, length, eos=(), costs=None, list_outcomes=list_verdicts):
    """The exact law of what the decode loop gives, and the lengths of draft that the target verified."""
    law, lengths = Counter(), Counter()
    branches = Branches(list_outcomes)
    for run in branches:
        sampling = Sampling(1.0, rule=rule)
        out = decode(engines, ladder, prompt, length, sampling, eos, costs, run.verify)
        law[tuple(out.tokens)] += run.weight
        reached = [out.drafter.asked, *out.drafter.drafted_at]
        for drafted, rounds in enumerate(-np.diff(reached)):
            lengths[drafted] += int(rounds)
    return law, +lengths


def largest_error(law, expected):
    return max(abs(law.get(key, 0) - expected.get(key, 0)) for key in law.keys() | expected.keys())


def three_engines(vocab_size, seed):
    target = FakeEngine(vocab_size, seed, scale=1)
    return {
        "target": target,
        "skip": FakeGuest(target, seed=seed, noise=0.9, own=3, scale=1),
        "learner": FakeLearner(target, seed=seed, noise=0.9, scale=1),
        "int8": FakeEngine(vocab_size, seed, noise=0.6, own=1, scale=1),
        "tiny": FakeEngine(vocab_size, seed, noise=1.2, own=2, scale=1),
    }


LADDERS = [
    ([Rung("int8", 2)], 4),
    ([Rung("suffix", 2)], 5),
    ([Rung("history", 2)], 5),
    ([Rung("suffix+history+recycling", 2)], 5),
    ([Rung("lookahead", 2)], 5),
    ([Rung("suffix", 2), Rung("int8", 3)], 4),
    ([Rung("tiny", 2), Rung("int8", 2)], 4),
    ([Rung("suffix", 1), Rung("tiny", 1), Rung("int8", 2)], 4),
    ([Rung("skip", 2)], 4),
    ([Rung("suffix-tree", 3), Rung("skip", 2)], 4),
    ([Rung("skip", 1), Rung("int8", 2)], 4),
    ([Rung("learner", 2)], 5),
    ([Rung("suffix-tree", 3), Rung("learner", 2)], 4),
    ([Rung("learner", 1), Rung("skip", 2)], 4),
]


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    ("ladder", "length"), LADDERS, ids=lambda x: "-".join(r.name for r in x) if isinstance(x, list) else None
)
def test_the_law_of_the_whole_loop_is_exact(rule, ladder, length):
    engines, prompt = three_engines(2, seed=5), [0, 1, 0, 1, 1, 0, 1]
    law, _ = enumerate_loop(engines, ladder, rule, prompt, length)
    assert math.isclose(sum(law.values()), 1, abs_tol=1e-12)
    assert largest_error(law, enumerate_target(engines["target"], prompt, length, ())) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
def test_an_end_of_text_inside_a_draft_keeps_the_law(rule):
    engines, prompt = three_engines(3, seed=2), [0, 1, 0]
    ladder = [Rung("tiny", 1), Rung("int8", 2)]
    law, _ = enumerate_loop(engines, ladder, rule, prompt, 4, eos=(2,))
    assert largest_error(law, enumerate_target(engines["target"], prompt, 4, (2,))) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_draft_is_accepted_as_often_as_its_law_allows(rule):
    # Judged as if it had not been sampled, a draft keeps the law too, but Σ pq are accepted, not Σ min(p, q).
    engines, prompt = three_engines(3, seed=5), [0, 1, 2]
    accepted = 0.0
    for run in Branches():
        # Three tokens: the prefill gives one, a draft is accepted or not, and there is no room for another.
        out = decode(engines, [Rung("int8", 1)], prompt, 3, Sampling(1.0, rule=rule), verify=run.verify)
        accepted += run.weight * out.drafter.accepted
    wanted = 0.0
    for first, mass in enumerate(softmax(engines["target"].logits_after(prompt))):
        p, q = (softmax(engines[name].logits_after([*prompt, first])) for name in ("target", "int8"))
        wanted += mass * np.minimum(p, q).sum()
    assert accepted == pytest.approx(wanted, abs=1e-12)


# Where drafts end by cost: a verifier whose rows are dear enough for some drafts and not for others.
PRICES = {
    "target": [1.0, 1.2, 1.3, 1.4, 1.5],
    "int8": [0.25, 0.28, 0.31, 0.34, 0.37],
    "tiny": [0.03, 0.04, 0.05, 0.06, 0.07],
    "learner": [0.2, 0.23, 0.26, 0.29, 0.32],
}
# The third row is dear and the fourth free: who might drop sampled tokens would keep three or one, by the law
# that the second leads to.
STAIRS = {"target": [1.0, 1.1, 1.6, 1.6], "int8": [0.05] * 4, "tiny": [0.01] * 4}
PRICED_LADDERS = [
    ([Rung("int8", 3)], 6, PRICES),
    ([Rung("int8", 3)], 5, STAIRS),
    ([Rung("suffix", 4)], 7, PRICES),
    ([Rung("suffix", 3), Rung("int8", 3)], 6, PRICES),
    ([Rung("tiny", 2), Rung("int8", 3)], 5, PRICES),
    ([Rung("tiny", 1), Rung("int8", 3)], 5, STAIRS),
    ([Rung("learner", 3)], 6, PRICES),
]


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(("ladder", "length", "costs"), PRICED_LADDERS)
def test_drafts_that_end_where_they_stop_to_pay_keep_the_law(rule, ladder, length, costs):
    engines, prompt = three_engines(2, seed=5), [0, 1, 0, 1, 1, 0, 1]
    law, lengths = enumerate_loop(engines, ladder, rule, prompt, length, costs=costs)
    assert len(lengths) > 1, "the lengths must vary for this to show anything"
    assert largest_error(law, enumerate_target(engines["target"], prompt, length, ())) < 1e-12


def forget_the_correction(rule, p, q, draft):
    """The tempting mistake: what replaces a rejected draft comes from the target's whole law."""
    for probability, accepted, _ in list_verdicts(rule, p, q, draft):
        for token, mass in enumerate(p[accepted]):
            yield probability * mass, accepted, token


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_enumeration_sees_a_verdict_that_is_not_lossless(rule):
    engines, prompt = three_engines(2, seed=5), [0, 1, 0]
    law, _ = enumerate_loop(engines, [Rung("int8", 2)], rule, prompt, 3, list_outcomes=forget_the_correction)
    assert math.isclose(sum(law.values()), 1, abs_tol=1e-12)
    assert largest_error(law, enumerate_target(engines["target"], prompt, 3, ())) > 1e-3


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
@pytest.mark.parametrize("costs", [None, PRICES], ids=["fixed", "priced"])
def test_the_shipped_loop_samples_the_processed_law(rule, settings, costs):
    temperature, top_k, top_p = settings
    vocab_size, length, total, prompt = 5, 4, 1500, [0, 1, 2, 0, 1]
    engines = three_engines(vocab_size, seed=11)
    ladder = [Rung("suffix", 2), Rung("tiny", 2), Rung("int8", 3)]
    counts = Counter()
    for seed in range(total):
        sampling = Sampling(temperature, top_k, top_p, seed, rule)
        counts[tuple(decode(engines, ladder, prompt, length, sampling, costs=costs).tokens)] += 1
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
