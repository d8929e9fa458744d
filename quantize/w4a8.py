"""The quantize stage of W4A8: int4 weights for every targeted linear, over rows that are quantized as W8A8
quantizes them.

Each linear's grids are fitted to its weights, and its weights rounded onto them column by column, so that the
columns to come make up for what the ones before lost (GPTQ: the sweep of `prune/sparsegpt.py` with nothing
pruned). The output projection is int8, since its errors are those of the logits themselves.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.linear import INT4_GROUP
from ..model.progress import Progress, no_progress
from ..model.select import select_linears
from ..model.store import Checkpoint
from ..model.walk import Part, Rows, linear_names, linears_of, walk
from ..prune.sparsegpt import Factor, factor_inputs, round_matrices
from .int4 import LEVELS, fit_grids, pack_int4
from .int8 import pack_int8, row_scale
from .w8a8 import SAMPLE_TOKENS, mean_error

DAMPENING_FRAC = 0.01


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
    """Write the checkpoint `src` with its targeted linears as W4A8 to `out`; return a report with one row a
    linear. `tokens` and `work` are as in `walk`."""
    settings = {"targets": targets or ["Linear"], "ignore": ignore or [], "bits": 4}
    names = linear_names(Checkpoint(src).config)
    selected = set(select_linears(names, settings["targets"], settings["ignore"]))

    def visit(part: Part) -> tuple[dict[str, Tensor] | None, Rows]:
        chosen = {name for name in part.linears() if part.full_name(name) in selected}
        if not chosen:
            return None, []
        tensors, rows, module = dict(part.tensors), [], part.build(part.tensors)
        for sharers, chunks in part.inputs(module):
            sharing = [name for name in sharers if name in chosen]
            if not sharing:
                continue
            weights = [part.tensors[f"{name}.weight"].float() for name in sharing]
            if part.is_head:
                packed = [pack_int8(name, weights[0], row_scale(weights[0])) for name in sharing]
            else:
                factor = factor_inputs(chunks, DAMPENING_FRAC, " and ".join(map(part.full_name, sharing)))
                rounded = zip(sharing, round_linears(weights, factor), strict=True)
                packed = [pack_int4(name, on_grid, grid) for name, (on_grid, grid) in rounded]
            sample = chunks[0][:SAMPLE_TOKENS].clone()
            for name, weight, stored in zip(sharing, weights, packed, strict=True):
                tensors |= stored
                linear = linears_of(module)[name]
                linear.load(tensors)  # what runs behind is calibrated on what this linear gives from now on
                bias = 0 if linear.bias is None else linear.bias
                error = mean_error(linear(sample) - bias, sample @ weight.T)
                rows.append({"linear": part.full_name(name), "dynamic_error": error})
        return tensors, rows

    rows = walk(src, tokens, out, work, visit, settings, progress, "quantize")
    return {"threads": torch.get_num_threads(), "linears": rows}


def round_linears(weights: list[Tensor], factor: Factor) -> list[tuple[Tensor, Tensor]]:
    """Matrices [N_n, K] that share their input, rounded, and their grids."""
    grids = [fit_grids(weight, factor.damped.diagonal()) for weight in weights]
    step, base = torch.cat(grids).to(weights[0].dtype).unbind(-1)

    def round_column(column: int, values: Tensor) -> Tensor:
        steps, bases = step[:, column // INT4_GROUP], base[:, column // INT4_GROUP]
        return torch.round((values - bases) / steps).clamp_(0, LEVELS).mul_(steps).add_(bases)

    swept = round_matrices(weights, factor, round_column)
    return [(result.weight, grid) for result, grid in zip(swept, grids, strict=True)]
