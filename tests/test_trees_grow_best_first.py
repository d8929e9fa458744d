"""The trees of drafters that are no models: the likeliest paths first, by chances counted by hand."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from draftsmith.speculate.drafters import Sources
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung, build_ladder, check_names
from draftsmith.speculate.ngrams import Ngrams, write_table
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine

NEVER = 1e-12


def paths_of(tokens, parents):
    paths = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


def check_best_first(tree, chances_after, max_nodes, max_depth):
    """chances_after(path): token -> its chance. The nodes are the likeliest paths there are, in order."""
    tokens, parents, chances = tree
    paths = paths_of(tokens, parents)
    assert len({tuple(path) for path in paths}) == len(paths) <= max_nodes
    reach = []
    for path, parent, chance in zip(paths, parents, chances, strict=True):
        assert len(path) <= max_depth
        assert chance == pytest.approx(min(1, chances_after(path[:-1])[path[-1]]), abs=1e-12)
        reach.append(chance * (reach[parent] if parent >= 0 else 1))
    assert all(later <= earlier + NEVER for earlier, later in itertools.pairwise(reach))
    known = {tuple(path) for path in paths}
    left_out = [
        whole * chance
        for path, whole in [([], 1.0), *zip(paths, reach, strict=True)]
        if len(path) < max_depth
        for token, chance in chances_after(path).items()
        if (*path, token) not in known
    ]
    if len(paths) < max_nodes:
        assert not left_out
    elif left_out:
        assert max(left_out) <= reach[-1] + NEVER


# ---- Suffix matches ----------------------------------------------------------------------------------------


def chance_of_match(length):
    return [0.4, 0.55, 0.7, 0.85, 0.95][sum(length >= limit for limit in (3, 5, 9, 17))]


def followers(committed, context, shortest=2, longest=32):
    """The definition: every distinct match of the context's end, the longest first, says what followed it by
    how often it did, the latest counted twice, and leaves the rest of its trust to shorter ones."""
    chances, left, before = defaultdict(float), 1.0, None
    n = len(committed)
    for length in range(min(longest, len(context)), shortest - 1, -1):
        end = context[len(context) - length :]
        places = [i for i in range(length, n + 1) if committed[i - length : i] == end]
        if not places or places == before:
            continue
        before = places
        counts = Counter(committed[i] for i in places if i < n)
        if not counts:
            continue
        latest = committed[max(i for i in places if i < n)]
        counts[latest] += 1
        for token, count in counts.items():
            chances[token] += left * chance_of_match(length) * count / counts.total()
        left *= 1 - chance_of_match(length)
    return dict(chances)


@pytest.mark.parametrize("alphabet", [1, 2, 3, 6])
def test_suffix_trees_hold_what_followed_by_how_often_it_did(alphabet):
    rng, grown = np.random.default_rng(alphabet), 0
    for _ in range(60):
        drafter = Sources().open("suffix-tree", alphabet + 1)
        drafter.begin(200)
        committed: list[int] = []
        for _ in range(6):
            bunch = rng.integers(0, alphabet, int(rng.integers(1, 15))).tolist()
            drafter.append(bunch)
            committed += bunch
            tail = rng.integers(0, alphabet + 1, int(rng.choice([0, 0, 1, 3]))).tolist()
            max_nodes, max_depth = int(rng.integers(1, 24)), int(rng.integers(1, 7))
            tree = drafter.draft_tree(tail, max_nodes, max_depth)
            context = committed + tail
            check_best_first(
                tree, lambda path, c=context, t=committed: followers(t, c + path), max_nodes, max_depth
            )
            grown += len(tree[0])
    assert grown > 500


def test_a_suffix_tree_does_not_go_past_the_end_of_a_reference():
    drafter = Sources(references=[[1, 2, 3, 4], [1, 2, 5]]).open("suffix-tree", 10)
    drafter.begin(10)
    drafter.append([1, 2])
    tokens, parents, _ = drafter.draft_tree([], 9, 9)
    assert sorted(map(tuple, paths_of(tokens, parents))) == [(3,), (3, 4), (5,)]


# ---- Recycling ---------------------------------------------------------------------------------------------


def test_recycling_trees_follow_the_ranks_that_were_right():
    """The likeliest token of new logits, at its rank among the candidates before, is what is learnt."""
    rng, vocab = np.random.default_rng(0), 12
    prior = np.array([0.45, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01])
    drafter, rows, right, seen = Sources().open("recycling-tree", vocab), {}, np.zeros(8), 0
    drafter.begin(500)
    for _ in range(40):
        tokens = rng.integers(vocab, size=4).tolist()
        logits = rng.permuted(np.tile(np.arange(vocab, dtype=np.float32), (4, 1)), axis=1)
        drafter.observe(tokens, logits)
        for token, row in zip(tokens, logits, strict=True):
            best = np.argsort(-row)[:8].tolist()
            if token in rows:
                seen += 1
                right += [candidate == best[0] for candidate in rows[token]]
            rows[token] = best
        chances = (right + 16 * prior) / (seen + 16)
        start = int(rng.integers(vocab))

        def after(path, start=start, chances=chances):
            return dict(zip(rows.get([start, *path][-1], []), chances, strict=False))

        size, depth = int(rng.integers(1, 40)), int(rng.integers(1, 6))
        check_best_first(drafter.draft_tree([start], size, depth), after, size, depth)


def test_a_recycling_tree_accepts_more_than_its_chain():
    """Where the second guess is often right, a chain of the first alone is short."""
    engines = {"target": FakeEngine(30, 3, scale=1.5)}
    rounds = {}
    for name in ("recycling", "recycling-tree"):
        decoder = build_ladder([Rung(name, 31)], engines.__getitem__)
        decoder.begin([1, 2, 3], 150, Sampling(1.0, seed=1, rule="exact"))
        list(iter(decoder.step, []))
        rounds[name] = decoder.counters(1).rounds
    assert rounds["recycling-tree"] < 0.9 * rounds["recycling"]


# ---- Bigrams -----------------------------------------------------------------------------------------------


def test_bigram_trees_follow_the_chances_of_the_table(tmp_path):
    rng, vocab = np.random.default_rng(0), 9
    after = np.argsort(rng.random((vocab + 1, vocab)), axis=-1)[:, :4].astype(np.int32)
    chances = -np.sort(-rng.dirichlet(np.ones(5), vocab + 1), axis=-1)[:, :4].astype(np.float32)
    write_table(tmp_path / "table", after, chances, "00" * 32)
    drafter = Sources(ngrams=Ngrams(tmp_path / "table", vocab, "00" * 32)).open("bigram-tree", vocab)
    for _ in range(40):
        stands, tail = rng.integers(vocab, size=2).tolist(), rng.integers(vocab, size=int(rng.integers(2)))
        drafter.begin(9)
        drafter.append(stands)
        last = [*stands, *tail.tolist()][-1]

        def likely(path, last=last):
            row = [last, *path][-1]
            return dict(zip(after[row].tolist(), chances[row].tolist(), strict=True))

        size, depth = int(rng.integers(1, 40)), int(rng.integers(1, 6))
        check_best_first(drafter.draft_tree(tail.tolist(), size, depth), likely, size, depth)


# ---- Merged ------------------------------------------------------------------------------------------------


def test_merged_drafters_keep_the_likeliest_of_what_all_propose():
    rng, vocab, mixed = np.random.default_rng(5), 6, 0
    for _ in range(40):
        drafters = [
            Sources().open(name, vocab) for name in ("suffix-tree", "recycling-tree", "suffix+recycling-tree")
        ]
        text = rng.integers(vocab, size=30).tolist()
        logits = rng.standard_normal((30, vocab)).astype(np.float32)
        size, depth = int(rng.integers(1, 20)), int(rng.integers(1, 5))
        for drafter in drafters:
            drafter.begin(40)
            drafter.append(text)
            drafter.observe(text, logits)
        alone = [drafter.draft_tree([], size, depth) for drafter in drafters[:2]]
        chances = defaultdict(dict)
        for tokens, parents, given in alone:
            for path, chance in zip(paths_of(tokens, parents), given, strict=True):
                known = chances[tuple(path[:-1])]
                known[path[-1]] = max(known.get(path[-1], 0), chance)
        merged = drafters[2].draft_tree([], size, depth)
        check_best_first(merged, lambda path, c=chances: c.get(tuple(path), {}), size, depth)
        said = [{tuple(path) for path in paths_of(*tree[:2])} for tree in (*alone, merged)]
        mixed += bool(said[2] - said[0]) and bool(said[2] - said[1])
    assert mixed > 10


# ---- Names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words",
    [
        ("recycling-tree", None),
        ("rest-tree", "rest proposes chains only"),
        ("suffix+suffix", "names a drafter twice"),
        ("suffix+int8", "'int8' is no drafter"),
        ("suffix-tree+recycling", "'suffix-tree' is no drafter"),
        ("int8-tree", None),
        ("int4-tree", "no drafter 'int4-tree'"),
        ("suffix-graph", "only models draft -graph; take suffix-tree"),
        ("suffix+int8-tree", "'int8' is no drafter"),
        ("suffix+", "'' is no drafter"),
    ],
)
def test_names_that_no_drafters_have_are_refused(name, words):
    if words is None:
        return check_names([name], ["target", "int8"])
    with pytest.raises(BundleError) as error:
        check_names([name], ["target", "int8"])
    assert words in str(error.value)
