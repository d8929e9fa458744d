"""Build a datastore: text files, in the tokens of a bundle's model, indexed to draft from."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..speculate.bundle import load
from ..speculate.datastore import write_datastore
from ..speculate.manifest import TOKENIZER
from .errors import RecipeError
from .progress import Progress, no_progress

BLOCK_CHARACTERS = 1 << 18  # tokenized at a time; a draft does not go past the end of one
BATCH = 8  # blocks that are tokenized side by side


def build_datastore(
    texts: Sequence[Path], out: Path, bundle_dir: Path, progress: Progress = no_progress
) -> dict[str, Any]:
    """Index text files into `out`, for the bundle's model and others with its tokenizer.

    Memory is bounded, however long the texts. While it runs it takes 12 bytes of disk a token, and leaves 8.
    """
    for path in texts:
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file"
            raise RecipeError(f"{path}: {what}; text files are wanted")
        if out.exists() and out.samefile(path):
            raise RecipeError(f"-o {out} is one of the texts and would replace it; name another file")
    if not out.absolute().parent.is_dir():
        raise RecipeError(f"-o {out}: its folder is not there; make it first")
    total = sum(path.stat().st_size for path in texts)
    if total == 0:
        raise RecipeError(f"{', '.join(map(str, texts))}: empty; some text is wanted")
    bundle = load(bundle_dir)

    def read(done: int) -> None:
        progress(done // 1024, total // 1024, "KiB of text")

    tokens = write_datastore(
        out,
        _encode(bundle.tokenizer, texts, read),
        bundle.manifest.files[TOKENIZER].sha256,
        progress=lambda done, total: progress(done, total, "sorting"),
    )
    size = out.stat().st_size
    return {"datastore": str(out), "files": len(texts), "text_bytes": total, "tokens": tokens, "bytes": size}


def _encode(tokenizer: Tokenizer, texts: Sequence[Path], read: Callable[[int], None]) -> Iterator[np.ndarray]:
    done, batch = 0, []
    for path in texts:
        for block in _read_blocks(path):
            batch.append(block)
            done += len(block.encode("utf-8", "replace"))
            if len(batch) == BATCH:
                yield from _encode_batch(tokenizer, batch)
                read(done)
                batch = []
    yield from _encode_batch(tokenizer, batch)


def _encode_batch(tokenizer: Tokenizer, blocks: list[str]) -> Iterator[np.ndarray]:
    for encoding in tokenizer.encode_batch_fast(blocks, add_special_tokens=False):
        yield np.array(encoding.ids, np.int32)


def _read_blocks(path: Path) -> Iterator[str]:
    """The text in pieces that end with a line, where lines are not longer than that."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while block := file.read(BLOCK_CHARACTERS):
            yield block + file.readline(BLOCK_CHARACTERS)
