"""Drafters that are no models: whatever they propose, the output is the target's alone; and they help."""

import json
import time

import numpy as np
import pytest
from decoding import random_costs
from draftsmith.speculate.binding import ffi, lib
from draftsmith.speculate.datastore import Datastore, write_datastore
from draftsmith.speculate.drafters import Drafter, Sources
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.levels import DRAFTERS, TREE, lacks_trees, split_level
from draftsmith.speculate.ngrams import Ngrams, write_table
from draftsmith.speculate.settings import Sampling
from fake_engine import FakeEngine, open_bundle, write_bundle, write_manifest

GREEDY = Sampling()
WARM = Sampling(temperature=1.0, seed=5, rule="exact")


def run(engines, ladder, lengths, sources, prompt, count, sampling=GREEDY, costs=None):
    """(tokens, counters of the level that drafts for the target, rounds of the target)."""
    rungs = [Rung(name, length) for name, length in zip(ladder, lengths, strict=True)]
    decoder = build_ladder(rungs, engines.__getitem__, costs, sources.open)
    decoder.begin(list(prompt), count, sampling)
    tokens = [token for block in iter(decoder.step, []) for token in block]
    return tokens, decoder.counters(max(0, len(rungs) - 1)), decoder.counters(len(rungs)).rounds


def some_sources(tmp_path, texts, vocab: int) -> Sources:
    """What every drafter needs, made of the same texts."""
    write_datastore(tmp_path / "texts.rest", texts)
    rng = np.random.default_rng(0)
    after = np.argsort(rng.random((vocab + 1, vocab)), axis=-1)[:, :3].astype(np.int32)
    write_table(tmp_path / "ngrams.table", after, np.full(after.shape, 0.3, np.float32), "00" * 32)
    return Sources(
        references=texts,
        datastore=Datastore(tmp_path / "texts.rest", vocab),
        ngrams=Ngrams(tmp_path / "ngrams.table", vocab, "00" * 32),
    )


LEVELS = [
    *DRAFTERS,
    *("suffix+recycling", "history+recycling+bigram", "rest+llma+history"),
    *("suffix-tree", "llma-tree", "recycling-tree", "suffix+recycling-tree", "rest+history+bigram-tree"),
    *("lookahead-tree", "history+lookahead-tree", "bigram-tree"),
]


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_output_is_the_targets_whatever_the_ladder_and_its_costs(tmp_path, name, seed):
    rng = np.random.default_rng(seed)
    vocab = int(rng.choice([3, 5, 8]))
    engines = {"target": FakeEngine(vocab, seed), "int8": FakeEngine(vocab, seed, noise=0.8)}
    sources = some_sources(tmp_path, [rng.integers(vocab, size=40).tolist() for _ in range(3)], vocab)
    drafted = accepted = 0
    for trial in range(8):
        prompt = rng.integers(vocab, size=int(rng.integers(1, 12))).tolist()
        ladder = [[name], [name, "int8"]][trial % 2]
        lengths = rng.choice([1, 2, 5, 9], size=len(ladder)).tolist()
        costs = random_costs(rng, engines) if trial % 3 == 0 else None
        for sampling in (GREEDY, WARM):
            plain = run(engines, [], [], sources, prompt, 50, sampling)[0]
            tokens, drafts, _ = run(engines, ladder, lengths, sources, prompt, 50, sampling, costs)
            assert tokens == plain
            drafted += drafts.drafted
            accepted += drafts.accepted
    assert 0 < accepted < drafted, "drafts must be taken and refused for this to show anything"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pytest.importorskip("torch")
    from draftsmith import load
    from draftsmith.pipeline.ngrams import write_ngrams
    from tiny_bundle import write_tiny_bundle

    folder = write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")
    (folder / "ngrams").mkdir()
    write_ngrams(folder, folder / "ngrams")
    (folder / "ngrams" / "ngrams.table").rename(folder / "ngrams.table")
    (folder / "ngrams").rmdir()
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
    bundle = load(folder, threads=1)
    said = [bundle.generate([i], 40, speculate="none", ignore_eos=True).token_ids for i in range(9)]
    write_datastore(folder / "own.rest", said, bundle.manifest.files["tokenizer.json"].sha256)
    return load(folder, threads=1, datastore=folder / "own.rest")


@pytest.mark.parametrize("name", LEVELS)
def test_real_graphs_say_the_same_with_and_without(bundle, name):
    parts = set(split_level(name))
    for prompt in ([7], list(range(5, 90, 3)), [1, 2, 3] * 9):
        plain = bundle.generate(prompt, max_new_tokens=60, speculate="none", ignore_eos=True).token_ids
        for ladder in ([name], [name, "int8"]):
            out = bundle.generate(
                prompt,
                max_new_tokens=60,
                speculate=ladder,
                ignore_eos=True,
                references=[plain[20:50], "a reference as text"] if {"suffix", "llma"} & parts else (),
            )
            assert out.token_ids == plain
            assert list(out.stats.draft_ms) == ladder


# ---- References --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["suffix", "llma"])
def test_a_reference_that_says_it_all_is_read_off(tmp_path, name):
    """Once two tokens of the output are there, each call gives as many as are drafted, and one more."""
    engines = {"target": FakeEngine(200, 1)}
    prompt = [3, 1, 4]
    plain = run(engines, [], [], Sources(), prompt, 81)[0]
    assert len(set(plain)) > 40, "a text that repeats itself would need no reference"
    sources = Sources(references=[[9, 9, 9], plain, [8, 8]])
    tokens, drafts, rounds = run(engines, [name], [7], sources, prompt, 81)
    assert tokens == plain
    assert drafts.accepted == drafts.drafted and rounds <= 2 + 80 / 8 + 1
    assert run(engines, ["suffix"], [7], Sources(), prompt, 81)[2] > 40


def test_no_draft_goes_past_the_end_of_a_reference():
    drafter = Sources(references=[[1, 2, 3, 4], [5, 6, 7]]).open("llma", 10)
    assert draft_after(drafter, [1, 2], 9) == ([3, 4], [2, 3])
    assert draft_after(drafter, [9, 3, 4], 9) == ([], [])
    assert draft_after(drafter, [5, 6, 7, 5, 6], 9)[0] == [7, 5, 6, 7, 5, 6, 7, 5, 6]


def test_a_drafter_begins_anew_with_each_generation():
    drafter = Sources(references=[[1, 2, 3]]).open("llma", 10)
    for _ in range(3):
        assert draft_after(drafter, [7, 8, 9, 7, 8], 3)[0] == [9, 7, 8]
        assert draft_after(drafter, [7, 8], 3)[0] == []


def draft_after(drafter: Drafter, text: list[int], count: int) -> tuple[list[int], list[int]]:
    """(the draft, its support) behind a text, the last half of which is the tail."""
    half = (len(text) + 1) // 2
    drafter.begin(len(text))
    drafter.append(text[:half])
    return drafter.draft(text[half:], count)


@pytest.mark.parametrize(
    "references, ladder, words",
    [
        ((), ["llma"], "llma drafts from references and there are none: pass references=[...] (--ref"),
        (["text"], ["int8"], "references are given, but no level of the ladder ['int8'] reads them"),
        (["text"], "none", "no level of the ladder [] reads them"),
        (["text", ""], ["llma"], "references[1] is empty"),
        ([[]], ["llma"], "references[0] is empty"),
        ([[1, 300]], ["llma"], "token id 300 at position 1 of references[0]"),
        ([[1, "a"]], ["llma"], "item 1 of references[0] is 'a'"),
        ("text", ["llma"], "references is one text: wanted a list of them"),
        (["text"], ["int8", "llma"], "llma needs no drafter, so it comes first"),
    ],
)
def test_bad_references_are_refused_before_decoding(tmp_path, references, ladder, words):
    bundle = open_bundle(write_bundle(tmp_path / "bundle"))
    with pytest.raises(BundleError) as error:
        bundle.stream("a prompt", speculate=ladder, references=references)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- Drafters of one's own ---------------------------------------------------------------------------------


class Stubborn:
    """A drafter that always says the same, whatever the text; through the public interface."""

    def __init__(self, says: list[int], count: int | None = None):
        self.calls = {
            "begin": ffi.callback("int32_t(ds_drafter *, int32_t)", lambda *_: 0),
            "append": ffi.callback("int32_t(ds_drafter *, const int32_t *, int32_t)", lambda *_: 0),
            "draft": ffi.callback(
                "int32_t(ds_drafter *, const int32_t *, int32_t, int32_t, int32_t *, int32_t *)", self.draft
            ),
        }
        self.says, self.count = says, count
        self.handle = ffi.new("ds_drafter *", self.calls)

    def draft(self, _, tail, n_tail, max_draft, tokens, support):
        said = self.says[:max_draft]
        tokens[0 : len(said)] = said
        support[0 : len(said)] = [1] * len(said)
        return len(said) if self.count is None else self.count


def test_a_drafter_from_outside_is_one_struct():
    engines = {"target": FakeEngine(4, 2), "int8": FakeEngine(4, 2, noise=0.5)}
    plain = run(engines, [], [], Sources(), [1], 60)[0]

    class Own(Sources):
        def open(self, name, vocab_size):
            return Stubborn([2, 2, 1])

    for ladder in (["suffix"], ["suffix", "int8"]):
        tokens, drafts, _ = run(engines, ladder, [3] * len(ladder), Own(), [1], 60)
        assert tokens == plain and drafts.drafted > 0


@pytest.mark.parametrize("in_hybrid", [False, True])
def test_all_that_a_drafter_does_is_its_cost(in_hybrid):
    """Being told what stands, reading logits and drafting each take two milliseconds, and are reported."""
    slept = [0]

    def slow(signature: str, call):
        def work(*arguments):
            slept[0] += 1
            time.sleep(0.002)
            return call(*arguments)

        return ffi.callback(signature, work)

    says = Stubborn([2, 2, 1])
    rows = "const int32_t *, const int32_t *, int32_t, const float *, const float *, int32_t"
    observe = f"int32_t(ds_drafter *, {rows})"
    told = slow("int32_t(ds_drafter *, const int32_t *, int32_t)", lambda *_: 0)
    asked = slow("int32_t(ds_drafter *, const int32_t *, int32_t, int32_t, int32_t *, int32_t *)", says.draft)
    read = slow(observe, lambda *_: 0)
    says.handle.append, says.handle.draft, says.handle.observe = told, asked, read
    parts = ffi.new("ds_drafter *[]", [says.handle])
    hybrid = Drafter(lib.ds_hybrid_drafter_create(parts, 1))

    class Own(Sources):
        def open(self, name, vocab_size):
            return hybrid if in_hybrid else says

    began = time.perf_counter()
    _, drafts, rounds = run({"target": FakeEngine(4, 2)}, ["suffix"], [3], Own(), [1], 20)
    elapsed = 1e3 * (time.perf_counter() - began)
    untimed = 1  # after the last round a drafter is told its tokens, for the next generation
    assert rounds > 5 and slept[0] >= 3 * (rounds - 1)
    assert 2 * (slept[0] - untimed) <= drafts.busy_ms <= elapsed


def test_a_tree_is_asked_of_who_can_grow_one(bundle):
    with pytest.raises(BundleError, match="rest proposes chains only: call it rest, or join it: recycling"):
        bundle.generate([1], 4, speculate=["rest-tree"])


def test_the_names_of_those_that_propose_trees_are_right(tmp_path):
    """Names are checked without the native library, so that a recipe is refused before anything is built."""
    sources = some_sources(tmp_path, [[1, 2, 3]], 4)
    for name in DRAFTERS:
        assert bool(lacks_trees(name + TREE)) == (not sources.open(name, 4).proposes_trees)
        assert not lacks_trees(name)
    with pytest.raises(BundleError, match="history-tree: history proposes chains only"):
        sources.open("history-tree", 4)


@pytest.mark.parametrize(
    "says, count, words",
    [
        ([4], None, "token 4, outside the vocabulary of 4"),
        ([-1], None, "token -1"),
        ([1], 9, "proposes 9 tokens"),
    ],
)
def test_a_drafter_that_breaks_its_word_is_an_error(says, count, words):
    class Own(Sources):
        def open(self, name, vocab_size):
            return Stubborn(says, count)

    with pytest.raises(BundleError, match=words):
        run({"target": FakeEngine(4, 2)}, ["suffix"], [3], Own(), [1], 20)
