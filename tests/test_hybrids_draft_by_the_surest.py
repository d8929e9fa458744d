"""A hybrid asks all its drafters and follows the one whose proposal is expected to stand the longest."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from draftsmith.speculate.binding import ffi, lib
from draftsmith.speculate.drafters import Drafter, Sources
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung, build_ladder, check_names
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine, open_bundle, write_bundle

PRIOR = [0.4, 0.55, 0.7, 0.85, 0.95]
MATCHES = [3, 5, 9, 17]


class Scripted:
    """A drafter that says what `says` gives for the number of tokens that stand, and how sure it is."""

    def __init__(self, says):
        self.count, self.says, self.seen = 0, says, []
        self.calls = {
            "begin": ffi.callback("int32_t(ds_drafter *, int32_t)", self._begin),
            "append": ffi.callback("int32_t(ds_drafter *, const int32_t *, int32_t)", self._append),
            "draft": ffi.callback(
                "int32_t(ds_drafter *, const int32_t *, int32_t, int32_t, int32_t *, int32_t *)", self._draft
            ),
        }
        self.handle = ffi.new("ds_drafter *", self.calls)

    def _begin(self, _, n):
        self.count = 0
        return 0

    def _append(self, _, tokens, n):
        self.count += n
        self.seen += ffi.unpack(tokens, n) if n else []
        return 0

    def _draft(self, _, tail, n_tail, room, tokens, support):
        said = self.says(self.count)[:room]
        for i, (token, rests_on) in enumerate(said):
            tokens[i], support[i] = token, rests_on
        return len(said)


def join(*members) -> Drafter:
    handles = ffi.new("ds_drafter *[]", [member.handle for member in members])
    return Drafter(lib.ds_hybrid_drafter_create(handles, len(members)), members)


LIMITS = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9]  # of the grades of a drafter's word


def bucket(support: int) -> int:
    return sum(support >= limit for limit in MATCHES)


class Trust:
    """How often nodes were right, by the chance that their drafter gave and whether they follow others. By
    definition: the mean of a Beta posterior whose prior is the drafter's word and weighs eight nodes."""

    def __init__(self):
        self.tried, self.right = Counter(), Counter()

    @staticmethod
    def key(depth, chance):
        return depth > 0, sum(chance >= limit for limit in LIMITS)

    def of(self, depth, chance):
        key = self.key(depth, chance)
        return (self.right[key] + 8 * chance) / (self.tried[key] + 8)

    def learn(self, tree, truth):
        """tree: (path, chance) of each node, in the order of the proposal."""
        for path, chance in tree:
            if len(path) > len(truth) or list(path[:-1]) != truth[: len(path) - 1]:
                continue
            key = self.key(len(path) - 1, chance)
            if self.tried[key] >= 64:
                self.tried[key], self.right[key] = self.tried[key] / 2, self.right[key] / 2
            self.tried[key] += 1
            self.right[key] += path[-1] == truth[len(path) - 1]

    def chances(self, said):
        """Of a chain (token, support)."""
        return [self.of(depth, PRIOR[bucket(support)]) for depth, (_, support) in enumerate(said)]


def as_tree(said):
    tokens = [token for token, _ in said]
    return [(tuple(tokens[: i + 1]), PRIOR[bucket(support)]) for i, (_, support) in enumerate(said)]


@pytest.mark.parametrize("seed", range(5))
def test_the_surest_by_what_came_to_stand_is_followed(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(5, size=700).tolist()
    said = []
    for right in (0.9, 0.5, 0.3):
        proposals = []
        for start in range(len(truth)):
            tokens = [
                t if rng.random() < right else (t + 1) % 5
                for t in truth[start : start + int(rng.integers(0, 6))]
            ]
            proposals.append([(t, int(rng.choice([1, 4, 12, 40]))) for t in tokens])
        said.append(proposals)
    members = [Scripted(proposals.__getitem__) for proposals in said]
    hybrid, trust, at, chosen = join(*members), [Trust() for _ in members], 0, set()
    hybrid.begin(len(truth))
    while at < len(truth) - 10:
        step = int(rng.integers(1, 5))
        hybrid.append(truth[at : at + step])
        if at:
            for one, proposals in zip(trust, said, strict=True):
                one.learn(as_tree(proposals[at]), truth[at : at + step])
        at += step
        chances = [one.chances(proposals[at]) for one, proposals in zip(trust, said, strict=True)]
        best = int(np.argmax([np.round(np.cumprod(row).sum(), 12) for row in chances]))
        draft, support = hybrid.draft([], 9)
        assert draft == [token for token, _ in said[best][at]]
        limits = [(a + b) / 2 for a, b in pairwise(PRIOR)]
        for value, chance in zip(support, chances[best], strict=True):
            assert bucket(value) == sum(chance >= limit for limit in limits)
        hybrid.draft([1, 2], 9)  # behind tokens that may not stand: nothing is learnt from it
        chosen.add(best)
    assert len(chosen) > 1
    assert all(member.seen == truth[:at] for member in members), "all are told what stands"


class Gardener(Scripted):
    """One that says a tree: (token, parent, chance) of each node."""

    def __init__(self, says):
        super().__init__(lambda count: [])
        self.grows = says
        self.calls["draft_tree"] = ffi.callback(
            "int32_t(ds_drafter *, const int32_t *, int32_t, int32_t, int32_t, int32_t *, int32_t *, "
            "double *)",
            self._draft_tree,
        )
        self.handle = ffi.new("ds_drafter *", self.calls)

    def _draft_tree(self, _, tail, n_tail, max_nodes, max_depth, tokens, parents, chances):
        said = self.grows(self.count)
        for i, node in enumerate(said):
            tokens[i], parents[i], chances[i] = node
        return len(said)


def random_tree(rng, truth):
    """Nodes that are right more often than by chance, siblings distinct."""
    nodes, paths = [], [()]
    for _ in range(int(rng.integers(0, 8))):
        before = paths[int(rng.integers(len(paths)))]
        token = truth[len(before)] if rng.random() < 0.4 else int(rng.integers(5))
        if (*before, token) not in paths:
            nodes.append((token, paths.index(before) - 1, float(rng.uniform(0.01, 1))))
            paths.append((*before, token))
    return nodes


@pytest.mark.parametrize("seed", range(5))
def test_a_merged_tree_has_the_chances_that_its_drafters_deserve(seed):
    """Two that say trees and one that says chains, of which each learns what stood, drafted or not."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(5, size=600).tolist()
    trees = [[random_tree(rng, truth[at : at + 9]) for at in range(580)] for _ in range(2)]
    chains = [
        [(t if rng.random() < 0.7 else (t + 1) % 5, int(rng.choice([1, 4, 40]))) for t in truth[at : at + 4]]
        for at in range(580)
    ]
    members = [Gardener(trees[0].__getitem__), Gardener(trees[1].__getitem__), Scripted(chains.__getitem__)]
    hybrid, trust, at, before = join(*members), [Trust() for _ in members], 0, None
    hybrid.begin(len(truth))
    while at < 570:
        step = int(rng.integers(1, 5))
        hybrid.append(truth[at : at + step])
        for one, nodes in zip(trust, before or [[]] * 3, strict=True):
            one.learn(nodes, truth[at : at + step])
        at += step
        before = [*([*with_paths(tree[at])] for tree in trees), as_tree(chains[at])]
        deserved: dict[tuple, float] = {}
        for one, nodes in zip(trust, before, strict=True):
            for path, chance in nodes:
                deserved[path] = max(deserved.get(path, 0), one.of(len(path) - 1, chance))
        tokens, parents, chances = hybrid.draft_tree([], 40, 12)
        hybrid.draft_tree([1, 2], 40, 12)  # behind tokens that may not stand: nothing is learnt from it
        paths = [path for path, _ in with_paths(zip(tokens, parents, chances, strict=True))]
        assert dict(zip(paths, chances, strict=True)) == pytest.approx(deserved, abs=1e-12)
        reach = [np.prod([deserved[path[:n]] for n in range(1, len(path) + 1)]) for path in paths]
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(reach))


def with_paths(nodes):
    """(path, chance) of each node (token, parent, chance)."""
    paths = []
    for token, parent, chance in nodes:
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
        yield paths[-1], chance


def test_of_equals_the_first_drafts_and_where_it_is_silent_the_next():
    first, second = Scripted(lambda n: [(1, 1)] if n % 2 else []), Scripted(lambda n: [(2, 1)])
    hybrid = join(first, second)
    hybrid.begin(9)
    hybrid.append([0])
    assert hybrid.draft([], 3)[0] == [1]
    hybrid = join(first, second)
    hybrid.begin(9)
    assert hybrid.draft([], 3)[0] == [2]


def test_a_hybrid_needs_no_more_calls_than_its_better_half():
    """Of one that knows the text by heart and one that knows nothing, in either order."""
    engine = FakeEngine(50, 3)
    plain = build_ladder([], {"target": engine}.__getitem__)
    plain.begin([1], 80, Sampling())
    text = [token for block in iter(plain.step, []) for token in block]
    sources = Sources(references=[text])

    def rounds(name):
        decoder = build_ladder([Rung(name, 6)], {"target": engine}.__getitem__, open_drafter=sources.open)
        decoder.begin([1], 80, Sampling())
        assert [token for block in iter(decoder.step, []) for token in block] == text
        return decoder.counters(1).rounds

    alone = rounds("llma")
    assert alone < 30 < rounds("recycling")
    assert rounds("llma+recycling") <= alone + 2 and rounds("recycling+llma") <= alone + 2


@pytest.mark.parametrize(
    "ladder, words",
    [
        (["suffix+nonsense"], "'nonsense' is no drafter that a hybrid can have"),
        (["suffix+int8"], "'int8' is no drafter that a hybrid can have"),
        (["suffix+suffix"], "names a drafter twice"),
        (["+suffix"], "'' is no drafter"),
        (["int8", "suffix+recycling"], "so it comes first"),
        (["suffix+recycling", "suffix+recycling"], "twice"),
    ],
)
def test_bad_hybrids_are_refused(ladder, words):
    with pytest.raises(BundleError, match=words.replace("+", r"\+")):
        check_names(ladder, ["target", "int8"])


@pytest.mark.parametrize(
    "ladder, words",
    [(["suffix+llma"], "there are none"), (["rest+suffix"], "none is open"), (["suffix+bigram"], "has none")],
)
def test_what_a_part_lacks_is_said_before_decoding(tmp_path, ladder, words):
    bundle = open_bundle(write_bundle(tmp_path / "bundle"))
    with pytest.raises(BundleError, match=words):
        bundle.stream("a prompt", speculate=ladder)


def test_a_hybrid_of_nothing_is_refused():
    with pytest.raises(BundleError, match="a hybrid of 0 drafters"):
        Drafter(lib.ds_hybrid_drafter_create(ffi.NULL, 0))
