"""How the next token is chosen from logits, checked once before anything is computed."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from .errors import BundleError
from .verify import RULES, Rule


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k (0: off), then top-p (1: off), as in transformers; temperature 0 is greedy.

    `rule` says how a sampled draft is verified; all three give exactly the target's distribution:
    "token"  accepts each draft token by its own ratio p/q (Leviathan et al., 2211.17192);
    "block"  accepts the longest prefix jointly, never fewer tokens in expectation (Sun et al., 2403.10444);
    "exact"  draws the target's token and keeps the draft while it guessed right. The draw at each position
    depends on
             the seed alone, so the output is, token for token, that of plain sampling.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    rule: Rule = "block"

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not (0 <= self.temperature < math.inf):
            raise BundleError(f"temperature={self.temperature!r}: wanted 0 (greedy) or a positive number")
        if not _is_count(self.top_k):
            raise BundleError(f"top_k={self.top_k!r}: wanted a whole number of tokens to keep, or 0 for all")
        if not _is_number(self.top_p) or not (0 < self.top_p <= 1):
            raise BundleError(
                f"top_p={self.top_p!r}: wanted a number above 0 and at most 1; 1 keeps all tokens"
            )
        if not _is_count(self.seed) or self.seed >= 2**64:
            raise BundleError(f"seed={self.seed!r}: wanted a whole number from 0 to 2**64 - 1")
        if self.rule not in RULES:
            raise BundleError(f"verify={self.rule!r}: wanted one of {', '.join(RULES)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
