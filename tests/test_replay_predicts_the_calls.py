"""The replay says, without the engines, which calls a ladder will make: those that decoding then makes."""

import numpy as np
import pytest
from decoding import decode
from draftsmith.pipeline.replay import Prediction, Recording, best_plan, predict, replay
from draftsmith.speculate.costs import Costs
from draftsmith.speculate.datastore import Datastore, write_datastore
from draftsmith.speculate.drafters import Sources
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.ngrams import Ngrams, write_table
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine, FakeGuest

NUM_TOKENS = 40
ROWS = (1, 2, 4, 8, 16, 32)
NOISE = {"target": 0.0, "int8": 1.2, "tiny": 2.0}
MILLISECONDS = {"target": 15.0, "int8": 6.0, "tiny": 2.0}
LADDERS = [["suffix"], ["int8"], ["suffix", "int8"], ["tiny", "int8"], ["suffix", "tiny", "int8"]]
LENGTHS = [
    {"suffix": 1, "int8": 1, "tiny": 1},
    {"suffix": 3, "int8": 4, "tiny": 2},
    {"suffix": 8, "int8": 7, "tiny": 5},
]


def make_costs(rows, overhead_ms=0.0, **milliseconds) -> Costs:
    """That do not depend on the context."""
    tables = {name: (tuple(row),) for name, row in milliseconds.items()}
    return Costs(rows=tuple(rows), contexts=(0,), milliseconds=tables, overhead_ms=overhead_ms)


COSTS = make_costs(ROWS, **{name: [ms * (1 + 0.02 * r) for r in ROWS] for name, ms in MILLISECONDS.items()})


class Counted(FakeEngine):
    """Notes the rows of every call and the slots before them."""

    def reserve(self, num_slots):
        super().reserve(num_slots)
        self.log = []

    def forward(self, token_ids, start, *rest, **named):
        self.log.append((len(token_ids), start))
        return super().forward(token_ids, start, *rest, **named)


class CountedGuest(FakeGuest, Counted):
    def __init__(self, host, **settings):
        super().__init__(host, **settings)
        self.log = []  # its host is asked for room


def make_engines(seed, vocab=3):
    return {name: Counted(vocab, seed, noise, own=1 + i) for i, (name, noise) in enumerate(NOISE.items())}


def record_greedily(engines, prompt, guests=()) -> Recording:
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(np.argmax(engines["target"].logits_after(tokens))))
    choices, leads = {}, {}
    for name in ("int8", "tiny"):
        rows = np.stack([engines[name].logits_after(tokens[:end]) for end in range(len(prompt), len(tokens))])
        choices[name] = rows.argmax(-1)
        leads[name] = np.sort(rows, -1)[:, -1] - np.sort(rows, -1)[:, -2]
    return Recording(list(prompt), np.array(tokens[len(prompt) :]), choices, leads, guests=frozenset(guests))


def decode_for_real(engines, ladder, lengths, prompt, costs=None):
    tables = {name: costs.spread(name, 9, len(prompt)) for name in costs.milliseconds} if costs else None
    decode(engines, [Rung(name, lengths[name]) for name in ladder], prompt, NUM_TOKENS, costs=tables)
    return {name: [call for call in engines[name].log if name != "target" or call[1] >= len(prompt)]
            for name in engines if name in [*ladder, "target"]}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_calls_of_fixed_lengths_are_those_of_decoding(seed, lengths):
    prompt = np.random.default_rng(seed).integers(3, size=6).tolist()
    engines = make_engines(seed)
    recording = record_greedily(engines, prompt)
    for ladder in LADDERS:
        foreseen = replay(recording, ladder, lengths)
        real = decode_for_real(engines, ladder, lengths, prompt)
        assert foreseen.calls["target"] == real["target"] and foreseen.target_calls == len(real["target"])
        if len(ladder) == 1:
            assert foreseen.calls == real
        else:  # it expects no inner acceptance where a level has left the target's text
            assert len(real["int8"]) <= len(foreseen.calls["int8"])


@pytest.mark.parametrize("ladder", [["int8"], ["suffix", "int8"], ["tiny", "int8"]])
def test_a_drafter_in_the_targets_cache_reads_no_prompt(ladder):
    prompt, lengths = [0, 1, 2, 1, 0, 1, 2], LENGTHS[1]
    for seed in range(6):
        engines = make_engines(seed)
        engines |= {
            name: CountedGuest(engines["target"], seed=seed, noise=NOISE[name], own=own)
            for own, name in enumerate(("int8", "tiny"), 2)
        }
        recording = record_greedily(engines, prompt, ["int8", "tiny"])
        foreseen = replay(recording, ladder, lengths)
        real = decode_for_real(engines, ladder, lengths, prompt)
        assert foreseen.calls["target"] == real["target"]
        assert len(ladder) > 1 or foreseen.calls == real
        for calls in (foreseen.calls, real):
            assert min(slots for name in ladder if name in calls for _, slots in calls[name]) >= len(prompt)


@pytest.mark.parametrize("ladder", LADDERS)
def test_time_with_scheduled_lengths_is_that_of_decoding(ladder):
    """What a level says once it has left the target's text is not recorded, so not to the call."""
    lengths = {"suffix": 8, "int8": 8, "tiny": 8}
    foreseen = real = 0.0
    for seed in range(12):
        prompt = np.random.default_rng(seed).integers(3, size=6).tolist()
        engines = make_engines(seed)
        foreseen_calls = replay(record_greedily(engines, prompt), ladder, lengths, COSTS).calls
        real_calls = decode_for_real(engines, ladder, lengths, prompt, COSTS)
        foreseen, real = (
            sum + COSTS_OF(calls) for sum, calls in ((foreseen, foreseen_calls), (real, real_calls))
        )
    assert foreseen == pytest.approx(real, rel=0.08)


def COSTS_OF(calls) -> float:
    return sum(float(COSTS.of(name, *call)) for name, log in calls.items() for call in log)


def test_a_plain_run_is_one_call_a_token():
    recording = Recording([1, 2], np.array([1, 2, 1, 2, 3]), {})
    costs = make_costs([1], 0.5, target=[2.0])
    plan = predict([recording], (), {}, costs)
    assert (plan.tokens_per_target_call, plan.tokens_per_second) == (1.0, 1000 / 2.5)


def test_costs_depend_on_rows_and_context():
    tables = {"e": ((10.0, 14.0), (12.0, 18.0), (20.0, 28.0))}
    costs = Costs(rows=(1, 3), contexts=(50, 100, 200), milliseconds=tables)
    assert costs.of("e", 2, 50) == 12.0 and costs.of("e", 4, 10) == 16.0
    assert costs.of("e", 1, 75) == 11.0 and costs.of("e", 3, 150) == 23.0
    assert costs.of("e", 1, 300) == 28.0, "beyond the last context on a straight line"
    assert costs.of("e", np.array([1, 2]), np.array([100, 200])).tolist() == [12.0, 24.0]
    assert costs.spread("e", 3, 75) == [11.0, 13.5, 16.0]
    flat = make_costs([1, 128], e=[2.0, 129.0])
    assert flat.of_reading("e", 300) == 129.0 + 129.0 + flat.of("e", 44, 0)


def test_the_best_lengths_follow_the_costs():
    """A drafter that is always right: long drafts win where rows are free, short ones where they cost."""
    count = 30
    right = np.arange(100, 100 + count)
    recording = Recording([0], right, {"int8": right}, {"int8": np.full(count, 9.0)})
    options = {"int8": (1, 2, 4, 8)}

    def best(target_ms: list[float]) -> Prediction:
        costs = make_costs([1, 9], target=target_ms, int8=[0.1, 0.1])
        return best_plan([recording], ("int8",), options, costs)

    assert best([1.0, 1.0]).num_speculative_tokens == {"int8": 8}
    dear = best([1.0, 90.0])
    plain = predict([recording], (), {}, make_costs([1, 9], target=[1.0, 90.0]))
    assert dear.tokens_per_second < 1.1 * plain.tokens_per_second
    assert dear.tokens_per_target_call < best([1.0, 1.0]).tokens_per_target_call


@pytest.mark.parametrize(
    "ladder",
    [
        ["rest"],
        ["bigram"],
        ["history"],
        ["rest+bigram"],
        ["bigram-tree"],
        ["rest+bigram-tree"],
        ["rest", "int8"],
    ],
)
def test_drafters_that_know_tokens_make_the_calls_of_decoding(tmp_path, ladder):
    """The tape has places in a list of tokens; a datastore and a table have tokens."""
    rng, fewer = np.random.default_rng(0), 0
    after = rng.integers(3, size=(4, 1)).astype(np.int32)
    write_table(tmp_path / "table", after, np.full(after.shape, 0.5, np.float32), "00" * 32)
    for seed in range(6):
        prompt = rng.integers(3, size=6).tolist()
        engines = make_engines(seed)
        recording = record_greedily(engines, prompt)
        said = recording.tokens.tolist()
        write_datastore(tmp_path / "rest", [said[:20], rng.integers(3, size=30), said[15:]])
        lengths = dict.fromkeys(ladder, 5)
        sources = Sources((), Datastore(tmp_path / "rest", 3), Ngrams(tmp_path / "table", 3, "00" * 32))
        foreseen = replay(recording, ladder, lengths, sources=sources)
        rungs = [Rung(name, lengths[name]) for name in ladder]
        decoder = build_ladder(rungs, engines.__getitem__, None, sources.open)
        decoder.begin(prompt, NUM_TOKENS, Sampling())
        while decoder.step():
            pass
        real = [call for call in engines["target"].log if call[1] >= len(prompt)]
        assert foreseen.calls["target"] == real
        fewer += NUM_TOKENS - 1 - len(real)
    assert fewer > 20, "drafts must be taken for this to show anything"


@pytest.mark.parametrize("ladder", [["recycling"], ["recycling", "int8"]])
def test_a_drafter_that_learns_from_logits_is_never_promised_more_than_it_keeps(ladder):
    """On the tape the target says nothing of use off its own text, which the drafter would learn from."""
    foreseen, real = 0, 0
    for seed in range(6):
        prompt = np.random.default_rng(seed).integers(3, size=6).tolist()
        engines = make_engines(seed)
        lengths = dict.fromkeys(ladder, 4)
        recording = record_greedily(engines, prompt)
        foreseen += replay(recording, ladder, lengths).target_calls
        real += len(decode_for_real(engines, ladder, lengths, prompt)["target"])
    assert real <= foreseen < 6 * NUM_TOKENS


@pytest.mark.parametrize("name", ["recycling", "recycling-tree", "suffix-tree", "suffix+recycling-tree"])
def test_drafters_that_learn_from_logits_are_foreseen_too(name):
    """The suffix tree to the call. What recycling learns off the text is not recorded, so nearly."""
    foreseen = real = plain = 0
    for seed in range(8):
        prompt = np.random.default_rng(seed).integers(30, size=6).tolist()
        engines = make_engines(seed, vocab=30)
        recording = record_greedily(engines, prompt)
        rows = [engines["target"].logits_after([*prompt, *recording.tokens[:i]]) for i in range(NUM_TOKENS)]
        likely = np.argsort(-np.array(rows), axis=-1, kind="stable")[:, :8]
        recording = Recording(prompt, recording.tokens, recording.choices, recording.leads, likely)
        foreseen += replay(recording, [name], {name: 15}).target_calls
        real += len(decode_for_real(engines, [name], {name: 15}, prompt)["target"])
        plain += NUM_TOKENS - 1
    assert real < plain
    assert foreseen == real if name == "suffix-tree" else foreseen == pytest.approx(real, rel=0.08)
