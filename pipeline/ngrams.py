"""The table of a target's unigrams and bigrams, read off the engine that is served."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..speculate.bundle import load
from ..speculate.engine import Engine
from ..speculate.levels import TARGET
from ..speculate.manifest import NGRAMS
from ..speculate.ngrams import write_table
from .processor import num_threads
from .progress import Progress, no_progress

ROWS = 64  # tokens of one call
WIDTH = 8  # candidates kept after each token


def write_ngrams(bundle_dir: Path, out: Path, progress: Progress = no_progress) -> dict:
    """The stage: write ``ngrams.table``."""
    bundle = load(bundle_dir, num_threads())
    entry = bundle.manifest.engines[TARGET]
    tokens, probabilities = list_continuations(bundle.engine(TARGET), entry.bos_token_id, progress)
    write_table(out / NGRAMS, tokens, probabilities, bundle.manifest.fingerprint(TARGET))
    return {"tokens": len(tokens) - 1, "candidates": tokens.shape[1], "bytes": (out / NGRAMS).stat().st_size}


def list_continuations(
    engine: Engine, bos: int | None, progress: Progress = no_progress
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(tokens int32 [V + 1, K], probabilities float32 [V + 1, K]): what a model finds likeliest after the
    beginning of a text and token t, in row t; after the beginning alone, in row V.

    Tokens are read many at a time, as leaves of one tree, each of which sees the beginning and itself.
    Without a token that begins a text, the row of nothing before is the mean of the others.
    """
    vocab = engine.vocab_size
    width = min(WIDTH, vocab)
    tokens = np.empty((vocab + 1, width), np.int32)
    probabilities = np.empty((vocab + 1, width), np.float32)
    engine.reserve(ROWS + 1)
    start, mean = 0, np.zeros(vocab)
    if bos is not None:
        mean = _laws(engine.forward(np.array([bos], np.int32), 0))[0]
        start = 1
    for first in range(0, vocab, ROWS):
        ids = np.arange(first, min(first + ROWS, vocab), dtype=np.int32)
        count = len(ids)
        mask = np.concatenate([np.ones((count, start), np.bool_), np.eye(count, dtype=np.bool_)], axis=1)
        laws = _laws(engine.forward(ids, start, np.full(count, start, np.int64), mask))
        tokens[ids], probabilities[ids] = _likeliest(laws, width)
        if bos is None:
            mean += laws.sum(0) / vocab
        progress(first + count, vocab, "tokens")
    tokens[vocab:], probabilities[vocab:] = _likeliest(mean[None], width)
    return tokens, probabilities


def _laws(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _likeliest(laws: NDArray, width: int) -> tuple[NDArray, NDArray]:
    """The largest of each row, of equals the lower id first."""
    some = np.sort(np.argpartition(-laws, width - 1, axis=-1)[:, :width], axis=-1)
    order = np.argsort(-np.take_along_axis(laws, some, -1), axis=-1, kind="stable")
    chosen = np.take_along_axis(some, order, -1)
    return chosen, np.take_along_axis(laws, chosen, -1)
