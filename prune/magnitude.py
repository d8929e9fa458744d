"""Magnitude pruning: the baseline that looks at no data."""

import torch
from torch import Tensor

from .masks import MaskStructure, choose_n_of_m, choose_smallest


def prune_by_magnitude(weight: Tensor, structure: MaskStructure) -> Tensor:
    """Zero the smallest |w| of a matrix [R, C]: round(sparsity · R · C) of all, or N of every M along C."""
    scores = weight.abs()
    if structure.group is None:
        mask = choose_smallest(scores, round(structure.sparsity * weight.numel()))
    else:
        groups = scores.reshape(-1, structure.group).T
        mask = choose_n_of_m(groups, structure.pruned).T.reshape(weight.shape)
    return torch.where(mask, 0.0, weight)
