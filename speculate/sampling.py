"""From logits to laws, and the uniforms that sample them. Native (`native/sampling.c`, `native/random.c`)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .binding import check, lib, view
from .errors import BundleError


def laws(
    logits: ArrayLike, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> NDArray[np.float64]:
    """Turn logits [S, V], read as float32, into next-token laws, float64 [S, V].

    Temperature, then top-k, then top-p, in the order of Hugging Face's warpers and with their rules for ties.
    Temperature 0 is one-hot at the first largest logit. top_k 0 is off; what equals the k-th logit is kept.
    top_p 1 is off; the token that crosses top_p is kept. A logit of -inf has no mass. Raises BundleError for
    NaN, +inf, a row of nothing but -inf, and settings out of range.
    """
    try:
        rows = np.ascontiguousarray(logits, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise BundleError(f"logits cannot be read as an array of numbers: {error}") from error
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise BundleError(f"logits have shape {list(rows.shape)}; [S, V] is wanted")
    if not isinstance(top_k, int | np.integer) or top_k < 0:
        raise BundleError(f"top_k is {top_k!r}; a whole number is wanted, or 0 for off")
    out = np.empty(rows.shape, dtype=np.float64)
    status = lib.ds_laws_from_logits(
        view("float[]", rows),
        *rows.shape,
        temperature,
        min(int(top_k), rows.shape[1]),
        top_p,
        view("double[]", out),
    )
    check(status)
    return out


def uniforms(seed: int, stream: int, counter: int, n: int) -> NDArray[np.float64]:
    """Uniform numbers counter, …, counter + n - 1 of a stream, float64 [n] in [0, 1), multiples of 2^-53.

    Philox4x64-10 with the key (seed, stream): a pure function of its arguments, each taken modulo 2^64. They
    are the doubles that NumPy draws from its Philox with that key, if its counter starts one block before 0.
    """
    if n < 0:
        raise BundleError(f"{n} uniforms are wanted; a count is not negative")
    mask = 2**64 - 1
    out = np.empty(n, dtype=np.float64)
    lib.ds_uniforms(seed & mask, stream & mask, counter & mask, n, view("double[]", out))
    return out
