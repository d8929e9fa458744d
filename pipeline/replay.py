"""Predict the speed of any ladder from one recorded run, by decoding it again without the engines.

Under greedy decoding the output is the target's own text whatever drafts. So one plain run of the target and
each drafter's choice at every position of that text, with how sure it was, let the shipped decode loop run
over a tape: engines that look up what they said. Draft lengths, with the schedule that ends a draft where it
does not pay, are those of real decoding, since it is the same code; the calls that it makes are added up by
their measured cost. What a drafter says after it has left the target's text is not on the tape: there it says
something that nobody accepts, as sure of it as it was at that position of the text.

Of the target the tape has the likeliest few tokens at each position, since drafters learn from what it does
not say too. A node of a tree that is off the text is answered as the same token was last answered on it:
nobody follows that path, but what a drafter learns from it is of the right kind.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..speculate.binding import ffi, lib
from ..speculate.costs import Costs
from ..speculate.drafters import Drafter, Sources
from ..speculate.ladder import Rung, build_ladder
from ..speculate.levels import TARGET, list_models
from ..speculate.plan import Work
from ..speculate.settings import Sampling

LIKELY = 8  # tokens that are kept of what the target found likely at a position
TREE_ROOM: int = lib.DS_TREE_ROWS  # slots behind the text for the nodes of a tree
STRANGERS = 1024  # ids for the tokens that no one on the tape says: siblings in a tree should keep apart


@dataclass(frozen=True)
class Recording:
    """The target's own greedy output for one prompt, and what every drafter would have said along it."""

    prompt: list[int]
    tokens: np.ndarray  # int [T]
    choices: Mapping[str, np.ndarray]  # drafter -> int [T], given the prompt and the target's tokens before
    leads: Mapping[str, np.ndarray] = field(default_factory=dict)  # first logit over second, float [T]
    likely: np.ndarray | None = None  # int [T, LIKELY]: the target's likeliest tokens, the first is `tokens`
    guests: frozenset[str] = frozenset()  # drafters in the target's cache

    def agreement(self, drafter: str) -> float:
        return float(np.mean(self.choices[drafter] == self.tokens))


@dataclass(frozen=True)
class Prediction:
    """A ladder (innermost first, the target implied), what each level proposes at most, and its predicted
    speed."""

    ladder: tuple[str, ...]
    num_speculative_tokens: Mapping[str, int]
    tokens_per_second: float
    tokens_per_target_call: float
    ms_per_token: Mapping[str, float] = field(default_factory=dict)  # by engine
    work: Mapping[str, Work] = field(default_factory=dict)  # by engine


@dataclass(frozen=True)
class Calls:
    """What one replay did."""

    target_calls: int  # behind the prompt
    calls: dict[str, list[tuple[int, int]]]  # engine -> (rows, slots before); not the target's prompt


class TapeEngine:
    """Says again what an engine said along a text. Ids are places in a list of the tokens that occur."""

    def __init__(
        self,
        text: np.ndarray,
        num_prompt: int,
        choices: np.ndarray,  # int [T], or [T, n] with the likeliest first
        leads: np.ndarray,
        elsewhere: int,
        vocab: int,
    ) -> None:
        self.vocab_size, self.max_seq_len = vocab, len(text) + 1 + TREE_ROOM
        self._elsewhere = elsewhere  # and up: what it says off the text, at each place something new
        self.calls = self.rows = 0
        self.log: list[tuple[int, int]] = []
        self._text, self._num_prompt = text, num_prompt
        self._choices, self._leads = choices.reshape(len(choices), -1), leads
        self._agrees = np.zeros(self.max_seq_len, bool)  # by slot: its path is the text
        self._said: dict[int, int] = {}  # token -> the place where it was last answered on the text

    def reserve(self, num_slots: int) -> None:
        self._agrees[:] = False
        self._said.clear()

    def keep(self, start, slots) -> None:
        self._agrees[start : start + len(slots)] = self._agrees[slots]

    def forward(self, token_ids, start, position_ids=None, mask=None, num_logits=None) -> np.ndarray:
        count = len(token_ids)
        self.log.append((count, start))
        depths = start + np.arange(count) if position_ids is None else position_ids
        same = np.asarray(token_ids) == self._text[depths]
        if mask is None:
            before = start == 0 or bool(self._agrees[start - 1])
            self._agrees[start : start + count] = np.logical_and.accumulate(same) & before
        else:
            for row, slot in enumerate(range(start, start + count)):
                seen = np.flatnonzero(mask[row, :slot])
                self._agrees[slot] = same[row] and (not seen.size or self._agrees[seen[-1]])
        wanted = count if num_logits is None else num_logits
        several = self._choices.shape[1] > 1
        logits = np.full((wanted, self.vocab_size), -1.0 if several else 0.0, np.float32)
        for row in range(count - wanted, count):
            agrees, token = self._agrees[start + row], int(token_ids[row])
            place = min(max(int(depths[row]) + 1 - self._num_prompt, 0), len(self._choices) - 1)
            if agrees:
                self._said[token] = place
            choices = self._choices[place]
            if not agrees:
                learnt = several and token in self._said
                choices = self._choices[self._said[token]] if learnt else [self._elsewhere + place]
            logits[row - count, choices] = -1e-3 * np.arange(len(choices))
            logits[row - count, choices[0]] = max(float(self._leads[place]), 1e-3)
        return logits


class TapeGuest(TapeEngine):
    """One in the cache of another."""

    def __init__(self, host: TapeEngine, *tape: Any) -> None:
        super().__init__(*tape)
        self.cache_host, self._agrees = host, host._agrees


class TapeDrafter:
    """A drafter that knows tokens, on a tape that has their places in a list of those that occur. What it
    drafts that does not occur is one of the STRANGERS behind that list."""

    def __init__(self, drafter: Drafter, known: np.ndarray) -> None:
        self._drafter = drafter
        self._tokens, self._wrong = known.tolist(), len(known)
        self._places = {token: place for place, token in enumerate(self._tokens)}
        self._callbacks = {
            "begin": ffi.callback("int32_t(ds_drafter *, int32_t)", self._begin),
            "append": ffi.callback("int32_t(ds_drafter *, const int32_t *, int32_t)", self._append),
            "draft": ffi.callback(
                "int32_t(ds_drafter *, const int32_t *, int32_t, int32_t, int32_t *, int32_t *)",
                self._draft,
            ),
            "close": ffi.callback("void(ds_drafter *)", lambda _: None),
        }
        if drafter.proposes_trees:
            self._callbacks["draft_tree"] = ffi.callback(
                "int32_t(ds_drafter *, const int32_t *, int32_t, int32_t, int32_t, int32_t *, int32_t *, "
                "double *)",
                self._draft_tree,
            )
        self.handle = ffi.new("ds_drafter *", self._callbacks)
        self.proposes_trees = drafter.proposes_trees

    def _read(self, places: Any, count: int) -> Any:
        said = ffi.unpack(places, count) if count else []
        return ffi.new("int32_t[]", [self._tokens[place] if place < self._wrong else -1 for place in said])

    def _begin(self, _: Any, num_tokens: int) -> int:
        return self._drafter.handle.begin(self._drafter.handle, num_tokens)

    def _append(self, _: Any, places: Any, count: int) -> int:
        return self._drafter.handle.append(self._drafter.handle, self._read(places, count), count)

    def _draft(self, _: Any, tail: Any, n_tail: int, room: int, draft: Any, support: Any) -> int:
        pending = ffi.unpack(tail, n_tail) if n_tail else []
        if any(place >= self._wrong for place in pending):
            return 0  # nobody accepts what would follow
        inner = self._drafter.handle
        count = inner.draft(inner, self._read(tail, n_tail), n_tail, room, draft, support)
        self._place(draft, count)
        return count

    def _draft_tree(
        self, _: Any, tail: Any, n_tail: int, room: int, depth: int, tokens: Any, parents: Any, chances: Any
    ) -> int:
        pending = ffi.unpack(tail, n_tail) if n_tail else []
        if any(place >= self._wrong for place in pending):
            return 0
        inner = self._drafter.handle
        count = inner.draft_tree(
            inner, self._read(tail, n_tail), n_tail, room, depth, tokens, parents, chances
        )
        self._place(tokens, count)
        return count

    def _place(self, tokens: Any, count: int) -> None:
        for i in range(count):
            tokens[i] = self._places.get(tokens[i], self._wrong + tokens[i] % STRANGERS)


@dataclass(frozen=True)
class TapeSources(Sources):
    """The drafters of one replay. Those that know the vocabulary are told its tokens."""

    known: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    history_bytes: int = 1 << 20  # of one generation; to take more costs more than to decode it

    def open_one(self, name: str, vocab_size: int) -> Any:
        drafter = super().open_one(name, vocab_size)
        return TapeDrafter(drafter, self.known) if name in ("rest", "bigram") else drafter


def replay(
    recording: Recording,
    ladder: Sequence[str],
    lengths: Mapping[str, int],
    costs: Costs | None = None,
    sources: Sources | None = None,
) -> Calls:
    """Decode one recording again. Without costs, drafts are as long as `lengths` says. sources: what drafters
    read; of earlier generations they know nothing."""
    count, num_prompt = len(recording.tokens), len(recording.prompt)
    likely = recording.tokens[:, None] if recording.likely is None else recording.likely
    said = [np.asarray(recording.prompt), recording.tokens, *recording.choices.values(), likely.ravel()]
    known, places = np.unique(np.concatenate(said), return_inverse=True)
    off = len(known) + STRANGERS
    vocab = off + (1 + len(recording.choices)) * count
    text = places[: num_prompt + count]
    sure = np.full(count, 1.0)
    likely = places[-likely.size :].reshape(likely.shape)
    engines = {TARGET: TapeEngine(text, num_prompt, likely, sure, off, vocab)}
    for index, name in enumerate(recording.choices, 1):
        choices = places[num_prompt + index * count : num_prompt + (index + 1) * count]
        tape = (text, num_prompt, choices, recording.leads.get(name, sure), off + index * count, vocab)
        shares = name in recording.guests
        engines[name] = TapeGuest(engines[TARGET], *tape) if shares else TapeEngine(*tape)
    rungs = [Rung(name, lengths[name]) for name in ladder]
    rows = 1 + max(lengths[name] for name in ladder) if ladder else 1
    tables = None
    if costs and ladder:
        timed = [TARGET, *list_models(ladder)]
        tables = {name: costs.spread(name, rows, num_prompt + count // 2) for name in timed}
    read = sources or Sources()
    drafters = TapeSources((), read.datastore, read.ngrams, known=known)
    decoder = build_ladder(rungs, engines.__getitem__, tables, drafters.open)
    decoder.begin(text[:num_prompt].tolist(), count, Sampling())
    output = [token for tokens in iter(decoder.step, []) for token in tokens]
    assert output == text[num_prompt:].tolist(), "the loop left the target's own text"
    target_log = [call for call in engines[TARGET].log if call[1] >= num_prompt]
    logs = {name: engines[name].log for name in list_models(ladder)}
    return Calls(len(target_log), {**logs, TARGET: target_log})


def predict(
    recordings: Iterable[Recording],
    ladder: Sequence[str],
    lengths: Mapping[str, int],
    costs: Costs,
    sources: Sources | None = None,
) -> Prediction:
    """The pooled speed of one setting over all recordings, from the first token on; the drafters' reading of
    the prompt counts, the target's does not."""
    recordings = list(recordings)
    replays = [replay(recording, ladder, lengths, costs, sources) for recording in recordings]
    tokens = sum(len(recording.tokens) - 1 for recording in recordings)
    calls = sum(one.target_calls for one in replays)
    shares, work = {}, {}
    for name in [*list_models(ladder), TARGET]:
        log = [call for one in replays for call in one.calls[name]]
        shares[name] = float(costs.of(name, *np.array(log, int).reshape(-1, 2).T).sum()) / tokens
        behind = [
            rows
            for recording, one in zip(recordings, replays, strict=True)
            for rows, slots in one.calls[name]
            if slots >= len(recording.prompt)
        ]
        work[name] = Work(
            calls_per_token=len(behind) / tokens,
            rows_per_call=max(1.0, sum(behind) / max(1, len(behind))),
            reads_prompt=name == TARGET or len(behind) < len(log),
        )
    spent = sum(shares.values()) + calls / tokens * costs.overhead_ms
    used = {name: lengths[name] for name in ladder}
    return Prediction(tuple(ladder), used, 1e3 / spent, tokens / calls, shares, work)


def best_plan(
    recordings: Sequence[Recording],
    ladder: Sequence[str],
    options: Mapping[str, Sequence[int]],
    costs: Costs,
    sources: Sources | None = None,
) -> Prediction:
    """The fastest draft lengths for `ladder` among `options` (level -> lengths): one level after another,
    from the outermost in, until none gets better alone. Lengths are upper bounds where the schedule cuts, so
    the order of the search hardly matters."""
    lengths = {name: max(options[name]) for name in ladder}
    best = predict(recordings, ladder, lengths, costs, sources)
    improved = True
    while improved:
        improved = False
        for name in reversed(ladder):
            for length in options[name]:
                tried = {**best.num_speculative_tokens, name: length}
                plan = predict(recordings, ladder, tried, costs, sources)
                if plan.tokens_per_second > best.tokens_per_second * (1 + 1e-9):
                    best, improved = plan, len(ladder) > 1
    return best
