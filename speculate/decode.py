"""The outer loop: the target advances by what it accepts, until something ends the generation."""

from collections.abc import Iterator

from .level import EngineLevel
from .sequence import Sequence


def decode(sequence: Sequence, target: EngineLevel, max_new_tokens: int) -> Iterator[list[int]]:
    """Yield the new tokens of each round, at most `max_new_tokens` in all, up to an end-of-text token
    inclusive.

    The first round reads the prompt and drafts nothing, so the first token is not kept waiting for the
    drafters to read it too. Later rounds draft no more than the room left, so nothing is decoded past
    `max_new_tokens`.
    """
    left = max_new_tokens
    while left > 0:
        room = 1 if left == max_new_tokens else left
        start = sequence.committed
        count = target.advance(sequence, start, room)
        sequence.committed += count
        left -= count
        tokens = sequence.ids[start : start + count].tolist()
        yield tokens
        if tokens[-1] in sequence.eos_token_ids:
            return
