"""Lossless verification of drafts: the accepted tokens and the next one are distributed as the target's own.

The rules are native (`native/verify.h`) and shared by every backend; these are their checked Python faces.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .binding import check, ffi, lib, view
from .errors import BundleError

Rule = Literal["token", "block", "exact"]

RULES: dict[str, int] = {"token": lib.DS_RULE_TOKEN, "block": lib.DS_RULE_BLOCK, "exact": lib.DS_RULE_EXACT}

# How far a row may sum from 1 and still be taken for a law that was rounded, by bytes a number. A float32
# softmax over a large vocabulary is off by some 1e-5; a row truncated or never normalized by far more.
TOLERANCE = {4: 1e-4, 8: 1e-6}


def chain(
    rule: Rule, p: ArrayLike, q: ArrayLike | None, draft: Sequence[int] | NDArray, uniforms: ArrayLike
) -> tuple[int, int]:
    """Verify a drafted chain of K >= 0 tokens; return (number of drafted tokens accepted, next token).

    rule      "token": each token on its own (Leviathan et al., arXiv 2211.17192, algorithm 1);
              "block": the draft as a whole (Sun et al., arXiv 2403.10444, algorithm 2), accepts no less;
              "exact": sample the target and accept while the draft says the same, any draft whatever.
    p         [K+1, V] float32 or float64: the target's laws; row i is that of the token after draft[:i]
    q         [K, V]: the laws that the draft was sampled from, or None for a draft that was not sampled
    draft     [K] token ids
    uniforms  [K+2] in [0, 1): [i] decides draft[i] (for "exact" it samples node i), [K] draws the token
              after a draft that was accepted whole, [K+1] the one that replaces a rejected token.

    p and q are the laws after all processing (temperature, top-k, top-p); q is what was really sampled from.
    Rows are divided by their sums. Raises BundleError, saying what is wrong, if anything is not as above.
    """
    if rule not in RULES:
        raise BundleError(f"verify rule {rule!r} is not one of {', '.join(RULES)}")
    tokens = _read_draft(draft)
    target = _read_laws("p", p, len(tokens) + 1)
    drafter = None
    if q is not None:
        drafter = _read_laws("q", q, len(tokens), vocab=target.shape[1])
    numbers = np.ascontiguousarray(_read_array("uniforms", uniforms, np.float64))
    if numbers.shape != (len(tokens) + 2,):
        raise BundleError(f"uniforms have shape {numbers.shape}; [{len(tokens) + 2}] is wanted (K + 2)")
    return chain_of_laws(rule, target, drafter, tokens, numbers)


def chain_of_laws(
    rule: Rule,
    p: NDArray[np.float64],
    q: NDArray[np.float64] | None,
    draft: NDArray[np.int32],
    uniforms: NDArray,
) -> tuple[int, int]:
    """`chain` without its copies: C-contiguous arrays of the right dtype and shape, rows that are laws.

    `sampling.laws` makes such rows. Nothing is copied; token ids and uniforms are checked, rows are not.
    """
    n_accepted, next_token = ffi.new("int32_t *"), ffi.new("int32_t *")
    status = lib.ds_verify_chain(
        RULES[rule],
        len(draft),
        p.shape[1],
        view("double[]", p),
        ffi.NULL if q is None else view("double[]", q),
        view("int32_t[]", draft),
        view("double[]", uniforms),
        n_accepted,
        next_token,
    )
    check(status)
    return n_accepted[0], next_token[0]


def greedy(logits: ArrayLike, draft: Sequence[int] | NDArray) -> tuple[int, int]:
    """Verify a chain of K tokens at temperature 0 from the target's logits, float32 [K+1, V].

    Accepts while draft[i] is the first argmax of row i; returns (number accepted, next token). Raises
    BundleError for NaN, shapes that do not fit and ids outside the vocabulary.
    """
    tokens = _read_draft(draft)
    rows = np.ascontiguousarray(_read_array("logits", logits, np.float32))
    if rows.ndim != 2 or len(rows) != len(tokens) + 1 or rows.shape[1] == 0:
        raise BundleError(f"logits have shape {rows.shape}; [{len(tokens) + 1}, V] is wanted (K + 1 rows)")
    n_accepted, next_token = ffi.new("int32_t *"), ffi.new("int32_t *")
    status = lib.ds_verify_greedy(
        len(tokens), rows.shape[1], view("float[]", rows), view("int32_t[]", tokens), n_accepted, next_token
    )
    check(status, "logits")
    return n_accepted[0], next_token[0]


def _read_array(name: str, values: ArrayLike, dtype: type | None = None) -> NDArray:
    try:
        return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{name} cannot be read as an array of numbers: {error}") from error


def _read_draft(draft: Sequence[int] | NDArray) -> NDArray[np.int32]:
    """Token ids as int32. What int32 cannot hold is refused here, what the vocabulary does not in C."""
    tokens = _read_array("draft", draft)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise BundleError(f"draft is {tokens.dtype} {list(tokens.shape)}; a flat list of token ids is wanted")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(np.int32).max:
        raise BundleError(f"draft holds ids from {tokens.min()} to {tokens.max()}, which no vocabulary has")
    return np.ascontiguousarray(tokens, dtype=np.int32)


def _read_laws(name: str, laws: ArrayLike, n_rows: int, vocab: int | None = None) -> NDArray[np.float64]:
    """A private float64 copy of laws [n_rows, V], checked and normalized."""
    given = _read_array(name, laws)
    if given.dtype.kind != "f" or given.itemsize not in TOLERANCE:
        raise BundleError(f"{name} is {given.dtype}; float32 or float64 is wanted")
    if given.ndim != 2 or len(given) != n_rows or given.shape[1] != (vocab or given.shape[1] or 1):
        wanted = f"[{n_rows}, {vocab or 'V'}]"
        raise BundleError(f"{name} has shape {list(given.shape)}; {wanted} is wanted for this draft")
    rows = np.array(given, dtype=np.float64, order="C")
    status = lib.ds_normalize_laws(n_rows, rows.shape[1], TOLERANCE[given.itemsize], view("double[]", rows))
    check(status, name)
    return rows
