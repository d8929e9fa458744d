"""Tuning measures calls, predicts every ladder, runs the best beside plain decoding, and keeps what pays."""

import hashlib
import json
from typing import cast

import msgspec
import pytest
from draftsmith.pipeline import call_costs, rounds
from draftsmith.pipeline import tune as tune_module
from draftsmith.pipeline.cli import main
from draftsmith.pipeline.recipe import Speculate
from draftsmith.pipeline.recipe_file import load_recipe
from draftsmith.pipeline.tune import tune_bundle
from draftsmith.speculate.bundle import Bundle
from draftsmith.speculate.levels import is_drafter
from draftsmith.speculate.manifest import MANIFEST, read_json, read_manifest
from draftsmith.speculate.plan import Plan
from fake_engine import BYTE_VOCAB, FakeEngine, open_bundle, write_bundle, write_manifest
from test_report_stands_alone import PLAN

ENGINES = {
    "target": {"scale": 4},
    "int8": {"scale": 4, "noise": 0.7},
    "tiny": {"scale": 4, "noise": 1.0, "own": 2},
}
PROMPTS = [[ord(letter) for letter in text] for text in ("Once upon a time", "The drafter", "def plan(n):")]


class Clock:
    def __init__(self):
        self.now = 0.0
        self.perf_counter = lambda: self.now


class TimedEngine(FakeEngine):
    def __init__(self, clock, name, milliseconds):
        super().__init__(BYTE_VOCAB, **ENGINES[name])
        self._clock, self._milliseconds = clock, milliseconds

    def forward(self, token_ids, start, *rest, **named):
        self._clock.now += 1e-3 * self._milliseconds * (1 + 0.03 * len(token_ids)) + 1e-7 * start
        return super().forward(token_ids, start, *rest, **named)


@pytest.fixture
def tune_with(tmp_path, monkeypatch):
    clock = Clock()
    for module in (rounds, call_costs):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(tune_module, "_measure_overhead", lambda *_: 0.0)

    def tune(spec=None, guests=(), **milliseconds):
        engines = {name: TimedEngine(clock, name, ms) for name, ms in milliseconds.items()}
        for name in guests:  # in the target's cache
            engines[name].cache_host, engines[name]._slots = engines["target"], engines["target"]._slots
        bundle = open_bundle(write_bundle(tmp_path / "bundle", plan={"ladder": []}), **engines)
        return tune_bundle(bundle, PROMPTS, spec or Speculate())

    return tune


def test_a_cheap_good_drafter_is_chosen_and_its_speed_foreseen(tune_with):
    plan = tune_with(target=15.0, int8=3.0, tiny=9.0)
    assert plan["ladder"][-1] == "int8"
    assert abs(plan["measured"]["plain"]["prediction_error"]) < 0.02
    assert abs(plan["measured"]["prediction_error"]) < 0.15
    assert plan["measured"]["speedup"] > 1.2
    assert plan["predicted"] == max(plan["candidates"], key=lambda row: row["tokens_per_second"])
    ladders = [tuple(row["ladder"]) for row in plan["candidates"]]
    assert {(), ("suffix",), ("int8", "tiny"), ("suffix", "int8", "tiny"), ("recycling", "int8")} <= set(
        ladders
    )
    assert {("history",), ("recycling+history", "int8")} <= set(ladders)
    assert {("recycling-tree",), ("suffix+recycling-tree",)} <= set(ladders)
    assert not any("rest" in name or "bigram" in name for ladder in ladders for name in ladder)
    assert ("tiny", "int8") not in ladders  # the dearer one would draft for the cheaper
    assert msgspec.convert(json.loads(json.dumps(plan)), Plan).costs is not None
    assert plan["costs"]["rows"][:2] == [1, 2] and plan["costs"]["rows"][-1] >= 32
    assert plan["costs"]["milliseconds"]["target"][0][0] == pytest.approx(15.0 * 1.03, rel=0.01)


def test_none_wins_where_nothing_pays(tune_with):
    plan = tune_with(target=15.0, int8=15.0, tiny=15.0)
    assert all(is_drafter(name) for name in plan["ladder"])
    assert plan["predicted"]["estimated_speedup"] < 1.1
    plan = tune_with(Speculate(ladder=["int8"]), target=15.0, int8=15.0, tiny=15.0)
    assert plan["ladder"] == ["int8"]  # the recipe's word stands


@pytest.mark.parametrize("least_gain", [tune_module.LEAST_GAIN, 0.0])
def test_a_choice_that_is_slower_when_run_is_not_kept(tune_with, monkeypatch, least_gain):
    """Nor is a lookup that pays by prediction alone: plain decoding reads the prompt with no more models."""
    check = tune_module.check_prediction
    monkeypatch.setattr(tune_module, "check_prediction", lambda *a, **k: check(*a, **k) | {"speedup": 0.9})
    monkeypatch.setattr(tune_module, "LEAST_GAIN", least_gain)
    plan = tune_with(target=15.0, int8=3.0, tiny=9.0)
    assert plan["ladder"] == [] and "was 0.90 times" in plan["why"]
    assert [choice["ladder"] for choice in plan["choices"]] == [[]]


def test_lengths_that_the_recipe_names_are_kept(tune_with):
    spec = Speculate(ladder=["suffix", "int8"], num_speculative_tokens={"int8": 3})
    plan = tune_with(spec, target=15.0, int8=3.0, tiny=9.0)
    assert plan["ladder"] == ["suffix", "int8"] and plan["num_speculative_tokens"]["int8"] == 3
    assert plan["why"].startswith("Named by the recipe")


@pytest.mark.parametrize("ladder", [["int8-tree"], ["int8-sequoia"], ["int8-graph", "tiny"]], ids=",".join)
def test_a_recipe_may_name_the_trees_of_models(tune_with, ladder):
    plan = tune_with(Speculate(ladder=ladder), target=15.0, int8=3.0, tiny=9.0)
    assert plan["ladder"] == ladder and plan["num_speculative_tokens"].keys() == set(ladder)
    assert plan["choices"][0]["work"].keys() == {"target", "int8", *ladder[1:]}


def test_the_verb_writes_a_whole_bundle_again(tmp_path, monkeypatch, capsys):
    from draftsmith.pipeline import retune

    folder = write_bundle(tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    chosen = {"ladder": ["suffix"], "num_speculative_tokens": {"suffix": 3}, "verify": "block"}
    shown = {"why": "because", "candidates": [], "measured": {}, "tuned_on": {"date": "d", "machine": {}}}
    monkeypatch.setattr(retune, "tune_bundle", lambda *_: chosen | shown)
    monkeypatch.setattr(retune, "load", lambda path, threads: open_bundle(path))
    with pytest.raises(SystemExit) as end:
        main(["tune", str(folder), "--json"])
    assert end.value.code == 0 and json.loads(capsys.readouterr().out)["ladder"] == ["suffix"]
    manifest = read_manifest(folder)  # checks every hash
    text = (folder / "plan.json").read_bytes()
    assert manifest.files["plan.json"].sha256 == hashlib.sha256(text).hexdigest()
    assert json.loads(text)["ladder"] == ["suffix"]
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"plan.json", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_verb_tells_anew_what_the_bundle_says_of_itself(tmp_path, monkeypatch):
    """Recipe, report, card and manifest name the new choice and the new measurement; what the build reported
    of compression stays."""
    from draftsmith.pipeline import retune

    folder = write_bundle(tmp_path / "bundle")  # of a version whose recipes say nothing of caches
    (folder / "recipe.yaml").write_text(
        "version: 1\nmodel: {source: a-model}\ndrafters: {int8: {quantize: {scheme: W8A8}}}\n"
        "speculate: {ladder: [suffix, int8], num_speculative_tokens: {suffix: 6, int8: 4}, verify: token}\n"
    )
    loaded = {"source": "a-model", "architecture": "llama"}
    (folder / "reports.json").write_text(json.dumps({"load": loaded, "bench": {"date": "long ago"}}))
    facts = {"model": loaded, "weights": {"target": "bfloat16", "int8": "w8a8"}, "packages": {}}
    manifest = json.loads((folder / "manifest.json").read_text()) | facts | {"calibration": {"samples": 3}}
    write_manifest(folder, manifest | {"recipe_sha256": "", "measurements": {"date": "long ago"}})
    plan = PLAN | {"ladder": ["suffix"], "num_speculative_tokens": {"suffix": 3}, "verify": "block"}
    plan |= {"why": "It is the fastest now.", "tuned_on": {"date": "now", "machine": {}}}
    monkeypatch.setattr(retune, "tune_bundle", lambda *_: plan)
    monkeypatch.setattr(retune, "load", lambda path, threads: open_bundle(path))
    retune.retune(folder, None, 2, 1)

    read_manifest(folder)  # checks every hash
    said = read_json(folder / MANIFEST)
    assert said["measurements"]["greedy_agreement"] == PLAN["greedy_agreement"]
    assert said["measurements"]["bench"]["settings"]["plan"]["ladder"] == ["suffix"]
    assert said["model"] == loaded and said["recipe_sha256"]
    recipe = load_recipe(str(folder / "recipe.yaml")).recipe
    assert recipe.speculate.ladder == ["suffix"] and recipe.speculate.num_speculative_tokens == {"suffix": 3}
    assert recipe.speculate.verify == "token" and recipe.drafters["int8"].cache == "own"
    assert "It is the fastest now." in (folder / "MODEL_CARD.md").read_text()
    page = (folder / "report.html").read_text()
    assert "It is the fastest now." in page and "a-model" in page
    reports = json.loads((folder / "reports.json").read_text())
    assert reports["load"] == loaded and reports["bench"]["date"] != "long ago"


def test_a_call_whose_timing_was_disturbed_does_not_make_longer_ones_dear():
    """Calls of fewer rows do no more work: a spoiled figure falls to the next one, which it leaves alone."""
    times = {1: [30.0, 30.0], 2: [10.0, 10.0], 4: [12.0, 12.0], 8: [11.0, 90.0]}
    meter = call_costs.CostMeter(
        cast(Bundle, None), samples={("target", rows, 256): ms for rows, ms in times.items()}
    )
    assert meter.costs().milliseconds["target"] == ((10.0, 10.0, 11.0, 11.0),)
