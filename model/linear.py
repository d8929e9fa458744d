"""A linear layer, in floating point or over quantized rows with weights of 8 or 4 bits."""

from functools import cache

import torch
from torch import Tensor, _int_mm, nn  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F

INT4_GROUP = 32  # input channels that share a grid


class Linear(nn.Module):
    """``y = x Wᵀ + b`` with W [N, K] in the arithmetic dtype or, where the weight is int8, the dynamic W8A8
    law:

    every token row x gets its own scale s = max|x| / 127 (1 for a row of zeros), and
    ``y = s · weight_scale · (clamp(round(x / s)) Wᵀ) + b``. Rounding is half to even and the integer product
    is exact, so a row's result does not depend on the rows beside it.

    Where the weight is uint8, the W4A8 law: rows as above, ``y = s · (clamp(round(x / s)) Ŵᵀ) + b`` with Ŵ
    what `expand_int4` makes of the weight and its grids. `weight` then holds Ŵ, in float32.
    """

    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, name: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.name, self.dtype = name, dtype
        self.load(tensors)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take ``{name}.weight`` and, if any, ``.bias``, ``.weight_scale`` and ``.weight_grid`` in place of
        what it has."""
        weight, bias = tensors[f"{self.name}.weight"], tensors.get(f"{self.name}.bias")
        scale, grid = tensors.get(f"{self.name}.weight_scale"), tensors.get(f"{self.name}.weight_grid")
        self.is_quantized = not weight.is_floating_point()
        if grid is not None:
            weight = expand_int4(weight, grid)
        elif not self.is_quantized:
            weight = weight.to(self.dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", None if scale is None else scale.float())
        self.register_buffer("bias", None if bias is None else bias.to(self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], same dtype."""
        if not self.is_quantized:
            return F.linear(x, self.weight, self.bias)
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        if self.weight_scale is None:
            y = (rows.float() @ self.weight.T) * scale
        else:
            y = multiply_int8(rows, self.weight) * (scale * self.weight_scale)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] → (int8 [M, K], scale float32 [M, 1]), one symmetric scale a row."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.round(x / scale).clamp(-127, 127).to(torch.int8), scale


def expand_int4(weight: Tensor, grid: Tensor) -> Tensor:
    """step · u + base, float32 [N, K], of weights u uint8 [N, K] of 0 to 15. `grid` [N, ceil(K / 32), 2] has
    the step and the base of every 32 of them."""
    step, base = spread_grid(grid, weight.shape[1])
    return weight * step + base


def spread_grid(grid: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Step and base of every weight, float32 [N, K] each."""
    step, base = grid.float().repeat_interleave(INT4_GROUP, dim=1)[:, :width].unbind(-1)
    return step, base


def multiply_int8(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] · b [N, K]ᵀ, both int8, summed exactly and rounded once → float32 [M, N]."""
    if a.shape[1] > 1 and _int_mm_is_exact():  # for K = 1 torch 2.13 returns memory that it has not written
        return _int_mm(a, b.T).float()
    return (a.double() @ b.double().T).float()


@cache
def _int_mm_is_exact() -> bool:
    """Without VNNI, integer kernels may add pairs of products in 16 bits, which saturates at full scale."""
    full = torch.full((16, 64), -127, dtype=torch.int8)
    try:
        return bool((_int_mm(full, full.T) == 127 * 127 * 64).all())
    except RuntimeError:
        return False
