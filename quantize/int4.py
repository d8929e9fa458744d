"""Affine int4: every 32 inputs of a row of a weight have a grid, w ≈ step · u + base with u of 0 to 15."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.linear import INT4_GROUP, spread_grid

LEVELS = 15
SHRINKS = (1.0, 0.9, 0.8, 0.7)  # of the range of a group, that a grid is made to span
CHUNK_ROWS = 2048  # of a weight, whose grids are searched at a time: bounds the memory


def fit_grids(weight: Tensor, importance: Tensor, shrinks: Sequence[float] = SHRINKS) -> Tensor:
    """Grids bfloat16 [N, ceil(K / 32), 2] of a weight [N, K]: the step and the base that each group is best
    rounded with, by squared error weighted by `importance` [K] (the mean square of each input, say).

    Cutting the range of a group short costs its ends and spares the middle. So a few ranges are tried, each
    once as it is and once with the step and base that are the least squares for the levels which it gives.
    """
    fitted = [_fit(rows.float(), importance.float(), shrinks) for rows in weight.split(CHUNK_ROWS)]
    return torch.cat(fitted)


def to_int4(weight: Tensor, grid: Tensor) -> Tensor:
    """The nearest u, uint8 [N, K], half to even. Exact for a weight that is on its grids already."""
    return _nearest(weight.float(), *spread_grid(grid, weight.shape[1])).to(torch.uint8)


def pack_int4(name: str, weight: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """The tensors by which a checkpoint holds a linear of 4 bits."""
    return {f"{name}.weight": to_int4(weight, grid), f"{name}.weight_grid": grid}


def _fit(weight: Tensor, importance: Tensor, shrinks: Sequence[float]) -> Tensor:
    short = -weight.shape[1] % INT4_GROUP
    # The last group is filled up with weights that widen no range and count nothing.
    groups = F.pad(weight[:, None], (0, short), mode="replicate")[:, 0].unflatten(1, (-1, INT4_GROUP))
    counts = F.pad(importance, (0, short)).unflatten(0, (-1, INT4_GROUP)) + torch.finfo(torch.float32).tiny
    low, high = groups.aminmax(dim=-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best, least = torch.zeros(*groups.shape[:2], 2), torch.full(groups.shape[:2], torch.inf)
    for shrink in shrinks:
        step, base = _as_stored(2 * half * shrink / LEVELS, middle - half * shrink)
        for _ in range(2):
            levels = _nearest(groups, step, base)
            error = (counts * (levels * step + base - groups).square()).sum(-1)
            grid = torch.cat((step, base), -1)
            best = torch.where((error < least)[..., None], grid, best)
            least = torch.minimum(error, least)
            step, base = _as_stored(*_least_squares(groups, levels, counts, step))
    return best.to(torch.bfloat16)


def _least_squares(groups: Tensor, levels: Tensor, counts: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Step and base of the weighted regression of `groups` on `levels`; `step` where the levels are all
    equal."""
    total = counts.sum(-1, keepdim=True)
    level = (counts * levels).sum(-1, keepdim=True) / total
    weight = (counts * groups).sum(-1, keepdim=True) / total
    spread = (counts * (levels - level).square()).sum(-1, keepdim=True)
    slope = (counts * (levels - level) * (groups - weight)).sum(-1, keepdim=True) / spread
    step = torch.where((spread > 0) & (slope > 0) & slope.isfinite(), slope, step)
    return step, weight - step * level


def _as_stored(step: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to bfloat16; a step of 1 for a group whose weights are all equal."""
    step = torch.where(step > 0, step, 1.0)
    return step.to(torch.bfloat16).float(), base.to(torch.bfloat16).float()


def _nearest(weight: Tensor, step: Tensor, base: Tensor) -> Tensor:
    return torch.round((weight - base) / step).clamp_(0, LEVELS)
