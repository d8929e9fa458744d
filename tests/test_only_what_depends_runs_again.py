"""Engines of a recipe share what they have in common, and a change runs what depends on it and no more."""

from dataclasses import replace

import pytest
from draftsmith.pipeline import stages
from draftsmith.pipeline.cache import Cache
from draftsmith.pipeline.hashing import hash_json, list_files
from draftsmith.pipeline.recipe import Recipe
from draftsmith.pipeline.stage import Call, run_task
from draftsmith.pipeline.stages import plan_tasks

NAMES = ("LOAD", "CALIBRATE", "SMOOTH", "PRUNE", "QUANTIZE", "EXPORT", "TUNE", "CHECK", "BENCH")
BASE = {
    "version": 1,
    "model": {"source": "a/b"},
    "drafters": {
        "int8": {"quantize": {"smoothing_strength": 0.5}},
        "sparse8": {
            "prune": {"mask_structure": "2:4"},
            "quantize": {"smoothing_strength": 0.5},
        },
    },
}


def stand_in(call: Call) -> dict:
    """Output that depends on all that the stage was given, as the real ones do."""
    inputs = {
        name: [(file, (folder / file).read_text()) for file in list_files(folder)]
        for name, folder in call.inputs.items()
    }
    files = {name: path.read_text() for name, path in call.files.items()}
    (call.out / "out").write_text(hash_json([inputs, files, dict(call.params)]))
    return {}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for name in NAMES:
        stage = getattr(stages, name)
        monkeypatch.setattr(stages, name, replace(stage, run=stand_in, sums=False))


@pytest.fixture
def build(tmp_path):
    source = tmp_path / "model.gguf"
    source.write_text("weights")
    cache = Cache(tmp_path / "cache")

    def build(texts=(), **changes) -> list[str]:
        """Names of the stages that ran."""
        data = BASE | changes
        done, ran = {}, []
        for task in plan_tasks(Recipe.model_validate(data), source, {path.name: path for path in texts}):
            outcome = run_task(task, done, cache, say=lambda line: None)
            done[task] = outcome.entry
            if not outcome.hit:
                ran.append(task.name)
        return ran

    return build


def drafters(**changes):
    return BASE["drafters"] | changes


AFTER = ["tune", "check", "bench"]


def test_the_plan_runs_in_order_and_shares_smoothing(build):
    assert build() == [
        "load", "calibrate", "export target",
        "smooth int8", "quantize int8", "export int8",
        "prune sparse8", "quantize sparse8", "export sparse8",
        *AFTER,
    ]  # fmt: skip
    assert build() == []


def test_one_smoothing_strength(build):
    build()
    changed = drafters(int8={"quantize": {"smoothing_strength": 0.7}})
    assert build(drafters=changed) == ["smooth int8", "quantize int8", "export int8", *AFTER]
    assert build() == [], "what was made before is still there"


def test_a_drafter_of_4_bits(build):
    """Another law to smooth for, so another smoothing."""
    build()
    settings = BASE["drafters"]["int8"]["quantize"] | {"scheme": "W4A8"}
    ran = build(drafters=drafters(int4={"quantize": settings}))
    assert ran == ["smooth int4", "quantize int4", "export int4", *AFTER]


def test_a_mask(build):
    build()
    changed = drafters(sparse8=BASE["drafters"]["sparse8"] | {"prune": {"mask_structure": "4:8"}})
    assert build(drafters=changed) == ["prune sparse8", "quantize sparse8", "export sparse8", *AFTER]


def test_the_seed_of_calibration(build):
    build()
    ran = build(calibration={"seed": 1})
    assert ran == [
        "calibrate", "smooth int8", "quantize int8", "export int8",
        "prune sparse8", "quantize sparse8", "export sparse8", *AFTER,
    ]  # fmt: skip


def test_the_ladder_alone(build):
    build()
    assert build(speculate={"ladder": ["suffix"]}) == ["tune", "bench"]


def test_a_gate_runs_nothing(build):
    build()
    assert build(gate={"max_regression": 0.1}) == []


def test_another_drafter_leaves_the_others_as_they_are(build):
    build()
    ran = build(drafters=drafters(half={"prune": {"sparsity": 0.5}}))
    assert ran == ["prune half", "export half", *AFTER]


def test_a_drafter_by_another_name_is_the_same_work(build):
    build()
    renamed = {"q8": BASE["drafters"]["int8"], "sparse8": BASE["drafters"]["sparse8"]}
    assert build(drafters=renamed) == AFTER


def test_a_setting_that_magnitude_pruning_does_not_read(build):
    magnitude = {"method": "magnitude", "sparsity": 0.5}
    build(drafters={"m": {"prune": magnitude}})
    assert build(drafters={"m": {"prune": magnitude | {"block_size": 64, "dampening_frac": 0.1}}}) == []


def test_the_text_counts_by_content(build, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    named = {"text": ["text.txt"]}
    build(texts=[text], calibration=named)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "text.txt").write_text("one")
    assert build(texts=[moved / "text.txt"], calibration=named) == []
    text.write_text("two")
    assert "calibrate" in build(texts=[text], calibration=named)


def test_the_weights_count_by_content(build, tmp_path):
    build()
    (tmp_path / "model.gguf").write_text("other weights")
    assert build()[0] == "load"


@pytest.mark.parametrize(
    ("target", "chain"),
    [
        ({"quantize": {}}, ["smooth", "quantize", "export"]),
        ({"quantize": {"smoothing_strength": "none"}}, ["quantize", "export"]),
        ({"prune": {}}, ["prune", "export"]),
        ({"prune": {}, "quantize": {}}, ["smooth", "prune", "quantize", "export"]),
    ],
)
def test_a_compressed_target(build, target, chain):
    assert build(target=target, drafters={}) == [
        "load", "calibrate", *(f"{stage} target" for stage in chain), *AFTER
    ]  # fmt: skip


def test_pruning_for_int8_is_joint_and_pruning_alone_is_not(tmp_path):
    recipe = Recipe.model_validate(BASE | {"drafters": drafters(half={"prune": {"sparsity": 0.5}})})
    plan = plan_tasks(recipe, tmp_path, {})
    joint = {task.label: task.params["joint_int8"] for task in plan if task.stage.name == "prune"}
    assert joint == {"sparse8": True, "half": False}
