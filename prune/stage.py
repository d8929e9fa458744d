"""The prune stage: every targeted linear of a checkpoint, layer by layer on what the pruned layers before it
give."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..model.errors import ModelError
from ..model.layout import linear_shapes
from ..model.progress import Progress, no_progress
from ..model.select import select_linears
from ..model.store import Checkpoint
from ..model.walk import Part, Rows, linear_names, walk
from ..quantize.int8 import is_int8, pack_int8, row_scale
from .magnitude import prune_by_magnitude
from .masks import MaskStructure
from .sparsegpt import Hessian, factor_hessian, prune_matrices


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
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    joint_int8: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the checkpoint `src` pruned to `out`; return a report with one row a linear.

    `tokens` holds the calibration windows and `work` survives a crash (see `walk`). With `joint_int8` the
    pruned linears come out as int8 on the symmetric grid of their dense rows. The output projection is never
    pruned. Raises ModelError before any work for settings that do not fit the model.
    """
    settings = {
        "method": method,
        "sparsity": sparsity,
        "mask_structure": mask_structure,
        "block_size": block_size,
        "dampening_frac": dampening_frac,
        "targets": targets or ["Linear"],
        "ignore": ignore or [],
        "joint_int8": joint_int8,
    }
    structure = MaskStructure.parse(mask_structure, sparsity, block_size)
    selected = _select(Checkpoint(src), structure, settings["targets"], settings["ignore"])

    def visit(part: Part) -> tuple[dict[str, Tensor] | None, Rows]:
        weights = {
            name: _float_weight(part, name) for name in part.linears() if part.full_name(name) in selected
        }
        if not weights:
            return None, []
        scales = {name: row_scale(weight) for name, weight in weights.items()} if joint_int8 else None
        if method == "sparsegpt":
            results = _by_sparsegpt(part, weights, scales, structure, dampening_frac)
        else:
            results = ((name, prune_by_magnitude(weight, structure), {}) for name, weight in weights.items())
        tensors, rows = dict(part.tensors), []
        for name, weight, facts in results:
            if not weight.isfinite().all():
                raise ModelError(
                    f"{part.full_name(name)}: its pruned weights are not finite; raise dampening_frac"
                )
            tensors |= {f"{name}.weight": weight} if scales is None else pack_int8(name, weight, scales[name])
            zeros = float((tensors[f"{name}.weight"] == 0).float().mean())
            rows.append({"linear": part.full_name(name), "sparsity": zeros, **facts})
        return tensors, rows

    rows = walk(src, tokens, out, work, visit, settings, progress, "prune")
    return {"threads": torch.get_num_threads(), "linears": rows}


def _by_sparsegpt(
    part: Part,
    weights: dict[str, Tensor],
    scales: dict[str, Tensor] | None,
    structure: MaskStructure,
    dampening_frac: float,
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Name, new weight and report of each linear; `loss` and `trace` are in squared output units per token,
    on the damped Hessian."""
    tensors = dict(part.tensors)
    for names in _find_groups(part, list(weights)):
        hessian = Hessian(tensors[f"{names[0]}.weight"].shape[1])
        for _, x in part.inputs(part.build(tensors), names):
            hessian.add(x)
        factor = factor_hessian(hessian.mean(), dampening_frac, " and ".join(map(part.full_name, names)))
        grids = None if scales is None else [scales[name] for name in names]
        results = prune_matrices([weights[name] for name in names], factor, structure, grids)
        for name, pruned in zip(names, results, strict=True):
            facts = {"loss": pruned.loss, "trace": pruned.trace, "dampening_frac": factor.dampening_frac}
            tensors[f"{name}.weight"] = pruned.weight
            yield name, pruned.weight, facts


def _find_groups(part: Part, wanted: list[str]) -> list[tuple[str, ...]]:
    """The linears that share an input, in the order in which they run. Each group is calibrated on what the
    pruned groups before it give ("true sequential"), which costs forward passes and gains most for down_proj.
    """
    groups: list[tuple[str, ...]] = []
    for names, _ in part.inputs(part.build(part.tensors), wanted):
        if names in groups:  # the second chunk begins
            break
        groups.append(names)
    return groups


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
