"""The quantize stage: int8 weights for every targeted linear, and where one will do, a static scale for its
input.

The W8A8 law with one dynamic scale a token row is `model/linear.py`'s. TensorRT takes only one static scale a
tensor: what a linear loses by that is measured here, and the linears that it would ruin get none and so stay
in floating point in a static graph.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.linear import Linear, multiply_int8, quantize_rows
from ..model.progress import Progress, no_progress
from ..model.select import select_linears
from ..model.store import Checkpoint
from ..model.walk import Part, Rows, linear_names, linears_of, walk
from .int8 import LIMIT, is_int8, pack_int8, row_scale

PEAK_TOKENS = 8192  # calibration tokens that the static scales are taken from
SAMPLE_TOKENS = 1024  # on which the two laws are compared
STATIC_ERROR_LIMIT = 0.01


def quantize_model(
    src: Path,
    tokens: Path,
    out: Path,
    work: Path,
    *,
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the checkpoint `src` with its targeted linears as W8A8 to `out`; return a report with one row a
    linear.

    A linear that is int8 already (pruned jointly) keeps its weights and only gets its input measured.
    `tokens` and `work` are as in `walk`.
    """
    settings = {"targets": targets or ["Linear"], "ignore": ignore or []}
    names = linear_names(Checkpoint(src).config)
    selected = set(select_linears(names, settings["targets"], settings["ignore"]))

    def visit(part: Part) -> tuple[dict[str, Tensor] | None, Rows]:
        chosen = [name for name in part.linears() if part.full_name(name) in selected]
        if not chosen:
            return None, []
        tensors = dict(part.tensors)
        for name in chosen:
            if not is_int8(tensors, name):
                weight = tensors[f"{name}.weight"]
                tensors |= pack_int8(name, weight, row_scale(weight))
        module, rows = part.build(tensors), []
        for sharers, chunks in part.inputs(module):
            peak = max(float(x.abs().max()) for x in chunks)
            scale, sample = (peak / LIMIT if peak > 0 else 1.0), chunks[0][:SAMPLE_TOKENS]
            for name in sharers:
                if name not in chosen:
                    continue
                exact, dynamic, static = _apply(linears_of(module)[name], sample, scale)
                row = {
                    "linear": part.full_name(name),
                    "input_scale": scale,
                    "dynamic_error": mean_error(dynamic, exact),
                    "static_error": mean_error(static, exact),
                }
                row["static"] = row["static_error"] <= STATIC_ERROR_LIMIT
                if row["static"]:
                    tensors[f"{name}.input_scale"] = torch.tensor(scale)
                rows.append(row)
        return tensors, rows

    rows = walk(src, tokens, out, work, visit, settings, progress, "quantize", max_tokens=PEAK_TOKENS)
    kept_out = [row["linear"] for row in rows if not row["static"]]
    return {"threads": torch.get_num_threads(), "linears": rows, "kept_out_of_static": kept_out}


def _apply(linear: Linear, x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Its output for x [T, K] unrounded, under the dynamic law and under the static law; without bias."""
    assert linear.weight_scale is not None
    exact = x @ (linear.weight.float() * linear.weight_scale[:, None]).T
    rows, row_scales = quantize_rows(x)
    dynamic = multiply_int8(rows, linear.weight) * (row_scales * linear.weight_scale)
    fixed = torch.round(x / scale).clamp_(-LIMIT, LIMIT).to(torch.int8)
    static = multiply_int8(fixed, linear.weight) * (scale * linear.weight_scale)
    return exact, dynamic, static


def mean_error(output: Tensor, exact: Tensor) -> float:
    """Mean over tokens of |error|² / |output|²: a few tokens with huge outputs do not hide the others."""
    size = exact.square().sum(1)
    return float(((output - exact).square().sum(1) / size.clamp(min=torch.finfo().tiny)).mean())
