"""Refit what a mask has left: each row's kept weights become the least-squares optimum on the calibration
data.

The column sweep makes up for a pruned weight only in the columns behind it, so what it leaves is worse than
the best that its mask allows, by a fifth to a third of the loss. That best solves, for each row, a system in
H restricted to the kept channels; here by conjugate gradients (Hestenes and Stiefel, 1952) with the diagonal
of H as preconditioner, for all rows side by side: every step is one product with H, whatever the masks.
"""

import torch
from torch import Tensor

from .masks import MaskStructure
from .sparsegpt import Factor, Pruned, half_traces, prune_matrices

STEPS = 32


def refit_matrices(
    dense: list[Tensor],
    swept: list[Pruned],
    factor: Factor,
    structure: MaskStructure,
    scales: list[Tensor] | None = None,
) -> list[Pruned]:
    """Refit matrices [R_n, C] that share their input, from what the sweep made of `dense`; zeros stay.

    With `scales` ([R_n] each), the refit weights are swept once more, under the masks that they have, onto
    the grid int8 · scale.
    """
    before = torch.cat(dense).T.contiguous()
    before[factor.dead] = 0
    kept = torch.cat([result.weight for result in swept]).T.contiguous()
    refit, gains = refit_rows(before, kept, factor)
    rows = [len(weight) for weight in dense]
    weights = [part.T.contiguous() for part in refit.split(rows, 1)]
    losses = [result.loss - float(gain.sum()) for result, gain in zip(swept, gains.split(rows), strict=True)]
    if scales is not None:
        masks = [weight == 0 for weight in weights]
        onto = prune_matrices(weights, factor, structure, scales, masks)
        # |refit - dense + change|² in the norm of H. The product is 0 at the optimum.
        change = torch.cat([result.weight for result in onto]).T - refit
        products = ((factor.damped.to(refit.dtype) @ (refit - before)) * change).sum(0).split(rows)
        losses = [
            loss + float(product.sum()) + result.loss
            for loss, product, result in zip(losses, products, onto, strict=True)
        ]
        weights = [result.weight for result in onto]
    traces = half_traces(torch.cat(weights).T - before, factor).split(rows)
    return [
        Pruned(weight, loss, float(trace.sum()), result.loss)
        for weight, loss, trace, result in zip(weights, losses, traces, swept, strict=True)
    ]


def refit_rows(dense: Tensor, pruned: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """Move the entries of `pruned` [C, R] that are not zero towards where each row's ½ δ H_damped δᵀ is
    least, with δ its difference from `dense` [C, R]. Returns them, in the dtype of `pruned`, and by how much
    each row's value fell, float64 [R]."""
    damped, kept = factor.damped.to(pruned.dtype), pruned != 0
    tiny = torch.finfo(pruned.dtype).tiny  # where a row is at its optimum, 0 / tiny makes no step
    inverse = 1 / damped.diagonal()[:, None]
    refit, gains = pruned.clone(), torch.zeros(pruned.shape[1], dtype=torch.float64)
    descent = -(damped @ (pruned - dense)) * kept
    direction = inverse * descent
    slope = (descent * direction).sum(0)
    for _ in range(STEPS):
        curved = (damped @ direction) * kept
        length = slope / (direction * curved).sum(0).clamp_min(tiny)
        refit += length * direction
        gains += (length * slope).double() / 2
        descent -= length * curved
        preconditioned = inverse * descent
        steeper = (descent * preconditioned).sum(0)
        direction = preconditioned + steeper / slope.clamp_min(tiny) * direction
        slope = steeper
    return refit, gains
