"""Where calls have known costs, drafts are as long as pays: by what was accepted so far, never by a clock."""

import json

import numpy as np
import pytest
from decoding import decode
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine, open_bundle, write_bundle

ROWS = 65
FLAT = [1.0] * ROWS


def rising(first, slope):
    return [first + slope * r for r in range(ROWS)]


def spent(engines, costs):
    """Milliseconds of all calls, by the tables."""
    return sum(costs[name][rows - 1] for name, engine in engines.items() for rows in engine.sizes)


class Counted(FakeEngine):
    """Notes the rows of every call but the first, which reads the prompt."""

    def reserve(self, num_slots):
        super().reserve(num_slots)
        self.sizes = []

    def forward(self, token_ids, start, *rest, **named):
        if start:
            self.sizes.append(len(token_ids))
        return super().forward(token_ids, start, *rest, **named)


def pair(noise, seed=1, vocab_size=7):
    return {
        "target": Counted(vocab_size, seed, max_seq_len=600),
        "int8": Counted(vocab_size, seed, noise=noise, max_seq_len=600),
    }


def test_free_rows_and_a_drafter_that_is_always_right_draft_to_the_full():
    costs = {"target": FLAT, "int8": rising(0.02, 0)}
    out = decode(pair(noise=0), [Rung("int8", 6)], [1, 2], 200, costs=costs)
    blocks = [len(block) for block in out.blocks]
    assert blocks[4:-2] == [7] * (len(blocks) - 6), "once it has shown so"


def test_a_drafter_dearer_than_the_target_is_tried_now_and_then_only():
    costs = {"target": FLAT, "int8": rising(1.2, 0)}
    out = decode(pair(noise=0), [Rung("int8", 6)], [1, 2], 300, costs=costs)
    tried = out.drafter.drafted_at[0]
    assert out.drafter.drafted == tried, "an exploration is one token"
    assert 300 // 20 <= tried <= 300 // 16


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("noise", [0.0, 0.8, 3.0])
def test_priced_drafts_cost_hardly_more_than_the_best_fixed_length(noise, sampling):
    costs = {"target": rising(1.0, 0.08), "int8": rising(0.25, 0.02)}
    times = {}
    for length in (0, 2, 8):
        engines = pair(noise)
        rungs = [Rung("int8", length)] if length else []
        decode(engines, rungs, [1, 2], 400, sampling)
        times[length] = spent({"target": engines["target"]} if not length else engines, costs)
    engines = pair(noise)
    decode(engines, [Rung("int8", 8)], [1, 2], 400, sampling, costs=costs)
    assert spent(engines, costs) < 1.1 * min(times.values())


def test_a_drafter_that_did_badly_is_trusted_again_when_it_does_well():
    class Improving(Counted):
        def logits_after(self, tokens):
            right = super().logits_after(tokens)
            return right if len(tokens) > 200 else np.roll(right, 1)

    engines = {"target": Counted(7, 1, max_seq_len=600), "int8": Improving(7, 1, max_seq_len=600)}
    costs = {"target": rising(1.0, 0.05), "int8": rising(0.2, 0.02)}
    out = decode(engines, [Rung("int8", 4)], [1, 2], 500, costs=costs)
    lengths = np.cumsum([len(block) for block in out.blocks])
    rounds = [int(np.searchsorted(lengths, at)) for at in (100, 198, 350, 500)]
    assert rounds[1] - rounds[0] > 90, "it is left out where it fails"
    assert rounds[3] - rounds[2] < 60, "and used where it does not"


def test_long_matches_are_followed_and_short_ones_are_not_where_rows_are_dear():
    class Cycle(Counted):
        def logits_after(self, tokens):
            return np.eye(self.vocab_size, dtype=np.float32)[(int(tokens[-1]) + 1) % self.vocab_size]

    costs = {"target": rising(1.0, 0.3)}
    out = decode({"target": Cycle(5)}, [Rung("suffix", 8)], [0, 1, 2, 3, 4, 0], 100, costs=costs)
    assert out.drafter.accepted > 60
    noisy = decode({"target": Counted(5, 1)}, [Rung("suffix", 8)], [0, 1, 2, 3, 4, 0], 200, costs=costs)
    fixed = decode({"target": Counted(5, 1)}, [Rung("suffix", 8)], [0, 1, 2, 3, 4, 0], 200)
    assert noisy.drafter.drafted < 0.4 * fixed.drafter.drafted


def test_equal_seeds_give_equal_samples_and_equal_calls():
    costs = {"target": rising(1.0, 0.08), "int8": rising(0.25, 0.02)}
    runs = []
    for _ in range(2):
        engines = pair(noise=0.8)
        rungs = [Rung("suffix", 3), Rung("int8", 6)]
        out = decode(engines, rungs, [1, 2], 200, Sampling(0.9, seed=5), costs=costs)
        runs.append((out.blocks, engines["target"].sizes, engines["int8"].sizes))
    assert runs[0] == runs[1]


PLAN = {"ladder": ["int8"], "num_speculative_tokens": {"int8": 6}}
DEAR = {
    "rows": [1, 2, 8],
    "contexts": [0],
    "milliseconds": {"target": [[1, 1, 1.6]], "int8": [[1.5, 1.5, 1.5]]},
}
ONE = {"rows": [1], "contexts": [0]}


def test_a_plans_costs_hold_unless_the_caller_says_how_long(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path / "b", plan=PLAN | {"costs": DEAR}))
    settings = {"max_new_tokens": 60, "ignore_eos": True}
    assert bundle.generate("abc", **settings).stats.drafted < 5
    told = bundle.generate("abc", **settings, num_speculative_tokens=6).stats
    assert len(told.drafts[0].drafted_at) == 6


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        (ONE | {"rows": [2, 1], "milliseconds": {}}, "rows must rise"),
        (ONE | {"rows": [], "milliseconds": {}}, "rows"),
        (ONE | {"contexts": [9, 9], "milliseconds": {}}, "contexts must rise"),
        (ONE | {"rows": [1, 2], "milliseconds": {"target": [[1.0]]}}, "one figure for each"),
        (ONE | {"milliseconds": {"target": [[1.0], [1.0]]}}, "one list for each"),
        (
            ONE | {"milliseconds": {"target": [[0.0]]}},
            r"costs\.milliseconds\.target\.0\.0: .* > 0\.0, found 0\.0",
        ),
        (ONE | {"contexts": [0, 9], "milliseconds": {"target": [[2.0], [1.0]]}}, "must not fall"),
        (
            ONE | {"milliseconds": {"target": [[2.0]]}, "overhead_ms": -1.0},
            r"costs\.overhead_ms: .* >= 0\.0, found -1\.0",
        ),
        ({"rows": [1], "milliseconds": {}}, "contexts"),
        (ONE, "milliseconds"),
    ],
)
def test_costs_that_make_no_table_are_refused(tmp_path, costs, words):
    with pytest.raises(BundleError, match=words):
        open_bundle(write_bundle(tmp_path / "b", plan=PLAN | {"costs": costs}))


def test_a_plan_without_costs_keeps_its_lengths(tmp_path):
    folder = write_bundle(tmp_path / "b", plan=PLAN)
    assert "costs" not in json.loads((folder / "plan.json").read_text())
    stats = open_bundle(folder).generate("abc", 60, ignore_eos=True).stats
    assert stats.drafts[0].drafted_at[0] == stats.drafts[0].rounds
