"""An engine on ONNX Runtime's CPU provider, its cache written in place."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Ids, Logits
from .errors import BundleError
from .manifest import EngineEntry

_SLOT_STEP = 64


def default_threads() -> int:
    """One thread for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxEngine:
    """Runs a graph of the kind that `export` writes (batch 1).

    `past_key_values.*` and `present.*` are bound to the same memory of ours, which turns each cache update
    into a write of the new slots alone. Attention reads all slots there are, seen or not, so the cache grows
    with the sequence, 64 slots or a sixteenth at a time: the copy costs less than slots to spare would. New
    slots are zeros, not what memory held: a hidden slot has weight 0, but 0 times NaN would be NaN.
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
        self._cache = self._new_cache(0)
        self._logits = np.empty((0, self.vocab_size), np.float32)

    def reserve(self, num_slots: int) -> None:
        if num_slots > self.max_seq_len:
            raise BundleError(
                f"{self._name} has a cache of {self.max_seq_len} tokens, {num_slots} are wanted: "
                "shorten the text or export with a larger max_seq_len"
            )
        self._cache = self._new_cache(0)

    def forward(
        self,
        token_ids: Ids,
        start: int,
        position_ids: NDArray[np.int64] | None = None,
        mask: NDArray[np.bool_] | None = None,
        num_logits: int | None = None,
    ) -> Logits:
        count, end = len(token_ids), start + len(token_ids)
        if end > self._cache.shape[4]:
            self._grow(end, start)
        slots = np.arange(self._cache.shape[4])
        if position_ids is None:
            position_ids = slots[start:end]
        visible = slots <= slots[start:end, None]
        if mask is not None:
            visible[:, :end] = mask
        if count > len(self._logits):
            self._logits = np.empty((count, self.vocab_size), np.float32)
        inputs = {
            "input_ids": np.ascontiguousarray(token_ids, np.int64).reshape(1, count),
            "position_ids": np.ascontiguousarray(position_ids, np.int64).reshape(1, count),
            "write_index": np.array([start], np.int64),
            "attention_mask": visible.reshape(1, 1, count, len(slots)),
        }
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        logits = self._logits[:count]
        self._binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self.calls += 1
        self.rows += count
        return logits if num_logits is None else logits[count - num_logits :]

    def _new_cache(self, slots: int) -> NDArray[np.float32]:
        entry = self._entry
        return np.zeros((entry.num_layers, 2, 1, entry.num_kv_heads, slots, entry.head_dim), np.float32)

    def _grow(self, needed: int, filled: int) -> None:
        """Make room for `needed` slots, keep the first `filled`, and bind the new cache."""
        if needed > self.max_seq_len:
            raise BundleError(f"{self._name}: slot {needed} of a cache that holds {self.max_seq_len}")
        ample = -(-(needed + needed // 16) // _SLOT_STEP) * _SLOT_STEP
        cache = self._new_cache(min(ample, self.max_seq_len))
        cache[..., :filled, :] = self._cache[..., :filled, :]
        self._cache = cache
        for layer, parts in enumerate(cache):
            for name, part in zip(("key", "value"), parts, strict=True):
                memory = ("cpu", 0, np.float32, part.shape, part.ctypes.data)
                self._binding.bind_input(f"past_key_values.{layer}.{name}", *memory)
                self._binding.bind_output(f"present.{layer}.{name}", *memory)

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
    # Without VNNI the usual int8 kernels add pairs of products in 16 bits, which saturates; these do not.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BundleError(f"{graph}: ONNX Runtime cannot load it: {reason}") from error
