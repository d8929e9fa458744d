"""Keys and values are kept in bfloat16 where the linears that make them are quantized, or where a recipe says
so; and a graph that contradicts itself is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from decoding import draw_ids
from draftsmith.model.errors import ModelError
from draftsmith.model.store import Checkpoint
from draftsmith.pipeline.describe import resolve_recipe
from draftsmith.pipeline.recipe import Recipe
from draftsmith.speculate.binding import lib
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime
from graph_session import entry_of, error_of
from quantized import export_kind


def read_cache_types(folder: Path) -> set[int]:
    nodes = onnx.load(folder / "cpu.onnx", load_external_data=False).graph.node
    return {a.i for node in nodes for a in node.attribute if a.name == "cache_type"}


def open_engine(folder: Path, graph: str = "cpu.onnx") -> OnnxEngine:
    config = Checkpoint(folder / "checkpoint").config
    return OnnxEngine("target", folder / graph, entry_of(config), OnnxRuntime(2))


def read(engine: OnnxEngine, ids: np.ndarray) -> np.ndarray:
    engine.reserve(len(ids))
    return engine.forward(ids, 0).copy()


@pytest.mark.parametrize(
    ("variant", "kind", "wanted", "made"),
    [
        ("qwen3", "int8", "auto", "BFLOAT16"),
        ("qwen3", "int4", "auto", "BFLOAT16"),
        ("qwen3", "2:4", "auto", "BFLOAT16"),
        ("qwen3", "int8", "float32", "FLOAT32"),
        ("qwen3", "bfloat16", "auto", "FLOAT32"),
        ("qwen3", "float32", "bfloat16", "BFLOAT16"),
        ("llama-bias", "int8", "auto", "FLOAT32"),  # heads of 10 channels
    ],
)
def test_the_export_chooses_or_does_as_it_is_told(tiny_checkpoint, tmp_path, variant, kind, wanted, made):
    export_kind(tiny_checkpoint(variant), kind, tmp_path, wanted)
    assert read_cache_types(tmp_path) == {getattr(lib, f"DS_CACHE_{made}")}


def test_heads_that_do_not_fit_are_refused_before_anything_is_written(tiny_checkpoint, tmp_path):
    with pytest.raises(ModelError, match="multiple of 16 channels, and this model's have 10: take float32"):
        export_kind(tiny_checkpoint("llama-bias"), "int8", tmp_path, "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_it_changes_logits_by_the_rounding_of_its_entries(tiny_checkpoint, tmp_path):
    """Of float32 weights nothing else is rounded."""
    for dtype in ("float32", "bfloat16"):
        export_kind(tiny_checkpoint("qwen3"), "float32", tmp_path / dtype, dtype)
    exact, rounded = open_engine(tmp_path / "float32"), open_engine(tmp_path / "bfloat16")
    ids = draw_ids(exact, 60)
    assert 2e-5 < error_of(read(rounded, ids), read(exact, ids)) < 2e-2


@pytest.mark.parametrize("types", [(1, 1, 0), (0, 1, 1), (7, 7, 7), (-1, -1, -1)])
def test_a_graph_that_contradicts_itself_is_refused(tiny_checkpoint, tmp_path, types):
    export_kind(tiny_checkpoint("qwen3"), "int8", tmp_path)
    model = onnx.load(tmp_path / "cpu.onnx", load_external_data=False)
    said = [a for node in model.graph.node for a in node.attribute if a.name == "cache_type"]
    for attribute, value in zip(said, types, strict=True):
        attribute.i = value
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(BundleError, match="cache_type"):
        open_engine(tmp_path, "wrong.onnx")


def read_recipe(**drafter) -> Recipe:
    return Recipe.model_validate(
        {
            "version": 1,
            "model": {"source": "a/b"},
            "drafters": {"copy": {"kv_cache_dtype": "bfloat16", **drafter}},
        }
    )


@pytest.mark.parametrize("drafter", [{"skip_layers": [1]}, {"quantize": {}}])
def test_a_drafter_in_the_targets_cache_has_none_to_speak_of(drafter):
    with pytest.raises(ValueError, match="give kv_cache_dtype to the target, or say cache: own"):
        read_recipe(**drafter)


def test_a_recipe_is_resolved_to_what_the_caches_hold():
    recipe = read_recipe(quantize={}, cache="own")
    resolved = resolve_recipe(recipe, {"ladder": [], "num_speculative_tokens": {}}, {"target": "float32"})
    assert resolved.target.kv_cache_dtype == "float32"
    assert resolved.drafters["copy"].kv_cache_dtype == "bfloat16"
    resolved = resolve_recipe(resolved, {}, {"target": "bfloat16", "copy": "float32"})
    assert resolved.target.kv_cache_dtype == "bfloat16"
    assert resolved.drafters["copy"].kv_cache_dtype == "float32"
