"""Drafters made out of your own language model, and lossless decoding with them.

``draftsmith.load(path)`` opens a bundle. Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsmith.speculate.bundle import load as load  # pyright: ignore[reportMissingImports]
    from draftsmith.speculate.errors import BundleError as BundleError  # pyright: ignore[reportMissingImports]

__version__: str
__all__ = ["BundleError", "__version__", "load"]

_LAZY = {"load": "draftsmith.speculate.bundle", "BundleError": "draftsmith.speculate.errors"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("draftsmith")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'draftsmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
