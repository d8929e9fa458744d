"""Trees that a model drafts, through the shipped loop: the likeliest prefixes under its law; and whatever
they are, greedy output is the target's bit for bit and sampled output has its law."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from decoding import decode, random_costs
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung, build_ladder, check_names
from draftsmith.speculate.levels import ENGINE_TREES
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine, FakeGuest
from test_sampling_keeps_the_target_law import enumerate_target, largest_error, process, softmax
from test_trees_are_drafted_losslessly import TreeBranches

GREEDY = Sampling()
KINDS = ["int8-tree", "int8-graph"]
ALL_KINDS = [*KINDS, "int8-sequoia"]


class Forgetful(FakeEngine):
    """One that cannot move slots: what stands is read again."""

    keep = property(lambda self: (_ for _ in ()).throw(AttributeError("keep")))


class Watched(FakeEngine):
    """Notes the calls behind the prompt: (start, tokens, what each row sees or None)."""

    def reserve(self, num_slots):
        super().reserve(num_slots)
        self.log = []

    def forward(self, token_ids, start, position_ids=None, mask=None, num_logits=None):
        if start:
            self.log.append((start, token_ids.tolist(), None if mask is None else mask.copy()))
        return super().forward(token_ids, start, position_ids, mask, num_logits)


class Shortsighted(Watched):
    """The last two tokens are all that it looks at."""

    def logits_after(self, tokens):
        return super().logits_after(list(tokens)[-2:])


def engines_of(vocab, seed, kind=FakeEngine, **settings):
    target = FakeEngine(vocab, seed, **settings)
    return {
        "target": target,
        "int8": kind(vocab, seed, noise=0.8, **settings),
        "int4": FakeEngine(vocab, seed, noise=1.1, own=2, **settings),
        "skip": FakeGuest(target, seed=seed, noise=0.9, own=3),
    }


def paths_in(call, text, before=()):
    """The tokens behind `text` that each row of a call ends with; none for rows of the text. before: those
    that earlier calls put behind the text."""
    start, tokens, mask = call
    slots = [*text, *before][:start] + tokens
    paths = []
    for row in range(len(tokens)):
        sees = np.arange(len(slots)) <= start + row if mask is None else mask[row]
        path = [slots[slot] for slot in np.flatnonzero(sees) if slot >= len(text)]
        if path:
            paths.append(tuple(path))
    return paths


def trees_of(engines, name, size, prompt, count, sampling=GREEDY, eos=()):
    """The tree that the target verified in every round, as (text before it, paths), and the decoder."""
    target = engines["target"]
    assert isinstance(target, Watched)
    decoder = build_ladder([Rung(name, size)], engines.__getitem__)
    decoder.begin(list(prompt), count, sampling, eos)
    text, trees = list(prompt), []
    while block := decoder.step():
        if len(text) > len(prompt):
            trees.append(([*text], paths_in(target.log[-1], text)))
        text += block
    return trees, decoder


# ---- The tree ----------------------------------------------------------------------------------------------


def list_prefixes(law_after, text, depth, eos):
    """The sequences of up to `depth` tokens behind `text`, none past an end of text, with their chances."""
    found, level = {}, {(): 1.0}
    for _ in range(depth):
        level = {
            (*path, token): chance * mass
            for path, chance in level.items()
            if not path or path[-1] not in eos
            for token, mass in enumerate(law_after([*text, *path]))
            if mass > 0
        }
        found |= level
    return found


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(0.7, top_k=3, top_p=0.95, rule="exact")], ids=["greedy", "processed"]
)
@pytest.mark.parametrize("seed", range(4))
def test_a_tree_holds_the_likeliest_prefixes_of_all(seed, sampling):
    rng, full = np.random.default_rng(seed), 0
    for _ in range(6):
        vocab, size, count = int(rng.choice([2, 3, 4])), int(rng.choice([1, 3, 9, 17, 40])), 7
        engines = {
            "target": Watched(vocab, seed, scale=1),
            "int8": FakeEngine(vocab, seed, noise=0.8, scale=float(rng.choice([0.3, 1, 3]))),
        }
        eos = (0,) if rng.random() < 0.5 else ()
        prompt = rng.integers(1, vocab, size=3).tolist()
        trees, _ = trees_of(engines, "int8-tree", size, prompt, count, sampling, eos)

        def law_after(text, drafter=engines["int8"]):
            logits = drafter.logits_after(text)
            if sampling.temperature == 0:
                return softmax(logits)
            return process(logits, sampling.temperature, sampling.top_k, sampling.top_p)

        for text, paths in trees:
            depth = min(size, count - (len(text) - len(prompt)) - 1)
            chances = list_prefixes(law_after, text, depth, eos)
            assert len(set(paths)) == len(paths) == min(size, len(chances))
            drafted = [chances[path] for path in paths]
            assert drafted == pytest.approx(sorted(chances.values(), reverse=True)[: len(paths)], rel=1e-9)
            full += len(paths) == size > 1
    assert full > 2


def test_the_largest_tree_is_the_likeliest_too():
    """64 nodes over a law that is nearly flat, and over one that is nearly certain."""
    for scale in (0.05, 6):
        engines = {"target": Watched(3, 1, scale=scale), "int8": FakeEngine(3, 1, noise=0.1, scale=scale)}
        trees, _ = trees_of(engines, "int8-tree", 64, [1, 2], 10)
        for text, paths in trees:
            chances = list_prefixes(
                lambda t, e=engines: softmax(e["int8"].logits_after(t)), text, 10 - (len(text) - 2) - 1, ()
            )
            best = sorted(chances.values(), reverse=True)[:64]
            assert [chances[path] for path in paths] == pytest.approx(best, rel=1e-9)


def test_several_nodes_are_read_in_a_call():
    engines = {"target": Watched(5, 2), "int8": Watched(5, 2, noise=0.8)}
    _, decoder = trees_of(engines, "int8-tree", 24, [1, 2], 60)
    drafts = decoder.counters(0)
    assert drafts.drafted > 20 * (drafts.asked - 3)
    assert drafts.rows > 1.8 * drafts.calls


# ---- The graph ---------------------------------------------------------------------------------------------


def test_a_graph_over_a_law_of_two_tokens_is_the_tree_with_fewer_rows():
    """Where two tokens decide what follows, what is borrowed is right."""
    rows = Counter()
    for seed, size in itertools.product(range(4), (6, 20, 50)):
        found = {}
        for name in KINDS:
            engines = {"target": Watched(3, seed), "int8": Shortsighted(3, seed, noise=0.8)}
            found[name], decoder = trees_of(engines, name, size, [1, 2, 0, 1], 40)
            rows[name] += decoder.counters(0).rows
        assert [set(paths) for _, paths in found["int8-graph"]] == [
            set(paths) for _, paths in found["int8-tree"]
        ]
    assert rows["int8-graph"] < 0.7 * rows["int8-tree"]


def test_a_graph_reads_no_path_twice():
    engines = {"target": Watched(4, 1), "int8": Watched(4, 1, noise=0.8)}
    decoder = build_ladder([Rung("int8-graph", 40)], engines.__getitem__)
    decoder.begin([1, 2], 40, GREEDY)
    text, read = [1, 2], 0
    while block := decoder.step():
        paths = []
        for call in engines["int8"].log:
            paths += paths_in(call, text, [path[-1] for path in paths])
        engines["int8"].log.clear()
        assert len(set(paths)) == len(paths)
        last_two = {tuple([text[-1], *path][-2:]) for path in paths}
        assert len(paths) < 2 * len(last_two) + 2, "what follows two tokens is read again behind itself only"
        read += len(paths)
        text += block
    assert read > 50


# ---- Greedy ------------------------------------------------------------------------------------------------

LADDERS = [
    [("int8-tree", 1)],
    [("int8-tree", 6)],
    [("int8-tree", 64)],
    [("int8-graph", 17)],
    [("skip-tree", 12)],
    [("skip-graph", 12)],
    [("int4-tree", 9), ("int8", 4)],
    [("int4-graph", 30), ("int8", 6)],
    [("skip-tree", 8), ("int8", 3)],
    [("int4-tree", 9), ("skip", 4)],
    [("int8-sequoia", 1)],
    [("int8-sequoia", 64)],
    [("skip-sequoia", 12)],
    [("int4-sequoia", 9), ("int8", 4)],
    [("int4-sequoia", 9), ("skip", 4)],
]


@pytest.mark.parametrize("kind", [FakeEngine, Forgetful], ids=["keeps-paths", "reads-again"])
@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ",".join(f"{n}={k}" for n, k in ladder))
def test_the_output_is_the_targets(ladder, kind):
    rng, accepted, rungs = np.random.default_rng(len(ladder)), 0, [Rung(*rung) for rung in ladder]
    for seed in range(6):
        vocab = int(rng.choice([2, 3, 7]))
        engines = engines_of(vocab, seed, kind)
        prompt = rng.integers(vocab, size=int(rng.integers(1, 12))).tolist()
        eos = (0,) if seed % 3 == 0 else ()
        costs = random_costs(rng, engines) if seed % 2 else None
        for sampling in (GREEDY, Sampling(1.0, seed=seed, rule="exact")):
            plain = decode(engines, [], prompt, 50, sampling, eos)
            drafted = decode(engines, rungs, prompt, 50, sampling, eos, costs)
            assert drafted.tokens == plain.tokens
            accepted += drafted.drafter.accepted
            assert sum(drafted.drafter.accepted_at) == drafted.drafter.accepted
    assert accepted > 30


class Contextual(FakeEngine):
    """A slot holds, as with a real model, what its token is behind those that its row saw; who sees the slot
    must be behind the same ones."""

    def reserve(self, num_slots):
        super().reserve(num_slots)
        self._paths = [()] * self.max_seq_len

    def forward(self, token_ids, start, position_ids=None, mask=None, num_logits=None):
        logits = super().forward(token_ids, start, position_ids, mask, num_logits)
        for row, slot in enumerate(range(start, start + len(token_ids))):
            sees = np.arange(slot + 1) if mask is None else np.flatnonzero(mask[row])
            path = tuple(self._slots[sees].tolist())
            for depth, before in enumerate(sees[:-1], 1):
                assert self._paths[before] == path[:depth]
            self._paths[slot] = path
        return logits

    def keep(self, start, slots):
        super().keep(start, slots)
        self._paths[start : start + len(slots)] = [self._paths[slot] for slot in slots]


@pytest.mark.parametrize(
    "ladder", [[f"int4{kind}", *above] for kind in ENGINE_TREES for above in ([], ["int8"])]
)
def test_what_a_cache_keeps_is_what_it_would_read(ladder):
    for seed in range(3):
        engines = {
            "target": Contextual(3, seed),
            "int8": Contextual(3, seed, noise=0.5),
            "int4": Contextual(3, seed, noise=0.8, own=2),
        }
        rungs = [Rung(name, 20 if name == ladder[0] else 4) for name in ladder]
        for sampling in (GREEDY, Sampling(1.0, seed=seed)):
            out = decode(engines, rungs, [1, 2, 0], 50, sampling)
            assert len(out.tokens) == 50 and out.decoder.counters(0).accepted > 5


@pytest.mark.parametrize("padding", [-2, 0, 3])
@pytest.mark.parametrize("name", ALL_KINDS)
def test_a_drafter_may_know_more_or_fewer_tokens(name, padding):
    """Of a target's padding it knows less, or has more, which is likely to it and never drafted."""
    target = FakeEngine(5, 3, padding=2, pad_logit=-9)
    drafter = FakeEngine(5, 3, noise=0.5, padding=2 + padding, pad_logit=5)
    engines, prompt = {"target": target, "int8": drafter}, [1, 6, 3]
    plain = decode(engines, [], prompt, 40).tokens
    out = decode(engines, [Rung(name, 12)], prompt, 40)
    assert out.tokens == plain
    assert out.drafter.accepted > 5


@pytest.mark.parametrize("slots", [60, 62, 70, 100])
@pytest.mark.parametrize("name", [*ALL_KINDS, "skip-tree", "skip-sequoia"])
def test_trees_shrink_where_the_cache_ends(name, slots):
    engines = engines_of(4, 2, max_seq_len=slots)
    plain = decode(engines, [], [1, 2], 58).tokens
    out = decode(engines, [Rung(name, 30)], [1, 2], 58)
    assert out.tokens == plain
    assert out.drafter.accepted > 10


@pytest.mark.parametrize("name", ALL_KINDS)
def test_what_was_read_of_the_path_that_stands_is_not_read_again(name):
    """A drafter that is always right has read all of an accepted path but its last node."""
    engines = {"target": FakeEngine(5, 1), "int8": Watched(5, 1)}
    decoder = build_ladder([Rung(name, 12)], engines.__getitem__)
    decoder.begin([1, 2, 3], 100, GREEDY)
    text, moved = [1, 2, 3], 0
    while block := decoder.step():
        text += block
        kept = decoder.kept(0)
        np.testing.assert_array_equal(engines["int8"]._slots[:kept], text[:kept])
        if len(block) > 1 and len(text) < 90:
            borrowed = name == "int8-graph"  # rows of another path are no rows of the text
            assert borrowed or len(text) - kept <= 2
            moved += len(text) - kept <= 2
    assert moved > 5


def test_trees_end_where_a_call_does_not_pay():
    def run(price):
        costs = {"target": [1.0] * 65, "int8": [price] * 65}
        engines = {"target": FakeEngine(5, 1), "int8": FakeEngine(5, 1, noise=0.4)}
        return decode(engines, [Rung("int8-tree", 24)], [1, 2], 200, costs=costs).decoder.counters(0)

    free, cheap, dear = run(0.001), run(0.3), run(3.0)
    assert free.calls > cheap.calls > dear.calls
    assert free.drafted > 15 * free.asked, "free rows are all used"
    assert dear.calls < 30, "a drafter dearer than the target is tried now and then only"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pytest.importorskip("torch")
    from draftsmith import load
    from tiny_bundle import write_tiny_bundle

    return load(write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"), threads=1)


@pytest.mark.parametrize("name", ALL_KINDS)
def test_real_graphs_say_the_same_and_keep_the_rows_of_the_path(bundle, name):
    """Greedily, and where the target samples by position."""
    prompt, settings = list(range(5, 90, 3)), {"max_new_tokens": 60, "ignore_eos": True}
    for sampled in ({}, {"temperature": 1.0, "seed": 4, "verify": "exact"}):
        plain = bundle.generate(prompt, speculate="none", **settings, **sampled)
        out = bundle.generate(prompt, speculate=[name], num_speculative_tokens=20, **settings, **sampled)
        assert out.token_ids == plain.token_ids
        assert out.stats.drafts[0].drafted > 100 and out.stats.calls.keys() == {"target", "int8"}


# ---- Sampling ----------------------------------------------------------------------------------------------


def enumerate_loop(engines, rungs, rule, prompt, length, eos=(), costs=None):
    law, branches, most = Counter(), TreeBranches(), 0
    for branch in branches:
        out = decode(engines, rungs, prompt, length, Sampling(1.0, rule=rule), eos, costs, branch.verify)
        law[tuple(out.tokens)] += branch.weight
        most = max(most, out.decoder.counters(0).drafted)
    assert math.isclose(sum(law.values()), 1, abs_tol=1e-12)
    return law, most


def costs_of(*names):
    rows = np.arange(65)
    return {name: (1 + 0.2 * rows if name == "target" else 0.1 + 0.02 * rows).tolist() for name in names}


@pytest.mark.parametrize("priced", [False, True], ids=["fixed", "priced"])
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("name", [*KINDS, "skip-tree"])
@pytest.mark.parametrize("vocab", [2, 3])
def test_the_law_of_a_loop_over_trees_of_a_model_is_exact(vocab, name, rule, priced):
    engines, prompt, length = engines_of(vocab, 5, scale=1), [0, 1, 0], 7 - vocab
    costs = costs_of("target", "int8", "skip") if priced else None
    law, most = enumerate_loop(engines, [Rung(name, 5)], rule, prompt, length, costs=costs)
    assert most > 3, "there must be trees for this to show anything"
    assert largest_error(law, enumerate_target(engines["target"], prompt, length, ())) < 1e-12


class Stubborn(FakeEngine):
    """Sure of its choice, now and then: a law without mass elsewhere."""

    def logits_after(self, tokens):
        logits = super().logits_after(tokens)
        return np.where(logits == logits.max(), 0, -2000).astype(np.float32) if len(tokens) % 2 else logits


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("name", KINDS)
def test_the_law_is_exact_with_certain_drafts_and_ends_of_text(name, rule):
    engines = {"target": FakeEngine(3, 2, scale=1), "int8": Stubborn(3, 2, noise=0.5, scale=1)}
    law, _ = enumerate_loop(engines, [Rung(name, 6)], rule, [0, 1], 4, eos=(2,))
    assert largest_error(law, enumerate_target(engines["target"], [0, 1], 4, (2,))) < 1e-12


# ---- Names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, words",
    [
        (["int8-tree"], None),
        (["int4-tree", "int8"], None),
        (["int4", "int8-tree"], "int8-tree drafts its tree from the text alone, so it comes first"),
        (["suffix", "int8-graph"], "to let it verify suffix, name it int8"),
        (["int8-tree", "int8"], "names 'int8' twice"),
        (["int9-tree"], "no drafter 'int9-tree', only .*; did you mean 'int[48]-tree'"),
        (["target-tree"], "no drafter 'target-tree'"),
        (["history-graph"], "only models draft -graph; take history-tree"),
    ],
)
def test_ladders_name_trees_of_models(names, words):
    engines = ["target", "int8", "int4"]
    if words is None:
        return check_names(names, engines)
    with pytest.raises(BundleError, match=words):
        check_names(names, engines)
