"""What a call would cost on a machine that never waits: the yardsticks of `speculate/native/probe.c`."""

from collections.abc import Callable

import numpy as np
from draftsmith.speculate.binding import ffi, lib
from draftsmith.speculate.kernels import Pool
from engines import Work

_PROBE_OPERATIONS = 4_000_000_000
_PROBE_STEP = 64 << 10  # the read probe takes whole multiples of it


class Yardsticks:
    """Reads memory and multiplies in registers, with as many threads as the engines have."""

    def __init__(self, threads: int, num_bytes: int) -> None:
        self._pool = Pool(threads)
        self._room = np.ones(num_bytes + _PROBE_STEP, np.uint8)

    def calls(self, work: Work) -> dict[str, Callable[[], object]]:
        """What to time beside an engine: reading as many bytes as its weights have, and multiplying."""
        address = ffi.cast("void *", ffi.from_buffer(self._room))
        calls: dict[str, Callable[[], object]] = {
            "read": lambda: lib.ds_probe_read(self._pool.handle, address, work.weight_bytes + _PROBE_STEP - 1)
        }
        for kind, is_int8, operations in (
            ("int8", 1, work.int8_operations),
            ("float", 0, work.float_operations),
        ):
            if operations:
                calls[kind] = lambda is_int8=is_int8: lib.ds_probe_multiply(
                    self._pool.handle, is_int8, _PROBE_OPERATIONS // (1 if is_int8 else 4)
                )
        return calls


def floors(work: Work, rows: int, times: dict[str, list[float]]) -> tuple[list[float], str]:
    """Milliseconds in every round, and which of the two it is: "read" or "multiply"."""
    multiply = np.zeros(len(times["read"]))
    if "int8" in times:
        multiply += rows * work.int8_operations / _PROBE_OPERATIONS * np.array(times["int8"])
    if "float" in times:
        multiply += rows * work.float_operations / (_PROBE_OPERATIONS // 4) * np.array(times["float"])
    larger = np.maximum(times["read"], multiply)
    bound = "read" if np.median(times["read"]) >= np.median(multiply) else "multiply"
    return larger.tolist(), bound
