"""Every kernel runs under the sanitizers, on each instruction set that this machine has: the address and
undefined-behaviour ones, and that for races between threads."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "native"
NATIVE = Path(__file__).parents[1] / "speculate" / "native"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wno-sign-conversion"]
# As CMakeLists.txt has them.
KERNELS = ["linear_float", "linear_int8", "linear_int4", "rows", "heads", "attention", "probe", "table"]
AVX2 = ["-mavx2", "-mfma", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
VBMI2 = [*AVX512, "-mavx512vbmi2"]
FLAGS = {
    "avx2": AVX2,
    "avx2_vnni": [*AVX2, "-mavxvnni"],
    "avx512_vnni": AVX512,
    "avx512_vbmi2": VBMI2,
    "avx512_bf16": [*VBMI2, "-mavx512bf16"],
    "amx_int8": [*VBMI2, "-mavx512bf16", "-mamx-tile", "-mamx-int8"],
}
RACE = """
#include "pool.h"
static int counter;
static void count(const void *job, int32_t item, int32_t next, int32_t thread) {
  (void)job, (void)item, (void)next, (void)thread;
  ++counter;
}
int main(void) {
  ds_pool *pool = ds_pool_create(2);
  for (int i = 0; i < 1000; ++i) ds_pool_run(pool, count, 0, 64);
  ds_pool_free(pool);
}
"""


def build(folder: Path, sanitizers: str, program: Path, isas: Mapping[str, list[str]]) -> Path:
    """A program with the library's sources, their portable kernels and those of `isas`."""
    # Not optimized: with the checks in them the unrolled tiles would take minutes.
    command = ["gcc", "-std=c11", "-g", "-O0", "-ffp-contract=off", f"-fsanitize={sanitizers}", *WARNINGS]
    common = ["-I", str(NATIVE), *(["-DDS_HAVE_X86"] if isas else [])]
    units = [(source, source.stem, common) for source in [*NATIVE.glob("*.c"), program]]
    for isa, flags in isas.items():
        units += [(NATIVE / f"{name}.c", f"{name}_{isa}", [*flags, f"-DDS_ISA={isa}"]) for name in KERNELS]

    def compile_unit(unit: tuple[Path, str, list[str]]) -> Path:
        source, name, flags = unit
        made = folder / f"{name}.o"
        subprocess.run([*command, *flags, "-c", source, "-o", made], check=True, timeout=300)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, units))
    linked = folder / "program"
    subprocess.run([*command, *objects, "-lm", "-lpthread", "-o", linked], check=True, timeout=300)
    return linked


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def skip_if_unable(folder: Path, sanitizers: str) -> None:
    """On some systems memory lies where the runtime of a sanitizer wants its own: there not even an empty
    program starts."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc on this machine")
    source, program = folder / "empty.c", folder / "empty"
    source.write_text("int main(void) { return 0; }\n")
    command = ["gcc", f"-fsanitize={sanitizers}", source, "-o", program]
    if subprocess.run(command, capture_output=True, check=False).returncode or run(program).returncode:
        pytest.skip(f"an empty program does not run with -fsanitize={sanitizers} here")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_every_kernel_is_clean(tmp_path, sanitizers):
    skip_if_unable(tmp_path, sanitizers)
    isas = FLAGS if platform.machine() == "x86_64" else {}
    done = run(build(tmp_path, sanitizers, HERE / "exercise_kernels.c", isas))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "clean", "")


@pytest.mark.slow
def test_a_race_between_the_threads_of_a_pool_is_seen(tmp_path):
    """Were the sanitizer blind to the pool's threads, the test above would prove nothing."""
    skip_if_unable(tmp_path, "thread")
    program = tmp_path / "race.c"
    program.write_text(RACE)
    done = run(build(tmp_path, "thread", program, {}))
    assert done.returncode != 0 and "data race" in done.stderr and "count" in done.stderr
