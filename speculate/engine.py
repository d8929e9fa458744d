"""What the decode loop needs of a model: one method that reads tokens into cache slots and returns their
logits."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError

Ids = NDArray[np.int32]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Decision:
    """A verdict to be given on a device (`ds_decision` in native/engine.h)."""

    temperature: float
    top_k: int
    top_p: float
    rule: int
    seed: int
    stream: int
    counter: int
    draft: Ids
    drafter: "DeviceEngine | None"
    row: int


class Engine(Protocol):
    """A causal model with a static key-value cache.

    Slot i of the cache belongs to token i of the sequence, or to a node of a tree behind it. Nothing is ever
    erased: a call that starts at a smaller slot overwrites what a rejected draft left there, and no token
    sees a slot behind its own.
    """

    vocab_size: int
    max_seq_len: int  # slots that `reserve` can give at most
    calls: int  # forward calls since the engine was opened
    rows: int  # tokens read by them

    def reserve(self, num_slots: int) -> None:
        """Make room for a sequence of `num_slots` tokens; what the cache held before may be lost."""
        ...

    def forward(
        self,
        token_ids: Ids,
        start: int,
        position_ids: NDArray[np.int64] | None = None,
        mask: NDArray[np.bool_] | None = None,
        num_logits: int | None = None,
    ) -> Logits:
        """Read `token_ids` [S] into slots start..start+S; float32 logits [S, V] of the token after each, or
        [num_logits, V] of those after the last ones.

        position_ids: int64 [S], the depth of each token in the sequence; by default its slot.
        mask: bool [S, start + S], which slots each token sees; by default every slot up to its own.
        num_logits: give those of the last so many tokens only; by default of all. 0 leaves them on the device
        of an engine that has one.
        The result may be a view of a buffer that the next call overwrites.
        """
        ...


@runtime_checkable
class MovingEngine(Engine, Protocol):
    """An engine that can move what its cache holds. Others read the path of a tree that stands again."""

    def keep(self, start: int, slots: Ids) -> None:
        """Slot start + i takes what slots[i] holds, for slots that rise from `start`."""
        ...


@runtime_checkable
class GuestEngine(Engine, Protocol):
    """An engine in the cache of another, its host: what one of them writes the other reads. It writes only
    slots behind those that stand, which its host writes itself before it reads them."""

    cache_host: Engine


@runtime_checkable
class AdaptingEngine(Engine, Protocol):
    """A drafter that learns from what was decoded."""

    num_scratch: int  # slots behind a sequence that `adapt` may write

    def adapt(self, token_ids: Ids, num_decoded: int) -> int:
        """Between rounds: `token_ids` stand, the last `num_decoded` of them decoded, and the cache holds all
        but the last. What is drafted in later rounds may depend on it. Returns how many rows were read."""
        ...


@runtime_checkable
class LearningEngine(Engine, Protocol):
    """An engine that can be told to draft as if it were new."""

    def forget(self) -> None: ...


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine whose logits can stay on its device."""

    def decide(self, decision: Decision) -> tuple[int, int]:
        """The verdict on the logits after the last tokens of the last call, one more than were drafted: how
        many of those are accepted, and the token that follows them."""
        ...


def check_room(name: str, num_slots: int, max_seq_len: int, remedy: str) -> None:
    """Raises BundleError where a sequence is longer than an engine's cache can be."""
    if num_slots > max_seq_len:
        raise BundleError(
            f"{name} has a cache of {max_seq_len} tokens, {num_slots} are wanted: "
            f"shorten the text or {remedy}"
        )
