"""The figures of bench are those of its runs, whatever ends it, and it leaves a baseline for the gate."""

import json

import pytest
from draftsmith.pipeline import bench as bench_module
from draftsmith.pipeline.bench import bench
from draftsmith.pipeline.cli import main
from draftsmith.pipeline.prompts import Prompt
from draftsmith.pipeline.show import show_bench
from draftsmith.pipeline.snapshot import Snapshot, find_differences, read_snapshot
from fake_engine import open_bundle, write_bundle

PROMPTS = [Prompt(f"The drafter proposes {n}", "odd" if n % 2 else "even", n + 1) for n in range(4)]
TOKENS = 20


@pytest.fixture
def bundle(tmp_path):
    return open_bundle(write_bundle(tmp_path / "bundle"))


def test_figures_are_those_of_the_runs(bundle):
    result = bench(bundle, PROMPTS, max_new_tokens=TOKENS, ignore_eos=True)
    runs = [run for run in result["runs"] if run["mode"] == "speculative"]
    assert [run["prompt"] for run in runs] == [0, 1, 2, 3]
    level = result["speculative"]["levels"]["int8"]
    for position in range(4):
        for key in ("drafted_at", "accepted_at"):
            counts = [run["stats"]["levels"]["int8"][key] for run in runs]
            assert level[key][position] == sum(row[position] for row in counts if position < len(row))
    assert level["drafted"] == sum(level["drafted_at"]) and level["accepted"] == sum(level["accepted_at"])
    assert level["per_position_acceptance"][0] == level["accepted_at"][0] / level["drafted_at"][0]
    for run in result["runs"]:
        stats = run["stats"]
        assert sum(stats["tokens_per_round"]) == len(stats["token_times"]) == TOKENS == stats["emitted"]
        assert len(stats["tokens_per_round"]) == len(stats["round_ms"]) == 1 + stats["steps"]
        assert stats["token_times"][-1] == pytest.approx(sum(stats["round_ms"]) / 1e3)
    parts = result["categories"].values()
    assert {name: part["speedup"]["n"] for name, part in result["categories"].items()} == {
        "even": 2,
        "odd": 2,
    }
    assert sum(part["speculative"]["target_calls"] for part in parts) == result["speculative"]["target_calls"]
    assert result["plain"]["itl_ms"]["n"] == 4 * (TOKENS - 1)
    assert result["memory"]["peak_rss"] > 1e6
    assert "odd" in show_bench(result) and "accepted by position" in show_bench(result)
    json.dumps(result)


def test_an_interrupt_keeps_what_was_measured(bundle, monkeypatch):
    decode, calls = bench_module.decode_in_turn, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:  # the second mode of the third prompt
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(bench_module, "decode_in_turn", interrupted)
    result = bench(bundle, PROMPTS, max_new_tokens=TOKENS, ignore_eos=True)
    assert result["interrupted"] and result["prompts"] == 2 and len(result["runs"]) == 4
    assert len(result["snapshot"]["prompts"]) == 2
    assert "interrupted" in show_bench(result)
    assert bundle.generate("again", 4).token_ids  # the bundle is free
    calls.clear()
    monkeypatch.setattr(bench_module, "decode_in_turn", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bench(bundle, PROMPTS, max_new_tokens=TOKENS)


def test_a_baseline_is_left_where_runs_can_be_compared(bundle, tmp_path):
    result = bench(bundle, PROMPTS, max_new_tokens=TOKENS, ignore_eos=True)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    snapshot = read_snapshot(path)
    assert isinstance(snapshot, Snapshot) and not find_differences(snapshot, bundle)
    assert {(sample.prompt, sample.mode) for sample in snapshot.samples} == {
        (prompt, mode) for prompt in range(4) for mode in ("plain", "speculative")
    }
    assert set(snapshot.agreement) == {"int8", "tiny"}
    for settings in ({"temperature": 1.0}, {"ignore_eos": False}, {"speculate": ["suffix"]}):
        wanted = {"max_new_tokens": TOKENS, "ignore_eos": True} | settings
        assert bench(bundle, PROMPTS[:1], **wanted)["snapshot"] is None


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "holds no usable prompt"), ('{"prompt": ""}\n{oops', "no usable prompt (line 1")],
)
def test_zero_prompts_are_refused(tmp_path, capsys, content, said):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["bench", str(write_bundle(tmp_path / "bundle")), "--prompts", str(prompts)])
    assert end.value.code == 2 and said in capsys.readouterr().err
