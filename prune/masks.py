"""Which weights to prune: exactly k of a set, or exactly N of every M along the input channels.

Scores and masks here are channel-major, [C, R] with C input channels and R rows (output channels), the layout
in which the column sweep of `sparsegpt.py` runs. In a mask, True means pruned; of equal scores the first is
pruned.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.errors import ModelError


@dataclass(frozen=True)
class MaskStructure:
    """`sparsity` of the weights anywhere (`group` is None), or `pruned` of each `group` consecutive input
    channels; and how many columns the sweep takes at a time."""

    sparsity: float
    pruned: int = 0
    group: int | None = None
    block_size: int = 128

    @classmethod
    def parse(cls, mask_structure: str, sparsity: float, block_size: int = 128) -> "MaskStructure":
        """Read "unstructured" or "N:M" (N kept of M, as in "2:4"); N:M settles the sparsity by itself."""
        if block_size < 1:
            raise ModelError(f"block_size is {block_size}; it must be at least 1")
        if mask_structure == "unstructured":
            if not 0.0 <= sparsity < 1.0:
                raise ModelError(f"sparsity is {sparsity}; it must be in [0, 1)")
            return cls(sparsity, block_size=block_size)
        match = re.fullmatch(r"(\d+):(\d+)", mask_structure)
        if not match:
            raise ModelError(
                f"mask_structure is {mask_structure!r}; it must be 'unstructured' or 'N:M' such as '2:4'"
            )
        kept, group = int(match[1]), int(match[2])
        if not 0 < kept < group:
            raise ModelError(
                f"mask_structure is {mask_structure!r}: it must keep between 1 and M - 1 of M weights"
            )
        if block_size % group:
            raise ModelError(
                f"block_size is {block_size}; mask_structure {mask_structure} needs a multiple of {group}"
            )
        return cls(1 - kept / group, group - kept, group, block_size)

    def check_width(self, width: int, name: str) -> None:
        if self.group and width % self.group:
            raise ModelError(
                f"{name} has {width} input channels, which mask_structure does not divide into groups of "
                f"{self.group}; add it to `ignore` or set mask_structure to 'unstructured'"
            )


def choose_smallest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly the `count` smallest scores of the whole tensor."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    threshold = float(
        np.partition(flat.numpy(), count - 1)[count - 1]
    )  # ten times faster than torch's kthvalue
    mask = flat < threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def choose_n_of_m(scores: Tensor, pruned: int) -> Tensor:
    """Mask of the `pruned` smallest scores of each column of scores [M, R]."""
    order = torch.from_numpy(np.argsort(scores.numpy(), axis=0, kind="stable"))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order[:pruned], True)
