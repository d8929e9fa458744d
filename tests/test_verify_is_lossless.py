"""Whatever drafts, the output is distributed as the target's own.

Three layers: the shipped native walk, integrated exactly, against the product of the target's laws; the
papers' formulas, written out a second time in rationals, against the native decisions; and a G-test on draws
through the whole path from logits. `exact_laws.py` holds the integration.
"""

from fractions import Fraction

import numpy as np
import pytest
from draftsmith.speculate import sampling, verify
from draftsmith.speculate.binding import ffi, lib, view
from draftsmith.speculate.errors import BundleError
from exact_laws import (
    LAST,
    TinyModel,
    Tokens,
    chi_square_quantile,
    draw,
    extend,
    g_statistic,
    integrate_walk,
    inverse_cdf,
    output_law,
)

RULES: list[verify.Rule] = ["token", "block", "exact"]
# (vocabulary, draft length, seed, share of tokens without mass)
PAIRS = [
    (3, 1, 0, 0.3),
    (3, 2, 1, 0.3),
    (3, 3, 2, 0.0),
    (3, 3, 3, 0.4),
    (4, 2, 4, 0.2),
    (5, 2, 5, 0.5),
    (2, 3, 6, 0.0),
]


def pair(vocab: int, seed: int, zeros: float) -> tuple[TinyModel, TinyModel]:
    return TinyModel(vocab, 2 * seed, zeros), TinyModel(vocab, 2 * seed + 1, zeros)


# ---- The law of the output, exactly ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab, length, seed, zeros", PAIRS)
def test_sampled_drafts_leave_the_targets_joint_law(rule, vocab, length, seed, zeros):
    target, drafter = pair(vocab, seed, zeros)
    joint = dict.fromkeys(target.sequences(length + 1), 0.0)
    for draft in target.sequences(length):
        if chance := float(drafter.chance(draft)):
            for tokens, mass in extend(
                target, draft, output_law(rule, target, drafter, draft), length + 1
            ).items():
                joint[tokens] += chance * mass
    error = max(abs(mass - float(target.chance(tokens))) for tokens, mass in joint.items())
    assert error < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab, length, seed", [(3, 1, 10), (3, 3, 11), (4, 2, 12)])
def test_chosen_drafts_leave_the_targets_joint_law(rule, vocab, length, seed):
    target = TinyModel(vocab, seed)
    for draft in target.sequences(length):
        joint = extend(target, draft, output_law(rule, target, None, draft), length + 1)
        for tokens in target.sequences(length + 1):
            assert joint.get(tokens, 0.0) == pytest.approx(float(target.chance(tokens)), abs=1e-12)


def test_the_law_test_notices_a_biased_rule():
    """The usual mistake: an argmax draft verified with the drafter's softmax instead of q=None."""
    target, drafter = pair(3, 20, 0.0)
    draft = (int(np.argmax([float(x) for x in drafter.law(())])),)
    joint = extend(target, draft, output_law("token", target, drafter, draft), 2)
    assert max(abs(joint[t] - float(target.chance(t))) for t in joint) > 0.01


# ---- Acceptance --------------------------------------------------------------------------------------------


def expected_accepted(rule: verify.Rule, target: TinyModel, drafter: TinyModel, length: int) -> float:
    total = 0.0
    for draft in target.sequences(length):
        if chance := float(drafter.chance(draft)):
            total += chance * float(
                np.arange(length + 1) @ output_law(rule, target, drafter, draft).sum(axis=1)
            )
    return total


def test_block_accepts_at_least_what_token_does_on_every_pair():
    gains = []
    for seed in range(30, 48):
        target, drafter = pair(3, seed, 0.2)
        gains.append(
            expected_accepted("block", target, drafter, 2) - expected_accepted("token", target, drafter, 2)
        )
    assert min(gains) > -1e-12
    assert max(gains) > 0.05


@pytest.mark.parametrize("rule", ["token", "block"])
def test_acceptance_of_one_token_is_one_minus_total_variation(rule):
    for seed in range(50, 60):
        target, drafter = pair(5, seed, 0.3)
        p, q = np.array(target.law(()), dtype=float), np.array(drafter.law(()), dtype=float)
        expected = 1 - abs(p - q).sum() / 2
        assert expected_accepted(rule, target, drafter, 1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_acceptance_of_a_chosen_token_is_its_mass(rule):
    target = TinyModel(5, 61)
    for token, mass in enumerate(target.law(())):
        assert output_law(rule, target, None, (token,))[1].sum() == pytest.approx(float(mass), abs=1e-15)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 40])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_model_accepts_its_own_drafts_whole(rule, length):
    rng = np.random.default_rng(length)
    p = sampling.laws(rng.normal(size=(length + 1, 33)) * 2, top_p=0.9)
    for _ in range(200):
        draft = [int(rng.choice(33, p=row / row.sum())) for row in p[:length]]
        uniforms = rng.choice([0.0, 0.5, LAST, rng.random()], size=length + 2)
        assert verify.chain(rule, p, p[:length], draft, uniforms)[0] == length


# ---- The papers' formulas, in rationals --------------------------------------------------------------------


def reference_walk(rule, p, q, draft: Tokens, uniforms: list[Fraction]) -> tuple[int, int, Fraction]:
    """(accepted, next token, distance to the nearest other decision); the rules as in `verify.chain`."""
    length, margin, accepted = len(draft), Fraction(1), 0
    if q is None:
        q = [[Fraction(int(t == x)) for t in range(len(p[0]))] for x in draft]
    if rule == "exact":
        for i in range(length + 1):
            token = draw(p[i], uniforms[i])
            edges = [abs(sum(p[i][: t + 1]) - uniforms[i]) for t in range(len(p[i]))]
            margin = min(margin, *edges)
            if i == length or token != draft[i]:
                return i, token, margin
    prefix = [Fraction(1)]
    for i, x in enumerate(draft):
        prefix.append(min(Fraction(1), (prefix[i] if rule == "block" else 1) * p[i][x] / q[i][x]))

    def residual(i):
        scale = prefix[i] if rule == "block" else 1
        return [max(scale * a - b, Fraction(0)) for a, b in zip(p[i], q[i], strict=True)]

    for i in range(1, length + 1):
        if rule == "token" or i == length:
            accept = prefix[i]
        else:
            rest = sum(residual(i))
            accept = rest / (rest + 1 - prefix[i]) if rest + 1 - prefix[i] else Fraction(1)
        if 0 < accept < 1:
            margin = min(margin, abs(accept - uniforms[i - 1]))
        if uniforms[i - 1] < accept:
            accepted = i
        elif rule == "token":
            break
    if accepted == length:
        weights, uniform = p[length], uniforms[length]
    else:
        weights, uniform = residual(accepted), uniforms[length + 1]
        weights = weights if sum(weights) else p[accepted]
    edges = [abs(Fraction(sum(weights[: t + 1]), sum(weights)) - uniform) for t in range(len(weights))]
    return accepted, draw(weights, uniform), min(margin, *edges)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampled", [True, False])
def test_native_decisions_are_those_of_the_papers(rule, sampled):
    """On random models and uniforms; this also shows that no decision depends on another's uniform."""
    rng = np.random.default_rng(RULES.index(rule))
    lengths_seen = set()
    for trial in range(600):
        vocab, length = int(rng.integers(1, 7)), int(rng.integers(0, 6))
        target = TinyModel(vocab, int(rng.integers(1 << 30)))
        drafter = target if trial % 7 == 0 else TinyModel(vocab, int(rng.integers(1 << 30)))
        draft: Tokens = ()
        while len(draft) < length:
            law = drafter.rows(draft, len(draft) + 1)[-1]
            draft += (int(rng.choice(vocab, p=law)),)
        uniforms = [Fraction(float(u)) for u in rng.random(length + 2)]
        p = [target.law(draft[:i]) for i in range(length + 1)]
        q = [drafter.law(draft[:i]) for i in range(length)] if sampled else None
        accepted, token, margin = reference_walk(rule, p, q, draft, uniforms)
        if margin < Fraction(1, 10**12):
            continue  # a tie in rationals, which doubles may decide either way
        rows_q = drafter.rows(draft, length) if sampled else None
        got = verify.chain(rule, target.rows(draft, length + 1), rows_q, draft, [float(u) for u in uniforms])
        assert got == (accepted, token)
        lengths_seen.add(accepted)
    assert lengths_seen >= {0, 1, 2, 3}


@pytest.mark.parametrize("rule", RULES)
def test_a_chosen_draft_is_a_draft_from_one_hot_laws(rule):
    rng = np.random.default_rng(3)
    for _ in range(500):
        p = sampling.laws(rng.normal(size=(5, 6)) * 3, top_k=4)
        draft = rng.integers(0, 6, 4)
        uniforms = rng.random(6)
        assert verify.chain(rule, p, None, draft, uniforms) == verify.chain(
            rule, p, np.eye(6)[draft], draft, uniforms
        )


def test_exact_rule_says_what_the_target_alone_would_from_the_same_uniforms():
    rng = np.random.default_rng(4)
    p, uniforms = rng.dirichlet(np.ones(8), size=6), rng.random(7)
    alone = [int(np.searchsorted(row.cumsum(), u, side="right")) for row, u in zip(p, uniforms, strict=False)]
    for wrong_from in range(6):
        draft = [t if i < wrong_from else (t + 1) % 8 for i, t in enumerate(alone[:5])]
        assert verify.chain("exact", p, None, draft, uniforms) == (
            min(wrong_from, 5),
            alone[min(wrong_from, 5)],
        )


# ---- A G-test, from logits to tokens -----------------------------------------------------------------------


def processed(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One row's law by sorting; an independent `sampling.laws` (no ties)."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weights)[: top_k or None]
    before = np.cumsum(weights[order]) - weights[order]
    order = order[before < top_p * weights[order].sum()]
    law = np.zeros_like(weights)
    law[order] = weights[order]
    return law / law.sum()


@pytest.mark.parametrize("rule", [*RULES, "biased"])
def test_draws_through_the_processors_follow_the_targets_law(rule):
    """250k rounds of K = 2 on V = 6, target and drafter processed with different settings; fixed seeds.

    `biased` verifies with the drafter's unprocessed law and must fail by far, so the test can tell.
    """
    rounds, vocab, num_draft = 250_000, 6, 2
    rng = np.random.default_rng(7)
    logits_p = rng.normal(size=(1 + vocab + vocab**2, vocab)).astype(np.float32) * 2  # a row for each prefix
    logits_q = logits_p[: 1 + vocab] + rng.normal(size=(1 + vocab, vocab)).astype(np.float32)
    settings_p, settings_q = (0.8, 5, 0.95), (1.3, 4, 0.9)
    p = sampling.laws(logits_p, *settings_p)
    q = sampling.laws(logits_q, *settings_q)
    q_told = sampling.laws(logits_q) if rule == "biased" else q

    stream = RULES.index(rule) if rule in RULES else 9
    uniforms = sampling.uniforms(11, stream, 0, rounds * 7).reshape(rounds, 7)
    first = inverse_cdf(q[0], uniforms[:, 4])
    second = inverse_cdf(q[1:][first], uniforms[:, 5])
    drafts = [(x, y) for x in range(vocab) for y in range(vocab)]
    p_rows = [np.stack([p[0], p[1 + x], p[1 + vocab + vocab * x + y]]) for x, y in drafts]
    q_rows = [np.stack([q_told[0], q_told[1 + x]]) for x, _ in drafts]
    cases = [
        (view("double[]", p_rows[i]), view("double[]", q_rows[i]), ffi.new("int32_t[]", draft))
        for i, draft in enumerate(drafts)
    ]
    numbers, accepted, tokens = uniforms[:, :4].copy(), np.zeros(rounds, np.int32), np.zeros(rounds, np.int32)
    u, n, y = view("double[]", numbers), view("int32_t[]", accepted), view("int32_t[]", tokens)
    native_rule = verify.RULES["block" if rule == "biased" else rule]
    for i, case in enumerate((first * vocab + second).tolist()):
        lib.ds_verify_chain(native_rule, num_draft, vocab, *cases[case], u + 4 * i, n + i, y + i)

    said_first = np.where(accepted > 0, first, tokens)
    fresh = inverse_cdf(p[1:][said_first], uniforms[:, 6])
    said_second = np.where(accepted == 0, fresh, np.where(accepted == 1, tokens, second))
    counts = np.bincount(said_first * vocab + said_second, minlength=vocab**2).reshape(vocab, vocab)

    law = np.array([processed(logits_p[0].astype(float), *settings_p)]).T * [
        processed(row.astype(float), *settings_p) for row in logits_p[1 : 1 + vocab]
    ]
    statistic, freedom = g_statistic(counts, law)
    bound = chi_square_quantile(freedom, 4.75)  # one false alarm in a million
    if rule == "biased":
        assert statistic > 10 * bound
    else:
        assert statistic < bound


# ---- Cases in which implementations have been wrong --------------------------------------------------------


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, LAST])
@pytest.mark.parametrize("rule", RULES)
def test_a_token_without_mass_is_neither_accepted_nor_said(rule, uniform):
    p = np.array([[0.0, 0.5, 0.5, 0.0]] * 3)
    for q in (None, np.full((2, 4), 0.25)):
        for draft in ([0, 1], [3, 2]):
            accepted, token = verify.chain(rule, p, q, draft, [uniform] * 4)
            assert accepted == 0 and token in (1, 2)
        assert verify.chain(rule, p, q, [1, 3], [uniform] * 4)[0] <= 1


@pytest.mark.parametrize("rule", ["token", "block"])
def test_equal_laws_never_divide_nothing_by_nothing(rule):
    p = np.array([[0.1, 0.2, 0.7]] * 3)
    for uniform in (0.0, 0.3, LAST):
        assert verify.chain(rule, p, p[:2], [0, 1], [uniform] * 4)[0] == 2
    one_hot = np.eye(3)[[1, 1, 1]]
    assert verify.chain(rule, one_hot, one_hot[:2], [1, 1], [LAST] * 4) == (2, 1)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_residual_of_rounding_alone_gives_way_to_the_targets_law(rule):
    """p and q differ by an ulp, the uniform falls between: the next token may be any that p has."""
    q = np.array([[0.25, 0.25, 0.5]])
    p = np.array([[0.25 - 2.0**-54, 0.25 + 2.0**-54, 0.5]] * 2)
    said = {
        verify.chain_of_laws(rule, p, q, np.array([0], np.int32), np.array([LAST, 0, u]))[1]
        for u in (0, 0.4, 0.9)
    }
    assert said == {0, 1, 2}


@pytest.mark.parametrize("rule", RULES)
def test_a_law_that_rounds_to_less_than_1_still_says_a_token_with_mass(rule):
    """Its sum is below the largest uniform, so the inverse CDF runs off the end, where there is no mass."""
    p = np.array([[0.0, 0.5, 0.5 - 2.0**-52, 0.0]] * 2)
    assert p[0].cumsum()[-1] < LAST
    for draft in (np.array([], np.int32), np.array([1], np.int32)):
        assert verify.chain_of_laws(rule, p, None, draft, np.full(len(draft) + 2, LAST))[1] == 2


def test_block_does_not_recover_from_a_token_without_mass():
    """After it the draft is dead, even if the next token is one that the drafter could not have drafted."""
    p, q = np.array([[0.0, 0.5, 0.5]] * 3), np.array([[0.5, 0.5, 0.0]] * 2)
    assert verify.chain("block", p, q, [0, 2], [0.0] * 4)[0] == 0


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_token_that_the_drafter_could_not_have_drafted_is_accepted_if_the_target_has_it(rule):
    p, q = np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([[1.0, 0.0]])
    assert verify.chain(rule, p, q, [1], [LAST, 0.0, 0.0])[0] == 1
    assert verify.chain(rule, np.array([[1.0, 0.0]] * 2), q, [1], [0.0, 0.0, 0.0]) == (0, 0)


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_outside_the_targets_support_is_replaced_by_the_targets_law(rule):
    """Drafter and target share nothing: the residual is p itself."""
    p, q = np.array([[0.5, 0.5, 0, 0]] * 2), np.array([[0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(integrate_walk(rule, p, q, (3,))[0], p[0], atol=1e-15)


@pytest.mark.parametrize("rule", RULES)
def test_no_draft_is_plain_sampling(rule):
    p = np.array([[0.125, 0.375, 0.5]])
    np.testing.assert_array_equal(integrate_walk(rule, p, None, ()), p)
    assert verify.chain(rule, p, np.empty((0, 3)), [], [0.2, 0.9]) == (0, 1)


@pytest.mark.parametrize("rule", RULES)
def test_a_vocabulary_of_one_has_nothing_to_decide(rule):
    assert verify.chain(rule, np.ones((4, 1)), np.ones((3, 1)), [0, 0, 0], [LAST] * 5) == (3, 0)
    assert verify.chain(rule, np.ones((4, 1)), None, [0, 0, 0], [0.0] * 5) == (3, 0)


def test_sums_over_a_vocabulary_of_any_size_agree():
    """Sizes around the width of the summation; a rejected draft is replaced from the residual."""
    for vocab in [2, 3, 5, 7, 8, 9, 15, 16, 17, 63, 1000]:
        rng = np.random.default_rng(vocab)
        p, q = rng.dirichlet(np.ones(vocab), size=3), rng.dirichlet(np.ones(vocab), size=2)
        rest = np.maximum(p[0] - q[0], 0)
        draft = [int(np.argmin(p[0] / q[0])), 0]
        for u in rng.random(50):
            expected = np.searchsorted(rest.cumsum() / rest.sum(), u, side="right")
            assert verify.chain("token", p, q, draft, [LAST, LAST, 0.5, u]) == (0, expected)


# ---- Inputs ------------------------------------------------------------------------------------------------


def test_any_float_width_and_memory_order_gives_the_same_answer():
    rng = np.random.default_rng(8)
    p, q = rng.dirichlet(np.ones(16), size=4), rng.dirichlet(np.ones(16), size=3)
    uniforms = rng.random(5)
    wanted = verify.chain("block", p, q, [1, 2, 3], uniforms)
    strided = np.empty((8, 32))
    strided[::2, ::2] = p
    for same in (np.asfortranarray(p), strided[::2, ::2], p.astype(np.float32), p.astype(">f8"), p.tolist()):
        before = np.array(same)
        assert (
            verify.chain("block", same, q.astype(np.float32), np.array([1, 2, 3], np.int64), uniforms)
            == wanted
        )
        np.testing.assert_array_equal(before, same)
    result = verify.chain("token", p, q, [1, 2, 3], uniforms)
    assert [type(x) for x in result] == [int, int]


P, Q, U = np.full((3, 4), 0.25), np.full((2, 4), 0.25), [0.5] * 4


@pytest.mark.parametrize(
    "rule, p, q, draft, uniforms, message",
    [
        ("typical", P, Q, [0, 1], U, "'typical' is not one of token, block, exact"),
        ("token", P[:2], Q, [0, 1], U, r"p has shape \[2, 4\]; \[3, V\]"),
        ("token", P[0], Q, [0, 1], U, "p has shape"),
        ("token", np.empty((3, 0)), None, [0, 1], U, "p has shape"),
        ("token", P, Q[:1], [0, 1], U, r"q has shape \[1, 4\]; \[2, 4\]"),
        ("token", P, Q[:, :3], [0, 1], U, r"q has shape \[2, 3\]; \[2, 4\]"),
        ("token", P.astype(np.float16), Q, [0, 1], U, "p is float16"),
        ("token", (P * 4).astype(int), Q, [0, 1], U, "p is int64"),
        ("token", P * 0.9, Q, [0, 1], U, r"p: row 0 sums to 0\.9"),
        ("token", P, Q * 1.00001, [0, 1], U, "q: row 0 sums to 1.00001"),
        ("token", P * [-1, 2, 2, 1], Q, [0, 1], U, r"p: row 0 gives token 0 the probability -0\.25"),
        ("token", P, Q * [1, 1, np.nan, 1], [0, 1], U, "q: row 0 gives token 2 the probability nan"),
        ("token", P * [1, np.inf, 1, 1], Q, [0, 1], U, "p: row 0 sums to inf"),
        ("token", P, Q, [0, 4], U, r"draft\[1\] is 4, outside the vocabulary of 4"),
        ("token", P, Q, [0, -1], U, "ids from -1 to 0"),
        ("token", P, Q, [0, 2**32], U, "ids from 0 to 4294967296"),
        ("token", P, Q, [0.0, 1.0], U, "draft is float64"),
        ("token", P, Q, [True, False], U, "draft is bool"),
        ("token", P, Q, [[0, 1]], U, "draft is int64"),
        ("token", P, Q, [0, 1], U[:3], r"uniforms have shape \(3,\); \[4\]"),
        ("token", P, Q, [0, 1], [0.5, 1.0, 0.5, 0.5], r"uniforms\[1\] is 1, outside \[0, 1\)"),
        ("token", P, Q, [0, 1], [0.5, 0.5, 0.5, -0.1], r"uniforms\[3\] is -0\.1"),
        ("exact", P, Q, [0, 1], [np.nan, 0.5, 0.5, 0.5], r"uniforms\[0\] is nan"),
        ("exact", P, None, [0, 1], ["a", "b", "c", "d"], "uniforms"),
    ],
)
def test_what_is_wrong_with_an_input_is_said(rule, p, q, draft, uniforms, message):
    with pytest.raises(BundleError, match=message):
        verify.chain(rule, p, q, draft, uniforms)


def test_rows_that_are_not_laws_do_not_crash_the_unchecked_walk():
    rng = np.random.default_rng(9)
    junk = np.array([0.0, -1.0, np.nan, np.inf, -np.inf, 1e308, 5e-324, 0.5])
    for rule in RULES:
        for _ in range(2000):
            p, q = rng.choice(junk, size=(4, 9)), rng.choice(junk, size=(3, 9))
            draft, uniforms = rng.integers(0, 9, 3).astype(np.int32), rng.random(5)
            try:
                accepted, token = verify.chain_of_laws(rule, p, q, draft, uniforms)
            except BundleError as error:
                assert "not a law" in str(error)
            else:
                assert 0 <= accepted <= 3 and 0 <= token < 9


# ---- Temperature 0 -----------------------------------------------------------------------------------------


def test_greedy_verification_is_the_argmax_walk():
    rng = np.random.default_rng(10)
    for _ in range(300):
        length, vocab = int(rng.integers(0, 9)), int(rng.integers(1, 200))
        logits = rng.integers(-4, 4, size=(length + 1, vocab)).astype(np.float32)  # many ties
        best = logits.argmax(axis=1)
        draft = np.where(rng.random(length) < 0.8, best[:length], rng.integers(0, vocab, length))
        accepted = next((i for i in range(length) if draft[i] != best[i]), length)
        assert verify.greedy(logits, draft) == (accepted, best[accepted])


@pytest.mark.parametrize("rule", ["token", "block", "exact"])
def test_temperature_0_is_greedy_under_every_rule(rule):
    rng = np.random.default_rng(12)
    for _ in range(100):
        logits = rng.normal(size=(5, 11)).astype(np.float32)
        p = sampling.laws(logits, temperature=0)
        q = sampling.laws(logits[:4] + rng.normal(size=(4, 11)).astype(np.float32) * 0.3, temperature=0)
        draft = q.argmax(axis=1)
        assert verify.chain(rule, p, q, draft, rng.random(6)) == verify.greedy(logits, draft)


@pytest.mark.parametrize(
    "logits, draft, message",
    [
        ([[0, np.nan], [0, 1]], [0], "logits: the logits hold NaN"),
        ([[0.0, 1.0]], [0], r"logits have shape \(1, 2\); \[2, V\]"),
        ([[0.0, 1.0]] * 2, [2], "outside the vocabulary of 2"),
        (np.empty((2, 0)), [0], "logits have shape"),
    ],
)
def test_what_is_wrong_with_greedy_inputs_is_said(logits, draft, message):
    with pytest.raises(BundleError, match=message):
        verify.greedy(logits, draft)
