"""A prompt that the bundle cannot decode costs its own figures and no more: bench and eval say why it is left
out, count it, and measure the rest."""

import json

import pytest
from draftsmith.pipeline.bench import bench
from draftsmith.pipeline.evaluate import evaluate
from draftsmith.pipeline.prompts import Prompt, read_prompts
from draftsmith.pipeline.show import MAX_REASONS, show_bench, show_evaluation
from draftsmith.speculate.errors import BundleError
from fake_engine import BYTE_VOCAB, FakeEngine, open_bundle, write_bundle

GOOD = [Prompt("Once upon a time", "all", 1), Prompt("The drafter proposed", "all", 5)]
REFUSED = {
    2: ("x" * 500, "more than the 256 that the cache of target holds"),
    3: ("", "the prompt has no tokens"),
    4: ([{"role": "user"}], "wanted {"),
    6: ([{"role": "user", "content": ["a list"]}], "chat template: "),
    7: ("\ud800", "cannot be tokenised"),
}
TEMPLATE = "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"


def refused(*lines):
    return [Prompt(REFUSED[line][0], "all", line) for line in lines]


def reasons_match(passed_over, lines):
    assert [reason.partition(":")[0] for reason in passed_over] == [f"line {line}" for line in lines]
    return all(REFUSED[line][1] in reason for line, reason in zip(lines, passed_over, strict=True))


@pytest.fixture
def bundle(tmp_path):
    return open_bundle(write_bundle(tmp_path / "bundle", chat_template=TEMPLATE))


def test_bench_measures_the_rest(bundle):
    prompts = sorted([*refused(*REFUSED), *GOOD], key=lambda prompt: prompt.line)
    result = bench(bundle, prompts, max_new_tokens=8)
    assert (result["prompts"], result["identical"], len(result["runs"])) == (2, 2, 4)
    assert reasons_match(result["passed_over"], sorted(REFUSED))
    assert "passed over: 5\n  line 2: the prompt has 500 tokens" in show_bench(result)


def test_eval_measures_the_rest_and_holds_the_prompts_against_every_drafter(tmp_path):
    entries = {"target": {}, "int8": {"max_seq_len": 40}}
    folder = write_bundle(tmp_path / "bundle", entries, plan={"ladder": []})
    bundle = open_bundle(
        folder, target=FakeEngine(BYTE_VOCAB), int8=FakeEngine(BYTE_VOCAB, noise=0.5, max_seq_len=40)
    )
    lines = ["Once upon a time", "", "a prompt of 33 bytes, that is all", "The drafter proposed"]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines))
    result = evaluate(bundle, prompts=path, max_new_tokens=8)
    assert result["prompts"]["prompts"] == 2
    (reason,) = result["prompts"]["passed_over"]
    assert reason.startswith("line 3: ") and "the cache of int8" in reason
    assert reason in show_evaluation(result)
    path.write_text(f"{lines[0]}\n{lines[3]}")
    assert evaluate(bundle, prompts=path, max_new_tokens=8)["engines"] == result["engines"]


def test_lines_that_cannot_be_read_are_told_in_the_same_words(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Once"}\n{"prompt": 3}\n{oops\n')
    prompts, problems = read_prompts(path)
    assert [prompt.line for prompt in prompts] == [1]
    assert [problem.partition(":")[0] for problem in problems] == ["line 2", "line 3"]
    assert all(problem.endswith("; passed over") for problem in problems)


def test_only_the_first_reasons_are_printed(bundle):
    result = bench(bundle, [*GOOD, *refused(*[3] * 9)], max_new_tokens=8)
    assert len(result["passed_over"]) == 9
    shown = show_bench(result)
    assert shown.count("no tokens") == MAX_REASONS and shown.endswith("… 4 more")
    json.dumps(result)


def test_a_run_without_a_prompt_left_fails_with_a_reason(bundle):
    with pytest.raises(BundleError, match=r"no prompt is left .*\(line 2: the prompt has 500 tokens"):
        bench(bundle, refused(2, 3), max_new_tokens=8)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"speculate": ["gone"]}, "gone"),
        ({"max_new_tokens": 256}, "max_new_tokens is 256"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_a_setting_that_no_prompt_can_meet_is_not_blamed_on_the_prompts(bundle, settings, expected):
    with pytest.raises(BundleError, match=expected) as refusal:
        bench(bundle, GOOD, **settings)
    assert "no prompt is left" not in str(refusal.value) and "line 1" not in str(refusal.value)
