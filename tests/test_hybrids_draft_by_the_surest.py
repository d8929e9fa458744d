"""A hybrid asks all its drafters and follows the one whose proposal is expected to stand the longest."""

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


def bucket(support: int) -> int:
    return sum(support >= limit for limit in MATCHES)


def no_surer_than_the_first(said):
    return [(token, min(support, said[0][1])) for token, support in said]


class Trust:
    """How often tokens were right, by bucket: the definition, in fractions."""

    def __init__(self):
        self.tried, self.right = [0.0] * 5, [0.0] * 5

    def of(self, support):
        b = bucket(support)
        return (self.right[b] + 4 * PRIOR[b]) / (self.tried[b] + 4)

    def learn(self, said, truth):
        said = no_surer_than_the_first(said)
        for (token, support), true in zip(said, truth, strict=False):
            b = bucket(support)
            if self.tried[b] >= 64:
                self.tried[b], self.right[b] = self.tried[b] / 2, self.right[b] / 2
            self.tried[b] += 1
            if token != true:
                return
            self.right[b] += 1

    def expected(self, said):
        said = no_surer_than_the_first(said)
        return sum(np.cumprod([self.of(support) for _, support in said])) if said else 0.0


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
                one.learn(proposals[at], truth[at : at + step])
        at += step
        expected = [one.expected(proposals[at]) for one, proposals in zip(trust, said, strict=True)]
        best = int(np.argmax(np.round(expected, 12)))
        draft, support = hybrid.draft([], 9)
        assert draft == [token for token, _ in said[best][at]]
        for value, (_, rests_on) in zip(support, no_surer_than_the_first(said[best][at]), strict=True):
            limits = [(a + b) / 2 for a, b in pairwise(PRIOR)]
            assert bucket(value) == sum(trust[best].of(rests_on) >= limit for limit in limits)
        hybrid.draft([1, 2], 9)  # behind tokens that may not stand: nothing is learnt from it
        chosen.add(best)
    assert len(chosen) > 1
    assert all(member.seen == truth[:at] for member in members), "all are told what stands"


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
