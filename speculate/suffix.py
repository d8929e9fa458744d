"""Drafting from the text itself: what followed the last time that the text ended this way. No model needed.

Prompt lookup (Saxena 2023) over prompt and output alike. The longest match and its most recent occurrence are
found by a suffix automaton (`native/suffix.c`), as in SAM-Decoding (arXiv 2411.10666).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .binding import check, ffi, lib, view
from .errors import BundleError


class SuffixDrafter:
    """Proposes the continuation of the longest recent match. A draft is not sampled: verify it with q=None.

    prompt_lookup_min  the fewest tokens that must match for a draft
    prompt_lookup_max  the most that are compared, at most 64
    match_length       how many matched for the last draft, 0 for none: how far to trust it
    """

    def __init__(self, prompt_lookup_min: int = 2, prompt_lookup_max: int = 32) -> None:
        if not 1 <= prompt_lookup_min <= prompt_lookup_max <= lib.DS_SUFFIX_MAX_MATCH:
            raise BundleError(
                f"prompt_lookup_min {prompt_lookup_min} and prompt_lookup_max {prompt_lookup_max} are not "
                f"within 1 <= min <= max <= {lib.DS_SUFFIX_MAX_MATCH}"
            )
        self.prompt_lookup_min = prompt_lookup_min
        self.prompt_lookup_max = prompt_lookup_max
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        handle = lib.ds_suffix_create()
        if handle == ffi.NULL:
            check(lib.DS_ERROR_MEMORY)
        self._handle = ffi.gc(handle, lib.ds_suffix_free)
        self._num_tokens = 0
        self.match_length = 0

    def __len__(self) -> int:
        """How many tokens are committed."""
        return self._num_tokens

    def append(self, tokens: Sequence[int] | NDArray) -> None:
        """Commit tokens. They cannot be taken back; what may be rejected belongs into `draft`'s tail."""
        added = _read_tokens(tokens)
        check(lib.ds_suffix_append(self._handle, view("int32_t[]", added), len(added)))
        self._num_tokens += len(added)

    def draft(self, tail: Sequence[int] | NDArray, max_draft: int) -> list[int]:
        """Propose max_draft tokens to follow the committed ones plus `tail`, or none where nothing matches.

        The tail is text that is not committed yet, such as what an outer drafter has proposed so far.
        """
        if max_draft < 0:
            raise BundleError(f"max_draft is {max_draft}; a count is not negative")
        pending = _read_tokens(tail)
        drafted = np.empty(max_draft, dtype=np.int32)
        match_length = ffi.new("int32_t *")
        count = lib.ds_suffix_draft(
            self._handle,
            view("int32_t[]", pending),
            len(pending),
            self.prompt_lookup_min,
            self.prompt_lookup_max,
            max_draft,
            view("int32_t[]", drafted),
            match_length,
        )
        check(count)
        self.match_length = match_length[0]
        return drafted[:count].tolist()


def _read_tokens(tokens: Sequence[int] | NDArray) -> NDArray[np.int32]:
    values = np.asarray(tokens)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise BundleError(f"{values.dtype} {list(values.shape)} given; a flat list of token ids is wanted")
    if values.size and int(values.max()) > np.iinfo(np.int32).max:
        raise BundleError(f"token id {values.max()} is beyond any vocabulary")
    if values.size and int(values.min()) < 0:
        raise BundleError(f"token {int(values.argmin())} is {values.min()}, not a token id")
    return np.ascontiguousarray(values, dtype=np.int32)
