"""SmoothQuant: move the difficulty of activations into the weights (Xiao et al., arXiv 2211.10438).

Each fold of the model (see `pairs.py`) gets the factors s_j = max|X_j|^α / max|W_j|^(1 - α), X over all
calibration tokens, W over all consumers. The producer is divided by them and the consumers are multiplied:
the function of the model stays what it was, only its tensors become easier to round.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..model.errors import ModelError
from ..model.progress import Progress, no_progress
from ..model.select import select_linears
from ..model.store import Checkpoint
from ..model.walk import Part, Rows, linear_names, walk
from .int4 import fit_grids, pack_int4
from .int8 import pack_int8, row_scale
from .pairs import Fold, find_folds

Scheme = Literal["W8A8", "W4A8"]
STRENGTHS = (None, 0.45, 0.6, 0.75, 0.9)  # what "auto" tries for each fold; None leaves the fold out
SAMPLE_TOKENS = 512  # of the calibration tokens, on which it compares them
SMALLEST = 1e-5


def smooth_model(
    src: Path,
    tokens: Path,
    out: Path,
    work: Path,
    *,
    scheme: Scheme = "W8A8",
    smoothing_strength: float | Literal["auto"] = "auto",
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the checkpoint `src` smoothed to `out`; return a report with one row a part.

    `smoothing_strength` is α of every fold, or "auto": the α of each fold, or leaving it out, that gives the
    least error of its part under the law of `scheme`. `targets` and `ignore` choose the linears that may be
    touched. A tied output projection comes out as a tensor of its own.
    """
    if smoothing_strength != "auto" and not 0 <= smoothing_strength <= 1:
        raise ModelError(f"smoothing_strength is {smoothing_strength}; it must be in [0, 1], or 'auto'")
    settings = {
        "scheme": scheme,
        "smoothing_strength": smoothing_strength,
        "targets": targets or ["Linear"],
        "ignore": ignore or [],
    }
    names = linear_names(Checkpoint(src).config)
    selected = set(select_linears(names, settings["targets"], settings["ignore"]))
    known: dict[bool, list[Fold]] = {}  # the layers all fold alike, the head in its own way

    def visit(part: Part) -> tuple[dict[str, Tensor] | None, Rows]:
        if part.is_head not in known:
            known[part.is_head] = find_folds(part)
        touched = [name for name in part.linears() if part.full_name(name) in selected]
        untouched = set(part.linears()).difference(touched)
        folds = [fold for fold in known[part.is_head] if not untouched & {fold.producer, *fold.consumers}]
        if not folds:
            return None, []
        sample = part.hidden[: -(-SAMPLE_TOKENS // part.hidden.shape[1])].clone()  # before they move on
        trial = _Trial(part, folds, touched, _find_peaks(part), sample, scheme)
        strengths: Strengths = [None if smoothing_strength == "auto" else smoothing_strength] * len(folds)
        if smoothing_strength == "auto":
            strengths = trial.search()
        return trial.smooth(strengths), [trial.describe(strengths)]

    rows = walk(src, tokens, out, work, visit, settings, progress, "smooth", exact=True)
    return {"threads": torch.get_num_threads(), "parts": rows}


Strengths = list[float | None]


class _Trial:
    """Ways of smoothing one part, compared on a sample of the states that enter it."""

    def __init__(
        self,
        part: Part,
        folds: list[Fold],
        quantized: list[str],
        peaks: dict[str, Tensor],
        sample: Tensor,
        scheme: Scheme,
    ):
        self.part, self.folds, self.quantized, self.scheme = part, folds, quantized, scheme
        self.peaks, self.sample = peaks, sample
        self.output = part.run(part.build(part.tensors), sample)

    def smooth(self, strengths: Strengths) -> dict[str, Tensor]:
        """The part's tensors, each fold with its α; all factors are taken from the tensors as they were."""
        tensors = self.part.tensors
        for fold, strength in zip(self.folds, strengths, strict=True):
            if strength is not None:
                tensors = fold.apply(tensors, find_factors(fold, self.part.tensors, self.peaks, strength))
        return tensors

    def quantization_error(self, strengths: Strengths) -> float:
        """Of the part's output under the law of the scheme, each weight rounded to the nearest."""
        tensors = dict(self.smooth(strengths))
        for name in self.quantized:
            weight = tensors[f"{name}.weight"]
            if self.scheme == "W8A8" or self.part.is_head:
                tensors |= pack_int8(name, weight, row_scale(weight))
            else:  # one try at each grid, since there are some twenty trials
                tensors |= pack_int4(name, weight, fit_grids(weight, torch.ones(weight.shape[1]), [1.0]))
        return self._error(tensors)

    def search(self) -> Strengths:
        """The best α of each fold in turn, the others held; or no smoothing, if that is better still."""
        none: Strengths = [None] * len(self.folds)
        strengths: Strengths = [0.5] * len(self.folds)
        for i in range(len(self.folds)):
            trials = [[*strengths[:i], strength, *strengths[i + 1 :]] for strength in STRENGTHS]
            strengths = min(trials, key=self.quantization_error)
        return min(strengths, none, key=self.quantization_error)

    def describe(self, strengths: Strengths) -> dict[str, Any]:
        name = self.part.full_name
        reached = {consumer for fold in self.folds for consumer in fold.consumers}
        return {
            "part": self.part.name,
            "folds": [
                {
                    "producer": name(fold.producer),
                    "consumers": list(map(name, fold.consumers)),
                    "smoothing_strength": strength,
                }
                for fold, strength in zip(self.folds, strengths, strict=True)
            ],
            "unreached": [name(linear) for linear in self.part.linears() if linear not in reached],
            "error_unsmoothed": self.quantization_error([None] * len(self.folds)),
            "error": self.quantization_error(strengths),
            "change": self._error(self.smooth(strengths)),
        }

    def _error(self, tensors: dict[str, Tensor]) -> float:
        """Of a layer: the mean over tokens of |error|² / |output|², since the next norm divides by |output|.
        Of the head: the mean over tokens of KL(exact law of the next token | approximate law)."""
        output = self.part.run(self.part.build(tensors), self.sample)
        if self.part.is_head:
            exact, approximate = self.output.log_softmax(-1), output.log_softmax(-1)
            return float((exact.exp() * (exact - approximate)).sum(-1).mean())
        return float(((output - self.output).square().sum(-1) / self.output.square().sum(-1)).mean())


def _find_peaks(part: Part) -> dict[str, Tensor]:
    """max|X| of each input channel [K] of each linear, over all tokens."""
    peaks: dict[str, Tensor] = {}
    for names, chunks in part.inputs(part.build(part.tensors)):
        peak = torch.stack([x.abs().amax(0) for x in chunks]).amax(0)
        peaks |= dict.fromkeys(names, peak)
    return peaks


def find_factors(fold: Fold, tensors: dict[str, Tensor], peaks: dict[str, Tensor], strength: float) -> Tensor:
    """s [C] of the producer's channels; a channel that feeds several (grouped queries) takes their maxima."""
    channels = len(tensors[f"{fold.producer}.weight"])
    x_peak = w_peak = torch.full((channels,), SMALLEST)
    for consumer, source in fold.consumers.items():
        columns = tensors[f"{consumer}.weight"].float().abs().amax(0)
        x_peak = x_peak.scatter_reduce(0, source, peaks[consumer], "amax")
        w_peak = w_peak.scatter_reduce(0, source, columns, "amax")
    return x_peak**strength / w_peak ** (1 - strength)
