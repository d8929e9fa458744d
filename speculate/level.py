"""The levels of a ladder: each drafts for the one above with the help of the one below.

What a level proposes is an exact sample of its own law, whatever it was drafted from, so the level above may
verify it with that law. This holds as long as the end of a proposal depends on nothing but the tokens kept in
it. A level may stop after an end-of-text token, at a length fixed beforehand, or where a round ended. It may
not look at a token and then drop it: to propose only the accepted drafts without the level's own token after
them, or to leave out a token for its low probability, selects among samples, and the verdict on them is no
longer lossless. (A deterministic level may propose as few as it likes: its drafts are not sampled.)

A level that is asked for n tokens gives n, in as many rounds as that takes, since the call above that
verifies them is the dear one. Its inner level drafts at most one token short of what is missing, so no round
overshoots.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from .engine import Engine, Ids, Logits
from .sequence import Sequence
from .stats import DraftStats
from .suffix import SuffixDrafter
from .verdict import Judge, Laws

PREFILL_ROWS = 128  # rows of one call while reading a prompt


@dataclass(frozen=True)
class Proposal:
    tokens: Ids  # int32 [n]
    laws: Laws | None  # float64 [n, V], what they were sampled from; None: chosen, not sampled


NOTHING = Proposal(np.empty(0, np.int32), None)


class Level(Protocol):
    name: str
    busy_ms: float  # wall time spent in this level, the ones below it included

    def propose(self, sequence: Sequence, length: int, count: int) -> Proposal:
        """Draft at most `count` tokens to follow the first `length` ones, and write them there."""
        ...

    def truncate(self, length: int) -> None:
        """Of what was proposed, only the first `length` tokens of the sequence stand."""
        ...


class SuffixLevel:
    """Level 0: what followed the last occurrence of the latest tokens, in the prompt or in the output."""

    name = "suffix"

    def __init__(self) -> None:
        self._drafter = SuffixDrafter()
        self._known = 0
        self.busy_ms = 0.0

    def propose(self, sequence: Sequence, length: int, count: int) -> Proposal:
        began = perf_counter()
        if sequence.committed > self._known:  # tokens that the levels above only propose are not learnt from
            self._drafter.append(sequence.ids[self._known : sequence.committed])
            self._known = sequence.committed
        tokens = self._drafter.draft(sequence.ids[self._known : length], count)
        sequence.ids[length : length + len(tokens)] = tokens
        kept = sequence.cut_at_eos(length, len(tokens))
        self.busy_ms += (perf_counter() - began) * 1e3
        return Proposal(sequence.ids[length : length + kept], None)

    def truncate(self, length: int) -> None:
        pass


class EngineLevel:
    """An engine, with an optional level below that drafts for it. The target is the last such level.

    Invariant: cache slot i holds token i of the sequence for every i < `kept`. The newest token is never in
    the cache yet, so a round without drafts is a call with one row, and after a fully accepted proposal the
    next call also reads its last token, which nobody had to read before.
    """

    def __init__(
        self, name: str, engine: Engine, judge: Judge, inner: Level | None = None, num_inner: int = 0
    ) -> None:
        self.name = name
        self.engine = engine
        self.judge = judge
        self.inner = inner
        self.num_inner = num_inner if inner else 0
        self.kept = 0
        self.rounds = 0
        self.discarded = 0  # tokens decided behind an end-of-text token
        self.drafts = DraftStats(inner.name) if inner else None
        self.busy_ms = self.prefill_ms = self.forward_ms = self.decide_ms = 0.0

    def propose(self, sequence: Sequence, length: int, count: int) -> Proposal:
        began = perf_counter()
        have = 0
        while have < count:
            have += self.advance(sequence, length + have, count - have, row=have)
            if int(sequence.ids[length + have - 1]) in sequence.eos_token_ids:
                break
        self.busy_ms += (perf_counter() - began) * 1e3
        laws = self.judge.laws
        return Proposal(sequence.ids[length : length + have], None if laws is None else laws[:have])

    def advance(self, sequence: Sequence, length: int, room: int, row: int = 0) -> int:
        """One round: draft, verify, write 1..room tokens behind the first `length`; returns how many."""
        draft = NOTHING
        if self.inner and room > 1:
            draft = self.inner.propose(sequence, length, min(self.num_inner, room - 1))
        count = len(draft.tokens)
        logits = self._read(sequence.ids, length + count, count + 1)

        began = perf_counter()
        accepted, token = self.judge.decide(logits, draft.tokens, draft.laws, length, row)
        sequence.ids[length + accepted] = token
        self.kept = length + accepted
        emitted = sequence.cut_at_eos(length, accepted + 1)
        self.rounds += 1
        self.discarded += accepted + 1 - emitted
        if self.inner and self.drafts:
            self.inner.truncate(length + accepted)
            if room > 1:
                self.drafts.record(count, accepted)
        self.decide_ms += (perf_counter() - began) * 1e3
        return emitted

    def truncate(self, length: int) -> None:
        self.kept = min(self.kept, length)
        if self.inner:
            self.inner.truncate(length)

    def _read(self, ids: Ids, end: int, rows: int) -> Logits:
        """Bring the cache up to token `end`; the logits after each of the last `rows` tokens."""
        began = perf_counter()
        first = self.kept == 0
        while end - self.kept >= PREFILL_ROWS + rows:
            self._forward(ids[self.kept : self.kept + PREFILL_ROWS])
        logits = self._forward(ids[self.kept : end])
        spent = (perf_counter() - began) * 1e3
        if first:
            self.prefill_ms += spent
        else:
            self.forward_ms += spent
        return logits[-rows:]

    def _forward(self, ids: Ids) -> Logits:
        # An id of the target's padding may be unknown to a drafter with less of it; any other will do there.
        logits = self.engine.forward(np.minimum(ids, self.engine.vocab_size - 1), self.kept)
        self.kept += len(ids)
        return logits
