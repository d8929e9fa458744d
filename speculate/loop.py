"""The native decode loop (`native/loop.h`): built from levels, started, asked for tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np

from .binding import check, ffi, lib
from .drafters import Drafter
from .engine import AdaptingEngine, Decision, DeviceEngine, Engine, GuestEngine, MovingEngine
from .errors import BundleError
from .levels import GRAPH, SEQUOIA, TREE
from .onnx_engine import OnnxEngine
from .settings import Sampling
from .verify import RULES

BRANCHING: dict[str, int] = {
    "": lib.DS_CHAIN,
    TREE: lib.DS_TREE,
    GRAPH: lib.DS_GRAPH,
    SEQUOIA: lib.DS_SEQUOIA,
}
PREFILL_ROWS: int = lib.DS_PREFILL_ROWS  # rows of one call while reading a prompt


@dataclass(frozen=True)
class Level:
    """One level of a ladder. Each drafts for the next; the last is the target."""

    name: str
    engine: Engine | None  # None: the drafter
    num_draft: int = 0  # the longest proposal to the level above; 0 for the target
    costs: Sequence[float] | None = (
        None  # [r]: milliseconds of a call with r + 1 rows; None: lengths are fixed
    )
    drafter: Drafter | None = None
    tree: str = ""  # the tree that it proposes, if it knows how to: TREE, of an engine one of ENGINE_TREES


class EngineCalls:
    """An `Engine` as the native loop calls it. What the engine raises is kept, to be raised again outside."""

    # By the addresses of their handles: native code names an engine by its handle.
    _known: ClassVar[WeakValueDictionary[int, "EngineCalls"]] = WeakValueDictionary()

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self._logits: np.ndarray | None = None  # alive until the next call
        failing = {"error": lib.DS_ERROR_ENGINE, "onerror": self._keep}
        self._callbacks = {
            "reserve": ffi.callback("int32_t(ds_engine *, int32_t)", self._reserve, **failing),
            "forward": ffi.callback(
                "int32_t(ds_engine *, int32_t, const int32_t *, int32_t, const int64_t *, const uint8_t *, "
                "int32_t, const float **)",
                self._forward,
                **failing,
            ),
        }
        if isinstance(engine, DeviceEngine):
            signature = "int32_t(ds_engine *, const ds_decision *, int32_t *, int32_t *)"
            self._callbacks["decide"] = ffi.callback(signature, self._decide, **failing)
        if isinstance(engine, MovingEngine):
            self._callbacks["keep"] = ffi.callback(
                "int32_t(ds_engine *, int32_t, const int32_t *, int32_t)", self._keep_slots, **failing
            )
        sizes = {"vocab": engine.vocab_size, "max_seq_len": engine.max_seq_len}
        if isinstance(engine, AdaptingEngine):
            sizes["n_scratch"] = engine.num_scratch
            self._callbacks["adapt"] = ffi.callback(
                "int32_t(ds_engine *, const int32_t *, int32_t, int32_t)", self._adapt, **failing
            )
        self.handle = ffi.new("ds_engine *", sizes | self._callbacks)
        self._known[_address(self.handle)] = self

    def _keep(self, kind: Any, error: BaseException, trace: Any) -> None:
        self.error = error.with_traceback(trace)

    def _reserve(self, handle: Any, num_slots: int) -> int:
        self.engine.reserve(num_slots)
        return lib.DS_OK

    def _keep_slots(self, handle: Any, start: int, slots: Any, num_slots: int) -> int:
        assert isinstance(self.engine, MovingEngine)
        self.engine.keep(start, _read(slots, np.int32, num_slots))
        return lib.DS_OK

    def _adapt(self, handle: Any, tokens: Any, num_tokens: int, num_decoded: int) -> int:
        assert isinstance(self.engine, AdaptingEngine)
        return self.engine.adapt(_read(tokens, np.int32, num_tokens), num_decoded)

    def _forward(
        self,
        handle: Any,
        num_rows: int,
        token_ids: Any,
        start: int,
        positions: Any,
        mask: Any,
        num_logits: int,
        logits: Any,
    ) -> int:
        given = self.engine.forward(
            _read(token_ids, np.int32, num_rows),
            start,
            None if positions == ffi.NULL else _read(positions, np.int64, num_rows),
            None if mask == ffi.NULL else _read(mask, np.bool_, num_rows, start + num_rows),
            num_logits=0 if logits == ffi.NULL else num_logits,
        )
        if logits == ffi.NULL:
            return lib.DS_OK
        self._logits = np.ascontiguousarray(given, np.float32)
        if self._logits.shape != (num_logits, self.engine.vocab_size):
            raise ValueError(
                f"an engine gave logits {self._logits.shape}: wanted {num_logits} rows of "
                f"{self.engine.vocab_size}"
            )
        logits[0] = ffi.from_buffer("float[]", self._logits)
        return lib.DS_OK

    def _decide(self, handle: Any, decision: Any, n_accepted: Any, next_token: Any) -> int:
        assert isinstance(self.engine, DeviceEngine)
        drafter = None
        if decision.drafter != ffi.NULL:
            drafter = self._known[_address(decision.drafter)].engine
            assert isinstance(drafter, DeviceEngine)
        fields = ("temperature", "top_k", "top_p", "rule", "seed", "stream", "counter", "row")
        n_accepted[0], next_token[0] = self.engine.decide(
            Decision(
                draft=_read(decision.draft, np.int32, decision.n_draft),
                drafter=drafter,
                **{name: getattr(decision, name) for name in fields},
            )
        )
        return lib.DS_OK


class NativeEngines:
    """Some engines as the native library calls them: those that are native as they are, others through
    `EngineCalls`. To be kept for as long as it may call them."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._calls: list[EngineCalls] = []
        self._handles: dict[Engine, Any] = {}
        for engine in engines:
            if isinstance(engine, OnnxEngine):
                self._handles[engine] = engine.handle
            else:
                self._calls.append(EngineCalls(engine))
                self._handles[engine] = self._calls[-1].handle
        for calls in self._calls:
            if isinstance(calls.engine, GuestEngine):
                host = self._handles.get(calls.engine.cache_host)
                if host is None:
                    raise BundleError(
                        "an engine drafts in the cache of one that is not in its ladder: "
                        "add that, or leave it out"
                    )
                calls.handle.host = host

    def handle(self, engine: Engine | None) -> Any:
        return self._handles[engine] if engine else ffi.NULL

    def check(self, status: int) -> int:
        """`binding.check` of a native call, unless an engine raised during it: that is raised again."""
        for calls in self._calls:
            error, calls.error = calls.error, None
            if error is not None:
                raise error
        return check(status)


def native_sampling(sampling: Sampling, verify: Any) -> dict[str, Any]:
    """The fields that `ds_sampling` and `ds_joint_settings` share. verify: a `ds_verify_function` or NULL."""
    return {
        "temperature": sampling.temperature,
        "top_k": min(int(sampling.top_k), 2**31 - 1),
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "rule": RULES[sampling.rule],
        "verify": verify,
    }


class Decoder:
    """The native loop over some levels, innermost first. While it decodes their engines are its own."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels = list(levels)
        for level in self.levels:
            if level.tree not in BRANCHING:
                known = ", ".join(map(repr, BRANCHING))
                raise BundleError(f"level {level.name}: tree={level.tree!r} is none of {known}")
        self._engines = NativeEngines(level.engine for level in self.levels if level.engine)
        costs = [ffi.NULL if level.costs is None else ffi.new("double[]", level.costs) for level in levels]
        wanted = ffi.new(
            "ds_level[]",
            [
                {
                    "engine": self._engines.handle(level.engine),
                    "n_draft": level.num_draft,
                    "n_costs": 0 if level.costs is None else len(level.costs),
                    "costs": cost,
                    "drafter": level.drafter.handle if level.drafter else ffi.NULL,
                    "tree": BRANCHING[level.tree],
                }
                for level, cost in zip(self.levels, costs, strict=True)
            ],
        )
        handle = lib.ds_decoder_create(wanted, len(self.levels))
        if handle == ffi.NULL:
            check(lib.DS_ERROR_ARGUMENT)
        self._handle = ffi.gc(handle, lib.ds_decoder_free)
        self._tokens = ffi.new("int32_t[]", lib.DS_MAX_DRAFT + 1)

    def begin(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_ids: Iterable[int] = (),
        verify: Any = ffi.NULL,
    ) -> None:
        """Start a generation. verify: a `ds_verify_function` in place of the shipped rules, for tests."""
        eos = list(eos_token_ids)
        self._engines.check(
            lib.ds_decoder_begin(
                self._handle,
                ffi.new("ds_sampling *", native_sampling(sampling, verify)),
                ffi.new("int32_t[]", prompt),
                len(prompt),
                max_new_tokens,
                ffi.new("int32_t[]", eos),
                len(eos),
            )
        )

    def step(self) -> list[int]:
        """The new tokens of one round of the target; none once the generation is finished."""
        count = self._engines.check(lib.ds_decoder_step(self._handle, self._tokens, len(self._tokens)))
        return ffi.unpack(self._tokens, count)

    def counters(self, level: int) -> Any:
        """The `ds_level_stats` of a level, as they stand."""
        stats = ffi.new("ds_level_stats *")
        check(lib.ds_decoder_stats(self._handle, level, stats))
        return stats

    def kept(self, level: int) -> int:
        """Cache slots of a level that hold the tokens that stand."""
        return check(lib.ds_decoder_kept(self._handle, level))


def _address(handle: Any) -> int:
    return int(ffi.cast("intptr_t", handle))


def _read(pointer: Any, dtype: Any, *shape: int) -> np.ndarray:
    """An array over memory that is lent for a call."""
    count = int(np.prod(shape))
    return np.frombuffer(ffi.buffer(pointer, count * np.dtype(dtype).itemsize), dtype, count).reshape(shape)
