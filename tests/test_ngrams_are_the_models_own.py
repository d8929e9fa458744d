"""The table of n-grams is what the target says after single tokens; drafts follow it; others are refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from draftsmith.speculate.binding import lib
from draftsmith.speculate.drafters import Sources
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ngrams import Ngrams, write_table
from fake_engine import BOS, BYTE_VOCAB, open_bundle, write_bundle, write_manifest

VOCAB, WIDTH = 7, 3
HERE, THERE = "ab" * 32, "cd" * 32
HEADER = struct.calcsize("8s4I32s")


def some_table(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = np.argsort(rng.random((VOCAB + 1, VOCAB)), axis=-1)[:, :WIDTH].astype(np.int32)
    return tokens, -np.sort(-rng.random((VOCAB + 1, WIDTH)), axis=-1).astype(np.float32) / 2


@pytest.fixture
def good(tmp_path) -> Path:
    write_table(tmp_path / "good.table", *some_table(), HERE)
    return tmp_path / "good.table"


def test_a_table_comes_back_as_it_was_written(good):
    tokens, probabilities = some_table()
    table = Ngrams(good, VOCAB, HERE)
    for row in range(VOCAB + 1):
        for room in (0, 1, WIDTH, WIDTH + 9):
            found = table.next(row if row < VOCAB else -1, room)
            assert found == (tokens[row, :room].tolist(), probabilities[row, :room].tolist())
    for token in (-2, VOCAB):
        with pytest.raises(BundleError, match=f"token {token} is outside the vocabulary of 7"):
            table.next(token, 1)


def test_a_draft_follows_the_first_of_each_row(good):
    tokens, probabilities = some_table()
    drafter = Sources(ngrams=Ngrams(good, VOCAB, HERE)).open("bigram", VOCAB)
    drafter.begin(9)
    for text, tail, row in (([], [], VOCAB), ([4, 2], [], 2), ([4, 2], [6, 5], 5)):
        if text:
            drafter.begin(9)
            drafter.append(text)
        draft, support = drafter.draft(tail, 5)
        for token, rests_on in zip(draft, support, strict=True):
            assert token == tokens[row, 0]
            limits = [(0.4 + 0.55) / 2, (0.55 + 0.7) / 2]
            assert rests_on == [1, 3, 5][sum(probabilities[row, 0] >= limit for limit in limits)]
            row = token
        assert len(draft) == 5


def test_the_table_is_the_argmax_after_each_token(tmp_path):
    """Against the target itself, one token a call."""
    pytest.importorskip("torch")
    from draftsmith import load
    from draftsmith.pipeline.ngrams import list_continuations, write_ngrams
    from tiny_bundle import write_tiny_bundle

    folder = write_tiny_bundle(tmp_path / "bundle")
    bundle = load(folder, threads=1)
    report = write_ngrams(folder, tmp_path)
    table = Ngrams(tmp_path / "ngrams.table", BYTE_VOCAB, bundle.manifest.fingerprint("target"))
    assert report["tokens"] == BYTE_VOCAB and report["bytes"] == table.path.stat().st_size
    width = report["candidates"]
    for token in [*range(0, BYTE_VOCAB, 7), BYTE_VOCAB - 1, -1]:
        check_row(bundle.logits([BOS] if token < 0 else [BOS, token])[-1], *table.next(token, width))
    tokens, probabilities = list_continuations(bundle.engine("target"), None)
    for token in (0, 97, BYTE_VOCAB - 1):
        check_row(bundle.logits([token])[-1], tokens[token].tolist(), probabilities[token].tolist())


def check_row(logits, tokens, probabilities):
    law = np.exp(logits - logits.max().astype(np.float64))
    law /= law.sum()
    assert tokens == np.argsort(-law, kind="stable")[: len(tokens)].tolist()
    np.testing.assert_allclose(probabilities, law[tokens], rtol=1e-5)


# ---- Bad input ---------------------------------------------------------------------------------------------


def expect_refusal(path: Path, words: str, vocab: int = VOCAB, model: str = HERE) -> None:
    with pytest.raises(BundleError) as error:
        Ngrams(path, vocab, model)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_models_and_other_files_are_refused(tmp_path, good):
    expect_refusal(good, "was read off another model than this target", model=THERE)
    expect_refusal(good, "of a vocabulary of 7, the target's has 8", vocab=8)
    expect_refusal(tmp_path / "gone", "cannot be opened: No such file")
    (tmp_path / "text").write_text("once upon a time " * 20)
    expect_refusal(tmp_path / "text", "is no table of n-grams of this version")


def test_every_cut_is_noticed(tmp_path, good):
    whole, cut = good.read_bytes(), tmp_path / "cut"
    for size in range(0, len(whole), 3):
        cut.write_bytes(whole[:size])
        expect_refusal(cut, "was cut short" if size < HEADER else "longer or shorter than its 8 rows")
    cut.write_bytes(whole + b"\0")
    expect_refusal(cut, "longer or shorter than its 8 rows")


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_damage(tmp_path, bad):
    tokens, probabilities = some_table()
    tokens[3, 1] = bad
    write_table(tmp_path / "bad", tokens, probabilities, HERE)
    expect_refusal(tmp_path / "bad", "is damaged at entry 10")
    write_table(tmp_path / "bad", some_table()[0], np.full_like(probabilities, np.nan), HERE)
    expect_refusal(tmp_path / "bad", "is damaged at entry 0")


def test_a_bundle_with_the_table_of_another_is_refused(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    bundle = open_bundle(folder)
    assert bundle.ngrams is None
    tokens = np.zeros((BYTE_VOCAB + 1, 1), np.int32)
    for model in (bundle.manifest.fingerprint("target"), bundle.manifest.fingerprint("int8")):
        write_table(folder / "ngrams.table", tokens, np.ones(tokens.shape, np.float32), model)
        write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
        if model == bundle.manifest.fingerprint("target"):
            assert (
                open_bundle(folder).generate("text", 20, speculate=["bigram"], ignore_eos=True).stats.drafted
            )
        else:
            with pytest.raises(BundleError, match="another model"):
                open_bundle(folder)
    assert lib.DS_MODEL_BYTES == 32
