"""A model's own unigrams and bigrams: what it finds likely with nothing before, and after each single token.

N-Grammys (arXiv 2411.03786) drafts from such tables. They are read off the model, not counted in a text.
"""

from pathlib import Path
from struct import pack

import numpy as np
from numpy.typing import NDArray

from .binding import check, ffi, lib

MAGIC = b"DSNGRAM1"


class Ngrams:
    """A table opened for one model.

    vocab_size  of the target that it will draft for
    model       the SHA-256 in hex that it was written with
    Raises BundleError if the file is none, is cut short or damaged, or was read off another model.
    """

    def __init__(self, path: Path | str, vocab_size: int, model: str) -> None:
        handle = lib.ds_ngrams_open(str(path).encode(), vocab_size, bytes.fromhex(model))
        if handle == ffi.NULL:
            check(lib.DS_ERROR_ARGUMENT)
        self.path = Path(path)
        self.handle = ffi.gc(handle, lib.ds_ngrams_free)

    def next(self, token: int, room: int) -> tuple[list[int], list[float]]:
        """(what may follow a token, or with -1 nothing, the likeliest first; how likely each is)."""
        tokens, probabilities = ffi.new("int32_t[]", room), ffi.new("float[]", room)
        count = check(lib.ds_ngrams_next(self.handle, token, room, tokens, probabilities))
        return ffi.unpack(tokens, count), ffi.unpack(probabilities, count)


def write_table(
    path: Path, tokens: NDArray[np.int32], probabilities: NDArray[np.float32], model: str
) -> None:
    """Write what may follow as `native/ngrams.h` has it.

    tokens          int32 [V + 1, K], the likeliest first: row t after token t, row V with nothing before
    probabilities   float32 [V + 1, K]
    model           SHA-256 in hex of whose they are, which a reader must ask for
    """
    rows, width = tokens.shape
    with path.open("wb") as file:
        file.write(MAGIC + pack("=4I", 1, rows - 1, width, 0) + bytes.fromhex(model))
        file.write(tokens.astype(np.int32).tobytes())
        file.write(probabilities.astype(np.float32).tobytes())
