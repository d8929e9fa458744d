"""A drafter that knows only some tokens: the frequent ones, with the logits that they have anyway."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from draftsmith.export.portable import export_onnx
from draftsmith.model.decoder import Decoder
from draftsmith.model.errors import ModelError
from draftsmith.model.layout import HEAD_IDS
from draftsmith.model.store import Checkpoint, write_part
from draftsmith.model.vocabulary import cut_vocabulary
from draftsmith.pipeline.errors import RecipeError
from draftsmith.pipeline.evaluate import evaluate, measure_perplexity
from draftsmith.pipeline.preflight import check_model
from draftsmith.pipeline.recipe import Recipe
from draftsmith.speculate.bundle import Bundle, load
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.joint import Contrast, Ensemble, generate_jointly
from fake_engine import write_manifest
from graph_session import GraphSession
from quantized import quantize_checkpoint
from tiny_bundle import CONFIG, write_tiny_bundle, write_tiny_checkpoint

IDS, SLOTS = [3, 17, 5, 90, 33, 8, 41], 16


def cut(source, folder, size: int, text) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    vocab = Checkpoint(source).config.vocab_size
    write_part(
        folder, "tokens", {"frequencies": torch.bincount(torch.tensor(text), minlength=vocab).double()}
    )
    return cut_vocabulary(source, folder / "tokens.safetensors", size, folder / "cut")


def known(folder) -> list[int]:
    return Checkpoint(folder / "cut").load_head()[HEAD_IDS].tolist()


# ---- Which tokens ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    write_tiny_checkpoint(folder, quantized=False)
    return folder


def test_the_most_frequent_are_kept_then_the_lowest(source, tmp_path):
    text = (np.random.default_rng(3).zipf(1.3, 320) % CONFIG.vocab_size).tolist()
    counts = Counter(text)
    by_count = sorted(range(CONFIG.vocab_size), key=lambda token: (-counts[token], token))
    order = [*CONFIG.eos_token_ids, *(token for token in by_count if token not in CONFIG.eos_token_ids)]
    for size in (1, 2, 20, len(counts) + 9, CONFIG.vocab_size - 1):
        report = cut(source, tmp_path / str(size), size, text)
        assert known(tmp_path / str(size)) == sorted(order[:size])
        assert report["tokens"] == size and report["of"] == CONFIG.vocab_size
        assert report["covered"] == pytest.approx(sum(counts[token] for token in order[:size]) / len(text))


def test_all_tokens_are_too_many(source, tmp_path):
    with pytest.raises(ModelError, match=r"draft_vocab_size is 300 .* lower it"):
        cut(source, tmp_path, 300, [1, 2])


# ---- Their logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["float", "int8", "int4"])
@pytest.mark.parametrize("variant", ["llama-tied", "llama-bias", "gemma3_text", "gpt2"])
def test_known_tokens_keep_their_logits_and_others_have_none(tiny_checkpoint, tmp_path, variant, weights):
    whole = tiny_checkpoint(variant)
    if weights != "float":
        quantize_checkpoint(whole, tmp_path / "whole", bits=int(weights[-1]))
        whole = tmp_path / "whole"
    vocab = Checkpoint(whole).config.vocab_size
    cut(whole, tmp_path, len(IDS), IDS * 3)
    ids = known(tmp_path)
    assert set(ids) <= {*IDS, *Checkpoint(whole).config.eos_token_ids}
    others = np.setdiff1d(np.arange(vocab), ids)
    export_onnx(whole, tmp_path / "a")
    export_onnx(tmp_path / "cut", tmp_path / "b")
    prompt = [[1, 4, 9, 2, 30]]

    for graph in ("cpu.onnx", "model.onnx"):
        logits, expected = (GraphSession(tmp_path / side / graph, SLOTS).run(prompt, [0]) for side in "ba")
        assert logits.shape == expected.shape
        assert (logits[..., others] == -np.inf).all()
        if graph == "cpu.onnx":  # an output does not depend on the others
            np.testing.assert_array_equal(logits[..., ids], expected[..., ids])
        else:
            np.testing.assert_allclose(logits[..., ids], expected[..., ids], atol=1e-4)
    in_torch = Decoder.from_checkpoint(Checkpoint(tmp_path / "cut")).forward(torch.tensor(prompt)).numpy()
    expected = Decoder.from_checkpoint(Checkpoint(whole)).forward(torch.tensor(prompt)).numpy()
    np.testing.assert_allclose(in_torch[..., ids], expected[..., ids], rtol=1e-5, atol=1e-5)
    assert (in_torch[..., others] == -np.inf).all()


# ---- In a bundle -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The tiny bundle with a drafter more: the target itself, of which 60 of the tokens are left."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_tiny_bundle(folder)
    checkpoint, plain = folder.parent / "few.checkpoint", load(folder)
    text = plain.generate("abc abd", max_new_tokens=60, speculate="none", ignore_eos=True).token_ids
    cut(folder.parent / "target.checkpoint", checkpoint, 60, text)
    export_onnx(checkpoint / "cut", folder / "drafters/few")
    manifest = json.loads((folder / "manifest.json").read_text())
    paths = {key: f"drafters/few/{name}" for key, name in (("graph", "cpu.onnx"), ("portable", "model.onnx"))}
    manifest["engines"]["few"] = {**manifest["engines"]["target"], **paths, "draft_vocab_size": 60}
    write_manifest(folder, manifest)
    return folder, known(checkpoint)


@pytest.mark.parametrize("device", ["cpu", "portable"])
@pytest.mark.parametrize("ladder", [["few"], ["suffix", "few"], ["few", "int8"]], ids="-".join)
def test_decoding_with_it_is_lossless(bundle, ladder, device):
    opened, taken = load(bundle[0], threads=2, device=device), 0
    for seed, prompt in enumerate(("abc abd", "the quick brown fox", "x = 1\ny = ")):
        outputs = [
            opened.generate(prompt, 48, speculate=levels, ignore_eos=True, **settings)
            for settings in ({}, {"temperature": 0.8, "seed": seed, "verify": "exact"})
            for levels in ("none", ladder)
        ]
        assert outputs[0].token_ids == outputs[1].token_ids
        assert outputs[2].token_ids == outputs[3].token_ids
        taken += sum(draft.accepted for draft in outputs[1].stats.drafts if draft.name == "few")
    assert taken > 0


def test_it_has_no_perplexity_but_agrees(bundle, tmp_path):
    opened = load(bundle[0], threads=2)
    (tmp_path / "text.txt").write_text("every quick brown fox jumps over 0123456789 lazy dogs. " * 4)
    engines = evaluate(opened, tmp_path / "text.txt", window=64)["engines"]
    assert "perplexity" not in engines["few"] and 0 < engines["few"]["text_agreement"] < 1
    assert engines["int8"]["perplexity"] > 1
    assert set(measure_perplexity(opened, tmp_path / "text.txt", 64, 2)) == {"target", "int8"}


def test_logits_that_are_no_numbers_are_no_cut_vocabulary(bundle, tmp_path, monkeypatch):
    opened, logits = load(bundle[0], threads=2), Bundle.logits
    (tmp_path / "text.txt").write_text("every quick brown fox jumps over lazy dogs. " * 4)
    for broken in ("target", "few"):
        monkeypatch.setattr(
            Bundle, "logits", lambda self, ids, engine, _broken=broken: logits(self, ids, engine) * (
                np.nan if engine == _broken else 1)
        )  # fmt: skip
        with pytest.raises(BundleError, match=f"logits of {broken} on this text are not numbers"):
            measure_perplexity(opened, tmp_path / "text.txt", 64, 2)


def test_a_contrast_needs_all_tokens(bundle):
    opened = load(bundle[0], threads=2)
    with pytest.raises(BundleError, match=r"few knows 60 of the 258 tokens .* take an ensemble"):
        generate_jointly(opened, "few", Contrast(0.1), [1, 2, 3], 8)
    assert len(generate_jointly(opened, "few", Ensemble(0.5), [1, 2, 3], 8, ignore_eos=True).token_ids) == 8


# ---- In a recipe -------------------------------------------------------------------------------------------


def recipe(**drafter) -> Recipe:
    return Recipe.model_validate(
        {"version": 1, "model": {"source": "somewhere"}, "drafters": {"small": drafter}}, strict=False
    )


def test_a_recipe_says_how_many(tmp_path):
    fits = recipe(quantize={}, draft_vocab_size=100)
    check_model(fits.model_copy(update={"calibration": fits.calibration.model_copy(
        update={"max_seq_length": 64})}), CONFIG, tmp_path, tmp_path)  # fmt: skip
    with pytest.raises(RecipeError, match=r"drafters\.small\.draft_vocab_size is 5000, .* lower it"):
        check_model(recipe(quantize={}, draft_vocab_size=5000), CONFIG, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="nor draft_vocab_size"):
        recipe(skip_layers=[1], draft_vocab_size=100)
    with pytest.raises(ValueError, match="leaves every layer as it is: add quantize or prune"):
        recipe(draft_vocab_size=100)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        recipe(quantize={}, draft_vocab_size=0)
