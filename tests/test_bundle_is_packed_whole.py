"""A bundle appears whole or not at all, belongs to its user, and never replaces what is not a bundle."""

import hashlib
import json
import os

import pytest
from draftsmith.pipeline import pack
from draftsmith.pipeline.errors import RecipeError
from draftsmith.pipeline.pack import check_output, lay_out, publish, try_bundle


def facts(data: bytes) -> dict:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


@pytest.fixture
def parts(tmp_path):
    """Two exports and a checkpoint, as the cache has them."""
    for name in ("target", "int8"):
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        data = f"graph of {name}".encode()
        (folder / "model.onnx").write_bytes(data)
        entry = {"graph": "model.onnx", "portable": "model.onnx", "weights": name}
        (folder / "engine.json").write_text(json.dumps(entry | {"files": {"model.onnx": facts(data)}}))
    model = tmp_path / "cache" / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    (model / "config.json").write_text("of no use in a bundle")
    return {"target": tmp_path / "cache" / "target", "int8": tmp_path / "cache" / "int8"}, model


@pytest.fixture
def layout(parts):
    engines, model = parts
    texts = {"plan.json": "{}", "MODEL_CARD.md": "é"}
    return lay_out(engines, model, texts, {"recipe_sha256": "0"}, sharing=["int8"])


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_manifest_lists_every_file_with_its_hash(layout, tmp_path):
    out = tmp_path / "deep" / "bundle"
    assert publish(out, layout) == "first time"
    files = contents(out)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {name: facts(files[name]) for name in sorted(files)}
    assert set(files) == {
        "target/model.onnx", "drafters/int8/model.onnx", "tokenizer.json", "plan.json", "MODEL_CARD.md"
    }  # fmt: skip
    assert manifest["engines"]["int8"] == {
        "graph": "drafters/int8/model.onnx",
        "portable": "drafters/int8/model.onnx",
        "weights": "int8",
        "shares_cache": True,
    }
    assert manifest["engines"]["target"]["shares_cache"] is False
    assert manifest["schema_version"] == 2 and manifest["recipe_sha256"] == "0"
    assert list(out.parent.iterdir()) == [out], "nothing is left beside it"


def test_it_shares_no_file_with_the_cache(layout, tmp_path):
    publish(tmp_path / "bundle", layout)
    for path in (tmp_path / "bundle").rglob("*"):
        assert path.is_dir() or path.stat().st_nlink == 1
    (tmp_path / "bundle" / "target" / "model.onnx").write_text("edited")
    assert (tmp_path / "cache" / "target" / "model.onnx").read_text() == "graph of target"


def test_packing_the_same_again_writes_nothing(layout, tmp_path):
    out = tmp_path / "bundle"
    publish(out, layout)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert publish(out, layout) == ""
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_what_was_edited_or_deleted_is_put_back_and_named(layout, tmp_path):
    out = tmp_path / "bundle"
    publish(out, layout)
    original = contents(out)
    (out / "plan.json").write_text("[]")
    os.utime(out / "plan.json", ns=(2**62, 2**62))  # later than the manifest, however coarse the clock
    assert publish(out, layout) == "plan.json was edited"
    (out / "tokenizer.json").unlink()
    assert publish(out, layout) == "tokenizer.json was deleted"
    assert contents(out) == original


def test_another_bundle_is_replaced(layout, parts, tmp_path):
    out = tmp_path / "bundle"
    publish(out, layout)
    engines, model = parts
    smaller = lay_out({"target": engines["target"]}, model, {"plan.json": "{}"}, {})
    assert publish(out, smaller) == "its content changed"
    assert not (out / "drafters").exists() and not (out / "MODEL_CARD.md").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json"])
def test_a_folder_that_is_no_bundle_is_left_alone(layout, tmp_path, name):
    out = tmp_path / "mine"
    out.mkdir()
    publish(out, layout)  # an empty folder is nobody's loss
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_text("{}")
    with pytest.raises(RecipeError, match="no bundle, so it is left alone"):
        publish(other, layout)
    assert contents(other) == {name: b"{}"}


def test_a_bundle_with_a_file_of_the_user_in_it_is_left_alone(layout, tmp_path):
    out = tmp_path / "bundle"
    publish(out, layout)
    (out / "notes.txt").write_text("x")
    with pytest.raises(RecipeError, match=r"holds notes\.txt"):
        check_output(out)


def test_a_pack_that_fails_leaves_the_old_bundle(layout, parts, tmp_path, monkeypatch):
    out = tmp_path / "bundle"
    publish(out, layout)
    original = contents(out)
    engines, model = parts
    changed = lay_out(engines, model, {"plan.json": "[]"}, {})

    def run_out_of_disk(source, destination):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pack, "copy_file", run_out_of_disk)
        with pytest.raises(OSError, match="No space left"):
            publish(out, changed)
    assert contents(out) == original
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "cache"]


def test_a_bundle_to_measure_is_made_of_links_and_has_a_plan(parts, tmp_path):
    engines, model = parts
    inputs = {"model": model, **{f"engine {name}": path for name, path in engines.items()}}
    bundle = try_bundle(tmp_path, inputs)
    assert (bundle / "target" / "model.onnx").stat().st_nlink == 2
    assert json.loads((bundle / "plan.json").read_text())["ladder"] == []
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text('{"ladder": ["suffix"]}')
    bundle = try_bundle(tmp_path, inputs | {"plan": tmp_path / "plan"})
    assert json.loads((bundle / "plan.json").read_text())["ladder"] == ["suffix"]


def test_a_copy_has_every_byte(tmp_path):
    data = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(data)
    pack.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data


def test_tensorrt_engines_lie_beside_the_graphs_and_are_listed_with_what_was_said_of_them(parts, tmp_path):
    engines, model = parts
    compiled = tmp_path / "cache" / "compiled"
    (compiled / "engines").mkdir(parents=True)
    (compiled / "engines" / "sm89.trt").write_bytes(b"plan")
    built = {"file": "engines/sm89.trt", "builder": "tensorrt_rtx 1.7", "rows": [1, 8], "sparse_tactics": 0}
    (compiled / "tensorrt.json").write_text(json.dumps(built | facts(b"plan")))
    layout = lay_out(engines, model, {"plan.json": "{}"}, {}, {"target": [], "int8": [compiled]})
    publish(tmp_path / "bundle", layout)
    assert contents(tmp_path / "bundle")["drafters/int8/engines/sm89.trt"] == b"plan"
    assert layout.manifest["files"]["drafters/int8/engines/sm89.trt"] == facts(b"plan")
    described = built | {"file": "drafters/int8/engines/sm89.trt", "size": 4}
    assert layout.manifest["engines"]["int8"]["tensorrt"] == [described]
    assert "tensorrt" not in layout.manifest["engines"]["target"]
