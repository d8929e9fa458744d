"""An engine on ONNX Runtime's CPU provider, its cache written in place."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Ids, Logits
from .errors import BundleError
from .manifest import EngineEntry

_SLOT_STEP = 64  # caches come in multiples of this: attention reads every slot there is, so none to spare


def default_threads() -> int:
    """One thread for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxEngine:
    """Runs a graph of the kind that `export` writes (batch 1).

    Every buffer is ours and stays bound between calls. The graph's `past_key_values.*` and `present.*` are
    bound to the same memory, which turns each cache update into a write of the new slots alone. Caches start
    as zeros and so always hold finite numbers: a slot that the mask hides has weight 0, but 0 times NaN would
    still be NaN.
    """

    def __init__(self, name: str, graph: Path, entry: EngineEntry, threads: int) -> None:
        self.vocab_size = entry.vocab_size
        self.max_seq_len = entry.max_seq_len
        self.calls = 0
        self.rows = 0
        self._name = name
        self._entry = entry
        self._session = _open_session(graph, threads)
        self._check_signature(graph)
        self._binding = self._session.io_binding()
        self._cache = np.empty(0, np.float32)
        self._causal = np.empty((0, 0), np.bool_)
        self._logits = np.empty((0, self.vocab_size), np.float32)

    def reserve(self, num_slots: int) -> None:
        if num_slots > self.max_seq_len:
            raise BundleError(
                f"{self._name} has a cache of {self.max_seq_len} tokens, {num_slots} are wanted: "
                "shorten the text or export with a larger max_seq_len"
            )
        slots = min(-(-num_slots // _SLOT_STEP) * _SLOT_STEP, self.max_seq_len)
        if slots == len(self._causal):
            return
        self._causal = np.tri(slots, dtype=np.bool_)
        shape = (1, self._entry.num_kv_heads, slots, self._entry.head_dim)
        self._cache = np.zeros((self._entry.num_layers, 2, *shape), np.float32)
        for layer in range(self._entry.num_layers):
            for i, part in enumerate(("key", "value")):
                pointer = self._cache[layer, i].ctypes.data
                for tensor, bind in (
                    (f"past_key_values.{layer}.{part}", self._binding.bind_input),
                    (f"present.{layer}.{part}", self._binding.bind_output),
                ):
                    bind(tensor, "cpu", 0, np.float32, shape, pointer)

    def forward(
        self,
        token_ids: Ids,
        start: int,
        position_ids: NDArray[np.int64] | None = None,
        mask: NDArray[np.bool_] | None = None,
    ) -> Logits:
        count = len(token_ids)
        slots = len(self._causal)
        if not 0 < count <= slots - start:
            raise BundleError(f"{self._name}: {count} tokens at slot {start} of a cache of {slots}")
        if position_ids is None:
            position_ids = np.arange(start, start + count, dtype=np.int64)
        if mask is None:
            mask = self._causal[start : start + count]
        if count > len(self._logits):
            self._logits = np.empty((count, self.vocab_size), np.float32)
        inputs = {
            "input_ids": np.ascontiguousarray(token_ids, np.int64).reshape(1, count),
            "position_ids": np.ascontiguousarray(position_ids, np.int64).reshape(1, count),
            "write_index": np.array([start], np.int64),
            "attention_mask": np.ascontiguousarray(mask).reshape(1, 1, count, slots),
        }
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        logits = self._logits[:count]
        self._binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self.calls += 1
        self.rows += count
        return logits

    def _check_signature(self, graph: Path) -> None:
        """Refuse a graph that does not match its manifest entry, before raw memory is bound to it."""
        entry = self._entry
        cache: list[Any] = [entry.num_kv_heads, entry.head_dim]
        found = {node.name: node for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        wanted = {
            f"{side}.{layer}.{part}": cache
            for side in ("past_key_values", "present")
            for layer in range(entry.num_layers)
            for part in ("key", "value")
        }
        plain = {"input_ids", "position_ids", "write_index", "attention_mask", "logits"}
        if found.keys() != wanted.keys() | plain:
            odd = sorted(found.keys() ^ (wanted.keys() | plain))[0]
            raise BundleError(f"{graph}: tensor {odd} does not fit the manifest's {entry.num_layers} layers")
        for name, sizes in wanted.items():
            node = found[name]
            if [node.shape[1], node.shape[3]] != sizes or node.type != "tensor(float)":
                raise BundleError(
                    f"{graph}: {name} is {node.type} {node.shape}, the manifest wants {sizes} of float32"
                )
        if found["logits"].shape[2] != entry.vocab_size or found["logits"].type != "tensor(float)":
            shape = found["logits"].shape
            raise BundleError(
                f"{graph}: logits are {shape}, the manifest wants {entry.vocab_size} float32 a row"
            )


def _open_session(graph: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BundleError(
            "decoding needs ONNX Runtime, which is not installed: pip install 'draftsmith[cpu]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Engines take turns: threads that go on spinning after a call would take the cores from the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BundleError(f"{graph}: ONNX Runtime cannot load it: {reason}") from error
