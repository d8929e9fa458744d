"""Quality of every engine of a bundle: perplexity on text, and agreement with the target on the target's
own words.
"""

from pathlib import Path

import numpy as np

from ..speculate.bundle import Bundle
from ..speculate.errors import BundleError
from .progress import Progress, no_progress
from .prompts import encode_prompts, read_prompts
from .traces import record

ROWS_AT_A_TIME = 64


def evaluate(
    bundle: Bundle,
    text: Path | None = None,
    prompts: Path | None = None,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    limit: int | None = None,
    max_new_tokens: int = 128,
    progress: Progress = no_progress,
) -> dict:
    """Perplexity of the target and of each drafter on `text`, and greedy agreement on `prompts`.

    The text is tokenised whole and cut into non-overlapping windows of `window` tokens, each predicted
    without the ones before it; perplexity is exp(mean negative log-likelihood) over every token but each
    window's first. An engine that knows only some tokens has none. Agreement is the share of positions of the
    target's own greedy output at which a drafter, given the same text, chooses the same token. A prompt that
    the bundle refuses is passed over.
    """
    if text is None and prompts is None:
        raise BundleError(
            "nothing to evaluate: give --text FILE for perplexity, --prompts FILE for agreement"
        )
    result: dict = {"engines": {name: {} for name in ["target", *bundle.drafters]}}
    if text is not None:
        result["text"] = {"file": str(text), "window": window}
        windows = _cut_windows(bundle, text, window, max_windows)
        result["text"]["windows"] = len(windows)
        for name, figures in _perplexities(bundle, windows, progress).items():
            result["engines"][name] |= figures
    if prompts is not None:
        chosen, unread = read_prompts(prompts, limit)
        alone = [[name] for name in bundle.drafters]
        modes = [{"speculate": ladder} for ladder in ("none", *alone)]
        encoded, refused = encode_prompts(bundle, chosen, modes, max_new_tokens=max_new_tokens)
        result["prompts"] = {"file": str(prompts), "prompts": len(encoded), "passed_over": unread + refused}
        agreed = {name: [] for name in bundle.drafters}
        for index, (_, ids) in enumerate(encoded):
            recording = record(bundle, ids, bundle.drafters, max_new_tokens)
            for name in bundle.drafters:
                agreed[name].append(recording.choices[name] == recording.tokens)
            progress(index + 1, len(encoded), "agreement")
        for name, flags in agreed.items():
            result["engines"][name]["greedy_agreement"] = float(np.concatenate(flags).mean())
    return result


def measure_perplexity(
    bundle: Bundle, text: Path, window: int, max_windows: int, progress: Progress = no_progress
) -> dict[str, float]:
    """Of every engine, as `evaluate` has it."""
    windows = _cut_windows(bundle, text, window, max_windows)
    figures = _perplexities(bundle, windows, progress)
    return {name: row["perplexity"] for name, row in figures.items() if "perplexity" in row}


def _cut_windows(bundle: Bundle, text: Path, window: int, max_windows: int | None) -> list[list[int]]:
    if not text.is_file():
        raise BundleError(f"text file {text} not found")
    ids = bundle.tokenizer.encode(
        text.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False
    ).ids
    windows = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    if not windows:
        raise BundleError(
            f"{text} has {len(ids)} tokens, fewer than one window of {window}: "
            "give more text or a smaller --window"
        )
    return windows[:max_windows]


def _perplexities(bundle: Bundle, windows: list[list[int]], progress: Progress) -> dict[str, dict]:
    figures: dict[str, dict] = {}
    target_choices: list[np.ndarray] = []
    for name in ["target", *bundle.drafters]:
        losses, agreements = [], []
        for index, ids in enumerate(windows):
            logits = bundle.logits(ids, engine=name)[:-1]
            losses.append(_negative_log_likelihoods(logits, np.asarray(ids[1:])))
            choices = logits.argmax(axis=-1)
            if name == "target":
                target_choices.append(choices)
            agreements.append(choices == target_choices[index])
            progress(index + 1, len(windows), f"perplexity of {name}")
        perplexity = float(np.exp(np.concatenate(losses).mean()))
        if np.isnan(perplexity):
            raise BundleError(f"the logits of {name} on this text are not numbers: build it again")
        row = figures[name] = {}
        if bundle.manifest.engines[name].draft_vocab_size is None:
            row["perplexity"] = perplexity
        if name != "target":
            if row:
                row["ratio_to_target"] = perplexity / figures["target"]["perplexity"]
            row["text_agreement"] = float(np.concatenate(agreements).mean())
    return figures


def _negative_log_likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float32 [T, V], int [T] -> float64 [T]; the sum over the vocabulary runs in float64. Some rows at a
    time: temporaries as large as the logits of a window take longer to map than to compute."""
    losses = np.empty(len(targets))
    for start in range(0, len(targets), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        peak = logits[rows].max(axis=-1, keepdims=True)
        log_sums = np.log(np.exp(logits[rows] - peak).sum(axis=-1, dtype=np.float64)) + peak[:, 0]
        losses[rows] = log_sums - np.take_along_axis(logits[rows], targets[rows, None], axis=-1)[:, 0]
    return losses
