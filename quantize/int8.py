"""Symmetric int8: one scale a row of a weight, w ≈ int8 · scale with |int8| ≤ 127."""

import torch
from torch import Tensor

LIMIT = 127


def row_scale(weight: Tensor) -> Tensor:
    """Scale float32 [N] that just fits each row of a weight [N, K]; 1 for a row of zeros."""
    scale = weight.float().abs().amax(dim=1) / LIMIT
    return torch.where(scale > 0, scale, 1.0)


def to_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest int8 [N, K], half to even. Exact for a weight that is on the grid already."""
    return torch.round(weight.float() / scale[:, None]).clamp_(-LIMIT, LIMIT).to(torch.int8)


def pack_int8(name: str, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors by which a checkpoint holds a quantized linear."""
    return {f"{name}.weight": to_int8(weight, scale), f"{name}.weight_scale": scale}


def is_int8(tensors: dict[str, Tensor], name: str) -> bool:
    return tensors[f"{name}.weight"].dtype == torch.int8
