"""SHA-256 over everything that a stage reads: settings, files, and the code that runs."""

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]
CODE_SUFFIXES = {".py", ".c", ".h", ".cu", ".cuh", ".so"}


def hash_json(value: Any) -> str:
    """Of canonical JSON: sorted keys, no spaces, no NaN; equal for equal values and for those only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, os.stat_result]:
    """Every file under `folder` by its relative POSIX path, in sorted order."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: files[name].stat() for name in sorted(files)}


@cache
def hash_code(part: str) -> str:
    """Of the source and compiled files of a folder such as "quantize" or a file such as "pipeline/tune.py".

    A compiled library counts by its own bytes as well as by its sources: in a development install either can
    be newer than the other.
    """
    hashes = {}
    for root in map(Path, importlib.import_module(PACKAGE).__path__):
        path = root / part
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.suffix in CODE_SUFFIXES:
                hashes[file.relative_to(root).as_posix()] = hash_file(file)
    if not hashes:
        raise ValueError(f"no code at {part}")
    return hash_json(hashes)


def hash_function(function: Callable) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()


def package_version(name: str) -> str:
    """Installed version, without importing the package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


class FileHashes:
    """Hashes of large files that lie outside the cache, remembered by path, size, time and inode."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> str:
        """Of one file, or of all files of a folder that are not hidden."""
        if path.is_dir():
            names = [
                name for name in list_files(path) if not any(p.startswith(".") for p in Path(name).parts)
            ]
            return hash_json({name: self._of_file(path / name) for name in names})
        return self._of_file(path)

    def _of_file(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(path))
        if known and known[:-1] == stamp:
            return known[-1]
        digest = hash_file(path)
        self._known[str(path)] = [*stamp, digest]
        write_json(self._path, self._known)
        return digest


def write_json(path: Path, data: Mapping | list) -> None:
    """Written beside and renamed into place."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
