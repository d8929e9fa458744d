"""SparseGPT: prune a matrix and correct what is left, column by column (Frantar and Alistarh, arXiv
2301.00774).

For a linear y = W x the objective is the mean of |W x - Ŵ x|² over the calibration tokens. It equals ½ tr(ΔW
H ΔWᵀ) with H = mean of 2 x xᵀ, and so does, row by row, each step of the optimal brain surgeon that this file
takes: with Uᵀ U = H⁻¹ (U upper triangular), pruning weight w of column i costs w² / (2 U_ii²) and is best
made up for by adding -(w / U_ii) · U_i,j to the columns j > i.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.errors import ModelError
from .masks import MaskStructure, choose_n_of_m, choose_smallest

PANEL = (
    16  # columns whose updates are made one by one, before the rest of the block gets theirs in one product
)


class Hessian:
    """Running mean of 2 x xᵀ over tokens: products of a chunk in float32, their sum in float64."""

    def __init__(self, width: int):
        self._sum = torch.zeros(width, width, dtype=torch.float64)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in the inputs x [T, C] of T tokens."""
        width = x.shape[1]
        strip = max(128, -(-width // 4))
        for start in range(
            0, width, strip
        ):  # the strips on and right of the diagonal: the rest is their mirror
            self._sum[start : start + strip, start:] += x[:, start : start + strip].T @ x[:, start:]
        self._tokens += x.shape[0]

    def mean(self) -> Tensor:
        """H [C, C], float64, symmetric."""
        upper = self._sum.triu() * (2 / max(1, self._tokens))
        return upper + upper.triu(1).T


@dataclass(frozen=True)
class Factor:
    """What the sweep needs of a Hessian, and how it was got."""

    upper: Tensor  # U [C, C], upper triangular, H_damped⁻¹ = Uᵀ U
    damped: Tensor  # H_damped [C, C]
    dead: Tensor  # [C] bool: channels that were zero on every token
    dampening_frac: float  # the damping that succeeded, as a fraction of the mean diagonal


def factor_hessian(hessian: Tensor, dampening_frac: float, name: str) -> Factor:
    """Damp H [C, C] by `dampening_frac` of its mean diagonal and factor its inverse, both in float64.

    A dead channel gets the mean diagonal, so that it is no obstacle and moves no other. Where H is not
    positive definite at that damping, ten times as much is tried, up to the whole mean diagonal.
    """
    hessian = hessian.double()
    if not hessian.isfinite().all():
        raise ModelError(
            f"{name}: the calibration inputs hold NaN or infinity; check the weights and the calibration text"
        )
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), dtype=torch.float64)
    damping = dampening_frac
    while True:
        damped = hessian + torch.diag(torch.where(dead, mean, 0) + damping * mean)
        upper = _invert_upper(damped)
        if upper is not None:
            return Factor(upper, damped, dead, damping)
        if damping >= 1:
            raise ModelError(
                f"{name}: the Hessian of its calibration inputs is not positive definite even with its mean "
                f"diagonal added; raise dampening_frac (it is {dampening_frac}) or calibrate on more text"
            )
        damping = min(1.0, max(10 * damping, 1e-4))


def factor_inputs(chunks: list[Tensor], dampening_frac: float, name: str) -> Factor:
    """The factor of the inputs [T, C] of a linear."""
    hessian = Hessian(chunks[0].shape[1])
    for x in chunks:
        hessian.add(x)
    return factor_hessian(hessian.mean(), dampening_frac, name)


def _invert_upper(matrix: Tensor) -> Tensor | None:
    """U with Uᵀ U = matrix⁻¹, or None where the matrix is not positive definite.

    With rows and columns in reverse, a lower Cholesky factor becomes an upper one: matrix = A Aᵀ, and U =
    A⁻¹. This takes one factorization and no explicit inverse, so it loses the least accuracy.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if info:
        return None
    upper = lower.flip(0, 1)
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(matrix), dtype=matrix.dtype), upper=True)
    return inverse if inverse.isfinite().all() else None


@dataclass(frozen=True)
class Pruned:
    """One matrix after the sweep, or after a refit."""

    weight: Tensor  # [R, C]; exact zeros where pruned, on the int8 grid where a scale was given
    loss: float  # ½ tr(ΔW H_damped ΔWᵀ) as the sum of what the steps cost and gained
    trace: float  # the same, computed from the result; they agree to rounding, or the steps are wrong
    sweep_loss: float | None = None  # where the weight was refit since: the loss before


def prune_matrices(
    weights: list[Tensor],
    factor: Factor,
    structure: MaskStructure,
    scales: list[Tensor] | None = None,
    masks: list[Tensor] | None = None,
) -> list[Pruned]:
    """Prune matrices [R_n, C] that share their input (hence H), each to its own exact sparsity, in one sweep.

    Unstructured: the mask of each block of `block_size` columns is chosen when the sweep reaches the block,
    over all rows of a matrix; the blocks' counts add up to round(sparsity · R · C). N:M: the mask of each M
    columns is chosen when the sweep reaches them, row by row. Either way on the weights as updated so far, by
    w² / U_ii².

    `masks` ([R_n, C] bool, True where pruned) are taken as they are instead of being chosen.

    With `scales` ([R_n] each), what is kept is also rounded to the grid int8 · scale, and the rounding error
    is made up for like the pruning error. The arithmetic is in the dtype of the weights.
    """
    round_column = None if scales is None else _rounder(torch.cat(scales).to(weights[0].dtype))
    return _sweep(weights, factor, structure, round_column, masks)


def round_matrices(weights: list[Tensor], factor: Factor, round_column: "RoundColumn") -> list[Pruned]:
    """The same sweep with nothing pruned: every column is rounded, and the columns behind it make up for the
    error (GPTQ, Frantar et al., arXiv 2210.17323).

    `round_column` gets the number of a column and its values, of all matrices [sum of R_n] one after another.
    """
    masks = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    return _sweep(weights, factor, MaskStructure(0.0), round_column, masks)


RoundColumn = Callable[[int, Tensor], Tensor]


def _sweep(
    weights: list[Tensor],
    factor: Factor,
    structure: MaskStructure,
    round_column: RoundColumn | None,
    masks: list[Tensor] | None,
) -> list[Pruned]:
    rows = [len(weight) for weight in weights]
    # Channel-major: a column of W, which is what every step works on, is contiguous.
    before = torch.cat(weights).T.contiguous()
    before[factor.dead] = 0
    work = before.clone()
    upper = factor.upper.to(work.dtype)
    given = None if masks is None else torch.cat(masks).T
    losses = torch.zeros(work.shape[1], dtype=torch.float64)
    for start in range(0, len(work), structure.block_size):
        stop = min(start + structure.block_size, len(work))
        errors = _sweep_block(
            work[start:stop],
            upper[start:stop, start:stop],
            structure,
            rows,
            start,
            round_column,
            None if given is None else given[start:stop],
        )
        work[stop:] -= upper[start:stop, stop:].T @ errors
        losses += errors.double().square().sum(0) / 2
    traces = half_traces(work - before, factor)
    return [
        Pruned(weight.T.contiguous(), float(loss.sum()), float(trace.sum()))
        for weight, loss, trace in zip(
            work.split(rows, 1), losses.split(rows), traces.split(rows), strict=True
        )
    ]


def half_traces(change: Tensor, factor: Factor) -> Tensor:
    """½ δ H_damped δᵀ of each row's change δ; change [C, R] → [R]."""
    return (change * (factor.damped.to(change.dtype) @ change)).sum(0) / 2


def _sweep_block(
    block: Tensor,
    upper: Tensor,
    structure: MaskStructure,
    rows: list[int],
    start: int,
    round_column: RoundColumn | None,
    given: Tensor | None,
) -> Tensor:
    """Sweep the columns of one block [B, R] in place; return the scaled errors (w - ŵ) / U_ii [B, R] for the
    rest."""
    diagonal = upper.diagonal()
    errors = torch.empty_like(block)
    pruned = torch.empty_like(block, dtype=torch.bool)
    if given is not None:
        pruned.copy_(given)
    elif structure.group is None:
        scores = (block / diagonal[:, None]).square()
        for part, mask in zip(scores.split(rows, 1), pruned.split(rows, 1), strict=True):
            before, after = (
                round(structure.sparsity * part.shape[1] * c) for c in (start, start + len(block))
            )
            mask.copy_(choose_smallest(part, after - before))
    panel = structure.group or 1
    panel *= max(1, PANEL // panel)
    for first in range(0, len(block), panel):
        stop = min(first + panel, len(block))
        for i in range(first, stop):
            if given is None and structure.group and i % structure.group == 0:
                group = slice(i, i + structure.group)
                scores = (block[group] / diagonal[group, None]).square()
                pruned[group] = choose_n_of_m(scores, structure.pruned)
            column = block[i]
            kept = column if round_column is None else round_column(start + i, column)
            kept = kept.masked_fill(pruned[i], 0.0)
            error = torch.sub(column, kept, out=errors[i]).div_(diagonal[i])
            block[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
            column.copy_(kept)
        block[stop:] -= upper[first:stop, stop:].T @ errors[first:stop]
    return errors


def _rounder(scale: Tensor) -> RoundColumn:
    """Round to the nearest of the grid int8 · scale, |int8| ≤ 127."""
    return lambda _, column: torch.round(column / scale).clamp_(-127, 127).mul_(scale)
