"""The quantize stage: int8 weights for every targeted linear, and static scales for its input.

The W8A8 law with one dynamic scale a token row is `model/linear.py`'s. TensorRT takes only one static scale a
tensor: what a linear loses by that is measured here. One that it would ruin takes its input in two
int8 parts: the rounded input, and on a finer scale what rounding left.
"""

from collections.abc import Sequence
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
STATIC_ERROR_LIMIT = 0.01  # of an input in one part
FINER = 2 * LIMIT  # what rounding leaves is at most half a step, so that this much finer it just fits


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
            steps = (scale, scale / FINER)
            group = {
                name: _compare(linears_of(module)[name], sample, steps) for name in sharers if name in chosen
            }
            # All alike, so that one product can serve them.
            ruined = any(errors["static_error"] > STATIC_ERROR_LIMIT for errors in group.values())
            used = steps if ruined else steps[:1]
            for name, errors in group.items():
                tensors[f"{name}.input_scale"] = torch.tensor(used)
                measured = {"input_scale": scale, "input_parts": len(used)}
                rows.append({"linear": part.full_name(name), **measured, **errors})
        return tensors, rows

    rows = walk(src, tokens, out, work, visit, settings, progress, "quantize", max_tokens=PEAK_TOKENS)
    in_two_parts = [row["linear"] for row in rows if row["input_parts"] == 2]
    return {"threads": torch.get_num_threads(), "linears": rows, "inputs_in_two_parts": in_two_parts}


def _compare(linear: Linear, x: Tensor, steps: tuple[float, float]) -> dict[str, float]:
    """The errors of its output for x [T, K] under the dynamic law and the static ones, biases left out."""
    assert linear.weight_scale is not None
    exact = x @ (linear.weight.float() * linear.weight_scale[:, None]).T
    rows, row_scales = quantize_rows(x)
    dynamic = multiply_int8(rows, linear.weight) * (row_scales * linear.weight_scale)
    return {
        "dynamic_error": mean_error(dynamic, exact),
        "static_error": mean_error(_apply_static(linear, x, steps[:1]), exact),
        "two_part_error": mean_error(_apply_static(linear, x, steps), exact),
    }


def _apply_static(linear: Linear, x: Tensor, scales: Sequence[float]) -> Tensor:
    """Its output for x [T, K] as a sum of int8 parts with these scales, without bias."""
    assert linear.weight_scale is not None
    output = torch.zeros(())
    for scale in scales:
        rounded = torch.round(x / scale).clamp_(-LIMIT, LIMIT).to(torch.int8)
        output = output + multiply_int8(rounded, linear.weight) * (scale * linear.weight_scale)
        x = x - rounded * scale
    return output


def mean_error(output: Tensor, exact: Tensor) -> float:
    """Mean over tokens of |error|² / |output|²: a few tokens with huge outputs do not hide the others."""
    size = exact.square().sum(1)
    return float(((output - exact).square().sum(1) / size.clamp(min=torch.finfo().tiny)).mean())
