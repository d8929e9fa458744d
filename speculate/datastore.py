"""Datastores: much text on disk, indexed, to draft from (REST, arXiv 2311.08252; `native/datastore.h`)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from .binding import check, ffi, lib, view
from .errors import BundleError

NO_TOKENIZER = "00" * lib.DS_TOKENIZER_BYTES


class Datastore:
    """A datastore opened for one model. It stays on disk: opening reads its header only.

    vocab_size  of the model that it will draft for
    tokenizer   the SHA-256 of its tokenizer.json, in hex
    Raises BundleError if the file is none, is cut short, or was built with another tokenizer.
    """

    def __init__(self, path: Path | str, vocab_size: int, tokenizer: str = NO_TOKENIZER) -> None:
        handle = lib.ds_datastore_open(str(path).encode(), vocab_size, _read_hash(tokenizer))
        if handle == ffi.NULL:
            check(lib.DS_ERROR_ARGUMENT)
        self.path = Path(path)
        self.handle = ffi.gc(handle, lib.ds_datastore_free)

    def __len__(self) -> int:
        """Tokens, the ends of texts included."""
        return lib.ds_datastore_n_tokens(self.handle)

    def draft(self, context: Sequence[int] | NDArray, max_draft: int) -> tuple[list[int], list[int]]:
        """(tokens that may follow `context`, on how many tokens of text each rests).

        They are what most places say at which the longest end of the context, of 2 to 32 tokens, occurs.
        """
        tokens = np.ascontiguousarray(context, dtype=np.int32)
        draft, support = np.empty(max_draft, np.int32), np.empty(max_draft, np.int32)
        count = check(
            lib.ds_datastore_draft(
                self.handle,
                view("int32_t[]", tokens),
                len(tokens),
                max_draft,
                view("int32_t[]", draft),
                view("int32_t[]", support),
            )
        )
        return draft[:count].tolist(), support[:count].tolist()


def write_datastore(
    path: Path | str,
    texts: Iterable[Sequence[int] | NDArray],
    tokenizer: str = NO_TOKENIZER,
    chunk_tokens: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> int:
    """Index the token ids of texts into `path`; the number of tokens, an end of each text included.

    chunk_tokens: so many are sorted at a time, which takes 4 bytes each; 0: 2^24. progress: done, in all.
    The file appears when it is whole; nothing is left behind where this fails. Raises BundleError for what is
    no text of token ids and for a file that cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise BundleError(f"{path} is a folder: name the file that is to be the datastore")
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")  # another writer of `path` has its own
    handle = lib.ds_datastore_writer_create(str(part).encode(), _read_hash(tokenizer), chunk_tokens)
    if handle == ffi.NULL:
        check(lib.DS_ERROR_ARGUMENT)
    writer, count = ffi.gc(handle, lib.ds_datastore_writer_free), 0
    try:
        for i, text in enumerate(texts):
            tokens = np.append(_read_text(text, i), np.int32(lib.DS_END_OF_REFERENCE))
            check(lib.ds_datastore_writer_append(writer, view("int32_t[]", tokens), len(tokens)))
            count += len(tokens)
        tell = ffi.callback("void(int64_t, int64_t)", progress) if progress else ffi.NULL
        check(lib.ds_datastore_writer_finish(writer, tell))
        ffi.release(writer)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return count


def _read_hash(tokenizer: str) -> bytes:
    try:
        digest = bytes.fromhex(tokenizer)
    except ValueError:
        digest = b""
    if len(digest) != lib.DS_TOKENIZER_BYTES:
        raise BundleError(
            f"tokenizer={tokenizer!r:.80}: wanted the SHA-256 of its tokenizer.json, "
            f"{2 * lib.DS_TOKENIZER_BYTES} hexadecimal digits"
        )
    return digest


def _read_text(text: Sequence[int] | NDArray, index: int) -> NDArray[np.int32]:
    try:
        ids = np.asarray(text)
    except ValueError:  # lists of several lengths
        raise BundleError(f"texts[{index}] is nested: wanted a flat list of token ids") from None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise BundleError(f"texts[{index}] is {ids.dtype} {list(ids.shape)}: wanted a flat list of token ids")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < lib.DS_END_OF_REFERENCE:
        raise BundleError(
            f"texts[{index}] holds ids from {ids.min()} to {ids.max()}, which no vocabulary has"
        )
    return ids.astype(np.int32)
