"""What a user can mend is one line on standard error and exit code 2, before anything is made."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from draftsmith.pipeline import cli
from draftsmith.pipeline.errors import CheckFailed
from draftsmith.pipeline.recipe_file import recipe_schema

TINY = "version: 1\nmodel: {source: model}\n"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command; returns its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DRAFTSMITH_DEBUG", "0")
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    yield run
    signal.signal(signal.SIGTERM, handler)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["build", "nowhere.yaml"], "no recipe file nowhere.yaml; packaged recipes: "),
        (["build", "recipe.yaml", "calibration.sed=1"], "calibration.sed: no such key; did you mean seed?"),
        (["build", "recipe.yaml", "calibration.seed"], "write section.field=value"),
        (["build", "tagged.yaml"], "tagged.yaml:2: the tag !!python/object/apply:os.system is refused"),
        (["build", "recipe.yaml"], "model"),
        (["build", "recipe.yaml", "calibration.text=[gone.txt]"], "no file gone.txt in "),
        (["build", "recipe.yaml", "calibration.text=gone.txt"], "no file gone.txt in "),
        (["build", "recipe.yaml", "export=[{format: tensorrt}]"], "needs compute_capability, such as"),
        (
            ["build", "recipe.yaml", "export=[{format: tensorrt, compute_capability: '5.2'}]"],
            "export.0: compute_capability '5.2' is unknown; there are: 7.5, 8.0",
        ),
        (["build", "recipe.yaml", "-o", "recipe.yaml"], "recipe.yaml is a file; give a folder"),
        (["build", "recipe.yaml", "-o", "mine"], "is there and is no bundle, so it is left alone"),
        (["build"], "Missing argument"),
        (["build", "recipe.yaml", "--bogus"], "No such option: --bogus"),
        (["bogus"], "No such command 'bogus'"),
        (["bench", "mine"], "Missing option '--prompts'"),
        (["bench", "mine", "--prompts", "gone.jsonl"], "prompts file gone.jsonl not found"),
        (
            ["bench", "mine", "--prompts", "p.txt", "--max-new-tokens", "many"],
            "'--max-new-tokens': Input should be a valid integer",
        ),
        (["generate", "mine", "Hello"], "mine holds no manifest.json"),
        (["generate", "gone", "Hello"], "gone is not a folder"),
        (["inspect", "mine"], "mine holds no manifest.json"),
        (["eval", "mine"], "mine holds no manifest.json"),
        (["init", "recipe.yaml"], "recipe.yaml is there already"),
        (["cache", "why", "smooth"], "the cache has no stage smooth"),
    ],
)
def test_mistake(run, tmp_path, arguments, expected):
    (tmp_path / "recipe.yaml").write_text(TINY)
    (tmp_path / "tagged.yaml").write_text("version: 1\nmodel: !!python/object/apply:os.system [false]\n")
    (tmp_path / "p.txt").write_text("Hello\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    before = files(tmp_path)
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    made = [name for name in files(tmp_path) if name not in before and not name.startswith("cache/")]
    assert not made


def test_a_traceback_is_shown_where_asked_for(run, monkeypatch):
    assert "Traceback" not in run("build", "nowhere.yaml")[2]
    assert "Traceback" in run("--debug", "build", "nowhere.yaml")[2]
    monkeypatch.setenv("DRAFTSMITH_DEBUG", "1")
    assert "Traceback" in run("build", "nowhere.yaml")[2]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckFailed("the graph is not\nits checkpoint"), 1),
        (MemoryError(), 3),
        (OSError(28, "No space left on device", "/x"), 3),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2),
        (ZeroDivisionError("division\nby zero"), 3),
    ],
)
def test_every_other_end_has_its_code_and_one_line(run, monkeypatch, error, code):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("draftsmith.pipeline.doctor.diagnose", fail)
    ended, out, line = run("doctor")
    assert (ended, out, line.count("\n")) == (code, "", 1)


def test_no_arguments_show_the_help_and_are_a_usage_error(run):
    code, _, error = run()
    assert code == 2 and "Commands:" in error


def test_json_is_all_there_is_on_standard_output(run, tmp_path):
    for arguments in (["doctor"], ["cache", "ls"], ["cache", "gc"], ["init", "starter.yaml"]):
        code, out, _ = run(*arguments, "--json")
        assert code == 0
        json.loads(out)
    assert run("init", "--schema")[1] == recipe_schema()


def test_the_starter_is_a_valid_recipe(run, tmp_path):
    from draftsmith.pipeline.recipe_file import load_recipe

    assert run("init", "starter.yaml", "--source", "org/model")[0] == 0
    assert load_recipe(str(tmp_path / "starter.yaml")).recipe.model.source == "org/model"


def test_the_command_line_needs_no_torch():
    code = "import draftsmith.pipeline.cli, draftsmith.pipeline.build, draftsmith.pipeline.stages, sys; "
    code += "print({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert process.stdout == "set()\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(tmp_path, number, code):
    script = """
import sys, time
from draftsmith.pipeline import cli, doctor

def wait():
    try:
        print("waiting", flush=True)
        time.sleep(60)
    finally:
        print("cleared away", flush=True)

doctor.diagnose = wait
cli.main(["doctor"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A runner in the background of a shell has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    os.kill(process.pid, number)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "cleared away\n")
    assert error.endswith("finished stages are kept\n") and "Traceback" not in error
