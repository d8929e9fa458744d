"""Linear layers in the layouts that the native kernels read, so that loading maps them as they are.

`speculate/native/kernels.h` has the layouts. Which one a weight gets is settled by its own zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..speculate import kernels
from .onnx_files import WeightFile

# A bitmask costs an eighth of a byte a weight, and the zeros that it leaves out a little time to put back.
MIN_SPARSITY = 0.3


@dataclass(frozen=True)
class PackedLinear:
    """`{name}.packed` and, if any, `{name}.packed_scale`, `.packed_bias` and `.packed_starts`."""

    name: str
    n: int  # outputs; of a gated one, half of what is packed
    k: int
    format: kernels.Format
    gated: bool
    has_bias: bool

    @property
    def has_scale(self) -> bool:
        return self.format.startswith("int8")


def add_packed(
    file: WeightFile,
    name: str,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    grids: Sequence[Tensor] = (),
    *,
    gated: bool = False,
    layout: kernels.Format | None = None,
) -> PackedLinear:
    """Pack linears [N, K] of one input as one and store it in `file`.

    Weights are int8, with scales [N], uint8 of 4 bits, with grids bfloat16 [N, ceil(K / 32), 2], or floats of
    any dtype. `gated`: they are the gate and the up
    projection of an MLP, whose outputs alternate by blocks of 16. `layout`: by default the one that suits
    the weights' own zeros.
    """

    def joined(parts: Sequence[Tensor]) -> np.ndarray:
        arrays = [_to_numpy(part) for part in parts]
        return kernels.interleave(*arrays) if gated else np.concatenate(arrays)

    weight = joined(weights)
    layout = layout or choose_format(weight)
    packed, starts = kernels.pack(weight, layout, joined(grids) if grids else None)
    file.add(f"{name}.packed", torch.from_numpy(packed.reshape(-1).view(np.uint8)))
    if starts is not None:
        file.add(f"{name}.packed_starts", torch.from_numpy(starts))
    for kind, rows in (("scale", scales), ("bias", biases)):
        if rows:
            padded = np.pad(joined(rows), (0, -len(weight) % kernels.LANES))
            file.add(f"{name}.packed_{kind}", torch.from_numpy(padded))
    n = len(weights[0]) if gated else len(weight)
    return PackedLinear(name, n, weight.shape[1], layout, gated, bool(biases))


def choose_format(weight: np.ndarray) -> kernels.Format:
    """The layout of a weight [N, K]: int8, 4 bits in uint8, float32 or bfloat16 bits (uint16)."""
    match weight.dtype:
        case np.uint8:
            return "int4"
        case np.uint16:
            return "bfloat16"
        case np.float32:
            return "float32"
    kept = np.pad(weight != 0, ((0, 0), (0, -weight.shape[1] % 4)))
    if (kept.reshape(len(kept), -1, 4).sum(axis=-1, dtype=np.uint8) <= 2).all():
        return "int8_2_4"
    return "int8_bitmask" if 1 - kept.mean() >= MIN_SPARSITY else "int8"


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """Integers as they are, bfloat16 as its bits, other floats as float32."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
