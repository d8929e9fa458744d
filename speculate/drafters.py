"""Drafters that are no models (`native/drafter.h`), by the names that a ladder calls them.

They propose from text that they have seen. A draft is chosen, not sampled; the loop verifies it as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binding import check, ffi, lib, view
from .datastore import Datastore
from .errors import BundleError

SUFFIX = "suffix"
TREE = "-tree"  # behind the name of a drafter that is to propose trees
MERGE = "+"  # between the names of drafters whose proposals are merged into one tree

# Each may only be the first level of a ladder.
DRAFTERS = {
    SUFFIX: "what followed the last time that prompt, output or references ended this way",
    "llma": "the same where there are references, and an error where there are none (arXiv 2304.04487)",
    "recycling": "what the level above last found likely after each token (arXiv 2408.08696)",
    "rest": "what most places of a datastore say that go on as the text does (arXiv 2311.08252)",
}


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

    def observe(self, tokens: Sequence[int], logits: NDArray[np.float32]) -> None:
        """float32 logits [S, V] of the level above after tokens [S], of which some may have been rejected."""
        if self.handle.observe != ffi.NULL:
            rows, ids = view("float[]", np.ascontiguousarray(logits)), ffi.new("int32_t[]", tokens)
            check(self.handle.observe(self.handle, ids, len(tokens), rows, logits.shape[1]))

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


def list_members(name: str) -> list[str]:
    """The drafters behind a level of a ladder: of "suffix+recycling" both, of "suffix-tree" that one."""
    return name.split(MERGE) if MERGE in name else [name.removesuffix(TREE)]


def is_drafter(name: str) -> bool:
    """Whether a level of a ladder is no model."""
    return all(member in DRAFTERS for member in list_members(name))


def wants_tree(name: str) -> bool:
    return MERGE in name or name.endswith(TREE)


@dataclass(frozen=True)
class Sources:
    """What drafters may read besides the generation's own text."""

    references: Sequence[Sequence[int]] = ()  # token ids of texts that the output may quote
    datastore: Datastore | None = None

    def open(self, name: str, vocab_size: int) -> Drafter:
        """The drafter of a ladder's level, or several as one. vocab_size: the target's."""
        members = [self._open_one(member, vocab_size) for member in list_members(name)]
        if MERGE not in name:
            if wants_tree(name) and not members[0].proposes_trees:
                raise BundleError(f"{name}: {name.removesuffix(TREE)} proposes chains only: name it so")
            return members[0]
        handles = ffi.new("ds_drafter *[]", [member.handle for member in members])
        return Drafter(lib.ds_merged_drafter_create(handles, len(members)), members)

    def _open_one(self, name: str, vocab_size: int) -> Drafter:
        if name == "recycling":
            return Drafter(lib.ds_recycling_drafter_create(vocab_size))
        if name == "rest" and self.datastore:
            return Drafter(lib.ds_datastore_drafter_create(self.datastore.handle), self.datastore)
        tokens = list(chain.from_iterable((*text, lib.DS_END_OF_REFERENCE) for text in self.references))
        return Drafter(lib.ds_suffix_drafter_create(ffi.new("int32_t[]", tokens), len(tokens)))

    def check(self, ladder: Sequence[str]) -> None:
        """Refuse what the drafters of a ladder lack, and what none of them would read."""
        names = [member for name in ladder for member in list_members(name)]
        if "llma" in names and not self.references:
            raise BundleError(
                f"ladder {list(ladder)}: llma drafts from references and there are none: "
                "pass references=[...]"
            )
        if "rest" in names and not self.datastore:
            raise BundleError(
                f"ladder {list(ladder)}: rest drafts from a datastore and none is open: give the datastore "
                "that `draftsmith datastore` wrote when the bundle is loaded"
            )
        if self.references and not {SUFFIX, "llma"} & set(names):
            raise BundleError(
                f"references are given, but no level of the ladder {list(ladder)} reads them: "
                'begin it with "llma" or "suffix"'
            )
