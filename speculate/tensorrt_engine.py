"""An engine on TensorRT: one sequence, its cache updated in place, one CUDA graph for each number of rows.

A plan has a profile for each number of rows that it was built for. A call takes the smallest that holds it;
the rows that are left over write into slots behind the call's own, which nobody sees before they are written
again. Everything is allocated when the engine is opened.
"""

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cuda
from .cuda_verdict import Verdicts
from .devices import why_not_builder
from .engine import Decision, Ids, Logits, check_room
from .errors import BundleError
from .manifest import EngineEntry, TensorrtEntry

_CACHE_BYTES = 2  # a number of the cache: bfloat16 or float16


class TensorrtRuntime:
    """TensorRT's own runtime, of the package that built the plans, and the stream that all engines share."""

    def __init__(self, builder: str) -> None:
        if reason := why_not_builder(builder):
            raise BundleError(reason)
        self.trt: Any = importlib.import_module(builder.partition(" ")[0])
        self._logger = self.trt.Logger(self.trt.Logger.ERROR)
        self._runtime = self.trt.Runtime(self._logger)
        self.stream = cuda.Stream()

    def deserialize(self, path: Path) -> Any:
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BundleError(
                f"{path}: TensorRT {self.trt.__version__} does not load it on this GPU: "
                "build for this GPU's compute capability with the installed version"
            )
        return engine


class TensorrtEngine:
    """Runs a plan of the kind that `export/tensorrt.py` builds."""

    def __init__(
        self, name: str, path: Path, plan: TensorrtEntry, entry: EngineEntry, runtime: TensorrtRuntime
    ) -> None:
        self.calls = self.rows = 0
        self.vocab_size, self.max_seq_len = entry.vocab_size, plan.max_seq_len
        self._name, self._plan, self._stream = name, plan, runtime.stream
        self._engine = runtime.deserialize(path)
        largest, slots = plan.rows[-1], plan.num_slots
        self._host = {
            "input_ids": np.zeros((1, largest), np.int64),
            "position_ids": np.zeros((1, largest), np.int64),
            "write_index": np.zeros(1, np.int64),
            "attention_mask": np.ones((1, 1, largest, slots), np.bool_),
        }
        self._logits = np.empty((largest, entry.vocab_size), np.float32)
        # The first calls, which only prepare, read what is written here.
        self._buffers = {
            key: cuda.Buffer(value.nbytes).write(value, self._stream) for key, value in self._host.items()
        }
        self._buffers["logits"] = cuda.Buffer(self._logits.nbytes)
        cache = entry.num_kv_heads * slots * entry.head_dim * _CACHE_BYTES
        for layer in range(entry.num_layers):
            for kind in ("key", "value"):
                buffer = self._buffers[f"past_key_values.{layer}.{kind}"] = cuda.Buffer(cache)
                buffer.write(np.zeros(cache, np.uint8), self._stream)
                self._buffers[f"present.{layer}.{kind}"] = buffer  # updated in place
        self._stream.wait()
        self._verdicts: Verdicts | None = None  # whoever never decides here needs no memory for it
        self._read_rows = 0  # of the last call
        self._is_busy = False  # whether copies from `_host` may be under way
        self._graphs = {rows: self._record(profile, rows) for profile, rows in enumerate(plan.rows)}

    def reserve(self, num_slots: int) -> None:
        check_room(self._name, num_slots, self.max_seq_len, "build with a larger max_seq_len")

    def forward(
        self,
        token_ids: Ids,
        start: int,
        position_ids: NDArray[np.int64] | None = None,
        mask: NDArray[np.bool_] | None = None,
        num_logits: int | None = None,
    ) -> Logits:
        count, largest = len(token_ids), self._plan.rows[-1]
        wanted = count if num_logits is None else num_logits
        self.calls += 1
        self.rows += count
        if count <= largest:
            self._run(token_ids, start, position_ids, mask, wanted)
            return self._logits[:wanted]
        # More than any profile takes: in pieces, of which later ones see earlier ones in the cache. The last
        # is as long as can be, so that the logits of a draft lie together.
        parts = []
        ends = range(count % largest or largest, count + 1, largest)
        for first, end in pairwise([0, *ends]):
            positions = None if position_ids is None else position_ids[first:end]
            seen = None if mask is None else mask[first:end, : start + end]
            rows = max(0, end - max(first, count - wanted))
            self._run(token_ids[first:end], start + first, positions, seen, rows)
            parts.append(self._logits[:rows].copy())
        return np.concatenate(parts)

    def _run(
        self,
        token_ids: Ids,
        start: int,
        position_ids: NDArray[np.int64] | None,
        mask: NDArray[np.bool_] | None,
        wanted: int,
    ) -> None:
        """Leaves the logits of the last `wanted` tokens in `_logits`; the host waits once, or for none not at
        all."""
        self._settle()
        count = self._read_rows = len(token_ids)
        rows = next(rows for rows in self._plan.rows if rows >= count)
        slots = start + np.arange(rows)
        ids, positions, seen = (self._host[key] for key in ("input_ids", "position_ids", "attention_mask"))
        ids[0, :count], ids[0, count:rows] = token_ids, 0
        positions[0, :rows] = np.minimum(slots, self.max_seq_len - 1)
        if position_ids is not None:
            positions[0, :count] = position_ids
        # The mask of a call lies densely, whatever the largest call would have.
        dense = seen.reshape(-1)[: rows * self._plan.num_slots].reshape(rows, self._plan.num_slots)
        dense[:] = np.arange(self._plan.num_slots) <= slots[:, None]
        if mask is not None:
            dense[:count, : start + count] = mask
            dense[:count, start + count :] = False
        self._host["write_index"][0] = start
        for key, used in (
            ("input_ids", ids[0, :rows]),
            ("position_ids", positions[0, :rows]),
            ("write_index", self._host["write_index"]),
            ("attention_mask", dense),
        ):
            self._buffers[key].write(used, self._stream)
        self._graphs[rows].launch()
        self._is_busy = True
        if wanted:
            self._buffers["logits"].read(
                self._logits[:wanted], self._stream, skip=(count - wanted) * self.vocab_size * 4
            )
            self._settle()

    def decide(self, decision: Decision) -> tuple[int, int]:
        row = self._read_rows - len(decision.draft) - 1
        if row < 0:
            raise BundleError(
                f"{self._name} has a profile for {self._plan.rows[-1]} tokens and is to verify "
                f"{len(decision.draft)} behind another: build with a larger prefill_chunk, or draft less"
            )
        drafter = decision.drafter
        laws = drafter.verdicts if isinstance(drafter, TensorrtEngine) else None
        verdict = self.verdicts.decide(self._buffers["logits"], row, decision, laws)
        self._is_busy = False
        return verdict

    @property
    def verdicts(self) -> Verdicts:
        self._verdicts = self._verdicts or Verdicts(self._name, self.vocab_size, self._stream)
        return self._verdicts

    def _settle(self) -> None:
        """Wait until what is in `_host` has been read."""
        if self._is_busy:
            self._stream.wait()
            self._is_busy = False

    def _record(self, profile: int, rows: int) -> cuda.Graph:
        """One call of `rows` rows as a CUDA graph."""
        context = self._engine.create_execution_context()
        stream = self._stream.address
        if not context.set_optimization_profile_async(profile, stream):
            raise BundleError(f"{self._name}: TensorRT does not take its profile {profile}")
        for key, buffer in self._buffers.items():
            context.set_tensor_address(key, buffer.address)
        slots = self._plan.num_slots
        for key, shape in (
            ("input_ids", (1, rows)),
            ("position_ids", (1, rows)),
            ("attention_mask", (1, 1, rows, slots)),
        ):
            context.set_input_shape(key, shape)
        self._execute(context, stream)  # what is set up at the first call cannot be recorded
        self._stream.wait()
        graph = cuda.Graph(self._stream)
        self._execute(context, stream)
        graph.keeps = context
        return graph.finish()

    def _execute(self, context: Any, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise BundleError(f"{self._name}: TensorRT refuses to run it")
