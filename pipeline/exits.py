"""How a command ends: its exit code, and one line for what its user can mend."""

import os
import sys
import traceback
from types import FrameType
from typing import NoReturn

import typer

from ..model.errors import ModelError
from ..speculate.errors import BundleError
from .errors import CheckFailed

FINE, FAILED, UNUSABLE, CANNOT_TELL = 0, 1, 2, 3
INTERRUPTED = 130


def report_error(error: Exception) -> int:
    """Print an error on standard error, its traceback too where that was asked for; returns the exit code."""
    if os.environ.get("DRAFTSMITH_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    code, message = _describe(error)
    print(message, file=sys.stderr)
    return code


def terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal by an exception, so that half-written files are cleared away and locks let go of."""
    print("terminated; finished stages are kept", file=sys.stderr)
    sys.exit(128 + signum)


def _describe(error: Exception) -> tuple[int, str]:
    match error:
        case ModelError() | BundleError():
            return UNUSABLE, _line(error)
        case CheckFailed():
            return FAILED, _line(error)
        case typer.TyperException() if "\n" in error.message:  # no arguments at all: the help itself
            return UNUSABLE, error.message
        case typer.TyperException():
            command = getattr(getattr(error, "ctx", None), "command_path", "draftsmith")
            return UNUSABLE, f"error: {error.format_message()} (see {command} --help)"
        case ModuleNotFoundError(name=str(name)) if not name.startswith("draftsmith"):
            return UNUSABLE, f"error: {name} is not installed: pip install 'draftsmith[build,cpu]'"
        case OSError():
            return CANNOT_TELL, _line(error)
        case MemoryError():
            return CANNOT_TELL, "error: out of memory; finished stages are kept"
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return CANNOT_TELL, f"internal error: {what} (--debug shows where; please report it)"


def _line(error: Exception) -> str:
    return f"error: {' '.join(str(error).split())}"
