"""What one call of every engine costs on this machine."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec
import numpy as np

from ..speculate.binding import ffi, lib
from ..speculate.bundle import Bundle
from ..speculate.costs import Costs
from ..speculate.kernels import Pool
from ..speculate.onnx_engine import wanting_leaders
from .compare import settle
from .progress import Progress, no_progress

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 128)  # the last is a chunk of a prompt
CONTEXTS = (64, 256, 1024)  # slots in use while calls are timed
READ_BYTES = 64 << 20  # more than the caches hold


@dataclass
class CostMeter:
    """Times calls, as greedy decoding makes them, of all engines in turn, so that drift falls on all alike.
    Disturbances only add time: of all sweeps, the calmer half of each call counts."""

    bundle: Bundle
    reads: list[float] = field(default_factory=list)  # milliseconds to read `READ_BYTES` of memory
    samples: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)  # engine, rows, context

    def sweep(self, sweeps: int, progress: Progress = no_progress) -> None:
        """Each call once warm and untimed, then timed `sweeps` times."""
        engines = {name: self.bundle.engine(name) for name in ["target", *self.bundle.drafters]}
        slots = min(engine.max_seq_len for engine in engines.values())
        rows = [count for count in ROWS if 2 * count <= slots]
        contexts = [context for context in CONTEXTS if context + rows[-1] <= slots] or [slots - rows[-1]]
        calls = [(name, count, context) for context in contexts for name in engines for count in rows]
        deepest = contexts[-1]
        room, pool = np.ones(READ_BYTES, np.uint8), Pool(self.bundle.threads)
        ids = np.ones(max(deepest, rows[-1]), np.int32)  # what they say does not matter to the clock
        with ExitStack() as stack:
            for engine in engines.values():
                stack.enter_context(wanting_leaders(engine))
                engine.reserve(deepest + rows[-1])
                for start in range(0, deepest, 128):
                    engine.forward(ids[: min(128, deepest - start)], start, num_logits=1)
            for number in range(sweeps + 1):
                before = None
                for name, count, start in calls:
                    if name != before:  # after another engine's long call the first one is slower
                        engines[name].forward(ids[:1], start)
                        before = name
                    began = time.perf_counter()
                    engines[name].forward(ids[:count], start, num_logits=1 if count > 32 else count)
                    if number:  # the first round warms up
                        spent = 1e3 * (time.perf_counter() - began)
                        self.samples.setdefault((name, count, start), []).append(spent)
                began = time.perf_counter()
                lib.ds_probe_read(pool.handle, ffi.from_buffer(room), READ_BYTES)
                if number:
                    self.reads.append(1e3 * (time.perf_counter() - began))
                progress(number, sweeps, "timing calls")

    def floors(self) -> dict[str, float]:
        """Milliseconds to read each engine's weights once: no call of few rows can take less."""
        read_ms = settle([[ms] for ms in self.reads])[0]
        return {
            name: weight_bytes(self.bundle, name) * read_ms / READ_BYTES
            for name in dict.fromkeys(name for name, _, _ in self.samples)
        }

    def costs(self, overhead_ms: float = 0.0) -> Costs:
        names = dict.fromkeys(name for name, _, _ in self.samples)
        rows = sorted({count for _, count, _ in self.samples})
        contexts = sorted({context for _, _, context in self.samples})
        table = {
            name: np.array(
                [
                    [settle([[ms] for ms in self.samples[name, count, context]])[0] for count in rows]
                    for context in contexts
                ]
            )
            for name in names
        }
        # A call of fewer rows, or behind fewer slots, does no more: where it seems to, that is noise, which
        # only adds time.
        for figures in table.values():
            for axis in (0, 1):
                figures[:] = np.flip(np.minimum.accumulate(np.flip(figures, axis), axis), axis)
        milliseconds = {name: figures.tolist() for name, figures in table.items()}
        axes = {"rows": rows, "contexts": contexts}
        return msgspec.convert({**axes, "milliseconds": milliseconds, "overhead_ms": overhead_ms}, Costs)


def weight_bytes(bundle: Bundle, engine: str) -> int:
    """Of the file beside an engine's graph that holds its weights, what a call of greedy decoding reads."""
    entry = bundle.manifest.engines[engine]
    if entry.skips:
        return round(entry.skips.bytes_read * weight_bytes(bundle, "target"))
    files = bundle.manifest.engine_files(engine)
    return sum(file.size for path, file in files.items() if path != entry.graph) - entry.screened_bytes
