"""Linear layers in the layouts that the native kernels read, so that loading maps them as they are.

`speculate/native/kernels.h` has the layouts. Which one a weight gets is settled by its own zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..speculate import kernels
from .onnx_files import WeightFile

# A bitmask costs an eighth of a byte a weight, and the zeros that it leaves out a little time to put back.
MIN_SPARSITY = 0.3
MAX_SCREENED_WEIGHT = 2.0**40


@dataclass(frozen=True)
class PackedLinear:
    """`{name}.packed` and, if any, `{name}.packed_scale`, `.packed_bias` and `.packed_starts`."""

    name: str
    n: int  # outputs; of a gated one, half of what is packed
    k: int
    format: kernels.Format
    gated: bool
    has_bias: bool
    num_bytes: int = 0  # of `{name}.packed`
    has_screen: bool = False  # `{name}.screen`, `.screen_scale` and `.screen_error`

    @property
    def screened_bytes(self) -> int:
        """Of its weights, where its screen (`kernels.h`) is read instead in greedy decoding."""
        return self.num_bytes if self.has_screen else 0

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
    return PackedLinear(name, n, weight.shape[1], layout, gated, bool(biases), packed.nbytes)


def add_screen(file: WeightFile, linear: PackedLinear, weight: Tensor) -> PackedLinear:
    """The same linear, of these weights [N, K], with an int8 copy that shows where its largest outputs may be
    (`ds_screen` in kernels.h), where it can have one."""
    if linear.format not in ("float32", "bfloat16") or linear.has_bias or linear.k > kernels.MAX_INT8_INPUTS:
        return linear
    values = weight.float().numpy()
    if not np.abs(values).max() < MAX_SCREENED_WEIGHT:
        return linear
    copy, scale, error = screen(values)
    pad = (0, -len(values) % kernels.LANES)
    file.add(f"{linear.name}.screen", torch.from_numpy(kernels.pack_int8(copy).reshape(-1)))
    file.add(f"{linear.name}.screen_scale", torch.from_numpy(np.pad(scale, pad)))
    file.add(f"{linear.name}.screen_error", torch.from_numpy(np.pad(error, pad)))
    return replace(linear, has_screen=True)


def screen(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [N, K] → its nearest int8 [N, K] by scales float32 [N], and errors float32 [N] so that an
    output w·x is off by at most |x| error: by what the copy rounds, by what two int8 rows leave of x, a
    4·127²-th of |x|√K, and by what sums of K in float32 do."""
    n, k = weight.shape
    largest = np.abs(weight).max(axis=1)
    scale = np.where(largest > 0, np.maximum(largest / 127, 2.0**-100), 1).astype(np.float32)
    copy, error = np.empty((n, k), np.int8), np.empty(n, np.float32)
    for rows in (slice(first, first + 4096) for first in range(0, n, 4096)):
        exact, steps = weight[rows].astype(np.float64), scale[rows, None].astype(np.float64)
        nearest = np.clip(np.round(exact / steps), -127, 127)
        copy[rows] = nearest
        off, size, copied = (
            np.linalg.norm(part, axis=1) for part in (exact - nearest * steps, exact, nearest * steps)
        )
        rest, rounding = 1.01 * k**0.5 / (4 * 127**2), (k + 32) * 2.0**-24
        bound = off + rest * copied + rounding * np.maximum(size, copied)
        # The last thousandth is for the norm of x in float32, the floor for what is lost below its range.
        error[rows] = np.maximum(bound * (1 + 2.0**-10), 2.0**-40)
    return copy, scale, error


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
