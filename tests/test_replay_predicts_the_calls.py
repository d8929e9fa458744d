"""The replay says, without decoding, which calls a ladder will make: those that decoding then makes."""

import numpy as np
import pytest
from decoding import decode
from draftsmith.pipeline.replay import CallCosts, Plan, best_plan, next_misses, predict, replay
from draftsmith.pipeline.traces import Recording, trace
from draftsmith.speculate.ladder import Rung
from fake_engine import FakeEngine

NUM_TOKENS = 40
ROWS = (1, 2, 4, 8, 16, 32)
CALLS_ONLY = {
    "target": [0.0] * len(ROWS),
    "int8": [1.0] * len(ROWS),
}  # so that milliseconds count int8's calls


def greedy_recording(target, int8, prompt):
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(np.argmax(target.logits_after(tokens))))
    choices = [int(np.argmax(int8.logits_after(tokens[:end]))) for end in range(len(prompt), len(tokens))]
    return Recording(list(prompt), np.array(tokens[len(prompt) :]), {"int8": np.array(choices)})


def decode_for_real(engines, rungs, prompt):
    """Calls of the target behind the prefill, and of int8."""
    out = decode(engines, rungs, prompt, NUM_TOKENS)
    return out.target.rounds - 1, engines["int8"].calls


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "lengths", [{"suffix": 1, "int8": 1}, {"suffix": 3, "int8": 4}, {"suffix": 8, "int8": 7}]
)
def test_calls_are_those_of_decoding(seed, lengths):
    prompt = np.random.default_rng(seed).integers(3, size=6).tolist()
    for ladder in (["suffix"], ["int8"], ["suffix", "int8"]):
        engines = {"target": FakeEngine(3, seed), "int8": FakeEngine(3, seed, noise=1.2)}
        recorded = trace(greedy_recording(engines["target"], engines["int8"], prompt))
        target_calls, drafter_calls = replay(recorded, ladder, lengths, CallCosts(ROWS, CALLS_ONLY))
        rungs = [Rung(name, lengths[name]) for name in ladder]
        real_target_calls, real_drafter_calls = decode_for_real(engines, rungs, prompt)
        assert target_calls == real_target_calls
        if ladder == ["int8"]:
            assert drafter_calls == real_drafter_calls
        elif ladder == [
            "suffix",
            "int8",
        ]:  # it expects no inner acceptance where int8 has left the target's text
            assert real_drafter_calls <= drafter_calls <= NUM_TOKENS * lengths["int8"]


def test_a_plain_run_is_one_call_a_token():
    recorded = trace(Recording([1, 2], np.array([1, 2, 1, 2, 3]), {}))
    assert replay(recorded, (), {}, CallCosts((1,), {"target": [2.0]})) == (4, 8.0)


def test_next_misses():
    agrees = np.array([True, False, True, True, False, True])
    assert next_misses(agrees).tolist() == [1, 1, 4, 4, 4, 6]


def test_the_best_lengths_follow_the_costs():
    """A drafter that is always right: long drafts win where rows are free, short ones where they cost."""
    count = 30
    recorded = trace(Recording([0], np.arange(100, 100 + count), {"int8": np.arange(100, 100 + count)}))
    options = {"int8": (1, 2, 4, 8)}

    def best(target_ms: list[float]) -> Plan:
        return best_plan(
            [recorded], ("int8",), options, CallCosts((1, 9), {"target": target_ms, "int8": [0.1, 0.1]})
        )

    assert best([1.0, 1.0]).num_speculative_tokens == {"int8": 8}
    assert best([1.0, 9.0]).num_speculative_tokens == {"int8": 1}
    plain = predict([recorded], (), {}, CallCosts((1, 9), {"target": [1.0, 9.0]}))
    assert best([1.0, 9.0]).tokens_per_second < plain.tokens_per_second
