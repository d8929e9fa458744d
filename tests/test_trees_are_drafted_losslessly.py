"""Drafted trees, through the shipped loop: greedy output is the target's bit for bit, sampled output has its
law."""

import math
from collections import Counter

import numpy as np
import pytest
from decoding import decode, random_costs
from draftsmith.speculate.binding import ffi
from draftsmith.speculate.drafters import Sources
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.settings import Sampling
from draftsmith.speculate.verify import TREE_RULES
from fake_engine import FakeEngine
from test_sampling_keeps_the_target_law import (
    Branches,
    enumerate_target,
    g_statistic,
    largest_error,
    softmax,
)

RULE_NAMES = {number: name for name, number in TREE_RULES.items()}
GREEDY = Sampling()


class Gardener:
    """A drafter that proposes trees of its maker's choice, through the public interface."""

    proposes_trees = True

    def __init__(self, grow):
        none = {
            "begin": ffi.callback("int32_t(ds_drafter *, int32_t)", lambda *_: 0),
            "append": ffi.callback("int32_t(ds_drafter *, const int32_t *, int32_t)", lambda *_: 0),
            "draft": ffi.callback(
                "int32_t(ds_drafter *, const int32_t *, int32_t, int32_t, int32_t *, int32_t *)", lambda *_: 0
            ),
        }
        self.grow, self.trees = grow, []
        self.calls = none | {
            "draft_tree": ffi.callback(
                "int32_t(ds_drafter *, const int32_t *, int32_t, int32_t, int32_t, int32_t *, int32_t *, "
                "double *)",
                self._grow,
            )
        }
        self.handle = ffi.new("ds_drafter *", self.calls)

    def _grow(self, _, tail, num_tail, max_nodes, max_depth, tokens, parents, chances):
        grown, behind = self.grow(max_nodes, max_depth)
        self.trees.append((grown, behind))
        tokens[0 : len(grown)], parents[0 : len(grown)] = grown, behind
        chances[0 : len(grown)] = [0.5] * len(grown)
        return len(grown)


def random_trees(rng, vocab, num_nodes=None):
    """Any tree whatever of any size, equal siblings included, as deep as it may be."""

    def grow(max_nodes, max_depth):
        parents, depths = [], []
        for i in range(int(rng.integers(0, (num_nodes or max_nodes) + 1))):
            parent = int(rng.integers(-1, i)) if i else -1
            while parent >= 0 and depths[parent] + 1 >= max_depth:
                parent = parents[parent]
            parents.append(parent)
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return rng.integers(vocab, size=len(parents)).tolist(), parents

    return grow


def run(engines, ladder, prompt, count, sampling=GREEDY, costs=None, grow=None, verify=ffi.NULL, eos=()):
    """(blocks of tokens, decoder) of a ladder whose first level is `grow`'s trees."""
    rungs = [Rung(name, length) for name, length in ladder]
    decoder = build_ladder(
        rungs, engines.__getitem__, costs, (lambda *_: Gardener(grow)) if grow else Sources().open
    )
    decoder.begin(list(prompt), count, sampling, eos, verify)
    return list(iter(decoder.step, [])), decoder


def engines_of(vocab, seed, keeps=True, **settings):
    class Forgetful(FakeEngine):
        """One that cannot move slots: the path that stands is read again."""

        keep = property(lambda self: (_ for _ in ()).throw(AttributeError("keep")))

    kind = FakeEngine if keeps else Forgetful
    return {"target": kind(vocab, seed, **settings), "int8": kind(vocab, seed, noise=0.8, **settings)}


# ---- Greedy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps", [True, False], ids=["keeps-paths", "reads-again"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_tree_is_proposed_the_output_is_the_targets(seed, keeps):
    rng = np.random.default_rng(seed)
    vocab, accepted, branching = int(rng.choice([2, 3, 5])), 0, 0
    engines = engines_of(vocab, seed, keeps)
    for trial in range(10):
        prompt = rng.integers(vocab, size=int(rng.integers(1, 12))).tolist()
        ladder = [[("suffix-tree", int(rng.choice([1, 5, 20, 64])))], [("suffix-tree", 12), ("int8", 4)]][
            trial % 2
        ]
        costs = random_costs(rng, engines) if trial % 3 == 0 else None
        for sampling in (GREEDY, Sampling(1.0, seed=seed, rule="exact")):
            plain = decode(engines, [], prompt, 50, sampling).tokens
            blocks, decoder = run(engines, ladder, prompt, 50, sampling, costs, grow=random_trees(rng, vocab))
            assert [token for block in blocks for token in block] == plain
            drafts = decoder.counters(0)
            accepted += drafts.accepted
            branching += drafts.drafted > sum(drafts.drafted_at)
            assert list(drafts.accepted_at) <= list(drafts.drafted_at)
            assert sum(drafts.accepted_at) == drafts.accepted
    assert accepted > 50 and branching > 10, "trees must branch and be accepted for this to show anything"


def test_the_cache_holds_the_path_that_stands():
    rng, engines = np.random.default_rng(1), engines_of(3, 1)
    decoder = build_ladder(
        [Rung("suffix-tree", 20)], engines.__getitem__, None, lambda *_: Gardener(random_trees(rng, 3))
    )
    prompt = [0, 1, 2]
    decoder.begin(prompt, 60, GREEDY)
    tokens = list(prompt)
    while block := decoder.step():
        tokens += block
        assert decoder.kept(1) == len(tokens) - 1
        np.testing.assert_array_equal(engines["target"]._slots[: len(tokens) - 1], tokens[:-1])


def test_a_tree_covers_more_of_what_may_follow_than_its_first_path():
    """Both tokens of a vocabulary of two, at every node: nothing can be rejected."""
    engines = engines_of(2, 3)

    def grow(max_nodes, max_depth):
        count = min(2**max_depth - 1, 15) * 2
        return [0, 1] * (count // 2), [(i - 2) // 2 for i in range(count)]

    blocks, _ = run(engines, [("suffix-tree", 30)], [0, 1], 41, grow=grow)
    assert [len(block) for block in blocks] == [1, *[5] * 8]


def test_trees_shrink_where_the_cache_ends():
    engines = engines_of(4, 2, max_seq_len=60)
    rng = np.random.default_rng(0)
    plain = decode(engines, [], [1, 2], 58).tokens
    blocks, _ = run(engines, [("suffix-tree", 30)], [1, 2], 58, grow=random_trees(rng, 4))
    assert [token for block in blocks for token in block] == plain


# ---- Sampling ----------------------------------------------------------------------------------------------

SHAPES = {
    "siblings": ([0, 1], [-1, -1]),
    "equal-siblings": ([1, 1, 0], [-1, -1, -1]),
    "two-levels": ([1, 0, 0, 1], [-1, 0, -1, 2]),
    "comb": ([0, 1, 1, 0], [-1, -1, 0, 1]),
}


def list_verdicts(rule, p, tokens, parents):
    """All outcomes (probability, path, next token) of a rule for a tree that was chosen: siblings are tried
    in turn, and those that are rejected are taken out of the law; an oracle in plain numpy."""
    children = {
        node: [i for i, parent in enumerate(parents) if parent == node] for node in range(-1, len(tokens))
    }

    if rule == "rrs":

        def descend(node, path, weight):
            left = p[node + 1].copy()
            for child in children[node]:
                mass = left[tokens[child]] / left.sum() if left.sum() > 1e-15 else 0.0
                if mass > 0:
                    yield from descend(child, [*path, child], weight * mass)
                weight *= 1 - mass
                left[tokens[child]] = 0
            if weight > 1e-15:
                after = left if left.sum() > 1e-15 else p[node + 1]
                for token, mass in enumerate(after / after.sum()):
                    if mass > 0:
                        yield weight * mass, path, token

        yield from descend(-1, [], 1.0)
        return

    # Traversal (arXiv 2505.12398, algorithm 1): a list of (node, law, keep) states, children first.
    def visit(node, path, keep):
        """(probability, path or None, token or None); None: the node and all below it were rejected."""
        law, alive = p[node + 1].copy(), 1.0
        for child in children[node]:
            token = tokens[child]
            below = keep * law[token]
            for probability, accepted, after in visit(child, [*path, child], min(1.0, below)):
                if accepted is not None:
                    yield alive * probability, accepted, after
                else:
                    rejected = probability
            alive *= rejected
            rest = keep * law
            rest[token] = max(rest[token] - 1, 0)
            total = rest.sum()
            if alive <= 1e-15:
                break
            if total <= 1e-15:
                law, keep = p[node + 1].copy(), keep if total + 1 - keep == 0 else 0.0
                break
            law, keep = rest / total, total / (total + 1 - keep)
        kept = 1.0 if node < 0 else keep
        for token, mass in enumerate(law):
            if alive * kept * mass > 0:
                yield alive * kept * mass, path, token
        yield alive * (1 - kept), None, None

    for probability, path, token in visit(-1, [], 1.0):
        if path is not None and probability > 0:
            yield probability, path, token


class TreeBranches(Branches):
    def list_verdicts(self, rule, p, q, tokens, parents):
        assert q is None, "a tree is chosen, not sampled"
        return list_verdicts(RULE_NAMES[rule], p, tokens, parents)


def fitting(shape):
    """The nodes of a tree that a round has room for."""
    tokens, parents = SHAPES[shape]

    def grow(max_nodes, max_depth):
        depths, kept = [], []
        for parent in parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        kept = [i for i, depth in enumerate(depths) if depth < max_depth][:max_nodes]
        place = {node: i for i, node in enumerate(kept)} | {-1: -1}
        return [tokens[i] for i in kept], [place[parents[i]] for i in kept]

    return grow


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [2, 3])
def test_the_law_of_a_loop_over_trees_is_exact(rule, shape, vocab):
    target, prompt, length = FakeEngine(vocab, 5, scale=1), [0, 1], 4
    law = Counter()
    for branch in TreeBranches():
        blocks, _ = run(
            {"target": target}, [("suffix-tree", 8)], prompt, length, Sampling(1.0, rule=rule),
            grow=fitting(shape), verify=branch.verify,
        )  # fmt: skip
        law[tuple(token for block in blocks for token in block)] += branch.weight
    assert math.isclose(sum(law.values()), 1, abs_tol=1e-12)
    assert largest_error(law, enumerate_target(target, prompt, length, ())) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    "name",
    ["suffix-tree", "recycling-tree", "lookahead-tree", "recycling+history-tree", "suffix+lookahead-tree"],
)
def test_the_law_of_a_loop_over_the_trees_of_a_drafter_is_exact(rule, name):
    """Those that learn from what the target found, of rejected nodes too, among them."""
    target, prompt, length, most = FakeEngine(2, 5, scale=1), [0, 1, 0, 0, 1, 1, 0], 5, 0
    law = Counter()
    for branch in TreeBranches():
        blocks, decoder = run(
            {"target": target}, [(name, 7)], prompt, length, Sampling(1.0, rule=rule), verify=branch.verify
        )
        law[tuple(token for block in blocks for token in block)] += branch.weight
        most = max(most, decoder.counters(0).drafted)
    assert most > 4, "there must be trees for this to show anything"
    assert largest_error(law, enumerate_target(target, prompt, length, ())) < 1e-12


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_level_above_verifies_what_trees_gave_the_one_below(rule):
    """int8 verifies trees; its proposals must be exact samples of its law, with laws of the accepted path."""
    vocab, total, prompt, length = 3, 2000, [0, 1], 4
    engines = {"target": FakeEngine(vocab, 5, scale=1), "int8": FakeEngine(vocab, 5, noise=0.8, scale=1)}
    counts = Counter()
    for seed in range(total):
        blocks, _ = run(
            engines, [("suffix-tree", 8), ("int8", 3)], prompt, length, Sampling(1.0, seed=seed, rule=rule),
            grow=fitting("two-levels"),
        )  # fmt: skip
        counts[tuple(token for block in blocks for token in block)] += 1
    g, bound = g_statistic(counts, enumerate_target(engines["target"], prompt, length, ()), total)
    assert g < bound


@pytest.mark.parametrize("rule", ["token", "block", "exact"])
@pytest.mark.parametrize("top_k", [0, 2])
def test_the_shipped_rules_sample_the_targets_law_over_random_trees(rule, top_k):
    """With top-k some tokens of the tree have no mass: they are never accepted."""
    vocab, total, prompt, length = 4, 1500, [0, 1], 3
    target, rng, counts = FakeEngine(vocab, 7, scale=1), np.random.default_rng(0), Counter()
    for seed in range(total):
        blocks, _ = run(
            {"target": target}, [("suffix-tree", 10)], prompt, length,
            Sampling(1.0, top_k, seed=seed, rule=rule), grow=random_trees(rng, vocab),
        )  # fmt: skip
        counts[tuple(token for block in blocks for token in block)] += 1
    law = {(): 1.0}
    for _ in range(length):
        grown = {}
        for tokens, mass in law.items():
            p = softmax(target.logits_after([*prompt, *tokens]))
            if top_k:
                p[np.argsort(-p)[top_k:]] = 0
            grown |= {(*tokens, token): mass * x / p.sum() for token, x in enumerate(p) if x > 0}
        law = grown
    assert counts.keys() <= law.keys()
    g, bound = g_statistic(counts, law, total)
    assert g < bound


# ---- Real graphs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pytest.importorskip("torch")
    from draftsmith import load
    from tiny_bundle import write_tiny_bundle

    return load(write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"), threads=1)


@pytest.mark.parametrize("ladder", [[("suffix-tree", 31)], [("suffix-tree", 12), ("int8", 4)]], ids=str)
def test_real_graphs_say_the_same_over_random_trees(bundle, ladder):
    """Trees that hold the right path among much else, so that paths of all kinds are kept and rolled back."""
    rng, prompt = np.random.default_rng(3), list(range(5, 90, 3))
    plain = bundle.generate(prompt, max_new_tokens=60, speculate="none", ignore_eos=True).token_ids
    vocab = bundle.engine("target").vocab_size
    decoder = None

    def grow(max_nodes, max_depth):
        tokens, parents = random_trees(rng, vocab)(max_nodes, max_depth)
        text = [*prompt, *plain]
        at = decoder.kept(0)
        depths = []
        for i, parent in enumerate(parents):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            if rng.random() < 0.5 and at + depths[i] < len(text):
                tokens[i] = text[at + depths[i]]
        return tokens, parents

    rungs = [Rung(name, length) for name, length in ladder]
    decoder = build_ladder(rungs, bundle.engine, None, lambda *_: Gardener(grow))
    decoder.begin(prompt, 60, GREEDY)
    assert [token for block in iter(decoder.step, []) for token in block] == plain
    assert decoder.counters(0).accepted > 10


# ---- Errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, parents, words",
    [
        ([1] * 9, [-1] * 9, "a tree of 9 nodes where 8 were asked for"),
        ([1, 1], [0, -1], "node 0 follows node 0; one before it is wanted"),
        ([1, 1], [-1, -2], "node 1 follows node -2"),
        ([1] * 5, [-1, 0, 1, 2, 3], "more than the 4 levels"),
        ([1, 4], [-1, -1], "token 4, outside the vocabulary of 4"),
    ],
)
def test_a_tree_that_breaks_its_word_is_an_error(tokens, parents, words):
    with pytest.raises(BundleError, match=words):
        run({"target": FakeEngine(4, 2)}, [("suffix-tree", 8)], [1], 6, grow=lambda *_: (tokens, parents))
