"""The native core: `lib` holds the functions of `native/draftsmith.h`, `ffi` makes their arguments."""

import os
from pathlib import Path

import numpy as np

from .errors import BundleError

try:
    from .native import _cdefs  # pyright: ignore[reportAttributeAccessIssue] (generated when the wheel is built)
except ImportError as error:
    raise ImportError(
        "draftsmith's native library is not built; install the package (`pip install .`)"
    ) from error

ffi = _cdefs.ffi
LIBRARY = Path(_cdefs.__file__).with_name("libdraftsmith.so")
# Handles may be freed after the module at interpreter exit, so the library is never unloaded.
lib = ffi.dlopen(str(LIBRARY), os.RTLD_NOW | os.RTLD_NODELETE)


def check(status: int, subject: str = "") -> int:
    """Return `status`, a native function's result, unless it reports an error: that is raised.

    `subject` names the argument that the message is about. Raises MemoryError or BundleError.
    """
    if status >= 0:
        return status
    message = ffi.string(lib.ds_error_message()).decode()
    if subject:
        message = f"{subject}: {message}"
    raise MemoryError(message) if status == lib.DS_ERROR_MEMORY else BundleError(message)


def view(kind: str, array: np.ndarray):
    """A C-contiguous array as a C pointer that keeps it alive, e.g. `view("double[]", laws)`."""
    return ffi.from_buffer(kind, array)
