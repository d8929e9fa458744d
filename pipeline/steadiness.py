"""How steady the machine is while it is measured: a yardstick that our code cannot change, and what others
take from us."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..speculate.binding import ffi, lib
from ..speculate.kernels import Pool

REFERENCE = (
    "read 64 MiB, then 4e8 int8 multiply-adds, all threads"  # a baseline in other units is another one
)
EVERY = 8  # rounds, so that it costs little beside them
_READ_BYTES = 64 << 20  # more than the caches of most processors hold
_MULTIPLICATIONS = 400_000_000


class Reference:
    """The reference kernel: what decoding does, reading weights and multiplying, with nothing of it that a
    change to the engines could make slower. Its time says how fast the machine is at the moment.
    """

    def __init__(self, threads: int) -> None:
        self._pool = Pool(threads)
        self._room = np.ones(_READ_BYTES, np.uint8)
        self.milliseconds: list[float] = []
        self._asked = 0
        self()
        self.milliseconds.clear()

    def __call__(self) -> None:
        started = time.perf_counter()
        lib.ds_probe_read(self._pool.handle, ffi.from_buffer(self._room), _READ_BYTES)
        lib.ds_probe_multiply(self._pool.handle, 1, _MULTIPLICATIONS)
        self.milliseconds.append(1e3 * (time.perf_counter() - started))

    def sometimes(self) -> None:
        """Once in `EVERY` calls: to be called between rounds."""
        if self._asked % EVERY == 0:
            self()
        self._asked += 1


def calm(milliseconds: Sequence[float]) -> float:
    """The mean of the calmer half of the reference kernel's times."""
    return float(np.mean(sorted(milliseconds)[: (len(milliseconds) + 1) // 2]))


def spread(milliseconds: Sequence[float]) -> float:
    """p90 / p10 of them."""
    low, high = np.percentile(milliseconds, [10, 90])
    return float(high / low)


@dataclass(frozen=True)
class Disturbance:
    """What others took from this process over some time. None where the system does not say."""

    waited: float | None  # of the time that our threads wanted a core, the share in which they had none
    stolen: float | None  # of the cores' time, the share that the hypervisor gave to others
    switches: float  # involuntary context switches a second
    cpu: float  # processor time of this process a second

    @property
    def worst(self) -> float:
        return max(self.waited or 0.0, self.stolen or 0.0)


class Watch:
    """Reads the system's counters twice and says what lies between."""

    def __init__(self) -> None:
        self._first = _read_counters()

    def stop(self) -> Disturbance:
        first, last = self._first, _read_counters()
        seconds = max(last.clock - first.clock, 1e-9)
        waited = stolen = None
        if first.threads and last.threads:
            # A thread that started in between counts from nothing; one that ended is left out.
            changes = [
                np.subtract(now, first.threads.get(name, (0, 0))) for name, now in last.threads.items()
            ]
            ran, stood = (float(sum(change[i] for change in changes)) for i in (0, 1))
            waited = stood / (ran + stood) if ran + stood > 0 else 0.0
        if first.stolen is not None and last.stolen is not None:
            cores = len(os.sched_getaffinity(0))
            stolen = (last.stolen - first.stolen) / os.sysconf("SC_CLK_TCK") / (seconds * cores)
        return Disturbance(
            waited, stolen, (last.switches - first.switches) / seconds, (last.cpu - first.cpu) / seconds
        )


@dataclass(frozen=True)
class _Counters:
    clock: float
    cpu: float
    switches: int
    threads: dict[str, tuple[int, int]]  # nanoseconds on a core and in the queue for one
    stolen: int | None  # ticks, of the cores that this process may use


def _read_counters() -> _Counters:
    import resource

    threads: dict[str, tuple[int, int]] = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            ran, waited, *_ = path.read_text().split()
            threads[path.parent.name] = int(ran), int(waited)
        except (OSError, ValueError):  # it has ended, or this kernel keeps no such figures
            continue
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return _Counters(
        time.perf_counter(), usage.ru_utime + usage.ru_stime, usage.ru_nivcsw, threads, _read_stolen()
    )


def _read_stolen() -> int | None:
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        return sum(int(line[8]) for line in lines if line[0] in cores)
    except (OSError, ValueError, IndexError):
        return None
