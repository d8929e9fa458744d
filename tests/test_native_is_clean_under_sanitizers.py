"""Every native function runs under the address and undefined-behaviour sanitizers, error paths included."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "native"
NATIVE = Path(__file__).parents[1] / "speculate" / "native"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wno-sign-conversion"]


def compile_and_run(
    command: list[str | Path], program: Path, *words: str | Path
) -> subprocess.CompletedProcess[str]:
    if not shutil.which(str(command[0])):
        pytest.skip(f"no {command[0]} on this machine")
    subprocess.run([*command, "-o", program], check=True, timeout=300)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [program, *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


# Not optimized: with the checks in them the unrolled tiles of the kernels would take minutes.
SANITIZED = [
    "gcc",
    "-std=c11",
    "-g",
    "-O0",
    "-ffp-contract=off",
    "-fsanitize=address,undefined",
    "-fno-omit-frame-pointer",
    *WARNINGS,
    "-I",
    NATIVE,
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The library's files, compiled once for all programs."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc on this machine")
    folder = tmp_path_factory.mktemp("objects")
    subprocess.run([*SANITIZED, "-c", *sorted(NATIVE.glob("*.c"))], check=True, timeout=600, cwd=folder)
    return [*sorted(folder.glob("*.o")), "-lm", "-lpthread"]


def expect_clean(folder: Path, objects, name: str, *words: str | Path) -> None:
    wrapped = "-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc"
    done = compile_and_run([*SANITIZED, HERE / f"{name}.c", *objects, wrapped], folder / name, *words)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "clean", "")


@pytest.mark.parametrize("program", ["exercise", "exercise_drafters", "exercise_joint", "exercise_loop"])
def test_every_function_is_clean(tmp_path, objects, program):
    expect_clean(tmp_path, objects, program, tmp_path / "scratch")


def test_engines_and_operators_are_clean(tmp_path, objects):
    """Within ONNX Runtime, whose own memory is not excused: it leaves nothing behind either."""
    pytest.importorskip("torch")
    from draftsmith.speculate.onnx_engine import find_library
    from tiny_bundle import CONFIG, write_tiny_bundle

    folder = write_tiny_bundle(tmp_path / "bundle", CONFIG.model_copy(update={"num_layers": 4}))
    expect_clean(tmp_path, objects, "exercise_engine", find_library(), folder)


def test_the_sanitizers_are_awake(tmp_path, objects):
    """The same build of a program that passes a row one logit too short must fail."""
    program = tmp_path / "overrun.c"
    program.write_text(
        '#include "draftsmith.h"\n#include <stdlib.h>\n'
        "int main(void) { float *row = calloc(3, sizeof *row); return ds_argmax(row, 4); }\n"
    )
    done = compile_and_run([*SANITIZED, program, *objects], tmp_path / "overrun")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("cuda", [[], ["-D__CUDACC__"]])
def test_the_headers_are_cpp_and_the_rules_are_device_code(tmp_path, cuda):
    command = ["g++", "-std=c++17", *WARNINGS, *cuda, "-I", NATIVE, HERE / "header.cpp"]
    assert compile_and_run(command, tmp_path / "header").returncode == 0


def test_the_public_header_declares_all_that_the_library_exports():
    """What is visible is the interface: nothing else leaks, nothing declared is missing."""
    from draftsmith.speculate import binding

    library = Path(binding._cdefs.__file__).with_name("libdraftsmith.so")
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    exported = {line.split()[-1] for line in listed.stdout.splitlines()}
    declared = {name for name in dir(binding.lib) if name.startswith("ds_")}
    assert exported == declared | {"RegisterCustomOps"}  # ONNX Runtime's own name for its way in
