"""Compiles a CUDA source for the emulator of `native/cuda_emulator.h` and calls it with numpy arrays."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import cffi
import numpy as np
import pytest
from draftsmith.speculate.cuda_linear import FORMATS
from draftsmith.speculate.native import _cuda_cdefs

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "speculate" / "native" / "cuda"
THREADS = 64  # a block: two warps show all that there is to show, and every thread costs time
FLAGS = [
    *("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-U_FORTIFY_SOURCE"),
    *(f"-DDS_CUDA_THREADS={THREADS}", "-include", str(ROOT / "tests" / "native" / "cuda_emulator.h")),
]
DECLARATIONS = "void emulator_order(unsigned order); const char *emulator_error(void);"


class EmulatorError(Exception):
    """What the emulator found wrong with a kernel."""


def compile_emulated(out: Path, *sources: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    together = out.with_suffix(".cpp")  # one unit, as the emulator has state
    together.write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [compiler, *FLAGS, str(together), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_changed(folder: Path, sources: Sequence[str], file: str, change: Callable[[str], str]) -> Path:
    """Those .cu files, compiled in `folder` with the text of one file of the kernels changed."""
    native = folder / "native"
    (native / "cuda").mkdir(parents=True)
    for path in [*SOURCES.parent.glob("*.h"), *SOURCES.iterdir()]:
        text = path.read_text()
        if path.name == file:
            text = change(text)
            assert text != path.read_text()
        (native / path.relative_to(SOURCES.parent)).write_text(text)
    compile_emulated(folder / "changed.so", *(native / "cuda" / name for name in sources))
    return folder / "changed.so"


def without_barrier(number: int) -> Callable[[str], str]:
    """A change of a source: one barrier is gone."""

    def change(text: str) -> str:
        parts = text.split("__syncthreads();")
        kept = ["__syncthreads();"] * (len(parts) - 2)
        kept.insert(number, ";")
        return "".join(part + end for part, end in zip(parts, [*kept, ""], strict=True))

    return change


class Emulated:
    """The functions of `draftsmith_cuda.h` that make a round; arrays stand for device memory."""

    def __init__(self, library: Path) -> None:
        self.ffi = _cuda_cdefs.ffi
        self.lib = self.ffi.dlopen(str(library))
        own = cffi.FFI()
        own.cdef(DECLARATIONS)
        self.emulator = own.dlopen(str(library))

    def order(self, order: int) -> None:
        """0: threads run in ascending order, 1: descending, else in an order drawn from that seed."""
        self.emulator.emulator_order(order)

    def call(self, name: str, *arguments) -> None:
        pointers = [
            self.ffi.NULL
            if argument is None
            else self.ffi.cast("void *", argument.ctypes.data)
            if isinstance(argument, np.ndarray)
            else argument
            for argument in arguments
        ]
        if getattr(self.lib, name)(*pointers, self.ffi.NULL):
            raise EmulatorError(self.ffi.string(self.emulator.emulator_error()).decode())

    def laws(self, logits, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
        laws = np.empty(logits.shape)
        self.call("ds_cuda_laws", logits, *logits.shape, temperature, top_k, top_p, laws)
        return laws

    def uniforms(self, seed: int, stream: int, counter: int, n: int) -> np.ndarray:
        out = np.empty(n)
        self.call("ds_cuda_uniforms", seed, stream, counter, n, out)
        return out

    def chain(self, rule: int, p, q, draft, uniforms) -> tuple[int, int]:
        verdict, sums = np.empty(2, np.int32), np.empty(max(1, len(draft)))
        self.call("ds_cuda_verify_chain", rule, len(draft), p.shape[1], p, q, draft, uniforms, sums, verdict)
        return int(verdict[0]), int(verdict[1])

    def tree(self, rule: int, p, q, tokens, parents, uniforms) -> tuple[list[int], int]:
        count = len(tokens)
        scratch = np.empty(self.lib.ds_cuda_tree_scratch_size(count), np.uint8)
        verdict, accepted = np.empty(2, np.int32), np.empty(max(1, count), np.int32)
        laws = (rule, count, p.shape[1], p, q)
        self.call("ds_cuda_verify_tree", *laws, tokens, parents, uniforms, scratch, accepted, verdict)
        return accepted[: verdict[0]].tolist(), int(verdict[1])

    def kseq(self, p, q, drafts, uniforms) -> tuple[int, int]:
        verdict = np.empty(2, np.int32)
        self.call("ds_cuda_verify_kseq", len(drafts), len(p), p, q, drafts, uniforms, verdict)
        return int(verdict[1]), int(verdict[0])

    def greedy(self, logits, draft) -> tuple[int, int]:
        verdict = np.empty(2, np.int32)
        self.call("ds_cuda_verify_greedy", len(draft), logits.shape[1], logits, draft, verdict)
        return int(verdict[0]), int(verdict[1])

    def compact(self, caches: list[np.ndarray], slots, start: int) -> None:
        """`caches` [H, slots, D], in place."""
        heads, num_slots, width = caches[0].shape
        pointers = np.array([cache.ctypes.data for cache in caches], np.uint64)
        row = width * caches[0].itemsize
        self.call("ds_cuda_compact", pointers, len(caches), heads, num_slots, row, slots, len(slots), start)

    def pack(self, format: str, weight: np.ndarray) -> np.ndarray:
        number, (n, k) = FORMATS.index(format), weight.shape
        packed = np.empty(self.lib.ds_cuda_packed_size(number, n, k), np.uint8)
        pointers = [self.ffi.cast("void *", array.ctypes.data) for array in (weight, packed)]
        assert self.lib.ds_cuda_pack(number, n, k, *pointers) == 0
        return packed

    def linear(self, format: str, packed, n: int, x, scales=None, row_scales=None) -> np.ndarray:
        y = np.full((len(x), n), np.nan, np.float32)
        rows, k = x.shape
        self.call("ds_cuda_linear", FORMATS.index(format), n, k, packed, scales, rows, x, row_scales, y)
        return y
