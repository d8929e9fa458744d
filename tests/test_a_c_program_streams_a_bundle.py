"""docs/stream.c, compiled as docs/c-api.md says, decodes a bundle without Python, and says what is wrong."""

import shutil
import subprocess
from pathlib import Path

import pytest
from draftsmith.speculate.binding import LIBRARY
from draftsmith.speculate.bundle import load
from draftsmith.speculate.onnx_engine import find_library
from fake_engine import BYTE_VOCAB
from tiny_bundle import CONFIG, write_tiny_bundle

SOURCE = Path(__file__).parents[1] / "docs" / "stream.c"
SLOTS = CONFIG.max_position_embeddings
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not shutil.which("gcc"):
        pytest.skip("no gcc on this machine")
    made, native = tmp_path_factory.mktemp("program") / "stream", LIBRARY.parent
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", SOURCE, "-I", native / "include"]
    command += ["-L", native, "-ldraftsmith", f"-Wl,-rpath,{native}", "-o", made]
    subprocess.run(command, check=True, timeout=120)
    return made


def stream(program, folder, prompt, slots=SLOTS, max_new_tokens=40, eos=-1, library=None):
    words = [library or find_library(), folder, slots, max_new_tokens, eos, *prompt]
    command = [program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_is_short():
    assert len(SOURCE.read_text().splitlines()) < 100


def test_its_headers_are_the_sources_own():
    """An install that left old headers beside a new library would compile programs that do not fit it."""
    native = Path(__file__).parents[1] / "speculate" / "native"
    installed = sorted((LIBRARY.parent / "include").iterdir())
    assert [path.name for path in installed] == [
        "datastore.h",
        "drafter.h",
        "draftsmith.h",
        "draftsmith_cuda.h",
        "engine.h",
        "joint.h",
        "kernels.h",
        "loop.h",
        "ngrams.h",
        "onnx.h",
        "swift.h",
    ]
    sources = {path.name: path for path in native.rglob("*.h")}
    assert all(path.read_text() == sources[path.name].read_text() for path in installed)


@pytest.mark.parametrize("prompt", [PROMPT, [7], list(range(200))], ids=["short", "single", "long"])
def test_its_tokens_are_those_of_python(program, folder, prompt):
    wanted = load(folder, threads=2).generate(prompt, 40, speculate=["suffix", "int8"], ignore_eos=True)
    done = stream(program, folder, prompt)
    assert (done.returncode, done.stderr) == (0, "")
    assert [int(line) for line in done.stdout.splitlines()] == wanted.token_ids
    assert len(wanted.token_ids) == 40


def test_it_stops_where_the_text_ends(program, folder):
    free = stream(program, folder, PROMPT).stdout.split()
    eos = next(token for token in free[5:] if free.index(token) >= 5)
    assert stream(program, folder, PROMPT, eos=eos).stdout.split() == free[: free.index(eos) + 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"library": "/nowhere/libonnxruntime.so"}, "/nowhere/libonnxruntime.so: cannot open"),
        ({"library": SOURCE}, "invalid ELF header"),
        ({"library": LIBRARY}, "is not an ONNX Runtime"),
        ({"folder": "/nowhere"}, "/nowhere/drafters/int8/cpu.onnx"),
        ({"prompt": [3, BYTE_VOCAB]}, f"prompt[1] is {BYTE_VOCAB}, outside the vocabulary"),
        ({"prompt": [-1]}, "prompt[0] is -1, outside the vocabulary"),
        ({"prompt": ["three"]}, "three: wanted an integer"),
        ({"prompt": [2**31]}, "wanted an integer"),
        ({"prompt": []}, "usage"),
        ({"prompt": [1] * SLOTS}, f"do not fit the {SLOTS} slots"),
        ({"prompt": [1] * (SLOTS + 1), "slots": 2 * SLOTS}, f"the tables have {SLOTS}"),
        ({"max_new_tokens": 0}, "0 new ones"),
        ({"eos": BYTE_VOCAB}, f"eos[0] is {BYTE_VOCAB}"),
        ({"slots": 0}, "sequences of 0 tokens"),
        ({"slots": 2**31 - 1}, "sequences of 2147483647 tokens"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(program, folder, settings, words):
    done = stream(program, **{"folder": folder, "prompt": PROMPT} | settings)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_a_damaged_bundle_is_one_line_and_a_failure(program, folder, tmp_path):
    for damage in ("text", "truncated", "no data"):
        broken = tmp_path / damage.replace(" ", "-")
        shutil.copytree(folder, broken)
        graph, data = broken / "target" / "cpu.onnx", broken / "target" / "cpu.data"
        match damage:
            case "text":
                graph.write_text("no graph\n" * 99)
            case "truncated":
                data.write_bytes(data.read_bytes()[:5000])
            case _:
                data.unlink()
        done = stream(program, broken, PROMPT)
        assert done.returncode == 1 and done.stdout == "", damage
        assert len(done.stderr.splitlines()) == 1 and str(graph) in done.stderr, damage
