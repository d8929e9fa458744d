"""Files that a reader finds whole or not at all. Free of torch, for what runs before any model is loaded."""

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def link_file(src: Path, dst: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = dst.with_name(f"{dst.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(src.resolve(), temporary)
    except OSError:
        shutil.copyfile(src, temporary)
    temporary.replace(dst)
