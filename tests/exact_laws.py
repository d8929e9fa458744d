"""Tiny language models with rational laws, and the law of a native verification walk, integrated exactly."""

import itertools
import math
from fractions import Fraction

import numpy as np
from draftsmith.speculate import verify
from draftsmith.speculate.binding import check, ffi, lib, view

STEPS = 2**53
LAST = 1 - 2.0**-53  # the largest uniform

Tokens = tuple[int, ...]


class TinyModel:
    """Rational next-token laws that depend on the whole prefix; about `zeros` of the tokens have no mass."""

    def __init__(self, vocab: int, seed: int, zeros: float = 0.25):
        self.vocab, self.zeros = vocab, zeros
        self.laws: dict[Tokens, list[Fraction]] = {}
        self.rng = np.random.default_rng(seed)

    def law(self, prefix: Tokens) -> list[Fraction]:
        if prefix not in self.laws:
            counts = self.rng.integers(1, 50, self.vocab) * (self.rng.random(self.vocab) >= self.zeros)
            counts[self.rng.integers(self.vocab)] += 1
            self.laws[prefix] = [Fraction(int(c), int(counts.sum())) for c in counts]
        return self.laws[prefix]

    def rows(self, draft: Tokens, n: int) -> np.ndarray:
        """float64 [n, V]: the laws after each of the first n prefixes of `draft`."""
        rows = np.array([[float(x) for x in self.law(draft[:i])] for i in range(n)])
        rows = rows.reshape(n, self.vocab)
        return rows / rows.sum(axis=1, keepdims=True)

    def chance(self, tokens: Tokens) -> Fraction:
        """The probability of generating `tokens`."""
        return math.prod((self.law(tokens[:i])[t] for i, t in enumerate(tokens)), start=Fraction(1))

    def sequences(self, length: int) -> list[Tokens]:
        return list(itertools.product(range(self.vocab), repeat=length))


def count_steps(holds) -> int:
    """How many of the uniforms 0, 2^-53, 2^-52, … satisfy `holds`, which is true up to some point only."""
    low, high = 0, STEPS
    while low < high:
        middle = (low + high) // 2
        if holds(middle * 2.0**-53):
            low = middle + 1
        else:
            high = middle
    return low


def integrate_walk(rule: verify.Rule, p: np.ndarray, q: np.ndarray | None, draft: Tokens) -> np.ndarray:
    """float64 [K+1, V]: the chance that the native walk accepts n tokens of `draft` and goes on with y.

    The walk is a step function of each uniform. Its steps are found by bisection down to 2^-53, so this is
    the law of the shipped code itself; no rule is written down a second time here. Only the use of each
    uniform is taken from the interface: [i] decides draft[i], [K] and [K+1] draw the next token.
    """
    num_draft, vocab = len(draft), p.shape[1]
    p_rows, q_rows = view("double[]", p), ffi.NULL if q is None else view("double[]", q)
    row, out = ffi.new("double[]", num_draft + 2), ffi.new("int32_t[2]")
    tokens = ffi.new("int32_t[]", list(draft))

    def walk(uniforms: list[float], slot: int, value: float) -> tuple[int, int]:
        row[0 : num_draft + 2] = uniforms
        row[slot] = value
        check(
            lib.ds_verify_chain(
                verify.RULES[rule], num_draft, vocab, p_rows, q_rows, tokens, row, out, out + 1
            )
        )
        return out[0], out[1]

    def steps_of(token_at) -> list[int]:
        return [0] + [count_steps(lambda u, y=y: token_at(u) <= y) for y in range(vocab)]

    law = np.zeros((num_draft + 1, vocab))
    if rule == "exact":
        uniforms, reach = [0.0] * (num_draft + 2), 1.0
        for i, drafted in enumerate([*draft, None]):

            def sampled(u, i=i, drafted=drafted):
                accepted, token = walk(uniforms, i, u)
                return token if accepted == i else drafted

            steps = steps_of(sampled)
            law[i] = reach * np.diff(steps) / STEPS
            if drafted is not None:
                reach, law[i, drafted] = law[i, drafted], 0
                uniforms[i] = (
                    steps[drafted] / STEPS
                )  # the first uniform that samples the draft: go on from there
                if reach == 0:
                    break
        return law

    # The chance to accept i + 1 tokens or more where no other decision interferes: under the token rule those
    # before say yes, under the block rule those behind say no.
    others = [0.0 if rule == "token" else LAST] * (num_draft + 2)
    accept = [count_steps(lambda u, i=i: walk(others, i, u)[0] > i) / STEPS for i in range(num_draft)]
    for n in range(num_draft + 1):
        if rule == "token":
            chance = math.prod(accept[:n]) * (1 - accept[n] if n < num_draft else 1)
            uniforms = [0.0] * n + [LAST] * (num_draft + 2 - n)
        else:
            chance = (accept[n - 1] if n else 1) * math.prod(1 - a for a in accept[n:])
            uniforms = [LAST] * (num_draft + 2)
            if n:
                uniforms[n - 1] = 0.0
        slot = num_draft if n == num_draft else num_draft + 1
        if walk(uniforms, slot, 0.5)[0] != n:
            assert chance < 1e-15, "the walk cannot end here, yet its decisions say that it may"
            continue
        law[n] = (
            chance
            * np.diff(steps_of(lambda u, uniforms=uniforms, slot=slot: walk(uniforms, slot, u)[1]))
            / STEPS
        )
    return law


def output_law(rule: verify.Rule, target: TinyModel, drafter: TinyModel | None, draft: Tokens) -> np.ndarray:
    """`integrate_walk` for a draft of two models; drafter None: the draft was chosen, not sampled."""
    q = drafter.rows(draft, len(draft)) if drafter else None
    return integrate_walk(rule, target.rows(draft, len(draft) + 1), q, draft)


def extend(target: TinyModel, draft: Tokens, law: np.ndarray, length: int) -> dict[Tokens, float]:
    """The joint law of draft[:n] and the next token, continued by fresh samples of the target to `length`."""
    joint: dict[Tokens, float] = {}
    for n, y in itertools.product(range(len(draft) + 1), range(target.vocab)):
        if law[n, y] == 0:
            continue
        said = (*draft[:n], y)
        for rest in target.sequences(length - len(said)):
            full = said + rest
            tail = math.prod(float(target.law(full[:i])[full[i]]) for i in range(len(said), length))
            joint[full] = joint.get(full, 0.0) + law[n, y] * tail
    return joint


# ---- Drawing, and telling whether draws follow a law -----------------------------------------------------


def draw(weights: list[Fraction], uniform: Fraction) -> int:
    total, passed = sum(weights), Fraction(0)
    for token, weight in enumerate(weights):
        passed += weight
        if weight and passed > uniform * total:
            return token
    raise AssertionError("nothing has mass")


def inverse_cdf(laws: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """A token for each uniform, from one law [V] or from a law each [n, V]."""
    passed = laws.cumsum(axis=-1)
    return (passed <= uniforms[:, None] * passed[..., -1:]).sum(axis=1)


def g_statistic(counts: np.ndarray, law: np.ndarray) -> tuple[float, int]:
    """G = 2 Σ n log(n / expected) and its degrees of freedom."""
    expected = law * counts.sum()
    assert not counts[law == 0].any(), "a token without mass was said"
    seen = counts > 0
    return float(2 * (counts[seen] * np.log(counts[seen] / expected[seen])).sum()), int((law > 0).sum()) - 1


def chi_square_quantile(freedom: int, z: float) -> float:
    """Wilson and Hilferty (1931): the quantile at z standard deviations of the normal law."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3
