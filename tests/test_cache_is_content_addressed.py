"""A stage runs again exactly when something that decides its output has changed, and the reason is said."""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
from draftsmith.pipeline import stage as stage_module
from draftsmith.pipeline.cache import Cache
from draftsmith.pipeline.errors import RecipeError
from draftsmith.pipeline.hashing import hash_json
from draftsmith.pipeline.stage import Call, Stage, Task, run_task

RUNS: list[str] = []


def write(call: Call) -> dict:
    RUNS.append("write")
    (call.out / "deep").mkdir()
    (call.out / "deep" / "text").write_text(call.params["text"])
    return {"length": len(call.params["text"])}


def upper(call: Call) -> dict:
    RUNS.append("upper")
    text = (call.inputs["source"] / "deep" / "text").read_text()
    (call.out / "text").write_text(text.upper() + call.params.get("end", ""))
    return {}


def read(call: Call) -> dict:
    RUNS.append("read")
    (call.out / "copy").write_bytes(call.files["prompts"].read_bytes())
    return {}


WRITE = Stage("write", write, code=("pipeline/hashing.py",))
UPPER = Stage("upper", upper, code=("pipeline/hashing.py",), packages=("numpy",), sums=True)
READ = Stage("read", read, code=("pipeline/hashing.py",))


@pytest.fixture
def cache(tmp_path):
    RUNS.clear()
    return Cache(tmp_path / "cache")


def run(cache, *tasks, again=False):
    done, outcomes = {}, []
    for task in tasks:
        outcomes.append(run_task(task, done, cache, again=again, say=lambda line: None))
        done[task] = outcomes[-1].entry
    return outcomes


def chain(text="a", end="", label=""):
    source = Task(WRITE, label, {"text": text})
    return source, Task(UPPER, label, {"end": end}, {"source": source})


def test_the_second_run_hits_and_runs_nothing(cache):
    first = run(cache, *chain())
    assert [outcome.why for outcome in first] == ["first time", "first time"]
    second = run(cache, *chain())
    assert RUNS == ["write", "upper"]
    assert all(outcome.hit for outcome in second)
    assert second[1].why == "same source, settings, code"
    assert [outcome.entry for outcome in first] == [outcome.entry for outcome in second]
    assert (second[1].entry.output / "text").read_text() == "A"


def test_a_setting_reruns_what_depends_on_it_and_nothing_else(cache):
    run(cache, *chain())
    outcomes = run(cache, *chain(end="!"))
    assert [(o.hit, o.why) for o in outcomes] == [
        (True, "same settings, code"),
        (False, "end unset → !"),
    ]


def test_an_input_that_came_out_the_same_changes_nothing_after_it(cache):
    run(cache, *chain())
    outcomes = run(cache, *chain(), again=False)
    source = Task(Stage("write", lambda call: write(call), code=("pipeline/cache.py",)), "", {"text": "a"})
    outcomes = run(cache, source, Task(UPPER, "", {"end": ""}, {"source": source}))
    assert [outcome.hit for outcome in outcomes] == [False, True]
    assert "code of" in outcomes[0].why


def test_the_label_is_for_people(cache):
    run(cache, *chain(label="int8"))
    outcomes = run(cache, *chain(label="sparse8"))
    assert all(outcome.hit for outcome in outcomes)
    assert outcomes[0].entry.path.name.startswith("write-int8-")


def test_each_reason_is_named(cache, monkeypatch, tmp_path):
    def why(*tasks):
        return run(cache, *tasks)[-1].why

    run(cache, *chain())
    assert why(*chain(text="b")) == "source changed"
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "package_version", lambda name: "99")
        assert why(*chain()).startswith("numpy ")
        assert why(*chain()) == "same source, settings, code"
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "7")
        assert why(*chain()).endswith(" → 7")
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "hash_code", lambda part: "0" * 64)
        assert why(*chain()) == "code of pipeline/hashing.py changed"
    prompts = tmp_path / "prompts.txt"
    task = Task(READ, files={"prompts": prompts})
    prompts.write_text("one")
    assert why(task) == "first time"
    other = tmp_path / "moved.txt"
    other.write_text("one")
    assert why(Task(READ, files={"prompts": other})) == "same prompts, settings, code"
    prompts.write_text("two")
    assert why(task) == "prompts changed"


def test_a_key_is_the_full_hash_of_everything_that_went_into_it(cache):
    entry = run(cache, *chain())[1].entry
    assert entry.key == hash_json(entry.record) and len(entry.key) == 64
    assert set(entry.record) == {"stage", "params", "inputs", "files", "code", "packages", "arithmetic"}
    stored = json.loads((entry.path / "stage.json").read_text())
    assert stored["record"] == entry.record
    assert stored["content"] == hash_json({"text": stored["files"]["text"]["sha256"]})


def test_equal_data_has_one_hash_and_different_data_have_two():
    assert hash_json({"a": 1, "b": [1.0, None]}) == hash_json({"b": [1.0, None], "a": 1})
    values = [1, 1.5, "1", True, None, [1], {"1": 1}, ["a", "b"], ["ab"], "", [], {}]
    assert len({hash_json(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="JSON"):
        hash_json(float("nan"))


@pytest.mark.parametrize("damage", ["edit", "truncate", "delete", "add", "stage.json"])
def test_a_damaged_entry_is_a_miss_that_says_so(cache, damage):
    entry = run(cache, *chain())[1].entry
    file = entry.output / "text"
    match damage:
        case "edit":
            file.write_text("B")  # same size
            os.utime(file, ns=(0, 0))
            expected = "damaged: text is not what was written"
        case "truncate":
            file.write_text("")
            expected = "damaged: text is not what was written"
        case "delete":
            file.unlink()
            expected = "damaged: text is gone"
        case "add":
            (entry.output / "extra").write_text("")
            expected = "damaged: extra is new"
        case _:
            (entry.path / "stage.json").write_text("{")
            expected = f"{entry.path.name} cannot be read"
    outcome = run(cache, *chain())[1]
    assert (outcome.hit, outcome.why) == (False, expected)
    assert (outcome.entry.output / "text").read_text() == "A"
    assert run(cache, *chain())[1].hit


def test_a_file_whose_time_changed_but_not_its_content_is_still_good(cache):
    entry = run(cache, *chain())[1].entry
    os.utime(entry.output / "text", ns=(0, 0))
    assert run(cache, *chain())[1].hit


def test_a_failed_stage_leaves_no_entry_and_keeps_the_ones_before(cache):
    def fail(call: Call) -> dict:
        (call.out / "half").write_text("x")
        raise RuntimeError("no")

    source = chain()[0]
    broken = Task(Stage("fail", fail, code=("pipeline/hashing.py",)), inputs={"source": source})
    with pytest.raises(RuntimeError):
        run(cache, source, broken)
    assert [entry.stage for entry in cache.entries()] == ["write"]
    assert run(cache, source)[0].hit


def test_measuring_again_replaces_the_entry(cache):
    first = run(cache, chain()[0])[0].entry
    second = run(cache, chain()[0], again=True)[0]
    assert (second.hit, second.why) == (False, "asked for again")
    assert second.entry.created > first.created
    assert len(cache.entries()) == 1


def test_two_builds_at_once_make_a_stage_once(tmp_path):
    """The second waits, says so, and takes what the first one made."""
    script = tmp_path / "build.py"
    script.write_text(
        textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from draftsmith.pipeline.cache import Cache
        from draftsmith.pipeline.stage import Stage, Task, run_task

        def slow(call):
            with open(sys.argv[2], "a") as log:
                log.write("ran\\n")
            time.sleep(1.0)
            (call.out / "a").write_text("a")
            return {}

        task = Task(Stage("slow", slow, code=("pipeline/hashing.py",)))
        outcome = run_task(task, {}, Cache(Path(sys.argv[1])), say=print)
        print(outcome.hit)
        """)
    )
    log = tmp_path / "log"
    command = [sys.executable, str(script), str(tmp_path / "cache"), str(log)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not log.exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert first.communicate(timeout=60)[0] == "False\n"
    assert second.stdout == "slow: another build is making it; waiting\nTrue\n"
    assert log.read_text() == "ran\n"


def test_nothing_is_collected_under_a_running_build(cache):
    with cache.in_use(), cache.in_use():
        other = Cache(cache.root)
        with pytest.raises(RecipeError, match="a build is using the cache"), other.alone():
            pass
    with cache.alone():
        pass


def test_a_cache_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="set DRAFTSMITH_CACHE"):
        Cache(tmp_path / "file" / "cache")


@pytest.fixture
def verbs(cache, monkeypatch):
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(cache.root))
    from draftsmith.pipeline import cache_verbs

    return cache_verbs


def test_why_compares_with_the_nearest_earlier_stage_of_the_engine(cache, verbs):
    for text, end in (("a", ""), ("b", ""), ("b", "!")):
        run(cache, *chain(text, end, label="int8"))
    run(cache, *chain("c", "?", label="sparse8"))
    reason = verbs.explain_stage("upper-int8")
    assert reason["differences"] == ["end unset → !"]
    assert reason["stage"].startswith("upper-int8-")
    assert verbs.explain_stage("upper")["compared_with"] is None
    with pytest.raises(RecipeError, match="has no stage lower; it has upper, write"):
        verbs.explain_stage("lower")


def test_a_file_that_stages_share_counts_once(cache, verbs):
    entry = run(cache, *chain())[0].entry
    before = verbs.list_cache()["bytes"]
    (cache.work / "more").mkdir()
    os.link(entry.output / "deep" / "text", cache.work / "more" / "text")
    assert verbs.list_cache()["bytes"] == before


def test_collection_takes_the_longest_unused_first(cache, verbs):
    entries = [run(cache, *chain(text))[0].entry for text in "abc"]
    ages = {entry.path: days for entry, days in zip(entries, (40, 10, 20), strict=True)}
    for path, days in ages.items():
        os.utime(path, (time.time() - days * 86400,) * 2)
    crashed = cache.work / "crashed"
    crashed.mkdir()
    assert verbs.collect_cache(30, None, False)["removed"] == [entries[0].path.name]
    run(cache, *chain("c"))  # used again, so now the latest
    size = verbs.list_cache()["bytes"]
    removed = verbs.collect_cache(30, size - 1, False)["removed"]
    assert removed == [entries[1].path.name]
    assert crashed.exists(), "of a build that may be taken up again"
    verbs.collect_cache(30, None, True)
    assert not cache.entries() and not crashed.exists()
    assert [path.name for path in (cache.root / "locks").iterdir()] == ["in-use"]
    assert verbs.collect_cache(30, None, True)["removed"] == []


def test_collection_is_refused_while_a_build_runs(cache, verbs):
    with cache.in_use(), pytest.raises(RecipeError, match="a build is using the cache"):
        verbs.collect_cache(0, None, True)
