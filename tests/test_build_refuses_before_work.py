"""What cannot work is refused when the model is known, before calibration, with the key and the remedy."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from draftsmith.model.config import DecoderConfig, Rotary
from draftsmith.pipeline import preflight
from draftsmith.pipeline.errors import RecipeError
from draftsmith.pipeline.hashing import hash_file
from draftsmith.pipeline.preflight import (
    check_datastore,
    check_model,
    count_parameters,
    estimate_disk,
    find_datastore,
    find_texts,
)
from draftsmith.pipeline.recipe import Recipe
from draftsmith.pipeline.recipe_file import LoadedRecipe, load_recipe
from draftsmith.speculate.datastore import write_datastore

CONFIG = DecoderConfig(
    family="llama", dtype="bfloat16", vocab_size=100, hidden_size=36, intermediate_size=50, num_layers=2,
    num_heads=6, num_kv_heads=2, head_dim=6, max_position_embeddings=256, norm="rms", norm_eps=1e-5,
    activation="silu", gated_mlp=True, rotary=Rotary(inv_freq=(1.0, 0.1, 0.01)), attention_scale=0.4,
    tied_head=True,
)  # fmt: skip


def recipe(drafter=None, **calibration) -> Recipe:
    return Recipe.model_validate(
        {
            "version": 1,
            "model": {"source": "a/b"},
            "calibration": {"max_seq_length": 32} | calibration,
            "drafters": {"x": drafter} if drafter else {},
        }
    )


@pytest.mark.parametrize(
    ("drafter", "expected"),
    [
        ({"quantize": {"ignore": ["*.down_prj"]}}, r"drafters\.x\.quantize\.ignore: .*down_prj.* nearest: "),
        ({"prune": {"targets": ["model.layers.2.*"]}}, r"drafters\.x\.prune\.targets: .* matches no linear"),
        ({"prune": {"targets": ["lm_head"]}}, r"drafters\.x\.prune\.targets: lm_head is .* never pruned"),
        ({"prune": {"ignore": ["Linear"]}}, r"drafters\.x\.prune: ignore leaves none"),
        ({"prune": {"mask_structure": "4:8"}}, r"model\.layers\.0\.self_attn\.q_proj has 36 inputs.* of 8"),
        ({"prune": {"mask_structure": "2:4"}}, r"model\.layers\.0\.mlp\.down_proj has 50 inputs.* of 4"),
        (
            {"quantize": {}, "cache": "own", "kv_cache_dtype": "bfloat16"},
            r"drafters\.x\.kv_cache_dtype: .* multiple of 16 channels, .* take float32",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(drafter, expected, tmp_path):
    with pytest.raises(RecipeError, match=expected):
        check_model(recipe(drafter), CONFIG, tmp_path, tmp_path)


@pytest.mark.parametrize(
    "drafter",
    [
        {"prune": {"mask_structure": "2:4", "ignore": ["*.down_proj"]}},
        {"prune": {"mask_structure": "2:4", "targets": ["re:.*q_proj"]}, "quantize": {"ignore": ["lm_head"]}},
        {"prune": {"sparsity": 0.3}},
    ],
)
def test_settings_that_fit(drafter, tmp_path):
    assert check_model(recipe(drafter), CONFIG, tmp_path / "not" / "there", tmp_path) == []


def test_samples_longer_than_the_model_can_read(tmp_path):
    with pytest.raises(RecipeError, match="max_seq_length is 257, but the model has 256 positions"):
        check_model(recipe(max_seq_length=257), CONFIG, tmp_path, tmp_path)


def test_parameters_are_counted_right():
    layer = 36 * (36 + 12 + 12 + 36) + 3 * 36 * 50 + 2 * 36
    assert count_parameters(CONFIG) == 100 * 36 + 2 * layer + 36


def test_a_model_that_memory_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.os, "sysconf", lambda name: 300)
    with pytest.raises(RecipeError, match=r"takes about .* GiB of memory .* text files instead of self"):
        check_model(recipe(), CONFIG, tmp_path, tmp_path)


def test_a_disk_that_may_be_too_small_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    warnings = check_model(recipe({"quantize": {}}), CONFIG, tmp_path, tmp_path / "out")
    assert len(warnings) == 2 and all("GiB left" in warning for warning in warnings)


def test_the_room_that_is_asked_for_is_that_of_a_real_build():
    """SmolLM2 by its packaged recipe: du -s of the cache's stages, and the size of the bundle."""
    smollm2 = CONFIG.model_copy(
        update={
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30,
            "num_heads": 9, "num_kv_heads": 3, "head_dim": 64,
        }
    )  # fmt: skip
    kept, packed = estimate_disk(load_recipe("smollm2-lossless").recipe, smollm2)
    assert 1 < kept / 1830e6 < 1.2 and 0.95 < packed / 663e6 < 1.2


def test_what_engines_share_is_counted_once():
    one = recipe({"quantize": {}})
    two = one.model_copy(update={"drafters": dict.fromkeys("xy", one.drafters["x"])})
    other = recipe({"quantize": {"smoothing_strength": 0.5}})
    three = two.model_copy(update={"drafters": {**two.drafters, "z": other.drafters["x"]}})
    sizes = [estimate_disk(r, CONFIG)[0] for r in (recipe(), one, two, three)]
    first, alike, unlike = (b - a for a, b in pairwise(sizes))
    assert first == unlike == alike + 4 * count_parameters(CONFIG)


def test_texts_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")

    def texts(text):
        return find_texts(LoadedRecipe(recipe(text=text), Path("recipe.yaml")))

    assert texts("self") == {} and texts("dataset:wikitext") == {}
    assert texts("a.txt") == texts(["a.txt"]) == {"a.txt": tmp_path / "a.txt"}
    for missing in ("b.txt", ["a.txt", "b.txt"], ["self.txt"], "."):
        with pytest.raises(RecipeError, match="no file"):
            texts(missing)
    with pytest.raises(RecipeError, match="an empty list"):
        texts([])


def test_a_datastore_is_found_and_held_against_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizer = hash_file(tmp_path / "tokenizer.json")
    data = recipe().model_dump() | {"speculate": {"rest": {"datastore": "a.rest"}}}
    loaded = LoadedRecipe(Recipe.model_validate(data), tmp_path / "recipe.yaml")
    assert find_datastore(LoadedRecipe(recipe(), tmp_path / "recipe.yaml")) is None
    with pytest.raises(
        RecipeError, match=r"speculate\.rest\.datastore: no file a\.rest in .*draftsmith datastore"
    ):
        find_datastore(loaded)
    for ids, made_with, words in (
        ([1, 2, 99], tokenizer, None),
        ([1, 2, 100], tokenizer, "token ids up to 100, outside the vocabulary of 100"),
        ([1, 2, 99], "ab" * 32, "built with another tokenizer"),
    ):
        write_datastore(tmp_path / "a.rest", [ids], made_with)
        path = find_datastore(loaded)
        assert path == tmp_path / "a.rest"
        if words is None:
            check_datastore(path, CONFIG, tmp_path / "tokenizer.json")
        else:
            with pytest.raises(RecipeError, match=rf"speculate\.rest\.datastore: .*{words}"):
                check_datastore(path, CONFIG, tmp_path / "tokenizer.json")


def test_a_context_too_short_to_tune_on(tmp_path):
    short = CONFIG.model_copy(update={"max_position_embeddings": 100})
    with pytest.raises(RecipeError, match=r"100 tokens of context are too few .* at least 160"):
        check_model(recipe(), short, tmp_path, tmp_path)
