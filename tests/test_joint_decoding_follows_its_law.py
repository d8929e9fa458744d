"""Two models decoded together follow the joint law exactly, whoever proposes and how much."""

from collections import Counter

import numpy as np
import pytest
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.joint import Contrast, Ensemble, JointDecoder, generate_jointly, joint_law
from draftsmith.speculate.settings import Sampling
from fake_engine import BYTE_VOCAB, FakeEngine, open_bundle, write_bundle
from test_sampling_keeps_the_target_law import Branches, enumerate_law, largest_error, softmax

PROPOSALS = [(0, 0), (0, 2), (1, 2), (2, 1), (3, 3), (1, 0), (0, 1)]
LAWS = [Ensemble(0.3), Ensemble(0.0), Ensemble(1.0), Contrast(0.4), Contrast(0.5, cutoff=0.3)]


def truncated(logits, temperature, top_k, top_p):
    """A law in float64, for logits without ties."""
    law = softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-law)
    if top_k:
        law[order[top_k:]] = 0
        law /= law.sum()
    dropped = 0.0
    for token in order[::-1]:
        if law[token] and dropped + law[token] <= 1 - top_p:
            dropped += law[token]
            law[token] = 0
    return law / law.sum()


def expected_law(law, first, second, temperature=1.0, top_k=0, top_p=1.0):
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    p, q = (truncated(row, temperature, top_k, top_p) for row in (first, second))
    if isinstance(law, Ensemble):
        return (1 - law.weight) * p + law.weight * q
    kept = (p > 0) & (softmax(first) >= law.cutoff * softmax(first).max())
    scores = np.where(kept, (first - law.weight * second) / temperature, -np.inf)
    return softmax(scores)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.6, 0, 0.8), (1.7, 5, 1), (1, 7, 0.9)]
)
def test_the_law_of_two_rows(law, temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    for vocab in (1, 2, 9, 130, 1000):
        first, second = rng.normal(0, 3, (2, vocab)).astype(np.float32)
        found = joint_law(law, first, second, Sampling(temperature, top_k, top_p))
        assert np.abs(found - expected_law(law, first, second, temperature, top_k, top_p)).max() < 1e-12


def test_greedy_is_the_likeliest_token_of_the_law_at_temperature_1():
    first, second = np.log(np.array([[0.5, 0.4, 0.1], [0.1, 0.4, 0.5]], np.float32))
    for law, token in ((Ensemble(0.5), 1), (Ensemble(0.1), 0), (Contrast(0.0), 0), (Contrast(1.0), 0)):
        found = joint_law(law, first, second, Sampling())
        assert found[token] == 1 and found.sum() == 1
        assert np.argmax(expected_law(law, first, second)) == token


def pair(vocab, noise=0.8, scale=1.0):
    return FakeEngine(vocab, 3, scale=scale), FakeEngine(vocab, 3, noise=noise, scale=scale)


def enumerate_joint(engines, law, prompt, length, eos):
    def law_after(tokens):
        return expected_law(law, *(engine.logits_after(tokens) for engine in engines))

    return enumerate_law(law_after, prompt, length, eos)


def decode(engines, law, prompt, count, sampling, proposals, eos=(), **hook):
    decoder = JointDecoder(*engines)
    decoder.begin(prompt, count, law, sampling, proposals, eos, **hook)
    return [token for tokens in iter(decoder.step, []) for token in tokens], decoder.counters()


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("proposals", PROPOSALS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_joint_law_of_three_tokens_by_enumeration(law, proposals, rule):
    engines, prompt, eos = pair(3), [0, 2, 1], [2]
    found: Counter = Counter()
    for run in Branches():
        tokens, _ = decode(
            engines, law, prompt, 3, Sampling(1.0, rule=rule), proposals, eos, verify=run.verify
        )
        found[tuple(tokens)] += run.weight
    assert largest_error(found, enumerate_joint(engines, law, prompt, 3, eos)) < 1e-12


def test_draws_of_the_shipped_rules_follow_it_too():
    """A G-test of two tokens over seeds; 8 degrees of freedom, 99.99 % are below 31.8."""
    engines, law, draws = pair(3), Ensemble(0.4), 6000
    expected = enumerate_joint(engines, law, [1, 0], 2, ())
    for rule in ("token", "block"):
        seen = Counter(
            tuple(decode(engines, law, [1, 0], 2, Sampling(1.0, seed=seed, rule=rule), (1, 2))[0])
            for seed in range(draws)
        )
        g = 2 * sum(count * np.log(count / draws / expected[tokens]) for tokens, count in seen.items())
        assert g < 31.8


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_greedy_tokens_do_not_depend_on_who_proposes(law):
    engines, prompt = pair(50, noise=0.5, scale=3), [7, 8, 9]
    expected = list(prompt)
    for _ in range(60):
        rows = [engine.logits_after(expected) for engine in engines]
        expected.append(int(np.argmax(expected_law(law, *rows))))
    for proposals in [*PROPOSALS, (2, 8), (32, 32)]:
        assert decode(engines, law, prompt, 60, Sampling(), proposals)[0] == expected[3:]


def test_every_token_is_counted_and_alternating_saves_calls():
    engines, law = pair(50, noise=0.3, scale=3), Ensemble(0.5)
    calls = {}
    for proposals in ((0, 0), (0, 4), (1, 4)):
        tokens, (first, second) = decode(engines, law, [1, 2], 64, Sampling(), proposals)
        assert len(tokens) == 64 and first.accepted + second.accepted <= 64
        assert (first.proposed > 0) == (proposals[0] > 0)
        calls[proposals] = first.calls
        assert (first.calls, second.calls) == (64, 64) or proposals != (0, 0)
    assert calls[1, 4] < calls[0, 4] < calls[0, 0] / 2


def test_a_prompt_longer_than_a_call_and_a_cache_that_is_just_full():
    engines = pair(20)
    tokens, _ = decode(engines, Ensemble(), [1, 2, 3] * 60, 76, Sampling(1.0), (2, 8))
    assert len(tokens) == 76
    with pytest.raises(BundleError, match="180 prompt tokens and 77 new ones do not fit the 256 slots"):
        decode(engines, Ensemble(), [1, 2, 3] * 60, 77, Sampling(), (2, 8))


def test_what_makes_no_law_is_refused(tmp_path):
    engines = pair(20)
    for law, words in (
        (Ensemble(1.5), "a share from 0 to 1"),
        (Contrast(-1.0), "weight is -1"),
        (Contrast(0.1, cutoff=2), "cutoff is 2"),
    ):
        with pytest.raises(BundleError, match=words):
            decode(engines, law, [1], 4, Sampling(), (1, 4))
    for proposals in ((1, 33), (-1, 4)):
        with pytest.raises(BundleError, match=r"proposes .* tokens; 0 to 32"):
            decode(engines, Ensemble(), [1], 4, Sampling(), proposals)
    with pytest.raises(BundleError, match='is verified by "token" or "block"'):
        decode(engines, Ensemble(), [1], 4, Sampling(rule="exact"), (1, 4))
    with pytest.raises(BundleError, match="one engine"):
        JointDecoder(engines[0], engines[0])
    with pytest.raises(BundleError, match="vocabularies of 20 and 21"):
        JointDecoder(engines[0], FakeEngine(21))


def test_a_bundle_with_its_drafter_and_with_another_bundle(tmp_path):
    bundle, other = (open_bundle(write_bundle(tmp_path / name)) for name in ("one", "two"))
    plain = bundle.generate("The drafter", 24, speculate="none", ignore_eos=True)
    alone = generate_jointly(bundle, "int8", Ensemble(0.0), "The drafter", 24, ignore_eos=True)
    assert alone.token_ids == plain.token_ids and alone.text == plain.text
    both = generate_jointly(bundle, other, Ensemble(0.5), "The drafter", 24, ignore_eos=True)
    assert both.token_ids == plain.token_ids, "an ensemble of a model with itself"
    assert both.models["target"]["calls"] < 24 and both.law == f"0.5 target + 0.5 {other.path}"
    assert bundle.generate("The drafter", 4).token_ids == plain.token_ids[:4], "the bundle is free again"

    with pytest.raises(BundleError, match="no drafter 'int9' to decode with, only int8, tiny"):
        generate_jointly(bundle, "int9", Ensemble(), "x")
    engines = {"target": {"vocab_size": BYTE_VOCAB + 2}}
    wider = open_bundle(write_bundle(tmp_path / "wider", engines, plan={"ladder": []}))
    with pytest.raises(BundleError, match="vocabularies of 258 and 260"):
        generate_jointly(bundle, wider, Ensemble(), "x")
