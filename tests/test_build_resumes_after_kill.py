"""A build that is killed at any point goes on where it was, and ends with the bytes of one that was not."""

import shutil
import subprocess
import sys

import pytest
from draftsmith.pipeline.cache import Cache
from draftsmith.pipeline.hashing import list_files

BUILD = """
import os, signal, sys
from pathlib import Path
from draftsmith.pipeline import cache as cache_module
from draftsmith.pipeline.cache import Cache
from draftsmith.pipeline.stage import Stage, Task, run_task

root, log, die_at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


def reach(point):
    with log.open("a") as file:
        file.write(point + "\\n")
    if point == die_at:
        os.kill(os.getpid(), signal.SIGKILL)


def first(call):
    reach("first begins")
    (call.out / "a").write_text("one")
    reach("first is half done")
    (call.out / "b").write_text("two")
    return {}


def layers(call):
    text = (call.inputs["first"] / "a").read_text()
    for index in range(4):
        done = call.work / f"{index}"
        if not done.exists():
            reach(f"layer {index}")
            part = call.work / "part"
            part.write_text(f"{text} {index}")
            part.rename(done)
        (call.out / f"{index}").write_text(done.read_text())
    return {}


def last(call):
    reach("last begins")
    (call.out / "c").write_text("".join(p.read_text() for p in sorted(call.inputs["layers"].iterdir())))
    return {}


write_json = cache_module.write_json


def commit(path, data):
    if path.name == "stage.json":
        reach(f"{data['stage']} before commit")
    write_json(path, data)
    if path.name == "stage.json":
        reach(f"{data['stage']} after commit")


cache_module.write_json = commit
code = ("pipeline/cache.py",)
one = Task(Stage("first", first, code))
two = Task(Stage("layers", layers, code), inputs={"first": one})
three = Task(Stage("last", last, code), inputs={"layers": two})
done = {}
for task in (one, two, three):
    outcome = run_task(task, done, Cache(root), say=print)
    done[task] = outcome.entry
    print("hit" if outcome.hit else "miss")
"""
POINTS = [
    "first begins", "first is half done", "first before commit", "first after commit",
    "layer 0", "layer 1", "layer 2", "layer 3", "layers before commit", "layers after commit",
    "last begins", "last before commit", "last after commit",
]  # fmt: skip


def contents(root):
    """Every finished stage: its name and the hash of its content."""
    return {entry.path.name: entry.content for entry in Cache(root).entries()}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "build.py"
    script.write_text(BUILD)

    def run(folder, die_at=""):
        command = [sys.executable, str(script), str(folder / "cache"), str(folder / "log"), die_at]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def unbroken(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert build(folder).stdout.split() == ["miss"] * 3
    assert (folder / "log").read_text().splitlines() == POINTS
    return contents(folder / "cache")


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point, build, unbroken, tmp_path):
    killed = build(tmp_path, die_at=point)
    assert killed.returncode == -9
    finished = contents(tmp_path / "cache")
    assert finished.items() <= unbroken.items(), "a crash leaves nothing half made"

    resumed = build(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split() == ["hit"] * len(finished) + ["miss"] * (3 - len(finished))
    assert contents(tmp_path / "cache") == unbroken
    log = (tmp_path / "log").read_text().splitlines()
    for layer in range(4):
        # Done twice only where the kill came before the layer was kept.
        assert log.count(f"layer {layer}") == 1 + (point == f"layer {layer}")
    assert not list_files(tmp_path / "cache" / "work"), "nothing is left over"
    assert build(tmp_path).stdout.split() == ["hit"] * 3


def test_stages_before_a_failure_are_kept_whatever_the_order(build, unbroken, tmp_path):
    for point in ("layer 2", "layer 3", "last begins"):
        assert build(tmp_path, die_at=point).returncode == -9
    assert build(tmp_path).returncode == 0
    assert contents(tmp_path / "cache") == unbroken


REAL_BUILD = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from draftsmith.pipeline import build, stage

@contextmanager
def dying(title):
    def progress(done, total, label):
        if (title, done) == ("prune sparse8", 2):
            os.kill(os.getpid(), signal.SIGKILL)
    yield progress

stage.show_progress = dying
build.build(sys.argv[1], out=Path(sys.argv[2]))
"""
CACHED_BUILD = """
import sys
from pathlib import Path
from draftsmith.pipeline.build import build

result = build(sys.argv[1], out=Path(sys.argv[2]))
heavy = {"torch", "transformers", "onnx", "onnxruntime"} & set(sys.modules)
print(all(row["hit"] for row in result["stages"]), heavy)
"""
RECIPE = """
version: 1
model: {source: model, dtype: float32}
calibration: {num_calibration_samples: 4, max_seq_length: 96}
speculate: {tune_prompts: 1}
drafters:
  int8: {quantize: {smoothing_strength: 0.5}}
  sparse8: {prune: {mask_structure: 2:4}, quantize: {smoothing_strength: 0.5}}
  int4: {quantize: {scheme: W4A8}}
"""
# These hold measured times.
MEASURED = ("tune", "bench")


def test_a_real_build_killed_between_two_layers(tmp_path, tiny_tokenizer, monkeypatch):
    from conftest import save_random_model
    from draftsmith.pipeline.build import build

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_random_model("llama", {"max_position_embeddings": 512}, tmp_path / "model")
    shutil.copy(tiny_tokenizer, tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)

    def run(name, caches):
        monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / caches))
        lines = []
        result = build(str(recipe), out=tmp_path / name, say=lines.append)
        made = {entry.path.name: entry.content for entry in Cache(tmp_path / caches).entries()}
        kept = {name: content for name, content in made.items() if not name.startswith(MEASURED)}
        return {row["stage"] + " " + row["engine"]: row["hit"] for row in result["stages"]}, kept, lines

    _, unbroken, _ = run("unbroken", "one")
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "two"))
    command = [sys.executable, "-c", REAL_BUILD, str(recipe), str(tmp_path / "killed")]
    assert subprocess.run(command, check=False, stdout=subprocess.PIPE).returncode == -9
    assert not (tmp_path / "killed").exists()
    layers = sorted(path.name for path in (tmp_path / "two" / "work").rglob("layers/0*.json"))
    assert layers == ["000.json", "001.json"], "two of three layers were kept"

    hits, resumed, lines = run("killed", "two")
    assert resumed == unbroken
    before = [name for name, hit in hits.items() if hit]
    assert before == [
        "load ", "calibrate ", "export target", "smooth int8", "quantize int8", "export int8"
    ]  # fmt: skip
    assert len(lines) == len(hits)
    command = [sys.executable, "-c", CACHED_BUILD, str(recipe), str(tmp_path / "killed")]
    cached = subprocess.run(command, check=True, capture_output=True, text=True)
    assert cached.stdout.endswith("True set()\n"), "a build that finds everything needs nothing heavy"
