"""report.html needs nothing but itself, gives every figure its unit, and says why each candidate lost."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from draftsmith.pipeline.bench import bench
from draftsmith.pipeline.prompts import Prompt
from draftsmith.pipeline.reasons import explain_candidates
from draftsmith.pipeline.report import render_report
from fake_engine import open_bundle, write_bundle

ROWS = [1, 2, 4, 8, 16, 32, 128]


def candidate(ladder, speed, calls, **ms):
    return {
        "ladder": ladder,
        "num_speculative_tokens": dict.fromkeys(ladder, 4),
        "tokens_per_second": speed,
        "tokens_per_target_call": calls,
        "estimated_speedup": speed / 60.0,
        "ms_per_token": ms,
    }


CANDIDATES = [
    candidate(["suffix", "int8"], 90.0, 3.0, int8=6.0, target=5.0),
    candidate(["int8"], 80.0, 3.0, int8=7.5, target=5.0),
    candidate([], 60.0, 1.0, target=16.0),
    candidate(["tiny"], 50.0, 1.2, tiny=6.0, target=14.0),
]
PLAN = {
    "ladder": ["suffix", "int8"],
    "num_speculative_tokens": {"suffix": 4, "int8": 4},
    "why": "The fastest by prediction: 1.50 times plain decoding, 1.45 when run.",
    "predicted": CANDIDATES[0],
    "measured": {
        "plain": {"tokens_per_second": 61.0, "predicted_tokens_per_second": 60.0, "prediction_error": -0.016},
        "chosen": {"tokens_per_second": 88.0, "predicted_tokens_per_second": 90.0, "prediction_error": 0.023},
        "speedup": 1.45,
        "prediction_error": 0.023,
    },
    "candidates": CANDIDATES,
    "greedy_agreement": {"int8": 0.94, "tiny": 0.5},
    "by_length": [
        {"prompt_tokens": 32, "new_tokens": 128, "ladder": ["suffix", "int8"]},
        {"prompt_tokens": 1024, "new_tokens": 32, "ladder": ["suffix"]},
    ],
    "costs": {
        "rows": ROWS,
        "contexts": [64, 1024],
        "milliseconds": {
            "target": [[15.0 + r for r in ROWS], [19.0 + r for r in ROWS]],
            "int8": [[8.0 + r / 2 for r in ROWS], [11.0 + r for r in ROWS]],
        },
        "floor_ms": {"target": 12.0, "int8": 6.0},
    },
}
LINEARS = [
    {"linear": f"model.layers.{layer}.mlp.{name}", "loss": 0.1 * (layer + 1), "sparsity": 0.5}
    for layer in range(3)
    for name in ("up_proj", "down_proj")
]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    bundle = open_bundle(write_bundle(folder / "bundle"))
    prompts = [Prompt(f"The drafter <{name}> proposes", name, i) for i, name in enumerate(("chat", "a&b"), 1)]
    reports = {
        "load": {"source": "pypi:a<b>&c", "num_parameters": 5},
        "prune tiny": {"threads": 2, "linears": LINEARS},
        "tune": PLAN,
        "bench": json.loads(json.dumps(bench(bundle, prompts, max_new_tokens=24, ignore_eos=True))),
        "check": {"int8": {"relative_error": 0.05, "tolerance": 0.3, "argmax_agreement": 0.95}},
        "manifest": {"model": {"source": "x"}, "packages": {"numpy": "2"}},
    }
    for name in ("report.html", "again.html"):
        (folder / name).write_text(render_report("bundle", reports))
    assert (folder / "report.html").read_bytes() == (folder / "again.html").read_bytes()
    return folder / "report.html"


def test_nothing_is_fetched_or_run(page):
    text = page.read_text()
    for url in re.findall(r"https?://[^\s\"'<>)]+", text):
        assert url.startswith("http://www.w3.org/"), url  # names of namespaces
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|src=", text)
    assert "pypi:a&lt;b&gt;&amp;c" in text and "<b>&c" not in text


def test_every_plot_has_axes_with_units_and_words_for_who_cannot_see_it(page):
    plots = re.findall(r"<svg\b.*?</svg>", page.read_text(), flags=re.S)
    assert len(plots) == 6
    for plot in plots:
        assert re.match(r'<svg role="img" aria-label="[^"]+"', plot)
        assert "viewBox" in plot and not re.search(r"<svg\b[^>]* (width|height)=", plot)
        assert 'id="xtick_1"' in plot or "xtick_1" in plot
    text = " ".join(plots)
    for label in (
        *("rows (tokens) in one call", "milliseconds", "tokens per second, decoding", "milliseconds a token"),
        *("place in the draft", "share accepted", "tokens per target call", "layer", "squared error of the"),
        *("down_proj", "chat", "a&amp;b", "measured", "predicted", "draft by int8"),
    ):
        assert label in text, label


def test_ids_are_unique(page):
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', page.read_text()))
    assert used <= set(ids)


def test_each_candidate_has_a_reason(page):
    text = page.read_text()
    rows = explain_candidates(PLAN)
    assert [row["chosen"] for row in rows] == [True, False, False, False]
    assert rows[0]["why"] == PLAN["why"]
    assert rows[1]["why"] == "11% slower than the chosen one: drafting costs 7.5 ms a token instead of 6.0."
    assert "every token costs a call of the target" in rows[2]["why"]
    assert (
        "gives 1.20 tokens instead of 3.00 (tiny would choose 50% of the target's tokens)" in rows[3]["why"]
    )
    for row in rows:
        assert row["why"].replace("'", "&#39;") in text
    assert "off by +2.3 %" in text


def test_a_bundle_without_drafters_has_a_page_too(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path / "bundle", plan={"ladder": []}))
    result = bench(bundle, [Prompt("The drafter", "all", 1)], max_new_tokens=8, ignore_eos=True)
    plain = CANDIDATES[2]
    plan = PLAN | {"ladder": [], "num_speculative_tokens": {}, "predicted": plain, "candidates": [plain]}
    plan |= {"measured": {"plain": PLAN["measured"]["plain"], "speedup": 1.0, "prediction_error": -0.016}}
    for name, reports in {"both": {"tune": plan, "bench": result}, "none": {}}.items():
        (tmp_path / f"{name}.html").write_text(render_report("bundle", reports))
    text = (tmp_path / "both.html").read_text()
    assert "Plain decoding." in text and "Acceptance</h2>" not in text


@pytest.mark.slow
def test_it_opens_in_a_browser_without_a_word_on_the_console(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no headless browser")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    window = ["--window-size=390,800", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [browser, *arguments, *window, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.count("<svg") == 6
    assert "CONSOLE" not in done.stderr
