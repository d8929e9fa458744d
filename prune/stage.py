"""The prune stage: every targeted linear of a checkpoint, layer by layer on what the pruned layers before it
give."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..model.errors import ModelError
from ..model.layout import linear_shapes
from ..model.progress import Progress, no_progress
from ..model.select import select_linears
from ..model.store import TORCH_DTYPES, Checkpoint
from ..model.walk import Part, Rows, linear_names, linears_of, walk
from ..quantize.int8 import is_int8, pack_int8, row_scale
from .magnitude import prune_by_magnitude
from .masks import MaskStructure
from .refit import refit_matrices
from .sparsegpt import Pruned, factor_inputs, prune_matrices


def prune_model(
    src: Path,
    tokens: Path,
    out: Path,
    work: Path,
    *,
    method: Literal["sparsegpt", "magnitude"] = "sparsegpt",
    sparsity: float = 0.5,
    mask_structure: str = "unstructured",
    block_size: int = 128,
    dampening_frac: float = 0.01,
    refit: bool = True,
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    joint_int8: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the checkpoint `src` pruned to `out`; return a report with one row a linear.

    `tokens` holds the calibration windows and `work` survives a crash (see `walk`). The pruned linears come
    out in the model's dtype, as they will be exported; with `joint_int8`, as int8 on the symmetric grid of
    their dense rows. The output projection is never pruned. Raises ModelError before any work for settings
    that do not fit the model.
    """
    settings = {
        "method": method,
        "sparsity": sparsity,
        "mask_structure": mask_structure,
        "block_size": block_size,
        "dampening_frac": dampening_frac,
        "refit": refit,
        "targets": targets or ["Linear"],
        "ignore": ignore or [],
        "joint_int8": joint_int8,
    }
    structure = MaskStructure.parse(mask_structure, sparsity, block_size)
    checkpoint = Checkpoint(src)
    selected = _select(checkpoint, structure, settings["targets"], settings["ignore"])
    dtype = TORCH_DTYPES[checkpoint.config.dtype]

    def visit(part: Part) -> tuple[dict[str, Tensor] | None, Rows]:
        weights = {
            name: _float_weight(part, name) for name in part.linears() if part.full_name(name) in selected
        }
        if not weights:
            return None, []
        tensors, rows, module = dict(part.tensors), [], part.build(part.tensors)
        for sharers, chunks in part.inputs(module):
            names = [name for name in sharers if name in weights]
            if not names:
                continue
            factor = factor_inputs(chunks, dampening_frac, " and ".join(map(part.full_name, names)))
            dense = [weights[name] for name in names]
            scales = [row_scale(weight) for weight in dense] if joint_int8 else None
            if method == "magnitude":
                results = [prune_by_magnitude(weight, factor, structure) for weight in dense]
            elif refit:
                results = refit_matrices(
                    dense, prune_matrices(dense, factor, structure), factor, structure, scales
                )
            else:
                results = prune_matrices(dense, factor, structure, scales)
            for i, (name, result) in enumerate(zip(names, results, strict=True)):
                weight = result.weight if scales else result.weight.to(dtype)
                tensors |= pack_int8(name, weight, scales[i]) if scales else {f"{name}.weight": weight}
                # What runs behind is calibrated on what this linear gives from now on ("true sequential").
                linears_of(module)[name].load(tensors)
                rows.append(_describe(part.full_name(name), weight, result, factor.dampening_frac))
        return tensors, rows

    rows = walk(src, tokens, out, work, visit, settings, progress, "prune")
    return {"threads": torch.get_num_threads(), "linears": rows}


def _describe(name: str, weight: Tensor, result: Pruned, dampening_frac: float) -> dict[str, Any]:
    """`loss`, `trace` and, after a refit, `sweep_loss` are in squared output units per token, on the damped
    Hessian."""
    if not weight.isfinite().all():
        raise ModelError(f"{name}: its pruned weights are not finite; raise dampening_frac")
    return {
        "linear": name,
        "sparsity": float((weight == 0).float().mean()),
        "loss": result.loss,
        "trace": result.trace,
        **({} if result.sweep_loss is None else {"sweep_loss": result.sweep_loss}),
        "dampening_frac": dampening_frac,
    }


def _select(
    checkpoint: Checkpoint, structure: MaskStructure, targets: list[str], ignore: list[str]
) -> set[str]:
    if "lm_head" in targets:
        raise ModelError("targets: lm_head is the output projection, which is never pruned; take it out")
    selected = set(select_linears(linear_names(checkpoint.config), targets, ignore)) - {"lm_head"}
    for name in selected:
        structure.check_width(linear_shapes(checkpoint.config)[name.split(".", 3)[3]][1], name)
    return selected


def _float_weight(part: Part, name: str) -> Tensor:
    if is_int8(part.tensors, name):
        raise ModelError(
            f"{part.full_name(name)} is int8 already: prune before quantizing, or set joint_int8"
        )
    return part.tensors[f"{name}.weight"].float()
