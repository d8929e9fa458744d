"""Datastores: much text on disk, indexed, to draft from (REST, arXiv 2311.08252; `native/datastore.h`)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binding import check, ffi, lib, view

NO_TOKENIZER = "00" * lib.DS_TOKENIZER_BYTES


class Datastore:
    """A datastore opened for one model. It stays on disk: opening reads its header only.

    vocab_size  of the model that it will draft for
    tokenizer   the SHA-256 of its tokenizer.json, in hex
    Raises BundleError if the file is none, is cut short, or was built with another tokenizer.
    """

    def __init__(self, path: Path | str, vocab_size: int, tokenizer: str = NO_TOKENIZER) -> None:
        handle = lib.ds_datastore_open(str(path).encode(), vocab_size, bytes.fromhex(tokenizer))
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
    path: Path,
    texts: Iterable[Sequence[int] | NDArray],
    tokenizer: str = NO_TOKENIZER,
    chunk_tokens: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> int:
    """Index the token ids of texts into `path`; the number of tokens. Nothing is left behind where it fails.

    chunk_tokens: so many are sorted at a time, which takes 4 bytes each; 0: 2^24. progress: done, in all.
    """
    part = path.with_name(f"{path.name}.part")
    handle = lib.ds_datastore_writer_create(str(part).encode(), bytes.fromhex(tokenizer), chunk_tokens)
    if handle == ffi.NULL:
        check(lib.DS_ERROR_ARGUMENT)
    writer, count = ffi.gc(handle, lib.ds_datastore_writer_free), 0
    try:
        for text in texts:
            tokens = np.append(np.asarray(text, dtype=np.int32), np.int32(lib.DS_END_OF_REFERENCE))
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
