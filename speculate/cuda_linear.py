"""Linear layers of few rows on a GPU's tensor cores, with dense weights or two of every four.

`native/cuda/draftsmith_cuda.h` says what is computed, `native/cuda/fragments.h` how weights are packed.
"""

from typing import Literal

import numpy as np

from . import cuda

Format = Literal["int8", "int8_2_4", "float16", "float16_2_4"]
FORMATS: tuple[Format, ...] = ("int8", "int8_2_4", "float16", "float16_2_4")  # in the order of the header
MOST_ROWS = 32

_OUTPUTS = 16
_INPUTS = {"int8": 32, "int8_2_4": 64, "float16": 16, "float16_2_4": 32}


def pack(weight: np.ndarray, format: Format) -> np.ndarray:
    """[N, K] int8 or float16 → the bytes that the kernels read. Needs no GPU.

    Raises ValueError for another type, for sizes that are no multiples of what a product takes, and where a
    2:4 weight has more than two nonzeros in a group of four inputs.
    """
    wanted = np.dtype(format.partition("_")[0])
    if weight.dtype != wanted:
        raise ValueError(f"{format} weights must be {wanted}, not {weight.dtype}")
    n, k = weight.shape
    if n % _OUTPUTS or k % _INPUTS[format]:
        raise ValueError(
            f"{format} weights take outputs in multiples of {_OUTPUTS} and inputs of {_INPUTS[format]}, "
            f"not {n} x {k}"
        )
    if format.endswith("2_4") and (np.count_nonzero(weight.reshape(n, -1, 4), axis=2) > 2).any():
        raise ValueError("more than two nonzero weights in a group of four inputs")
    ffi, lib = cuda.open_library()
    number = FORMATS.index(format)
    packed = np.empty(lib.ds_cuda_packed_size(number, n, k), np.uint8)
    source = np.ascontiguousarray(weight)
    pointers = [ffi.cast("void *", array.ctypes.data) for array in (source, packed)]
    cuda.call("ds_cuda_pack", number, n, k, *pointers)
    return packed


class Linear:
    """A packed weight [N, K] on the device, and for int8 a scale of each output."""

    def __init__(
        self, weight: np.ndarray, format: Format, stream: cuda.Stream, scale: np.ndarray | None = None
    ) -> None:
        self._format, self._stream = FORMATS.index(format), stream
        self.n, self.k = weight.shape
        self.is_int8 = format.startswith("int8")
        if self.is_int8 != (scale is not None):
            raise ValueError(
                f"{format} weights take {'a scale' if self.is_int8 else 'no scale'} of each output"
            )
        packed = pack(weight, format)
        self.num_bytes = packed.nbytes
        self._packed = cuda.Buffer(packed.nbytes).write(packed, stream)
        self._scale = None
        if scale is not None:
            scale = np.ascontiguousarray(scale, np.float32)
            self._scale = cuda.Buffer(scale.nbytes).write(scale, stream)
        stream.wait()  # what is written must stay until then

    def multiply(
        self, x: cuda.Buffer, num_rows: int, y: cuda.Buffer, row_scale: cuda.Buffer | None = None
    ) -> None:
        """Queue y = x W^T, float32 [num_rows, N], of at most `MOST_ROWS` rows x [num_rows, K] of the weight's
        type. For int8, times the scales of the rows, float32 [num_rows], and of the outputs."""
        ffi = cuda.open_library()[0]

        def pointer(buffer: cuda.Buffer | None, kind: str) -> object:
            return ffi.NULL if buffer is None else ffi.cast(kind, buffer.at())

        weight = (self._format, self.n, self.k, self._packed.at(), pointer(self._scale, "float *"))
        rows = (num_rows, x.at(), pointer(row_scale, "float *"))
        cuda.call("ds_cuda_linear", *weight, *rows, pointer(y, "float *"), self._stream.handle)
