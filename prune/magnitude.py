"""Magnitude pruning: the baseline that looks at no data."""

import torch
from torch import Tensor

from .masks import MaskStructure, choose_n_of_m, choose_smallest
from .sparsegpt import Factor, Pruned, half_traces


def prune_by_magnitude(weight: Tensor, factor: Factor, structure: MaskStructure) -> Pruned:
    """Zero the smallest |w| of a matrix [R, C]: round(sparsity · R · C) of all, or N of every M along C.
    `factor` serves only to tell the loss."""
    scores = weight.abs()
    if structure.group is None:
        mask = choose_smallest(scores, round(structure.sparsity * weight.numel()))
    else:
        groups = scores.reshape(-1, structure.group).T
        mask = choose_n_of_m(groups, structure.pruned).T.reshape(weight.shape)
    pruned = torch.where(mask, 0.0, weight)
    change = (pruned - weight).T.contiguous()
    change[factor.dead] = 0  # their inputs are zero: whatever they hold, nothing is lost
    loss = float(half_traces(change, factor).sum())
    return Pruned(pruned, loss, loss)
