"""Drafters that are no models (`native/drafter.h`), by the names that a ladder calls them.

They propose from text that they have seen. A draft is chosen, not sampled; the loop verifies it as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .binding import check, ffi, lib
from .datastore import Datastore
from .errors import BundleError

# Each may only be the first level of a ladder.
DRAFTERS = {
    "suffix": "what followed the last time that prompt, output or references ended this way",
    "llma": "the same where there are references, and an error where there are none (arXiv 2304.04487)",
    "recycling": "what the level above last found likely after each token (arXiv 2408.08696)",
    "rest": "what most places of a datastore say that go on as the text does (arXiv 2311.08252)",
}


class Drafter:
    """A `ds_drafter` of the native library. One generation at a time; closed when it is forgotten."""

    def __init__(self, handle: Any, reads: Any = None) -> None:
        if handle == ffi.NULL:
            check(lib.DS_ERROR_ARGUMENT)
        self.handle = ffi.gc(handle, lib.ds_drafter_close)
        self._reads = reads  # lent to the drafter, so it is kept alive


@dataclass(frozen=True)
class Sources:
    """What drafters may read besides the generation's own text."""

    references: Sequence[Sequence[int]] = ()  # token ids of texts that the output may quote
    datastore: Datastore | None = None

    def open(self, name: str, vocab_size: int) -> Drafter:
        """The drafter of a ladder's level. vocab_size: the target's."""
        if name == "recycling":
            return Drafter(lib.ds_recycling_drafter_create(vocab_size))
        if name == "rest" and self.datastore:
            return Drafter(lib.ds_datastore_drafter_create(self.datastore.handle), self.datastore)
        tokens = list(chain.from_iterable((*text, lib.DS_END_OF_REFERENCE) for text in self.references))
        return Drafter(lib.ds_suffix_drafter_create(ffi.new("int32_t[]", tokens), len(tokens)))

    def check(self, names: Sequence[str]) -> None:
        """Refuse what the drafters of a ladder lack, and what none of them would read."""
        if "llma" in names and not self.references:
            raise BundleError(
                f"ladder {list(names)}: llma drafts from references and there are none: pass references=[...]"
            )
        if "rest" in names and not self.datastore:
            raise BundleError(
                f"ladder {list(names)}: rest drafts from a datastore and none is open: give the datastore "
                "that `draftsmith datastore` wrote when the bundle is loaded"
            )
        if self.references and not {"suffix", "llma"} & set(names):
            raise BundleError(
                f"references are given, but no level of the ladder {list(names)} reads them: "
                'begin it with "llma" or "suffix"'
            )
