"""The CUDA library (`native/cuda/draftsmith_cuda.h`): device memory, streams, graphs, and what a round does
with logits that stay on the device.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .driver import find_gpus, supported_cuda
from .errors import BundleError

LIBRARY = "libdraftsmith_cuda.so"


def why_no_cuda() -> str:
    """Why CUDA kernels cannot run here, in one line; empty if they can."""
    if not find_library().is_file():
        return "the CUDA kernels are not built: install draftsmith from source where nvcc is on PATH"
    gpus, reason = find_gpus()
    if not gpus:
        return reason
    try:
        has, needs = supported_cuda(), open_library()[1].ds_cuda_runtime_version()
    except (OSError, AttributeError) as error:  # built for another system, or by another version
        return f"the CUDA kernels do not load: {error}; install draftsmith again"
    if has // 1000 < needs // 1000:
        return (
            f"the NVIDIA driver supports CUDA {_name_version(has)} and the CUDA kernels need "
            f"{_name_version(needs)}: install a newer driver"
        )
    return ""


def find_library() -> Path:
    """Where the library is, if it was built."""
    from .native import _cuda_cdefs  # pyright: ignore[reportAttributeAccessIssue] (generated with the wheel)

    return Path(_cuda_cdefs.__file__).with_name(LIBRARY)


@cache
def open_library() -> tuple[Any, Any]:
    """(ffi, lib). Raises BundleError where it is not built."""
    from .native import _cuda_cdefs  # pyright: ignore[reportAttributeAccessIssue]

    if not find_library().is_file():
        raise BundleError(why_no_cuda())
    return _cuda_cdefs.ffi, _cuda_cdefs.ffi.dlopen(str(find_library()))


def call(name: str, *arguments: Any) -> None:
    """Call a function of the header. Raises BundleError with CUDA's words, or MemoryError."""
    ffi, lib = open_library()
    status = getattr(lib, name)(*arguments)
    if status:
        message = f"{name}: {ffi.string(lib.ds_cuda_error_message(status)).decode()}"
        raise MemoryError(message) if status == 2 else BundleError(message)


class Stream:
    """Work on the device in order."""

    def __init__(self) -> None:
        ffi, lib = open_library()
        made = ffi.new("void **")
        call("ds_cuda_create_stream", made)
        self.handle = ffi.gc(made[0], lib.ds_cuda_destroy_stream)

    @property
    def address(self) -> int:
        """As TensorRT and ONNX Runtime take it."""
        return int(open_library()[0].cast("intptr_t", self.handle))

    def wait(self) -> None:
        call("ds_cuda_wait", self.handle)


class Buffer:
    """Memory of the device, freed with the object."""

    def __init__(self, size: int) -> None:
        ffi, lib = open_library()
        self.size = size
        made = ffi.new("void **")
        call("ds_cuda_allocate", made, max(size, 1))
        self.pointer = ffi.gc(made[0], lib.ds_cuda_free)

    @property
    def address(self) -> int:
        return int(open_library()[0].cast("intptr_t", self.pointer))

    def at(self, skip: int = 0) -> Any:
        """The pointer to what follows `skip` bytes."""
        ffi = open_library()[0]
        return ffi.cast("void *", ffi.cast("char *", self.pointer) + skip)

    def write(self, array: np.ndarray, stream: Stream) -> "Buffer":
        """Queue a copy of `array`, which must stay as it is until the stream has got there."""
        assert array.nbytes <= self.size and array.flags.c_contiguous
        call("ds_cuda_copy", self.pointer, _host(array), array.nbytes, stream.handle)
        return self

    def read(self, array: np.ndarray, stream: Stream, skip: int = 0) -> np.ndarray:
        """Queue a copy into `array` of what follows `skip` bytes; there once the stream was waited for."""
        assert skip + array.nbytes <= self.size and array.flags.c_contiguous
        call("ds_cuda_copy", _host(array), self.at(skip), array.nbytes, stream.handle)
        return array


class Graph:
    """Work that was recorded once and is launched as one."""

    def __init__(self, stream: Stream) -> None:
        """Record what is queued on `stream` until `finish`."""
        self.keeps: Any = None  # what must live as long as the recording
        self._stream = stream
        call("ds_cuda_begin_graph", stream.handle)

    def finish(self) -> "Graph":
        ffi, lib = open_library()
        made = ffi.new("void **")
        call("ds_cuda_end_graph", self._stream.handle, made)
        self._handle = ffi.gc(made[0], lib.ds_cuda_destroy_graph)
        return self

    def launch(self) -> None:
        call("ds_cuda_launch_graph", self._handle, self._stream.handle)


def _name_version(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _host(array: np.ndarray) -> Any:
    return open_library()[0].cast("void *", array.ctypes.data)
