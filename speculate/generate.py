"""One generation, from prompt tokens to pieces of text."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from time import perf_counter
from typing import Any, Literal

from tokenizers import Tokenizer

from .errors import BundleError
from .levels import split_engine_tree
from .loop import Decoder
from .stats import DraftStats, GenerationStats
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
    exhausted; before that `stats`, read anew after a piece, are those of the pieces so far. After an error
    the round that failed may be in them."""

    def __init__(
        self,
        prompt: list[int],
        begin: Callable[[], Decoder],
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer,
        max_new_tokens: int,
        stop: tuple[str, ...],
        busy: Lock,
    ) -> None:
        self._stats = GenerationStats(prompt_tokens=len(prompt))
        self._decoder: Decoder | None = None
        self._num_cut = 0  # tokens of the last round behind an end of text or a stop string
        self.finish_reason: FinishReason = "length"
        self._begin = begin
        self._eos_token_ids = eos_token_ids
        self._max_new_tokens = max_new_tokens
        self._text = TextStream(tokenizer, prompt)
        self._stops = StopStrings(stop)
        self._stopping = bool(stop)
        self._pieces = self._decode(busy)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Give up the rest and free the bundle for another generation."""
        self._pieces.close()

    @property
    def stats(self) -> GenerationStats:
        """Read from the loop when they are asked for: to read them in each round takes a hundredth of it."""
        if self._decoder is not None:
            _collect(self._stats, self._decoder, self._num_cut)
        return self._stats

    def _decode(self, busy: Lock) -> Generator[Piece]:
        stats = self._stats
        with exclusive(busy):
            resumed = perf_counter()
            decoder = self._decoder = self._begin()
            try:
                while token_ids := decoder.step():
                    kept, text = self._read(token_ids)
                    stats.emitted += kept
                    last = self.finish_reason != "length" or stats.emitted == self._max_new_tokens
                    if last:
                        text += self._stops.push(self._text.flush()) + self._stops.flush()
                    stats.total_ms += (perf_counter() - resumed) * 1e3
                    stats.ttft_ms = stats.ttft_ms or stats.total_ms
                    self._num_cut = len(token_ids) - kept
                    yield Piece(text, token_ids[:kept])
                    if last:
                        return
                    resumed = perf_counter()
            finally:  # with the decoder go its laws and drafters
                _collect(stats, decoder, self._num_cut)
                self._decoder = None

    def _read(self, token_ids: list[int]) -> tuple[int, str]:
        """Take in the tokens of a round; how many of them stay, and the text that they add."""
        ended = token_ids[-1] in self._eos_token_ids
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


def _collect(stats: GenerationStats, decoder: Decoder, num_cut: int) -> None:
    """Copy the loop's counters: they are the single source, and always consistent between rounds. num_cut:
    tokens that the loop gave and the generation did not keep."""
    levels = [(level.name, decoder.counters(i)) for i, level in enumerate(decoder.levels)]
    *drafters, (_, target) = levels
    stats.steps = max(target.rounds - 1, 0)  # of a prompt that could not be read there is none
    stats.discarded = target.discarded + num_cut
    stats.drafts = [_read_drafts(name, counters) for name, counters in drafters]
    stats.calls = {
        split_engine_tree(level.name)[0]: counters.calls
        for level, (_, counters) in zip(decoder.levels, levels, strict=True)
        if level.engine
    }
    stats.prefill_ms = sum(counters.prefill_ms for _, counters in levels)
    below = 0.0
    for name, counters in drafters:
        stats.draft_ms[name] = counters.busy_ms - below - counters.prefill_ms
        below = counters.busy_ms
    stats.verify_ms = target.forward_ms
    stats.sampling_ms = target.decide_ms
    stats.adapt_ms = sum(counters.adapt_ms for _, counters in drafters)


def _read_drafts(name: str, counters: Any) -> DraftStats:
    drafted_at, accepted_at = list(counters.drafted_at), list(counters.accepted_at)
    longest = sum(map(bool, drafted_at))
    return DraftStats(
        name,
        counters.asked,
        counters.drafted,
        counters.accepted,
        drafted_at[:longest],
        accepted_at[:longest],
    )
