"""A linear layer, in floating point or in 8-bit integers."""

from functools import cache

import torch
from torch import Tensor, _int_mm, nn  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F


class Linear(nn.Module):
    """``y = x Wᵀ + b`` with W [N, K] in the arithmetic dtype or, where the weight is int8, the dynamic W8A8
    law:

    every token row x gets its own scale s = max|x| / 127 (1 for a row of zeros), and
    ``y = s · weight_scale · (clamp(round(x / s)) Wᵀ) + b``. Rounding is half to even and the integer product
    is exact, so a row's result does not depend on the rows beside it.
    """

    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, name: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.name, self.dtype = name, dtype
        self.load(tensors)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take ``{name}.weight`` and, if any, ``.bias`` and ``.weight_scale`` in place of what it has."""
        weight, bias = tensors[f"{self.name}.weight"], tensors.get(f"{self.name}.bias")
        scale = tensors.get(f"{self.name}.weight_scale")
        self.register_buffer("weight", weight if weight.dtype == torch.int8 else weight.to(self.dtype))
        self.register_buffer("weight_scale", None if scale is None else scale.float())
        self.register_buffer("bias", None if bias is None else bias.to(self.dtype))

    @property
    def is_quantized(self) -> bool:
        return self.weight.dtype == torch.int8

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], same dtype."""
        if not self.is_quantized:
            return F.linear(x, self.weight, self.bias)
        assert self.weight_scale is not None
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
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
