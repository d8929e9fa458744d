"""Whatever tree is drafted, what is said is distributed as the target's own; and so for K drafts of a token.

As for chains: the shipped native walk, integrated exactly (`exact_trees.py`), against the product of the
target's laws; the papers' algorithms, written out a second time in rationals and with whole laws, against the
native decisions; and a G-test on draws.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from draftsmith.speculate import sampling, verify
from draftsmith.speculate.binding import ffi, lib, view
from draftsmith.speculate.errors import BundleError
from exact_laws import (
    LAST,
    STEPS,
    TinyModel,
    Tokens,
    chi_square_quantile,
    count_steps,
    draw,
    g_statistic,
    inverse_cdf,
)
from exact_trees import (
    Parents,
    Walk,
    children_of,
    depth_law,
    draws,
    extend,
    integrate,
    path_to,
    prefixes,
    rows,
)

RULES: list[verify.TreeRule] = ["rrs", "traversal", "specinfer", "exact"]
CHAIN, FAN, FORK, BUSHY = (-1, 0, 1), (-1, -1, -1), (-1, -1, 0, 0), (-1, 0, -1, 0, 2)
# The drawing of siblings that each rule allows: with replacement or without.
ALLOWED = [
    (rule, replacement)
    for rule in RULES
    for replacement in (False, True)
    if (rule, replacement) != ("specinfer", False)
]
# (vocabulary, tree, seed, share of tokens without mass)
TREES = [
    (3, CHAIN, 0, 0.3),
    (3, FAN, 1, 0.0),
    (4, FAN, 2, 0.3),
    (3, FORK, 3, 0.2),
    (2, (-1, -1, 0, 0, 1, 1), 4, 0.0),
    (3, BUSHY, 5, 0.2),
]


def pair(vocab: int, seed: int, zeros: float) -> tuple[TinyModel, TinyModel]:
    return TinyModel(vocab, 2 * seed, zeros), TinyModel(vocab, 2 * seed + 1, zeros)


def law_of(
    rule: verify.TreeRule, target: TinyModel, drafter: TinyModel | None, tokens: Tokens, parents: Parents
) -> np.ndarray:
    q = rows(drafter, tokens, parents) if drafter else None
    return integrate(Walk(rule, rows(target, tokens, parents), q, tokens, parents))


def worst_error(
    rule: verify.TreeRule, target: TinyModel, drafter: TinyModel, parents: Parents, replacement: bool
) -> float:
    joint: dict[Tokens, float] = {}
    for tokens, chance in draws(drafter, parents, replacement):
        for text, mass in extend(
            target, tokens, parents, law_of(rule, target, drafter, tokens, parents)
        ).items():
            joint[text] = joint.get(text, 0.0) + float(chance) * mass
    length = len(next(iter(joint)))
    return max(abs(joint.get(text, 0.0) - float(target.chance(text))) for text in target.sequences(length))


# ---- The law of the output, exactly ------------------------------------------------------------------------


@pytest.mark.parametrize("rule, replacement", ALLOWED)
@pytest.mark.parametrize("vocab, parents, seed, zeros", TREES)
def test_sampled_trees_leave_the_targets_joint_law(rule, replacement, vocab, parents, seed, zeros):
    target, drafter = pair(vocab, seed, zeros)
    assert worst_error(rule, target, drafter, parents, replacement) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab, parents, seed, zeros", TREES)
def test_chosen_trees_leave_the_targets_joint_law(rule, vocab, parents, seed, zeros):
    """Every labelling, equal siblings and tokens without mass included."""
    target = TinyModel(vocab, seed + 100, zeros)
    for tokens in itertools.product(range(vocab), repeat=len(parents)):
        joint = extend(target, tokens, parents, law_of(rule, target, None, tokens, parents))
        for text in target.sequences(len(next(iter(joint)))):
            assert joint.get(text, 0.0) == pytest.approx(float(target.chance(text)), abs=1e-12)


@pytest.mark.parametrize("rule, replacement", ALLOWED)
@pytest.mark.parametrize("vocab, parents, seed", [(3, FORK, 6), (4, FAN, 7)])
def test_one_hot_laws_leave_the_targets_joint_law(rule, replacement, vocab, parents, seed):
    """Of the drafter, whose siblings are then chosen but for one; and of the target: its text is certain."""
    target, drafter = pair(vocab, seed, 0.2)
    certain = TinyModel(vocab, seed + 200, 1.0)
    assert worst_error(rule, target, certain, parents, replacement) < 1e-12
    assert worst_error(rule, certain, drafter, parents, replacement) < 1e-12
    assert worst_error(rule, certain, certain, parents, replacement) < 1e-12


def test_the_law_test_notices_the_wrong_drawing():
    """SpecInfer's rule takes independent siblings only: drawn without replacement they bias it."""
    target, drafter = pair(4, 4, 0.0)
    assert worst_error("specinfer", target, drafter, FAN, replacement=False) > 0.001


# ---- Acceptance --------------------------------------------------------------------------------------------


def expected_accepted(
    rule: verify.TreeRule, target: TinyModel, drafter: TinyModel, parents: Parents, replacement: bool = False
) -> float:
    return sum(
        float(chance) * depth_law(parents, law_of(rule, target, drafter, tokens, parents))
        for tokens, chance in draws(drafter, parents, replacement)
    )


@pytest.mark.parametrize("parents", [FORK, (-1, -1, 1, 1), (-1, 0, -1)])
def test_traversal_accepts_at_least_what_recursive_rejection_does_on_every_pair(parents):
    gains = []
    for seed in range(30, 38):
        target, drafter = pair(3, seed, 0.1)
        gains.append(
            expected_accepted("traversal", target, drafter, parents)
            - expected_accepted("rrs", target, drafter, parents)
        )
    assert min(gains) > -1e-12
    assert max(gains) > 0.005


def optimal_acceptance(p: list[Fraction], chance_within) -> float:
    """The most that any rule accepts of drafts of one token: min over sets H of 1 + p(H) - P(all drafts in H)
    (Hu et al., arXiv 2502.18779)."""
    vocab = range(len(p))
    sets = itertools.chain.from_iterable(itertools.combinations(vocab, n) for n in range(len(p) + 1))
    return float(min(1 + sum(p[x] for x in H) - chance_within(set(H)) for H in sets))


def test_siblings_without_replacement_are_accepted_more_and_never_beyond_the_optimum():
    gains = []
    for seed in range(40, 46):
        target, drafter = pair(4, seed, 0.0)

        def within(allowed, drafter=drafter):
            return sum(chance for drawn, chance in draws(drafter, FAN, False) if allowed.issuperset(drawn))

        best = optimal_acceptance(target.law(()), within)
        without = expected_accepted("rrs", target, drafter, FAN)
        assert without <= best + 1e-12
        assert without == pytest.approx(expected_accepted("traversal", target, drafter, FAN), abs=1e-12)
        gains.append(without - expected_accepted("specinfer", target, drafter, FAN, True))
    assert np.mean(gains) > 0.05


@pytest.mark.parametrize(
    "tree_rule, rule", [("rrs", "token"), ("specinfer", "token"), ("traversal", "block"), ("exact", "exact")]
)
@pytest.mark.parametrize("sampled", [True, False])
def test_on_a_chain_the_rules_are_those_for_chains(tree_rule, rule, sampled):
    rng = np.random.default_rng(3)
    for _ in range(400):
        length, vocab = int(rng.integers(0, 6)), int(rng.integers(1, 40))
        p = rng.dirichlet(np.ones(vocab), size=length + 1)
        q = rng.dirichlet(np.ones(vocab), size=length + 1)
        draft = [int(rng.choice(vocab, p=row)) for row in q[:length]]
        uniforms = rng.random(length + 2)
        parents = np.arange(length) - 1
        accepted, token = verify.tree(tree_rule, p, q if sampled else None, draft, parents, uniforms)
        expected = verify.chain(rule, p, q[:length] if sampled else None, draft, uniforms)
        assert (accepted, token) == (list(range(expected[0])), expected[1])


# ---- The papers' algorithms, in rationals and with whole laws ----------------------------------------------


class Reference:
    """One walk. `margin` is the distance of a uniform to the nearest other decision."""

    def __init__(self, rule, p, q, tokens: Tokens, parents: Parents, uniforms: list[Fraction]):
        self.rule, self.p, self.q = rule, p, q
        self.tokens, self.parents, self.uniforms = tokens, parents, uniforms
        self.margin = Fraction(1)

    def decide(self, uniform: Fraction, chance: Fraction) -> bool:
        if 0 < chance < 1:
            self.margin = min(self.margin, abs(chance - uniform))
        return uniform < chance

    def say(self, law: list[Fraction], uniform: Fraction) -> int:
        passed = itertools.accumulate(law)
        self.margin = min(self.margin, *(abs(edge / sum(law) - uniform) for edge in passed))
        return draw(law, uniform)

    def trials(self, node: int):
        """(child, the law that it was drawn from) of the children that are tried."""
        law = self.q[node + 1] if self.q else [Fraction(0)] * len(self.p[0])
        seen: set[int] = set()
        for child in children_of(self.parents, node):
            token = self.tokens[child]
            if self.rule != "specinfer" and token in seen:
                continue
            seen.add(token)
            if law[token] == 0:
                yield child, [Fraction(int(x == token)) for x in range(len(law))]
                continue
            yield child, law
            if self.rule != "specinfer":
                law = [Fraction(0) if x == token else mass for x, mass in enumerate(law)]
                law = [mass / sum(law) for mass in law] if sum(law) else law

    def visit(self, node: int, keep: Fraction):
        """(last accepted node, next token), or None where the subtree is rejected."""
        law, n, tried = list(self.p[node + 1]), len(self.tokens), False
        for child, drawn in self.trials(node):
            x = self.tokens[child]
            ratio = min(Fraction(1), keep * law[x] / drawn[x])
            if self.rule == "traversal":
                if below := self.visit(child, ratio):
                    return below
            elif self.decide(self.uniforms[child], ratio):
                return self.visit(child, Fraction(1))
            tried = True
            rest = [max(keep * a - b, Fraction(0)) for a, b in zip(law, drawn, strict=True)]
            if not sum(rest):
                keep, law = (Fraction(1) if keep == 1 else Fraction(0)), list(self.p[node + 1])
                break
            law = [a / sum(rest) for a in rest]
            keep = sum(rest) / (sum(rest) + 1 - keep)
        if node >= 0 and self.rule == "traversal" and not self.decide(self.uniforms[node], keep):
            return None
        return node, self.say(law, self.uniforms[n + tried])


def random_tree(rng: np.random.Generator, size: int) -> Parents:
    return tuple(int(rng.integers(-1, i)) for i in range(size))


def sample_tree(rng, drafter: TinyModel, parents: Parents, replacement: bool) -> Tokens:
    tokens: list[int] = []
    for i, parent in enumerate(parents):
        text = tuple(tokens[j] for j in path_to(parents, parent))
        law = drafter.rows(text, len(text) + 1)[-1].copy()
        if not replacement:
            law[[tokens[j] for j in range(i) if parents[j] == parent]] = 0
        law = law if law.sum() else np.ones(len(law))  # then a token is chosen
        tokens.append(int(rng.choice(len(law), p=law / law.sum())))
    return tuple(tokens)


@pytest.mark.parametrize("rule", ["rrs", "traversal", "specinfer"])
@pytest.mark.parametrize("sampled", [True, False])
def test_native_decisions_are_those_of_the_papers(rule, sampled):
    """On random trees, models and uniforms; this also shows that no decision depends on another's uniform."""
    rng = np.random.default_rng(RULES.index(rule))
    seen = set()
    for trial in range(500):
        vocab, parents = int(rng.integers(1, 6)), random_tree(rng, int(rng.integers(0, 9)))
        target = TinyModel(vocab, int(rng.integers(1 << 30)))
        drafter = target if trial % 7 == 0 else TinyModel(vocab, int(rng.integers(1 << 30)))
        tokens = sample_tree(rng, drafter, parents, bool(trial % 2) or rule == "specinfer")
        uniforms = [Fraction(float(u)) for u in rng.random(len(tokens) + 2)]
        texts = prefixes(tokens, parents)
        q = [drafter.law(text) for text in texts] if sampled else None
        reference = Reference(rule, [target.law(text) for text in texts], q, tokens, parents, uniforms)
        expected = reference.visit(-1, Fraction(1))
        assert expected
        if reference.margin < Fraction(1, 10**12):
            continue  # a tie in rationals, which doubles may decide either way
        accepted, token = verify.tree(
            rule,
            rows(target, tokens, parents),
            rows(drafter, tokens, parents) if sampled else None,
            tokens,
            parents,
            [float(u) for u in uniforms],
        )
        assert (accepted, token) == (path_to(parents, expected[0]), expected[1])
        seen.add(len(accepted))
    assert {0, 1, 2} <= seen


# ---- A G-test, from logits to tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, "biased"])
def test_draws_follow_the_targets_law(rule):
    """200,000 native rounds over a fork of 2 + 2 nodes on V = 5, processors on; fixed seeds.

    `biased` tells the drafter's laws of a tree that was made of its likeliest tokens, and must fail by far.
    """
    rounds, vocab = 200_000, 5
    rng = np.random.default_rng(17)
    logits = rng.normal(size=(1 + vocab, vocab)).astype(np.float32) * 2
    p = sampling.laws(logits, 0.8, 4, 0.95)
    q = sampling.laws(logits + rng.normal(size=logits.shape), 1.3)
    stream = 9 if rule == "biased" else RULES.index(rule)
    numbers = sampling.uniforms(23, stream, 0, rounds * 11).reshape(rounds, 11)

    def siblings(laws: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        laws = np.broadcast_to(laws, (rounds, vocab)).copy()
        if rule == "biased":
            first, second = np.argsort(-laws, axis=1)[:, :2].T
            return first, second
        first = inverse_cdf(laws, uniforms[:, 0])
        if rule != "specinfer":
            laws[np.arange(rounds), first] = 0
        return first, inverse_cdf(laws, uniforms[:, 1])

    first, second = siblings(q[0], numbers[:, 6:8])
    third, fourth = siblings(q[1:][first], numbers[:, 8:10])
    tokens = np.stack([first, second, third, fourth], axis=1).astype(np.int32)
    # Behind the third and fourth node the text is longer than what is counted: any law will do there.
    orders = [[0, 1 + x, 1 + y, 0, 0] for x in range(vocab) for y in range(vocab)]
    laws = [(p[order], q[order]) for order in orders]
    views = [(view("double[]", a), view("double[]", b)) for a, b in laws]

    uniforms, path = numbers[:, :6].copy(), np.zeros((rounds, 4), np.int32)
    depth, last = np.zeros(rounds, np.int32), np.zeros(rounds, np.int32)
    u, nodes, parents = view("double[]", uniforms), view("int32_t[]", tokens), ffi.new("int32_t[]", FORK)
    out, n, y = view("int32_t[]", path), view("int32_t[]", depth), view("int32_t[]", last)
    native = verify.TREE_RULES["rrs" if rule == "biased" else rule]
    for i, case in enumerate((first * vocab + second).tolist()):
        lib.ds_verify_tree(
            native, 4, vocab, *views[case], nodes + 4 * i, parents, u + 6 * i, out + 4 * i, n + i, y + i
        )

    every = np.arange(rounds)
    said_first = np.where(depth > 0, tokens[every, path[:, 0]], last)
    fresh = inverse_cdf(p[1:][said_first], numbers[:, 10])
    said_second = np.where(depth == 0, fresh, np.where(depth == 1, last, tokens[every, path[:, 1]]))
    counts = np.bincount(said_first * vocab + said_second, minlength=vocab**2).reshape(vocab, vocab)
    statistic, freedom = g_statistic(counts, p[0][:, None] * p[1:])
    bound = chi_square_quantile(freedom, 4.75)  # one false alarm in a million
    assert statistic > 10 * bound if rule == "biased" else statistic < bound


# ---- K-SEQ -------------------------------------------------------------------------------------------------


def integrate_kseq(p: np.ndarray, q: np.ndarray, drafts: Tokens) -> tuple[np.ndarray, float]:
    """(the law of the token that the native rule gives, the chance that it is a draft), by bisection."""
    count, vocab = len(drafts), len(p)
    rejected = [LAST] * (count + 1)

    def ask(slot: int, value: float) -> tuple[int, int]:
        return verify.kseq(p, q, drafts, [*rejected[:slot], value, *rejected[slot + 1 :]])

    law, reach = np.zeros(vocab), 1.0
    for i, token in enumerate(drafts):
        accept = count_steps(lambda u, i=i: ask(i, u)[1] == i) / STEPS
        law[token] += reach * accept
        reach *= 1 - accept
    accepted = 1 - reach
    if reach:
        steps = [0] + [count_steps(lambda u, y=y: ask(count, u)[0] <= y) for y in range(vocab)]
        law += reach * np.diff(steps) / STEPS
    return law, accepted


@pytest.mark.parametrize(
    "vocab, count, zeros", [(2, 1, 0.0), (3, 2, 0.3), (3, 3, 0.0), (4, 2, 0.2), (3, 4, 0.5), (2, 5, 0.0)]
)
def test_kseq_leaves_the_targets_law_and_is_near_the_best_acceptance(vocab, count, zeros):
    for seed in range(60, 62):
        target, drafter = pair(vocab, seed, zeros)
        p, q = target.rows((), 1)[0], drafter.rows((), 1)[0]
        law, accepted = np.zeros(vocab), 0.0
        for drafts in itertools.product(range(vocab), repeat=count):
            if chance := float(math.prod(drafter.law(())[x] for x in drafts)):
                said, share = integrate_kseq(p, q, drafts)
                law += chance * said
                accepted += chance * share
        np.testing.assert_allclose(law, p, rtol=0, atol=1e-12)
        mass = drafter.law(())
        best = optimal_acceptance(target.law(()), lambda H, mass=mass: sum(mass[x] for x in H) ** count)
        assert (1 - 1 / math.e) * best - 1e-12 <= accepted <= best + 1e-12


def test_kseq_is_near_the_best_acceptance_on_hundreds_of_laws():
    """Drafts are independent and each is accepted by its token alone, so K of them are at 1 - (1 - beta)^K.
    The best is the bound of optimal transport, found by trying every set of tokens."""
    rng, shares = np.random.default_rng(8), []
    for _ in range(300):
        vocab, count = int(rng.integers(2, 7)), int(rng.integers(1, 13))
        p, q = (rng.dirichlet(np.full(vocab, rng.choice([0.05, 0.3, 1, 5]))) for _ in range(2))
        p[rng.random(vocab) < 0.2] = 0
        p = p / p.sum() if p.sum() > 0 else q

        def is_accepted(u: float, x: int, p=p, q=q, count=count) -> bool:
            return verify.kseq(p, q, [x] * count, [u] + [LAST] * count)[1] == 0

        chances = [count_steps(lambda u, x=x: is_accepted(u, x)) / STEPS for x in range(vocab)]
        accepted = 1 - (1 - q @ chances) ** count
        best = optimal_acceptance(list(p), lambda H, q=q, count=count: sum(q[x] for x in H) ** count)
        assert (1 - 1 / math.e) * best - 1e-12 <= accepted <= best + 1e-12
        shares.append(accepted / best if best > 1e-9 else 1)
    assert 0.632 < min(shares) < 0.95 < np.mean(shares), "laws that are too easy show nothing"


def test_kseq_of_one_draft_is_the_rule_for_a_token():
    rng = np.random.default_rng(5)
    for _ in range(300):
        p, q = rng.dirichlet(np.ones(6), size=2)
        draft, uniforms = [int(rng.choice(6, p=q))], rng.random(2)
        token, accepted = verify.kseq(p, q, draft, uniforms)
        kept, after = verify.chain("token", np.stack([p, p]), q[None], draft, [uniforms[0], 0.5, uniforms[1]])
        assert (accepted, token) == ((0, draft[0]) if kept else (-1, after))


def test_kseq_of_equal_laws_takes_the_first_draft_whatever_the_sums_round_to():
    rng = np.random.default_rng(3)
    for vocab in (3, 8, 177, 4000):
        for _ in range(50):
            law = rng.dirichlet(np.full(vocab, 0.3))
            drafts = rng.choice(vocab, size=16, p=law)
            assert verify.kseq(law, law, drafts, [1 - 1e-6] * 17) == (drafts[0], 0)


def test_kseq_takes_laws_that_are_one_hot_equal_or_apart():
    one_hot, even = np.eye(3)[0], np.full(3, 1 / 3)
    assert verify.kseq(even, even, [2, 1], [LAST, LAST, 0.5])[1] in (-1, 0, 1)
    assert verify.kseq(one_hot, one_hot, [0, 0], [LAST, LAST, 0.5]) == (0, 0)
    assert verify.kseq(one_hot, np.array([0, 0.5, 0.5]), [1, 2], [0.0, 0.0, LAST]) == (0, -1)
    assert verify.kseq(np.array([1.0, 0]), np.array([0.5, 0.5]), [1, 1], [0.0, 0.0, 0.0]) == (0, -1)


def test_kseq_of_two_drafts_does_not_cover():
    """Sequoia's example (arXiv 2402.12374): p = [1, 0], q uniform, two drafts are accepted at 0.75."""
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    accepted = sum(integrate_kseq(p, q, drafts)[1] / 4 for drafts in itertools.product(range(2), repeat=2))
    assert accepted == pytest.approx(0.75, abs=1e-6)


# ---- Inputs ------------------------------------------------------------------------------------------------

P4 = np.full((4, 3), 1 / 3)


def test_parents_may_be_nodes_or_rows():
    rng = np.random.default_rng(9)
    for _ in range(50):
        parents = random_tree(rng, 5)
        p, q = rng.dirichlet(np.ones(4), size=6), rng.dirichlet(np.ones(4), size=6)
        tokens, uniforms = rng.integers(0, 4, 5), rng.random(7)
        by_node = verify.tree("rrs", p, q, tokens, parents, uniforms)
        assert by_node == verify.tree("rrs", p, q, tokens, np.add(parents, 1), uniforms)


def test_rows_of_the_drafter_without_children_are_not_read():
    q = np.full((4, 3), np.nan)
    q[0] = [0.5, 0.25, 0.25]
    assert verify.tree("rrs", P4, q, [0, 1, 2], FAN, [LAST, 0.0, LAST, 0.1, 0.9])[0] == [1]


@pytest.mark.parametrize("rule", RULES)
def test_no_tree_is_plain_sampling(rule):
    p = np.array([[0.125, 0.375, 0.5]])
    assert verify.tree(rule, p, None, [], [], [0.2, 0.9]) == ([], 1)
    assert verify.tree(rule, p, np.zeros((1, 3)), [], [], [0.5, 0.9]) == ([], 2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rule": "token"}, "'token' is not one of rrs, traversal, specinfer, exact"),
        ({"tokens": [0, 1, 3]}, "tokens[2] is 3, outside the vocabulary of 3"),
        ({"tokens": [0, 1, -1]}, "tokens holds ids from -1"),
        ({"tokens": [0.0, 1.0, 2.0]}, "a flat list of token ids"),
        ({"parents": [-1, 0]}, "2 parents for 3 tokens"),
        ({"parents": [-1, 1, 0]}, "parents[1] is 1; a node before it is wanted, or -1 for the root"),
        ({"parents": [0, 2, 1]}, "parents[1] is 2; a node before it is wanted, or 0 for the root"),
        ({"parents": [-1, -2, 0]}, "parents[1] is -2"),
        ({"parents": [1, 0, 0]}, "parents[0] is 1; the first node's parent is the root"),
        ({"p": P4[:3]}, "p has shape [3, 3]; [4, V]"),
        ({"q": P4[:3]}, "q has shape [3, 3]; [4, 3]"),
        ({"q": P4 * 2}, "q: row 0 sums to 2"),
        ({"q": P4[:, :2]}, "q has shape [4, 2]"),
        ({"p": np.full((4, 3), np.nan)}, "p: "),
        ({"uniforms": [0.5] * 4}, "[5] is wanted (n + 2)"),
        ({"uniforms": [0.5] * 4 + [1.0]}, "uniforms[4] is 1"),
    ],
)
def test_bad_trees_are_refused_in_one_line(change, words):
    given = {
        "rule": "rrs",
        "p": P4,
        "q": P4,
        "tokens": [0, 1, 2],
        "parents": [-1, 0, -1],
        "uniforms": [0.5] * 5,
    }
    verify.tree(**given)
    with pytest.raises(BundleError) as error:
        verify.tree(**(given | change))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_tree_over_the_limit_is_refused():
    n = lib.DS_MAX_TREE + 1
    p = np.ones((n + 1, 1))
    with pytest.raises(BundleError, match=f"a tree of {n} nodes, outside 0 to {n - 1}"):
        verify.tree("exact", p, None, [0] * n, [-1] * n, [0.5] * (n + 2))
    chain = np.arange(n - 1) - 1
    for rule in RULES:
        assert len(verify.tree(rule, p[:n], p[:n], [0] * (n - 1), chain, [0.5] * (n + 1))[0]) == n - 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"drafts": []}, "0 drafts"),
        ({"drafts": [0, 3]}, "drafts[1] is 3"),
        ({"q": None}, "q"),
        ({"q": [0.5, 0.5]}, "q has shape"),
        ({"p": [[0.5, 0.25, 0.25]]}, "p has shape"),
        ({"p": [0.5, 0.5, 0.5]}, "p: row 0 sums to 1.5"),
        ({"uniforms": [0.5] * 4}, "[3] is wanted (K + 1)"),
        ({"uniforms": [0.5, 0.5, -0.1]}, "uniforms[2]"),
    ],
)
def test_bad_drafts_of_one_token_are_refused_in_one_line(change, words):
    given = {"p": [0.5, 0.25, 0.25], "q": [0.25, 0.25, 0.5], "drafts": [2, 0], "uniforms": [0.5] * 3}
    verify.kseq(**given)
    changed = given | change
    if "drafts" in change and not change["drafts"]:
        changed["uniforms"] = [0.5]
    with pytest.raises(BundleError) as error:
        verify.kseq(**changed)
    assert words in str(error.value) and "\n" not in str(error.value)
