"""One generation, from prompt tokens to pieces of text."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from time import perf_counter
from typing import Literal

from tokenizers import Tokenizer

from .decode import decode
from .errors import BundleError
from .level import EngineLevel, Level
from .sequence import Sequence
from .stats import GenerationStats
from .text import StopStrings, TextStream

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one step added. The texts of all pieces concatenate to the text of the whole generation."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Generation:
    """`token_ids` are the new ones, an end-of-text token included; `text` leaves out special tokens and stop
    strings."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stats: GenerationStats


class Run(Iterator[Piece]):
    """A generation under way: an iterator of its pieces. `finish_reason` and `stats` stand once it is
    exhausted."""

    def __init__(
        self,
        sequence: Sequence,
        build_target: Callable[[], EngineLevel],
        tokenizer: Tokenizer,
        max_new_tokens: int,
        stop: tuple[str, ...],
        busy: Lock,
    ) -> None:
        self.stats = GenerationStats(prompt_tokens=sequence.committed)
        self.finish_reason: FinishReason = "length"
        self._sequence = sequence
        self._build_target = build_target
        self._max_new_tokens = max_new_tokens
        self._text = TextStream(tokenizer, sequence.ids[: sequence.committed].tolist())
        self._stops = StopStrings(stop)
        self._stopping = bool(stop)
        self._pieces = self._decode(busy)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Give up the rest and free the bundle for another generation."""
        self._pieces.close()

    def _decode(self, busy: Lock) -> Generator[Piece]:
        stats = self.stats
        with exclusive(busy):
            resumed = perf_counter()
            target = self._build_target()
            levels = list(_levels(target))
            calls = {level.name: level.engine.calls for level in levels if isinstance(level, EngineLevel)}
            for token_ids in decode(self._sequence, target, self._max_new_tokens):
                kept, text = self._read(token_ids)
                stats.emitted += kept
                last = self.finish_reason != "length" or stats.emitted == self._max_new_tokens
                if last:
                    text += self._stops.push(self._text.flush()) + self._stops.flush()
                stats.total_ms += (perf_counter() - resumed) * 1e3
                stats.ttft_ms = stats.ttft_ms or stats.total_ms
                _collect(stats, levels, calls)
                stats.discarded += len(token_ids) - kept
                yield Piece(text, token_ids[:kept])
                if last:
                    return
                resumed = perf_counter()

    def _read(self, token_ids: list[int]) -> tuple[int, str]:
        """Take in the tokens of a round; how many of them stay, and the text that they add."""
        ended = token_ids[-1] in self._sequence.eos_token_ids
        spoken = token_ids[:-1] if ended else token_ids
        text = ""
        if self._stopping:  # token by token: the output ends with the one that completes the stop string
            for i, token in enumerate(spoken):
                text += self._stops.push(self._text.push([token]))
                if self._stops.stopped:
                    self.finish_reason = "stop"
                    return i + 1, text
        else:
            text = self._text.push(spoken)
        if ended:
            self.finish_reason = "eos"
        return len(token_ids), text


@contextmanager
def exclusive(busy: Lock) -> Iterator[None]:
    """Hold a bundle's engines; refuse at once where another generation holds them, since its cache would be
    lost."""
    if not busy.acquire(blocking=False):
        raise BundleError(
            "another generation is under way on this bundle: "
            "exhaust or close its stream first, or load the bundle a second time"
        )
    try:
        yield
    finally:
        busy.release()


def _levels(target: EngineLevel) -> Iterator[Level]:
    """Innermost first, target last."""
    if isinstance(target.inner, EngineLevel):
        yield from _levels(target.inner)
    elif target.inner:
        yield target.inner
    yield target


def _collect(stats: GenerationStats, levels: list[Level], calls_before: dict[str, int]) -> None:
    """Copy the levels' counters: they are the single source, and always consistent between rounds."""
    target = levels[-1]
    assert isinstance(target, EngineLevel)
    stats.steps = target.rounds - 1
    stats.discarded = target.discarded
    engine_levels = [level for level in levels if isinstance(level, EngineLevel)]
    stats.drafts = [level.drafts for level in engine_levels if level.drafts]
    stats.calls = {level.name: level.engine.calls - calls_before[level.name] for level in engine_levels}
    stats.prefill_ms = sum(level.prefill_ms for level in engine_levels)
    below = 0.0
    for level in levels[:-1]:
        own_prefill = level.prefill_ms if isinstance(level, EngineLevel) else 0.0
        stats.draft_ms[level.name] = level.busy_ms - below - own_prefill
        below = level.busy_ms
    stats.verify_ms = target.forward_ms
    stats.sampling_ms = target.decide_ms
