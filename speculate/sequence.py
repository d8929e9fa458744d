"""The token sequence that all levels of a ladder write to."""

from dataclasses import dataclass, field

import numpy as np

from .engine import Ids


@dataclass
class Sequence:
    """Tokens 0..committed are decided; levels write their proposals right behind them, over one another's.

    Sharing one array is what makes nesting cheap: an accepted draft is already where it belongs, and a
    verdict is one token written at the place of the first rejected one.
    """

    ids: Ids  # int32 [capacity]
    committed: int
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)  # empty where the end of text is ignored

    @classmethod
    def begin(
        cls, prompt: list[int], capacity: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> "Sequence":
        ids = np.zeros(capacity, np.int32)
        ids[: len(prompt)] = prompt
        return cls(ids, len(prompt), eos_token_ids)

    def cut_at_eos(self, start: int, count: int) -> int:
        """How many of the `count` tokens from `start` remain if nothing may follow an end-of-text token."""
        if self.eos_token_ids:
            for i, token in enumerate(self.ids[start : start + count].tolist()):
                if token in self.eos_token_ids:
                    return i + 1
        return count
