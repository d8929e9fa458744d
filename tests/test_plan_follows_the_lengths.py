"""A plan's ladder follows the lengths of prompt and output: a model that drafts has to read them too."""

import msgspec
import pytest
from draftsmith.pipeline.bench import bench
from draftsmith.pipeline.prompts import Prompt
from draftsmith.pipeline.recipe import Speculate
from draftsmith.speculate.costs import Costs
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.plan import Candidate, Plan, Work
from fake_engine import open_bundle, write_bundle
from test_tune_chooses_what_pays import tune_with  # noqa: F401, a fixture

PLAIN = {"ladder": [], "num_speculative_tokens": {}, "work": {"target": [1.0, 1.0]}}
LOOKUP = {"ladder": ["suffix"], "num_speculative_tokens": {"suffix": 8}, "work": {"target": [0.8, 2.0]}}
MODEL = {
    "ladder": ["suffix", "int8"],
    "num_speculative_tokens": {"suffix": 4, "int8": 6},
    "work": {"target": [0.3, 4.0], "int8": [0.8, 2.0]},
}
COSTS = {
    "rows": [1, 128],
    "contexts": [0, 1000],
    "milliseconds": {"target": [[10.0, 137.0], [14.0, 141.0]], "int8": [[4.0, 131.0], [8.0, 135.0]]},
    "overhead_ms": 0.5,
}


def make_plan(*choices, costs=COSTS) -> dict:
    spelled = [
        choice
        | {
            "work": {
                name: {"calls_per_token": calls, "rows_per_call": rows}
                for name, (calls, rows) in choice["work"].items()
            }
        }
        for choice in choices
    ]
    main = {key: spelled[0][key] for key in ("ladder", "num_speculative_tokens")}
    return main | {"verify": "block", "costs": costs, "choices": spelled}


def cost(rows: float, context: int, one: float) -> float:
    """Of a call, by the table above: 1 ms for each further row, 4 ms for each 1000 slots."""
    return one + rows - 1 + 4 * context / 1000


def whole_time(choice: dict, prompt: int, new: int) -> float:
    """Milliseconds of a generation, chunk by chunk and by the cost of the token in the middle."""
    ones = {"target": 10.0, "int8": 4.0}
    reading = sum(
        cost(min(128, prompt - start), start, ones[name])
        for name in choice["work"]
        for start in range(0, prompt, 128)
    )
    token = 0.5 * choice["work"]["target"][0]
    for name, (calls, rows) in choice["work"].items():
        token += calls * cost(rows, prompt + new // 2, ones[name])
    return reading + (new - 1) * token


@pytest.mark.parametrize("prompt", [1, 64, 128, 300, 1000])
@pytest.mark.parametrize("new", [1, 2, 16, 64, 512])
def test_the_ladder_is_the_one_with_the_least_time(prompt, new):
    choices = [MODEL, LOOKUP, PLAIN]
    plan = msgspec.convert(make_plan(*choices), Plan)
    assert plan.costs
    times = [choice.milliseconds(plan.costs, prompt, new) for choice in plan.choices]
    assert times == pytest.approx([whole_time(choice, prompt, new) for choice in choices])
    least = min(choices, key=lambda choice: whole_time(choice, prompt, new))
    chosen = plan.choose(prompt, new)
    assert chosen and chosen.ladder == tuple(least["ladder"])
    assert chosen.num_speculative_tokens == least["num_speculative_tokens"]


def test_generation_follows_the_lengths_and_says_the_same(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path / "b", plan=make_plan(MODEL, LOOKUP, PLAIN)))

    def levels(new, **settings) -> list[str]:
        out = bundle.generate("the drafter " * 2, new, ignore_eos=True, **settings)
        plain = bundle.generate("the drafter " * 2, new, ignore_eos=True, speculate="none")
        assert out.token_ids == plain.token_ids
        return [level.name for level in out.stats.drafts]

    assert levels(4) == ["suffix"] and levels(80) == ["suffix", "int8"]
    assert bundle.plan_for(lengths=(24, 4))["ladder"] == ["suffix"]
    assert bundle.plan_for()["ladder"] == ["suffix", "int8"]
    assert levels(4, num_speculative_tokens=3) == ["suffix", "int8"], "lengths are those of the main ladder"
    assert levels(4, speculate=["int8"]) == ["int8"]


def test_a_drafter_in_the_targets_cache_reads_no_prompt():
    work = {"target": Work(calls_per_token=0.3, rows_per_call=4.0)}
    apart, inside = (
        Candidate(
            ladder=("int8",),
            num_speculative_tokens={},
            work=work | {"int8": Work(calls_per_token=0.8, rows_per_call=2.0, reads_prompt=reads)},
        )
        for reads in (True, False)
    )
    costs = msgspec.convert(COSTS, Costs)
    apart_ms, inside_ms = (choice.milliseconds(costs, 300, 16) for choice in (apart, inside))
    reading = sum(cost(rows, 128 * chunk, 4.0) for chunk, rows in enumerate((128, 128, 44)))
    assert apart_ms - inside_ms == pytest.approx(reading)


def test_bench_holds_the_plan_against_what_it_measured(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path / "b", plan=make_plan(MODEL, LOOKUP)))
    prompts = [Prompt("the drafter " * count, "chat", count) for count in (1, 9)]
    result = bench(bundle, prompts, max_new_tokens=20, ignore_eos=True)
    sizes = [run["stats"]["prompt_tokens"] for run in result["runs"] if run["mode"] == "plain"]
    for mode, choices in (("plain", [PLAIN]), ("speculative", [MODEL, LOOKUP])):
        expected = sum(min(whole_time(choice, size, 20) for choice in choices) for size in sizes)
        row = result["prediction"][mode]
        assert row["predicted_tokens_per_second"] == pytest.approx(1e3 * 40 / expected)
        ratio = row["predicted_tokens_per_second"] / row["tokens_per_second"]
        assert row["prediction_error"] == pytest.approx(ratio - 1)
    assert bench(bundle, prompts, max_new_tokens=4, speculate=["suffix"])["prediction"] is None


def test_a_choice_that_cannot_be_followed_is_refused(tmp_path):
    unknown = MODEL | {"ladder": ["suffix", "int9"]}
    with pytest.raises(BundleError, match="int9"):
        open_bundle(write_bundle(tmp_path / "a", plan=make_plan(LOOKUP, unknown)))
    unpriced = MODEL | {"work": {"target": [0.3, 4.0]}}
    with pytest.raises(BundleError, match="needs the work of int8, target"):
        open_bundle(write_bundle(tmp_path / "c", plan=make_plan(LOOKUP, unpriced)))
    untimed = LOOKUP | {"work": {"target": [0.8, 2.0], "tiny": [1.0, 1.0]}}
    with pytest.raises(BundleError, match="costs of tiny"):
        open_bundle(write_bundle(tmp_path / "b", plan=make_plan(LOOKUP, untimed)))


def test_a_plan_of_version_1_keeps_its_ladder(tmp_path):
    older = {"rows": [1, 2], "context": 256, "milliseconds": {"target": [9.0, 9.5]}, "other_contexts": {}}
    named = {"ladder": ["suffix"], "num_speculative_tokens": {"suffix": 3}}
    bundle = open_bundle(write_bundle(tmp_path / "b", plan=named | {"costs": older}))
    assert bundle.plan.costs is None and bundle.plan_for(lengths=(4, 4))["ladder"] == ["suffix"]


@pytest.mark.parametrize("guests", [(), ("int8",)])
def test_tuning_keeps_the_fastest_of_every_set_of_models(tune_with, guests):  # noqa: F811
    plan = tune_with(guests=guests, target=15.0, int8=3.0, tiny=9.0)
    choices = plan["choices"]
    assert choices[0]["ladder"] == plan["ladder"] and choices[0]["work"].keys() == {"target", "int8"}
    assert [choice["work"].keys() for choice in choices[1:]] == [{"target"}]  # tiny is slower and no use
    assert choices[0]["work"]["int8"]["reads_prompt"] == (not guests)
    for row in plan["by_length"]:
        chosen = msgspec.convert(plan, Plan).choose(row["prompt_tokens"], row["new_tokens"])
        assert chosen and list(chosen.ladder) == row["ladder"]
    named = tune_with(Speculate(ladder=["int8"]), target=15.0, int8=3.0, tiny=9.0)
    assert [choice["ladder"] for choice in named["choices"]] == [["int8"]] and named["by_length"] == []
