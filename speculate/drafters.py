"""Drafters that are no models (`native/drafter.h`), by the names that a ladder calls them (`levels.py`).

They propose from text that they have seen. A draft is chosen, not sampled; the loop verifies it as such.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binding import check, ffi, lib, view
from .datastore import Datastore
from .errors import BundleError
from .levels import SUFFIX, check_parts, split_level
from .ngrams import Ngrams

HISTORY_BYTES = 64 << 20  # for earlier outputs


class Drafter:
    """A `ds_drafter` of the native library. One generation at a time; closed when it is forgotten.

    A decoder calls the handle by itself; the methods are for who would try a drafter without one.
    """

    def __init__(self, handle: Any, reads: Any = None) -> None:
        if handle == ffi.NULL:
            check(lib.DS_ERROR_ARGUMENT)
        self.handle = ffi.gc(handle, lib.ds_drafter_close)
        self._reads = reads  # lent to the drafter, so it is kept alive
        self.proposes_trees = self.handle.draft_tree != ffi.NULL

    def begin(self, num_tokens: int) -> None:
        """Forget all tokens; at most so many will come."""
        check(self.handle.begin(self.handle, num_tokens))

    def append(self, tokens: Sequence[int]) -> None:
        """Tokens that stand, behind those before."""
        check(self.handle.append(self.handle, ffi.new("int32_t[]", tokens), len(tokens)))

    def observe(
        self,
        tokens: Sequence[int],
        logits: NDArray[np.float32],
        parents: Sequence[int] | None = None,
        peaks: NDArray[np.float32] | None = None,
    ) -> None:
        """float32 logits [S, V] of the level above after tokens [S], of which some may have been rejected.
        parents [S - 1]: `tokens[1 + i]` follows `tokens[1 + parents[i]]`; None: the one before.
        peaks [S, ceil(V / DS_PEAK_WIDTH)]: of the logits (draftsmith.h)."""
        if self.handle.observe != ffi.NULL:
            rows, ids = view("float[]", np.ascontiguousarray(logits)), ffi.new("int32_t[]", tokens)
            behind = ffi.new("int32_t[]", list(range(-1, len(tokens) - 2) if parents is None else parents))
            num_peaks = -(-logits.shape[1] // lib.DS_PEAK_WIDTH)
            assert peaks is None or peaks.shape == (len(tokens), num_peaks)
            known = ffi.NULL if peaks is None else view("float[]", np.ascontiguousarray(peaks, np.float32))
            check(self.handle.observe(self.handle, ids, behind, len(tokens), rows, known, logits.shape[1]))

    def draft(self, tail: Sequence[int], max_draft: int) -> tuple[list[int], list[int]]:
        """(tokens to follow the appended ones and `tail`, on how many tokens of text each of them rests)."""
        tokens, support = ffi.new("int32_t[]", max_draft), ffi.new("int32_t[]", max_draft)
        pending = ffi.new("int32_t[]", tail)
        count = check(self.handle.draft(self.handle, pending, len(tail), max_draft, tokens, support))
        return ffi.unpack(tokens, count), ffi.unpack(support, count)

    def draft_tree(
        self, tail: Sequence[int], max_nodes: int, max_depth: int
    ) -> tuple[list[int], list[int], list[float]]:
        """(tokens of a tree, the node that each follows or -1, how likely each is right if that is), the
        nodes in the order in which they are worth a row; of a drafter that `proposes_trees`."""
        tokens, parents = ffi.new("int32_t[]", max_nodes), ffi.new("int32_t[]", max_nodes)
        chances, pending = ffi.new("double[]", max_nodes), ffi.new("int32_t[]", tail)
        count = check(
            self.handle.draft_tree(
                self.handle, pending, len(tail), max_nodes, max_depth, tokens, parents, chances
            )
        )
        return ffi.unpack(tokens, count), ffi.unpack(parents, count), ffi.unpack(chances, count)


@dataclass(frozen=True)
class Sources:
    """What drafters may read besides the generation's own text."""

    references: Sequence[Sequence[int]] = ()  # token ids of texts that the output may quote
    datastore: Datastore | None = None
    ngrams: Ngrams | None = None
    lasting: dict[str, Drafter] = field(default_factory=dict)  # those that learn from earlier generations
    history_bytes: int = HISTORY_BYTES

    def open(self, name: str, vocab_size: int) -> Drafter:
        """The drafter of a ladder's level, or several as one. vocab_size: the target's."""
        check_parts(name)
        parts = [self.open_one(part, vocab_size) for part in split_level(name)]
        if len(parts) == 1:
            return parts[0]
        handles = ffi.new("ds_drafter *[]", [part.handle for part in parts])
        return Drafter(lib.ds_hybrid_drafter_create(handles, len(parts)), parts)

    def open_one(self, name: str, vocab_size: int) -> Drafter:
        if name == "recycling":
            return Drafter(lib.ds_recycling_drafter_create(vocab_size))
        if name == "lookahead":
            return Drafter(lib.ds_lookahead_drafter_create(vocab_size))
        if name == "rest" and self.datastore:
            return Drafter(lib.ds_datastore_drafter_create(self.datastore.handle), self.datastore)
        if name == "bigram" and self.ngrams:
            return Drafter(lib.ds_bigram_drafter_create(self.ngrams.handle), self.ngrams)
        if name == "history":
            if name not in self.lasting:
                self.lasting[name] = Drafter(lib.ds_history_drafter_create(self.history_bytes))
            return self.lasting[name]
        if name not in (SUFFIX, "llma"):
            raise BundleError(f"{name} has nothing to draft from")
        tokens = list(chain.from_iterable((*text, lib.DS_END_OF_REFERENCE) for text in self.references))
        return Drafter(lib.ds_suffix_drafter_create(ffi.new("int32_t[]", tokens), len(tokens)))

    def check(self, names: Iterable[str]) -> None:
        """Refuse what the drafters of a ladder lack, and what none of them would read."""
        names = list(names)
        parts = {part for name in names for part in split_level(name)}
        if "llma" in parts and not self.references:
            raise BundleError(
                f"ladder {names}: llma drafts from references and there are none: pass "
                "references=[...] (--reference FILE)"
            )
        if "rest" in parts and not self.datastore:
            raise BundleError(
                f"ladder {names}: rest drafts from a datastore and none is open: load the bundle with "
                "datastore=FILE (--datastore FILE), which `draftsmith datastore` writes"
            )
        if "bigram" in parts and not self.ngrams:
            raise BundleError(
                f"ladder {names}: bigram drafts from a table of the target's bigrams and this bundle has "
                "none: build it with speculate.bigram=true"
            )
        if self.references and not {SUFFIX, "llma"} & parts:
            raise BundleError(
                f"references are given, but no level of the ladder {names} reads them: "
                'begin it with "llma" or "suffix"'
            )
