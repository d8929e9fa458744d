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

TreeRule = Literal["rrs", "traversal", "specinfer", "exact"]

RULES: dict[str, int] = {"token": lib.DS_RULE_TOKEN, "block": lib.DS_RULE_BLOCK, "exact": lib.DS_RULE_EXACT}
TREE_RULES: dict[str, int] = {
    "rrs": lib.DS_RULE_RRS,
    "traversal": lib.DS_RULE_TRAVERSAL,
    "specinfer": lib.DS_RULE_SPECINFER,
    "exact": lib.DS_RULE_EXACT,
}

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
    tokens = _read_tokens("draft", draft)
    target = _read_laws("p", p, len(tokens) + 1)
    drafter = None
    if q is not None:
        drafter = _read_laws("q", q, len(tokens), vocab=target.shape[1])
    return chain_of_laws(rule, target, drafter, tokens, _read_uniforms(uniforms, len(tokens), "K", 2))


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
    tokens = _read_tokens("draft", draft)
    rows = np.ascontiguousarray(_read_array("logits", logits, np.float32))
    if rows.ndim != 2 or len(rows) != len(tokens) + 1 or rows.shape[1] == 0:
        raise BundleError(f"logits have shape {rows.shape}; [{len(tokens) + 1}, V] is wanted (K + 1 rows)")
    n_accepted, next_token = ffi.new("int32_t *"), ffi.new("int32_t *")
    status = lib.ds_verify_greedy(
        len(tokens), rows.shape[1], view("float[]", rows), view("int32_t[]", tokens), n_accepted, next_token
    )
    check(status, "logits")
    return n_accepted[0], next_token[0]


def tree(
    rule: TreeRule,
    p: ArrayLike,
    q: ArrayLike | None,
    tokens: Sequence[int] | NDArray,
    parents: Sequence[int] | NDArray,
    uniforms: ArrayLike,
) -> tuple[list[int], int]:
    """Verify a drafted tree of n >= 0 nodes; return (the accepted nodes, next token).

    The accepted nodes are a path from below the root down: indices into `tokens`, possibly none.

    rule      which also says how siblings must have been drawn from their law in q, in the order of `tokens`:
              "rrs": without replacement; one after the other (Sequoia, arXiv 2402.12374);
              "traversal": without replacement; the tree as a whole, from its leaves up (arXiv
              2505.12398), accepts no less than "rrs" on average;
              "specinfer": independently, equal siblings included (SpecInfer, arXiv 2305.09781);
              "exact": in any way; samples the target and follows the child that says the same.
              "rrs" and "traversal" take independent draws too: a sibling that repeats a token is passed over.
    p         [n+1, V] float32 or float64: the target's laws; row 0 at the root, the text so far, row i + 1
              after tokens[i]
    q         [n+1, V]: row 0 the law that the root's children were drawn from, row i + 1 for those of node i
              (of nodes without children not read); or None for a tree that was chosen, not sampled. A child
              that has no mass in its row counts as chosen.
    tokens    [n] token ids of the drafted nodes, without the root
    parents   [n] each node's parent: its index in `tokens`, -1 for the root. Or as rows of p, one more: 0 is
              the root and parents[0] then is 0. Parents come before their children.
    uniforms  [n+2] in [0, 1), each with one use: [i] decides node i (for "exact": [i] samples row i, i <= n),
              [n] draws the token after a node without children, [n+1] after one whose children are rejected

    On a chain "rrs" and "specinfer" are the rule "token" of `chain`, "traversal" is "block". Otherwise as
    `chain`, errors included.
    """
    if rule not in TREE_RULES:
        raise BundleError(f"verify rule {rule!r} is not one of {', '.join(TREE_RULES)}, the rules for trees")
    nodes = _read_tokens("tokens", tokens)
    elders = _read_parents(parents, len(nodes))
    target = _read_laws("p", p, len(nodes) + 1)
    drafter = None
    if q is not None:
        used = np.isin(np.arange(len(nodes) + 1), elders + 1)
        drafter = _read_laws("q", q, len(nodes) + 1, target.shape[1], used)
    return tree_of_laws(rule, target, drafter, nodes, elders, _read_uniforms(uniforms, len(nodes), "n", 2))


def tree_of_laws(
    rule: TreeRule,
    p: NDArray[np.float64],
    q: NDArray[np.float64] | None,
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    uniforms: NDArray,
) -> tuple[list[int], int]:
    """`tree` without its copies, as `chain_of_laws`; a parent is -1 for the root."""
    accepted, out = np.empty(len(tokens), np.int32), ffi.new("int32_t[2]")
    status = lib.ds_verify_tree(
        TREE_RULES[rule],
        len(tokens),
        p.shape[1],
        view("double[]", p),
        ffi.NULL if q is None else view("double[]", q),
        view("int32_t[]", tokens),
        view("int32_t[]", parents),
        view("double[]", uniforms),
        view("int32_t[]", accepted),
        out,
        out + 1,
    )
    check(status)
    return accepted[: out[0]].tolist(), out[1]


def kseq(p: ArrayLike, q: ArrayLike, drafts: Sequence[int] | NDArray, uniforms: ArrayLike) -> tuple[int, int]:
    """Verify K >= 1 drafts of one token by K-SEQ; return (token, index of the draft that it is or -1).

    The drafts are independent draws from q. rho is the smallest that is valid for p, q and K (Sun et al.,
    SpecTr, arXiv 2310.15141), so a draft is accepted at least 1 - 1/e times as often as by the
    best rule that there is.

    p, q      [V] float32 or float64: the laws of target and drafter
    drafts    [K] token ids
    uniforms  [K+1] in [0, 1): [i] decides drafts[i], [K] draws the token that replaces them all.

    Raises BundleError as `chain` does.
    """
    tokens = _read_tokens("drafts", drafts)
    target = _read_laws("p", _read_array("p", p)[np.newaxis], 1)
    drafter = _read_laws("q", _read_array("q", q)[np.newaxis], 1, target.shape[1])
    numbers = _read_uniforms(uniforms, len(tokens), "K", 1)
    out = ffi.new("int32_t[2]")
    status = lib.ds_verify_kseq(
        len(tokens),
        target.shape[1],
        view("double[]", target),
        view("double[]", drafter),
        view("int32_t[]", tokens),
        view("double[]", numbers),
        out,
        out + 1,
    )
    check(status)
    return out[1], out[0]


def _read_array(name: str, values: ArrayLike, dtype: type | None = None) -> NDArray:
    try:
        return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{name} cannot be read as an array of numbers: {error}") from error


def _read_uniforms(uniforms: ArrayLike, n: int, count: str, more: int) -> NDArray[np.float64]:
    numbers = np.ascontiguousarray(_read_array("uniforms", uniforms, np.float64))
    if numbers.shape != (n + more,):
        raise BundleError(f"uniforms have shape {numbers.shape}; [{n + more}] is wanted ({count} + {more})")
    return numbers


def _read_integers(name: str, values: Sequence[int] | NDArray, wanted: str) -> NDArray:
    integers = _read_array(name, values)
    if integers.ndim != 1 or (integers.size and integers.dtype.kind not in "iu"):
        raise BundleError(
            f"{name} is {integers.dtype} {list(integers.shape)}; a flat list of {wanted} is wanted"
        )
    return integers


def _read_tokens(name: str, values: Sequence[int] | NDArray) -> NDArray[np.int32]:
    """Token ids as int32. What int32 cannot hold is refused here, what the vocabulary does not in C."""
    tokens = _read_integers(name, values, "token ids")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(np.int32).max:
        raise BundleError(f"{name} holds ids from {tokens.min()} to {tokens.max()}, which no vocabulary has")
    return np.ascontiguousarray(tokens, dtype=np.int32)


def _read_parents(parents: Sequence[int] | NDArray, n: int) -> NDArray[np.int32]:
    """Indices of nodes, -1 for the root: the first node's parent, whose name tells which numbers are used."""
    given = _read_integers("parents", parents, "node indices")
    if given.shape != (n,):
        raise BundleError(f"{len(given)} parents for {n} tokens; one for each drafted node is wanted")
    if n and given[0] not in (-1, 0):
        raise BundleError(f"parents[0] is {given[0]}; the first node's parent is the root: -1, or row 0 of p")
    named = given.astype(np.int64) - (1 if n and given[0] == 0 else 0)
    early = np.flatnonzero((named < -1) | (named >= np.arange(n)))
    if early.size:
        i = int(early[0])
        raise BundleError(
            f"parents[{i}] is {given[i]}; a node before it is wanted, or {given[0]} for the root"
        )
    return np.ascontiguousarray(named, dtype=np.int32)


def _read_laws(
    name: str, laws: ArrayLike, n_rows: int, vocab: int | None = None, used: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """A private float64 copy of laws [n_rows, V], checked and normalized; rows that are not `used` may be
    anything."""
    given = _read_array(name, laws)
    if given.dtype.kind != "f" or given.itemsize not in TOLERANCE:
        raise BundleError(f"{name} is {given.dtype}; float32 or float64 is wanted")
    if given.ndim != 2 or len(given) != n_rows or given.shape[1] != (vocab or given.shape[1] or 1):
        wanted = f"[{n_rows}, {vocab or 'V'}]"
        raise BundleError(f"{name} has shape {list(given.shape)}; {wanted} is wanted for this draft")
    rows = np.array(given, dtype=np.float64, order="C")
    if used is not None:
        rows[~used] = 1 / rows.shape[1]
    status = lib.ds_normalize_laws(n_rows, rows.shape[1], TOLERANCE[given.itemsize], view("double[]", rows))
    check(status, name)
    return rows
