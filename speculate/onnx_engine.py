"""Engines on ONNX Runtime's CPU provider: a thin wrapper around `native/onnx.h`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binding import check, ffi, lib, view
from .engine import Engine, Ids, Logits, check_room
from .errors import BundleError
from .manifest import EngineEntry


def default_threads() -> int:
    """One thread for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxRuntime:
    """ONNX Runtime's library, taken from its wheel, and the threads that all engines share."""

    def __init__(self, threads: int) -> None:
        library = find_library()
        self.threads = threads
        self.handle = lib.ds_onnx_create(str(library).encode(), threads)
        if self.handle == ffi.NULL:
            check(lib.DS_ERROR_ENGINE, str(library))
        self.handle = ffi.gc(self.handle, lib.ds_onnx_free)

    @property
    def isa(self) -> str:
        """The instruction set of the kernels: one of `kernels.ISAS`."""
        return ffi.string(lib.ds_onnx_isa(self.handle)).decode()


def find_library() -> Path:
    """The shared library inside the installed wheel. Its Python package, slow to import, is not needed."""
    try:
        spec = find_spec("onnxruntime")
    except ImportError:  # a finder may raise where others return None
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise BundleError(
            "decoding needs ONNX Runtime, which is not installed: pip install 'draftsmith[cpu]'"
        )
    found = sorted((Path(folders[0]) / "capi").glob("libonnxruntime.so*"))
    if not found:
        raise BundleError(f"{folders[0]} holds no libonnxruntime.so: reinstall onnxruntime")
    return found[0]


class OnnxEngine:
    """Runs a graph of the kind that `export` writes (batch 1)."""

    def __init__(self, name: str, graph: Path, entry: EngineEntry, runtime: OnnxRuntime) -> None:
        self.is_stock = graph.name != Path(entry.graph).name  # on ONNX Runtime's own operators
        ort_threads = runtime.threads if self.is_stock else 1
        self._own(
            lib.ds_onnx_open(runtime.handle, os.fsencode(graph), entry.max_seq_len, ort_threads),
            name,
            str(graph),
        )

    def _own(self, handle: Any, name: str, source: str) -> None:
        if handle == ffi.NULL:
            check(lib.DS_ERROR_ENGINE, source)
        self.calls = 0
        self.rows = 0
        self._name = name
        self.handle = ffi.gc(handle, lambda engine: engine.close(engine))
        self.vocab_size = int(self.handle.vocab)
        self.max_seq_len = int(self.handle.max_seq_len)

    def reserve(self, num_slots: int) -> None:
        check_room(self._name, num_slots, self.max_seq_len, "export with a larger max_seq_len")
        check(self.handle.reserve(self.handle, num_slots), self._name)

    def forward(
        self,
        token_ids: Ids,
        start: int,
        position_ids: NDArray[np.int64] | None = None,
        mask: NDArray[np.bool_] | None = None,
        num_logits: int | None = None,
    ) -> Logits:
        count = len(token_ids)
        wanted = count if num_logits is None else num_logits
        logits = ffi.new("const float **")
        status = self.handle.forward(
            self.handle,
            count,
            view("int32_t[]", np.ascontiguousarray(token_ids, np.int32)),
            start,
            ffi.NULL
            if position_ids is None
            else view("int64_t[]", np.ascontiguousarray(position_ids, np.int64)),
            ffi.NULL if mask is None else view("uint8_t[]", np.ascontiguousarray(mask, np.uint8)),
            wanted,
            logits,
        )
        check(status, self._name)
        self.calls += 1
        self.rows += count
        values = ffi.buffer(logits[0], wanted * self.vocab_size * 4)
        return np.frombuffer(values, np.float32).reshape(wanted, self.vocab_size)


@contextmanager
def wanting_leaders(engine: Engine) -> Iterator[None]:
    """Of the logits of its calls only the first largest of each row has to be exact, as in greedy decoding
    (`wants_leaders` in engine.h). Engines that know no such thing give all, as ever."""
    if not isinstance(engine, OnnxEngine):
        yield
        return
    engine.handle.wants_leaders = 1
    try:
        yield
    finally:
        engine.handle.wants_leaders = 0


class SharingEngine(OnnxEngine):
    """An engine in the cache of another, its host, for which it drafts (`ds_onnx_share`)."""

    def __init__(self, name: str, host: OnnxEngine, engine: OnnxEngine) -> None:
        """engine: whose weights it has. It can still be called by itself, in its own cache."""
        self._runner = engine  # which stays open
        self._move_in(lib.ds_onnx_share(host.handle, engine.handle), name, host)

    def _move_in(self, handle: Any, name: str, host: OnnxEngine) -> None:
        self.cache_host = host
        self._own(handle, name, name)

    def read_along(self, token_ids: Ids) -> Logits:
        """float32 logits [T, V] after each of `token_ids` [T], as the first token of a draft there has them:
        the host has read all tokens before.

        A chunk is read by the host, then again behind it, where each row sees the host's rows before it and
        itself. Chunks get shorter towards the end of the cache; there the very last token has no slot behind
        it and takes the host's, which nobody reads again.
        """
        logits = np.empty((len(token_ids), self.vocab_size), np.float32)
        slots = min(self.max_seq_len, len(token_ids) + lib.DS_PREFILL_ROWS)
        self.reserve(slots)
        start = 0
        while start < len(token_ids):
            chunk = token_ids[start : start + min(lib.DS_PREFILL_ROWS, max(1, (slots - start) // 2))]
            self.cache_host.forward(chunk, start, num_logits=1)
            first = min(start + len(chunk), slots - 1)
            rows, seen = np.arange(len(chunk)), np.arange(first + len(chunk))
            mask = (seen < start + rows[:, None]) | (seen == first + rows[:, None])
            logits[start : start + len(chunk)] = self.forward(chunk, first, start + rows, mask)
            start += len(chunk)
        return logits


class SkippingEngine(SharingEngine):
    """Another engine without some of its sublayers, in that one's session and cache (`ds_onnx_skip`)."""

    def __init__(self, name: str, host: OnnxEngine, skips: NDArray[np.bool_]) -> None:
        """skips: bool [num_layers, 2], of the attention and the MLP of each layer."""
        table = np.ascontiguousarray(skips, np.uint8)
        self._move_in(lib.ds_onnx_skip(host.handle, view("uint8_t[]", table), table.size), name, host)


@dataclass(frozen=True)
class SwiftState:
    """How far a search is. bool [num_layers, 2], of the attention and the MLP of each layer: `skips`, the set
    in use, and `tried`, the latest; match: of each, the share of the tokens read again that it chose too."""

    num_tried: int
    is_over: bool
    match: float
    skips: NDArray[np.bool_]
    tried_match: float
    tried: NDArray[np.bool_]


class SwiftEngine(SkippingEngine):
    """Another engine without a share of its sublayers, which are searched while it decodes
    (`ds_swift_create`)."""

    def __init__(self, name: str, host: OnnxEngine, num_layers: int, share: float) -> None:
        self._move_in(lib.ds_swift_create(host.handle, 2 * num_layers, share), name, host)

    @property
    def state(self) -> SwiftState:
        state = ffi.new("ds_swift_state *")
        check(lib.ds_swift_look(self.handle, state), self._name)

        def read(table: Any) -> NDArray[np.bool_]:
            return np.array(ffi.unpack(table, state.n_sublayers), bool).reshape(-1, 2)

        return SwiftState(
            num_tried=state.n_tried,
            is_over=bool(state.is_over),
            match=state.match,
            skips=read(state.skips),
            tried_match=state.tried_match,
            tried=read(state.tried),
        )

    def forget(self) -> None:
        """Search anew, from evenly spaced sublayers."""
        check(lib.ds_swift_forget(self.handle), self._name)
