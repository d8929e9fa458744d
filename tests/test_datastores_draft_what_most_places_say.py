"""A datastore drafts what most places say where the longest end of a context occurs; others are refused."""

import struct
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from draftsmith import load
from draftsmith.pipeline.cli import main
from draftsmith.speculate.binding import lib
from draftsmith.speculate.datastore import Datastore, write_datastore
from draftsmith.speculate.errors import BundleError
from fake_engine import BYTE_VOCAB, open_bundle, write_bundle

END = lib.DS_END_OF_REFERENCE
LONGEST = lib.DS_DATASTORE_MAX_MATCH
HEADER = struct.calcsize("8sIIQQ32s")
HERE, THERE = "ab" * 32, "cd" * 32


def search(texts: list[list[int]], context: list[int]) -> tuple[int, list[list[int]]]:
    """The definition, by trying every place: (match length, what follows at each place that has it)."""
    longest, places = 0, []
    for text in texts:
        for i in range(1, len(text)):
            length = 0
            while length < min(i, len(context), LONGEST) and text[i - 1 - length] == context[-1 - length]:
                length += 1
            if length > longest:
                longest, places = length, []
            if length == longest:
                places.append(text[i:])
    return longest, places


@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("vocab", [1, 2, 4])
def test_drafts_equal_a_search_through_all_places(tmp_path, chunk_tokens, vocab):
    rng = np.random.default_rng([chunk_tokens, vocab])
    drafted = 0
    for _ in range(30):
        texts = [
            rng.integers(vocab, size=int(rng.integers(0, 40))).tolist() for _ in range(rng.integers(1, 6))
        ]
        write_datastore(tmp_path / "a.rest", texts, chunk_tokens=chunk_tokens)
        datastore = Datastore(tmp_path / "a.rest", vocab)
        assert len(datastore) == sum(map(len, texts)) + len(texts)
        for _ in range(20):
            context = rng.integers(vocab, size=int(rng.integers(0, 45))).tolist()
            longest, places = search(texts, context)
            draft, support = datastore.draft(context, 6)
            if longest < 2:
                assert draft == []
                continue
            if len(places) > 64:
                continue  # then some are taken
            sampled = len(places)
            for i in range(6):
                votes = Counter(place[i] for place in places if len(place) > i)
                if not votes:
                    assert len(draft) == i
                    break
                assert votes[draft[i]] == max(votes.values())
                places = [place for place in places if len(place) > i and place[i] == draft[i]]
                assert support[i] == max(1, (longest + i) * len(places) // sampled)
                drafted += 1
    assert drafted > 100


def test_of_many_places_some_are_asked(tmp_path):
    texts = [[1, 2, 3 if i % 10 else 4, i] for i in range(1000)]
    write_datastore(tmp_path / "a.rest", texts)
    draft, support = Datastore(tmp_path / "a.rest", 1000).draft([1, 2], 1)
    assert draft == [3] and support == [1]


def test_the_file_does_not_depend_on_how_it_was_sorted(tmp_path):
    texts = [np.random.default_rng(i).integers(3, size=500) for i in range(5)]
    files = []
    for chunk_tokens in (0, 13, 999):
        write_datastore(tmp_path / "a.rest", texts, chunk_tokens=chunk_tokens)
        files.append((tmp_path / "a.rest").read_bytes())
    assert files[0] == files[1] == files[2]
    assert [path.name for path in tmp_path.iterdir()] == ["a.rest"], "something was left behind"


def varied(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(vocab)
    ids = rng.integers(vocab, size=20_000)
    return [ids[rng.zipf(1.3, size=40_000).clip(max=20_000) - 1].tolist() for _ in range(6)]


@pytest.mark.parametrize(
    "texts",
    [varied(50), varied(40_000), varied(2**31 - 1), [[5] * 40_000, [5, 6] * 30_000, [5] * 30_000]],
    ids=["few ids", "a vocabulary", "any ids", "monotonous"],
)
def test_many_places_sorted_by_threads_in_chunks_are_in_order(tmp_path, texts):
    """A file that is merged of several chunks, in several pieces, against numpy's sort of all contexts."""
    write_datastore(tmp_path / "a.rest", texts, chunk_tokens=70_000)
    raw = (tmp_path / "a.rest").read_bytes()
    n_tokens, n_places = struct.unpack_from("QQ", raw, 16)
    tokens = np.frombuffer(raw, np.int32, n_tokens, HEADER)
    places = np.frombuffer(raw, np.uint32, n_places, HEADER + 4 * n_tokens).astype(np.int64)
    assert tokens.tolist() == np.concatenate([[*text, END] for text in texts]).tolist()
    padded = np.concatenate([np.full(LONGEST, -1), tokens])
    goes_on = np.arange(1, n_tokens)
    goes_on = goes_on[(tokens[1:] != END) & (tokens[:-1] != END)]
    before = [padded[goes_on + LONGEST - 1 - depth] for depth in range(LONGEST)]
    assert places.tolist() == goes_on[np.lexsort([goes_on, *reversed(before)])].tolist()


def test_monotonous_text_is_sorted_as_fast_as_any(tmp_path):
    """Compared without end, 300,000 equal tokens would take some 10^11 comparisons."""
    write_datastore(tmp_path / "a.rest", [[5] * 300_000], chunk_tokens=100_000)
    assert Datastore(tmp_path / "a.rest", 6).draft([5] * 40, 9)[0] == [5] * 9


def watch_writing(path: Path, kind: str, chunk_tokens: int) -> int:
    """Bytes of memory that a datastore of 4 million tokens takes at most, but for pages of its files."""
    rng, sizes, done = np.random.default_rng(0), [], Event()

    def texts():
        for _ in range(40):
            yield rng.integers(50_000, size=99_999) if kind == "varied" else np.full(99_999, 5)
            sizes.append(read_anonymous())

    def watch():
        while not done.wait(0.001):
            sizes.append(read_anonymous())

    next(texts())
    before, watcher = read_anonymous(), Thread(target=watch)
    watcher.start()
    write_datastore(path, texts(), chunk_tokens=chunk_tokens)
    done.set()
    watcher.join()
    return max(sizes) - before


def read_anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


@pytest.mark.parametrize("kind", ["varied", "monotonous"])
def test_memory_is_that_of_a_chunk_however_long_the_text(tmp_path, kind):
    chunk_tokens = 1 << 21
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        taken = process.submit(watch_writing, tmp_path / "a.rest", kind, chunk_tokens).result()
    assert 4 * chunk_tokens < taken < 4 * chunk_tokens + (6 << 20)
    assert len(Datastore(tmp_path / "a.rest", 50_000)) == 4_000_000


def test_any_vocabulary_fits(tmp_path):
    large = 2**31 - 2
    write_datastore(tmp_path / "a.rest", [[large, 70_000, 3, large]])
    assert Datastore(tmp_path / "a.rest", 2**31 - 1).draft([70_000, 3], 4)[0] == [large]


# ---- Bad input ---------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path) -> Path:
    write_datastore(tmp_path / "good.rest", [[1, 2, 3, 4] * 5], HERE)
    return tmp_path / "good.rest"


def expect_refusal(path: Path, words: str, vocab: int = 100, tokenizer: str = HERE) -> None:
    with pytest.raises(BundleError) as error:
        Datastore(path, vocab, tokenizer)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_models_and_other_files_are_refused(tmp_path, good):
    Datastore(good, 5, HERE)
    expect_refusal(good, "built with another tokenizer", tokenizer=THERE)
    expect_refusal(good, "token ids up to 4, outside the vocabulary of 4", vocab=4)
    expect_refusal(tmp_path / "gone.rest", "No such file")
    expect_refusal(tmp_path, "is no datastore")
    (tmp_path / "text").write_text("once upon a time " * 20)
    expect_refusal(tmp_path / "text", "no datastore of this version")
    (tmp_path / "empty").touch()
    expect_refusal(tmp_path / "empty", "is no datastore: 0 bytes")


def test_every_cut_is_noticed(tmp_path, good):
    whole = good.read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.rest").write_bytes(whole[:size])
        expect_refusal(tmp_path / "cut.rest", "is no datastore" if size < HEADER else "cut short")
    (tmp_path / "cut.rest").write_bytes(whole + b"\0")
    expect_refusal(tmp_path / "cut.rest", "cut short or damaged")


def test_damage_inside_gives_some_draft_and_no_crash(tmp_path, good):
    rng, whole = np.random.default_rng(0), np.frombuffer(good.read_bytes(), np.uint8)
    for _ in range(300):
        damaged = whole.copy()
        at = rng.integers(HEADER, len(whole), size=8)
        damaged[at] = rng.integers(256, size=8)
        (tmp_path / "damaged.rest").write_bytes(damaged.tobytes())
        datastore = Datastore(tmp_path / "damaged.rest", 5, HERE)
        for context in ([1, 2], [4, 1, 2, 3], [3, 3], [2, 3, 4, 1] * 9):
            assert all(0 <= token < 5 for token in datastore.draft(context, 8)[0])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, good):
    before = good.read_bytes()

    def texts():
        yield [1, 2]
        raise RuntimeError("the text ended badly")

    with pytest.raises(RuntimeError):
        write_datastore(good, texts())
    for bad, words in (
        ([], "no tokens"),
        ([[1], [1, -3]], r"texts\[1\] holds ids from -3 to 1"),
        ([[1, 2**31]], "to 2147483648, which no vocabulary has"),
        ([[1.0, 2.5]], "float64 .2.: wanted a flat list of token ids"),
        ([[[1, 2]]], "int64 .1, 2.: wanted a flat list"),
    ):
        with pytest.raises(BundleError, match=words):
            write_datastore(good, bad)
    for digest in ("ab", "no hash", "ab" * 31 + "xy"):
        with pytest.raises(BundleError, match=f"tokenizer='{digest}': wanted the SHA-256"):
            write_datastore(good, [[1]], digest)
        with pytest.raises(BundleError, match="wanted the SHA-256"):
            Datastore(good, 5, digest)
    with pytest.raises(BundleError, match="cannot be written"):
        write_datastore(tmp_path / "no" / "folder", [[1]])
    assert good.read_bytes() == before and list(tmp_path.iterdir()) == [good]


def test_what_is_being_written_is_not_there_and_of_two_writers_the_last_one_counts(tmp_path):
    path = tmp_path / "a.rest"

    def texts():
        yield [1, 2, 3] * 30_000
        expect_refusal(path, "No such file")
        (part,) = tmp_path.glob("*.part")
        expect_refusal(part, "cut short or damaged")
        write_datastore(path, [[7, 8, 9]])
        assert len(Datastore(path, 100)) == 4
        yield [1, 2, 4]

    write_datastore(path, texts())
    assert len(Datastore(path, 100)) == 90_005
    assert [path.name for path in tmp_path.iterdir()] == ["a.rest"]


def test_a_datastore_that_is_replaced_stays_as_it_was_for_who_has_it_open(tmp_path):
    write_datastore(tmp_path / "a.rest", [[1, 2, 3]])
    before = Datastore(tmp_path / "a.rest", 10)
    write_datastore(tmp_path / "a.rest", [[1, 2, 4]])
    after = Datastore(tmp_path / "a.rest", 10)
    assert before.draft([1, 2], 1)[0] == [3] and after.draft([1, 2], 1)[0] == [4]


# ---- With bundles ------------------------------------------------------------------------------------------


def test_the_command_indexes_text_for_a_bundle(tmp_path, capsys):
    folder = write_bundle(tmp_path / "bundle")
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 3)
    (tmp_path / "b.txt").write_text("a dog\n")
    command = [
        "datastore",
        str(tmp_path / "a.txt"),
        str(tmp_path / "b.txt"),
        "-o",
        str(tmp_path / "out.rest"),
    ]
    with pytest.raises(SystemExit) as done:
        main([*command, "--bundle", str(folder), "--json"])
    assert done.value.code in (0, None)
    assert '"tokens": 77' in capsys.readouterr().out  # bytes, and the end of each file
    bundle = load(folder, datastore=tmp_path / "out.rest")
    assert bundle.datastore and len(bundle.datastore) == 77
    draft, _ = bundle.datastore.draft(bundle.encode("my cat s"), 14)
    assert bundle.tokenizer.decode(draft) == "at on the mat\n"


@pytest.mark.parametrize(
    "texts, out, words",
    [
        (["a.txt"], "a.txt", "-o a.txt is one of the texts and would replace it"),
        (["a.txt"], "folder", "folder is a folder: name the file"),
        (["a.txt"], "gone/out.rest", "-o gone/out.rest: its folder is not there"),
        (["gone.txt"], "out.rest", "gone.txt: no such file"),
        (["folder"], "out.rest", "folder: a folder; text files are wanted"),
        (["empty.txt"], "out.rest", "empty.txt: empty; some text is wanted"),
    ],
)
def test_the_command_says_in_a_line_what_it_cannot_index(tmp_path, monkeypatch, capsys, texts, out, words):
    monkeypatch.chdir(tmp_path)
    folder = write_bundle(tmp_path / "bundle")
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as done:
        main(["datastore", *texts, "-o", out, "--bundle", str(folder)])
    said = capsys.readouterr()
    assert done.value.code == 2 and words in said.err and said.err.count("\n") == 1
    assert (tmp_path / "a.txt").read_text() == "the cat sat on the mat\n"


def test_a_bundle_refuses_the_datastore_of_another_tokenizer_and_rest_without_one(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    write_datastore(tmp_path / "other.rest", [[1, 2, 3]], THERE)
    with pytest.raises(BundleError, match="built with another tokenizer"):
        load(folder, datastore=tmp_path / "other.rest")
    with pytest.raises(BundleError, match="rest drafts from a datastore and none is open"):
        open_bundle(folder).stream("text", speculate=["rest", "int8"])
    assert BYTE_VOCAB == 258
