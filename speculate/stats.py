"""What a generation did, in counters that add up.

Of every generation: ``1 + steps + accepted == emitted + discarded``. The first token belongs to the prefill;
each step emits what it accepted and one token of the target's own; what falls behind an end of text or a stop
string is discarded. Rates are pooled over the run, never means of means.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DraftStats:
    """What became of one level's proposals in the hands of the level above."""

    name: str
    rounds: int = 0  # of the level above in which this one was asked
    drafted: int = 0
    accepted: int = 0
    drafted_at: list[int] = field(default_factory=list)  # [i]: rounds with a draft at position i
    accepted_at: list[int] = field(default_factory=list)  # [i]: rounds that accepted it

    @property
    def histogram(self) -> Counter[int]:
        """Accepted tokens -> rounds. Who accepts the one at i has accepted all before it."""
        reached = [self.rounds, *self.accepted_at, 0]
        counts = {i: reached[i] - reached[i + 1] for i in range(len(reached) - 1)}
        return Counter({accepted: rounds for accepted, rounds in counts.items() if rounds})

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def per_position_acceptance(self) -> list[float]:
        """[i]: of the rounds that drafted a token at position i, the share that accepted it."""
        return [a / d for a, d in zip(self.accepted_at, self.drafted_at, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "draft_acceptance_rate": self.acceptance_rate,
            "per_position_acceptance": self.per_position_acceptance,
            "drafted_at": self.drafted_at,
            "accepted_at": self.accepted_at,
            "histogram": dict(sorted(self.histogram.items())),
        }


@dataclass
class GenerationStats:
    """Of one generation. Times are wall milliseconds; the caller's own time between streamed pieces is not in
    them."""

    prompt_tokens: int
    emitted: int = 0
    discarded: int = 0
    steps: int = 0  # verify calls of the target after the prefill
    drafts: list[DraftStats] = field(default_factory=list)  # innermost first, as in the ladder
    calls: dict[str, int] = field(default_factory=dict)  # forward calls by engine, prefill chunks included
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    prefill_ms: float = 0.0  # all engines that decoded
    draft_ms: dict[str, float] = field(default_factory=dict)  # each level without the ones below it
    verify_ms: float = 0.0  # the target's forward calls
    sampling_ms: float = 0.0  # laws, acceptance and choice at the target
    adapt_ms: float = 0.0  # drafters that learn by reading again what was decoded

    @property
    def accepted(self) -> int:
        """Draft tokens that the target accepted."""
        return self.drafts[-1].accepted if self.drafts else 0

    @property
    def drafted(self) -> int:
        """Draft tokens that the target verified."""
        return self.drafts[-1].drafted if self.drafts else 0

    @property
    def draft_acceptance_rate(self) -> float | None:
        return self.drafts[-1].acceptance_rate if self.drafts else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """1 + accepted / steps: tokens for each target call, the bonus or correction included."""
        return 1 + self.accepted / self.steps if self.steps else None

    @property
    def bookkeeping_ms(self) -> float:
        """What is left of the total: text, stop strings, the loop itself."""
        drafting = sum(self.draft_ms.values()) + self.adapt_ms
        return self.total_ms - self.prefill_ms - drafting - self.verify_ms - self.sampling_ms

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of an output token after the first."""
        return (self.total_ms - self.ttft_ms) / (self.emitted - 1) if self.emitted > 1 else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.emitted / self.total_ms * 1e3 if self.total_ms else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "emitted": self.emitted,
            "discarded": self.discarded,
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "levels": {draft.name: draft.to_dict() for draft in self.drafts},
            "calls": self.calls,
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "total_ms": self.total_ms,
            "tokens_per_second": self.tokens_per_second,
            "ms": {
                "prefill": self.prefill_ms,
                "draft": self.draft_ms,
                "verify": self.verify_ms,
                "sampling": self.sampling_ms,
                **({"adapt": self.adapt_ms} if self.adapt_ms else {}),
                "bookkeeping": self.bookkeeping_ms,
            },
        }
