"""The gate's verdicts on a machine with a simulated clock: noisy, drifting, at times taken by others."""

import json
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from draftsmith.pipeline import gate as gate_module
from draftsmith.pipeline import rounds, steadiness, trial
from draftsmith.pipeline.cli import main
from draftsmith.pipeline.compare import Series, compare, settle
from draftsmith.pipeline.gate import Request, gate
from draftsmith.pipeline.gate_files import write_files
from draftsmith.pipeline.recipe import Gate
from draftsmith.pipeline.snapshot import Snapshot
from draftsmith.speculate.errors import BundleError
from fake_engine import BYTE_VOCAB, FakeEngine, open_bundle, write_bundle

ENGINES = {
    "target": {"scale": 4},
    "int8": {"scale": 4, "noise": 0.7},
    "tiny": {"scale": 4, "noise": 1.5, "own": 2},
}
COSTS = {"target": 15.0, "int8": 6.0, "tiny": 3.0}  # milliseconds of a call
SECONDS = 60.0


class Machine:
    """A clock that only work moves. Speed drifts by 15 %; some calls are held up by several times their time;
    all others vary by `noise`."""

    def __init__(self, seed: int = 0, noise: float = 0.12) -> None:
        self.now, self.slowness, self.waited, self.noise = 0.0, 1.0, 0.02, noise
        self._random = np.random.default_rng(seed)
        self.perf_counter = self.monotonic = lambda: self.now

    def random(self) -> float:
        return self._random.random()

    def work(self, milliseconds: float) -> None:
        drift = 1 + 0.15 * np.sin(self.now / 7)
        noise = np.exp(self.noise * abs(self._random.standard_normal()))
        if self._random.random() < 0.05:
            noise *= self._random.uniform(1, 5)
        self.now += 1e-3 * milliseconds * self.slowness * drift * noise


class TimedEngine(FakeEngine):
    def __init__(self, name: str, machine: Machine, milliseconds: float) -> None:
        super().__init__(BYTE_VOCAB, **ENGINES[name])
        self._machine, self._milliseconds = machine, milliseconds

    def forward(self, token_ids, *arguments, **named):
        self._machine.work(self._milliseconds * (1 + 0.02 * len(token_ids)))
        return super().forward(token_ids, *arguments, **named)


class World:
    """Two bundles, and what their engines cost; `open` opens them anew."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.machine = machine
        self.baseline, self.candidate = (write_bundle(folder / name) for name in ("baseline", "candidate"))
        self.costs = {
            path: {"target": 15.0, "int8": 6.0, "tiny": 3.0} for path in (self.baseline, self.candidate)
        }
        self.opened: list[Path] = []

    def open(self, path: Path, threads: int):
        self.opened.append(path)
        costs = self.costs[path]
        bundle = open_bundle(
            path, **{name: TimedEngine(name, self.machine, ms) for name, ms in costs.items()}
        )
        bundle.threads = threads
        return bundle

    def gate(self, baseline: Path | None = None, settings: Gate | None = None, **request) -> dict:
        request = {"seconds": SECONDS, "threads": 1} | request
        return gate(
            self.candidate, baseline or self.baseline, settings or Gate(), Request(**request), self.open
        )


@pytest.fixture
def make_world(tmp_path, monkeypatch):
    def make(seed: int = 0, **settings) -> World:
        machine = Machine(seed, **settings)

        class Reference:
            def __init__(self, threads: int) -> None:
                self.milliseconds: list[float] = []

            def sometimes(self) -> None:
                if machine.random() > 0.15:
                    return
                before = machine.now
                machine.work(4.0)
                self.milliseconds.append(1e3 * (machine.now - before))

        watch = SimpleNamespace(stop=lambda: steadiness.Disturbance(machine.waited, 0.0, 10.0, 1.0))
        for module in (rounds, trial):
            monkeypatch.setattr(module, "time", machine)
        monkeypatch.setattr(gate_module, "Reference", Reference)
        monkeypatch.setattr(trial, "Watch", lambda: watch)
        return World(tmp_path / str(seed), machine)

    return make


def outcomes(result: dict) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in result["checks"]}


def why(result: dict, name: str) -> str:
    return next(check["why"] for check in result["checks"] if check["name"] == name)


# ---- Verdicts ------------------------------------------------------------------------------------------


def test_a_bundle_is_not_slower_than_itself_and_ten_percent_are_found(make_world):
    said: dict[float, list[str]] = {1.0: [], 1.1: []}
    for slowdown, results in said.items():
        for seed in range(20):
            world = make_world(seed)
            world.costs[world.candidate]["target"] *= slowdown
            results.append(world.gate()["outcome"])
    assert said[1.0].count("pass") >= 19 and "regression" not in said[1.0]
    assert said[1.1].count("regression") >= 19 and "pass" not in said[1.1]


def test_only_what_is_slower_is_blamed(make_world):
    world = make_world()
    world.costs[world.candidate]["int8"] *= 1.6
    result = world.gate()
    assert outcomes(result)["plain tpot"] != "regression"
    assert outcomes(result)["speculative tpot"] == result["outcome"] == "regression"


def test_a_suspect_is_measured_again_on_bundles_opened_in_the_other_order(make_world):
    world = make_world()
    assert world.gate()["trial"]["measured_again"] is False
    assert world.opened == [world.baseline, world.candidate]
    world.opened.clear()
    world.costs[world.candidate]["target"] *= 1.3
    assert world.gate()["trial"]["measured_again"] is True
    assert world.opened == [world.baseline, world.candidate, world.candidate, world.baseline]


def test_what_does_not_show_again_is_no_regression(make_world):
    world = make_world()
    world.costs[world.candidate]["target"] *= 1.3
    opening = world.open

    def forgiving(path, threads):
        if len(world.opened) == 2:
            world.costs[world.candidate]["target"] /= 1.3
        return opening(path, threads)

    world.open = forgiving
    assert world.gate()["outcome"] != "regression"


def test_a_small_slowdown_in_milliseconds_is_let_pass(make_world):
    world = make_world()
    for costs in world.costs.values():
        costs |= {name: ms / 1000 for name, ms in costs.items()}
    world.costs[world.candidate]["target"] *= 1.3
    assert world.gate(seconds=1.0)["outcome"] == "pass"
    assert world.gate(seconds=1.0, settings=Gate(floor_ms=0.001))["outcome"] == "regression"


@pytest.mark.parametrize("slowdown", [1.0, 1.3])
def test_a_loaded_neighbour_leaves_no_verdict(make_world, slowdown):
    world = make_world()
    world.costs[world.candidate]["target"] *= slowdown
    world.machine.waited = 0.5
    result = world.gate()
    assert result["outcome"] == "cannot tell"
    assert "a loaded neighbour" in why(result, "plain tpot")


def test_noise_that_would_hide_a_slowdown_leaves_no_verdict(make_world):
    result = make_world(seed=3, noise=1.0).gate(seconds=60.0, max_new_tokens=16)
    assert result["outcome"] == "cannot tell"
    assert any("too noisy" in check["why"] for check in result["checks"])


def test_too_little_to_go_by_leaves_no_verdict(make_world):
    assert "fewer than 3 undisturbed repetitions in 1 s" in why(make_world().gate(seconds=1.0), "plain tpot")
    result = make_world().gate(settings=Gate(metric="ttft"), limit=3)
    assert "only 3 passages" in why(result, "plain ttft")


@pytest.mark.parametrize("metric", ["ttft", "itl", "e2el"])
def test_other_metrics(make_world, tmp_path, metric):
    world = make_world(noise=0.02)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"The drafter proposes {word}" for word in range(8)))
    request = {"settings": Gate(metric=metric), "prompts": prompts, "max_new_tokens": 20, "seconds": 120.0}
    assert world.gate(**request)["outcome"] == "pass"
    world.costs[world.candidate]["target"] *= 1.4
    assert world.gate(**request)["outcome"] == "regression"


# ---- Without a clock -----------------------------------------------------------------------------------


def test_agreement_and_size_are_judged_beside_a_loaded_neighbour(make_world, monkeypatch):
    world = make_world()
    world.machine.waited = 0.9
    monkeypatch.setitem(ENGINES, "int8", {"scale": 4, "noise": 4.0})
    opening = world.open

    def older(path, threads):
        bundle = opening(path, threads)
        if path == world.baseline:
            bundle._engines.opened["int8"] = FakeEngine(BYTE_VOCAB, scale=4, noise=0.7)
        return bundle

    world.open = older
    result = world.gate()
    assert outcomes(result)["agreement of int8"] == "regression"
    assert outcomes(result)["agreement of tiny"] == outcomes(result)["size"] == "pass"
    assert result["outcome"] == "regression"
    result = world.gate(settings=Gate(max_acceptance_drop=1.0))
    assert outcomes(result)["agreement of int8"] == "pass"


def test_a_larger_bundle_fails(make_world):
    world = make_world()
    write_bundle(world.candidate, chat_template="x" * 10_000)
    assert outcomes(world.gate())["size"] == "regression"
    assert outcomes(world.gate(settings=Gate(max_size_growth=9.0)))["size"] == "pass"


def test_perplexity_is_gated_where_both_have_it(make_world, tmp_path, monkeypatch):
    world = make_world()
    text = tmp_path / "text.txt"
    text.write_text("The drafter proposes and the master decides. " * 12)
    monkeypatch.setattr(gate_module, "TEXT_WINDOW", 128)
    assert outcomes(world.gate(text=text))["perplexity of target"] == "pass"
    baseline = tmp_path / "gate.json"
    baseline.write_text(json.dumps(world.gate(text=text)))
    raw = json.loads(baseline.read_text())
    raw["snapshot"]["perplexity"]["engines"]["target"] /= 1.1
    baseline.write_text(json.dumps(raw))
    assert outcomes(world.gate(baseline, text=text))["perplexity of target"] == "regression"
    raw["snapshot"]["perplexity"] = None
    baseline.write_text(json.dumps(raw))
    assert outcomes(world.gate(baseline, text=text))["perplexity"] == "not compared"


# ---- A file as the baseline ----------------------------------------------------------------------------


@pytest.fixture
def baseline_file(make_world, tmp_path) -> Path:
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(make_world(noise=0.03).gate()))
    return path


def test_a_file_is_held_against_a_faster_or_slower_machine_by_the_reference_kernel(make_world, baseline_file):
    for speed in (0.7, 1.0, 1.4):
        world = make_world(noise=0.03)
        world.machine.slowness = speed
        assert world.gate(baseline_file)["outcome"] == "pass"
        world.costs[world.candidate]["target"] *= 1.15
        assert world.gate(baseline_file)["outcome"] == "regression"


def test_a_reference_that_varies_cannot_stand_for_the_clock(make_world, baseline_file):
    result = make_world(noise=0.9).gate(baseline_file, seconds=120.0)
    assert result["outcome"] == "cannot tell" and "reference kernel" in why(result, "plain tpot")


def test_a_file_that_lacks_a_kind_of_decoding_leaves_no_verdict_on_it(make_world, baseline_file):
    raw = json.loads(baseline_file.read_text())
    samples = raw["snapshot"]["samples"]
    raw["snapshot"]["samples"] = [sample for sample in samples if sample["mode"] == "plain"]
    baseline_file.write_text(json.dumps(raw))
    result = make_world(noise=0.03).gate(baseline_file)
    assert outcomes(result)["plain tpot"] == "pass"
    assert why(result, "speculative tpot") == "the baseline did not measure it"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(model={"files": {"other.gguf": "0"}}), "another model"),
        (lambda s: s.update(tokenizer_sha256="0"), "another tokenizer"),
        (lambda s: s["machine"].update(processor="Other 9000"), "another machine: processor"),
        (lambda s: s.update(threads=7), "--threads 7"),
        (lambda s: s.update(reference="other"), "another reference kernel"),
        (lambda s: s.update(version=0), "snapshot version 0"),
    ],
)
def test_another_model_machine_or_schema_leaves_no_verdict(make_world, baseline_file, change, words):
    raw = json.loads(baseline_file.read_text())
    change(raw["snapshot"])
    baseline_file.write_text(json.dumps(raw))
    result = make_world().gate(baseline_file)
    assert result["outcome"] == "cannot tell" and words in why(result, "baseline")


def test_another_model_in_a_baseline_bundle_leaves_no_verdict(make_world):
    world = make_world()
    manifest = json.loads((world.baseline / "manifest.json").read_text())
    manifest["model"] = {"source": "another", "files": {"a": "b"}}
    (world.baseline / "manifest.json").write_text(json.dumps(manifest))
    assert "another model" in why(world.gate(), "baseline")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not found; it takes a bundle, or a JSON file"),
        ("{oops", "is not JSON"),
        ('{"plain": {}}', 'holds no "snapshot"'),
        ('{"snapshot": {"version": 1, "model": null}}', "snapshot.tokenizer_sha256"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(make_world, tmp_path, content, words):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match=words):
        make_world().gate(path)


# ---- What it writes ------------------------------------------------------------------------------------


def test_files_say_what_the_verdict_says(make_world, tmp_path):
    world = make_world()
    world.costs[world.candidate]["target"] *= 1.3
    result = world.gate()
    paths = write_files(result, tmp_path / "out")
    suite = ElementTree.parse(paths["gate.xml"]).getroot()
    failed = {case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None}
    assert failed == {name for name, outcome in outcomes(result).items() if outcome == "regression"} != set()
    assert suite.get("failures") == str(len(failed)) and suite.get("tests") == str(len(result["checks"]))
    markdown = Path(paths["gate.md"]).read_text()
    assert "regression" in markdown.splitlines()[0] and all(name in markdown for name in outcomes(result))
    kept = json.loads(Path(paths["gate.json"]).read_text())
    assert kept["outcome"] == "regression" and Snapshot.model_validate(kept["snapshot"])


@pytest.mark.parametrize(("outcome", "code"), [("pass", 0), ("regression", 1), ("cannot tell", 3)])
def test_exit_codes(tmp_path, monkeypatch, capsys, outcome, code):
    bundle = write_bundle(tmp_path / "bundle")
    said = {"outcome": outcome, "checks": [], "seconds": 1.0}
    monkeypatch.setattr(gate_module, "gate", lambda *arguments, **named: said)
    with pytest.raises(SystemExit) as end:
        main(["gate", str(bundle), "--baseline", str(bundle), "--json"])
    assert end.value.code == code
    assert json.loads(capsys.readouterr().out) == said


# ---- The statistics by themselves ----------------------------------------------------------------------


def test_bounds_hold_the_true_ratio_as_often_as_they_say():
    random, true, held = np.random.default_rng(1), 1.07, 0
    tokens = [1] * 49
    for seed in range(200):
        base = 10 + random.random(49)
        noisy = lambda factor: Series(tokens, (base * factor * random.lognormal(0, 0.1, 49)).tolist())  # noqa: B023, E731
        found = compare([noisy(1)] * 1, [noisy(true)], "tpot", seed)
        held += found.lower <= true
    assert held >= 0.85 * 200  # six passages: the bound of so few is a little too near


def test_passages_end_where_both_have_the_same_number_of_tokens():
    """Other draft lengths, other rounds: totals are of the same text."""
    old, new = Series([1, 4, 4, 4, 4], [50, 8, 8, 8, 8]), Series([1, 2, 6, 3, 5], [50, 4, 12, 6, 10])
    found = compare([old], [new], "tpot")
    assert found.ratio == pytest.approx(1.0) and found.baseline_ms == pytest.approx(2.0)
    assert found.passages == 2


def test_the_calmer_half_of_the_repetitions_counts():
    assert settle([[1, 9], [2, 2], [30, 1], [40, 50]]) == [1.5, 1.5]
    assert settle([[5.0]]) == [5.0]
