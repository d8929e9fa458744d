"""Results of stages on disk, found by the content of what they were made from.

    stages/<stage>-<label>-<first 12 digits of the key>/
        output/       what the stage made
        stage.json    its full key, what went into the key, and size, time and hash of every file
    work/<key>/       of a stage under way: the layers it has finished survive a crash
    locks/<key>       held while a stage is made
    providers/        engines that ONNX Runtime's providers build of a bundle's graphs at the first call

Nothing is at its final place before it is whole. No file is forced to disk: one that a power cut truncated no
longer has its recorded size, so it is found damaged and made again.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..speculate.folders import default_root
from .errors import RecipeError
from .hashing import FileHashes, hash_file, hash_json, list_files, write_json

Record = dict[str, Any]  # what goes into a key: JSON data
Make = Callable[[Path, Path], dict]  # (empty output folder, work folder) → the stage's report

IN_USE = "in-use"


@dataclass(frozen=True)
class Entry:
    """A finished stage."""

    path: Path
    key: str
    stage: str
    label: str
    record: Record
    content: str  # hash over the sorted (relative path, SHA-256) of its files
    files: dict[str, dict]  # relative path → {"sha256", "size", "mtime_ns"}
    report: dict
    seconds: float
    created: str

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def size(self) -> int:
        return sum(file["size"] for file in self.files.values())

    @classmethod
    def read(cls, path: Path) -> "Entry":
        """Raises OSError, ValueError or TypeError where `path` is no entry of this version."""
        return cls(path, **json.loads((path / "stage.json").read_text(encoding="utf-8")))

    def find_damage(self) -> str:
        """What is wrong with its files, or "". One whose size and time are as recorded is taken as it is."""
        try:
            found = list_files(self.output)
        except OSError as error:
            return str(error)
        if found.keys() != self.files.keys():
            changed = sorted(found.keys() ^ self.files.keys())
            return f"{changed[0]} is {'new' if changed[0] in found else 'gone'}"
        for name, stat in found.items():
            known = self.files[name]
            if (stat.st_size, stat.st_mtime_ns) == (known["size"], known["mtime_ns"]):
                continue
            if hash_file(self.output / name) != known["sha256"]:
                return f"{name} is not what was written"
        return ""


class Cache:
    def __init__(self, root: Path | None = None) -> None:
        """Raises RecipeError where the cache folder cannot be made."""
        self.root = (root or default_root()).absolute()
        self.stages, self.work, self._locks = (self.root / name for name in ("stages", "work", "locks"))
        self.models = self.root / "models"  # as downloaded
        try:
            for folder in (self.stages, self.work, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
            tag = self.root / "CACHEDIR.TAG"  # backup programs pass over folders with this file
            if not tag.exists():
                tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
        except OSError as error:
            raise RecipeError(
                f"no cache at {self.root} ({error}); set DRAFTSMITH_CACHE to a folder"
            ) from None
        self.file_hashes = FileHashes(self.root / "files.json")

    def entries(self, stage: str = "*") -> list[Entry]:
        """Finished stages, the latest first."""
        found = []
        for path in self.stages.glob(f"{stage}-*"):
            try:
                found.append(Entry.read(path))
            except (OSError, ValueError, TypeError):
                continue  # of another version, or being removed
        return sorted(found, key=lambda entry: entry.created, reverse=True)

    def find(self, record: Record) -> tuple[Entry | None, str]:
        """The entry with exactly this record, or None and what is wrong with the one that there is."""
        key = hash_json(record)
        for path in self.stages.glob(f"{record['stage']}-*{key[:12]}"):
            try:
                entry = Entry.read(path)
            except (OSError, ValueError, TypeError):
                return None, f"{path.name} cannot be read"
            if entry.key == key:
                damage = entry.find_damage()
                return (None, f"damaged: {damage}") if damage else (entry, "")
        return None, ""

    def make(self, record: Record, label: str, make: Make) -> Entry:
        """Run `make` and keep its output. The caller holds the lock of the record."""
        key = hash_json(record)
        work, started = self.work / key, time.monotonic()
        entry, layers = work / "entry", work / "layers"
        shutil.rmtree(entry, ignore_errors=True)  # half made by a run that was killed
        (entry / "output").mkdir(parents=True)
        layers.mkdir(exist_ok=True)
        report = make(entry / "output", layers)
        files = {
            name: {
                "sha256": hash_file(entry / "output" / name),
                "size": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
            }
            for name, stat in list_files(entry / "output").items()
        }
        data = {
            "key": key,
            "stage": record["stage"],
            "label": label,
            "record": record,
            "content": hash_json({name: file["sha256"] for name, file in files.items()}),
            "files": files,
            "report": report,
            "seconds": round(time.monotonic() - started, 3),
            "created": datetime.now(UTC).isoformat(),
        }
        write_json(entry / "stage.json", data)
        for number, old in enumerate(self.stages.glob(f"{record['stage']}-*{key[:12]}")):
            old.rename(work / f"replaced-{number}")
        final = self.stages / "-".join(filter(None, (record["stage"], label, key[:12])))
        entry.rename(final)
        shutil.rmtree(work, ignore_errors=True)
        return Entry.read(final)

    def leftovers(self) -> list[Path]:
        """Work folders of builds that did not end well, and entries that cannot be read."""
        known = {entry.path for entry in self.entries()}
        return [*self.work.iterdir(), *(path for path in self.stages.iterdir() if path not in known)]

    @contextmanager
    def lock(self, record: Record, waiting: Callable[[], None]) -> Iterator[None]:
        """Only one process makes what `record` describes; `waiting` is called if another one is at it."""
        with _flock(self._locks / hash_json(record), fcntl.LOCK_EX, waiting):
            yield

    def drop_locks(self) -> None:
        """Only where no other process uses the cache: a lock that is waited for must stay where it is."""
        for path in self._locks.iterdir():
            if path.name != IN_USE:
                path.unlink()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While any process is in here, nothing is collected."""
        with _flock(self._locks / IN_USE, fcntl.LOCK_SH, lambda: None):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises RecipeError while a build uses the cache."""

        def refuse() -> None:
            raise RecipeError(f"a build is using the cache {self.root}; try again when it has ended")

        with _flock(self._locks / IN_USE, fcntl.LOCK_EX, refuse):
            yield


@contextmanager
def _flock(path: Path, mode: int, waiting: Callable[[], None]) -> Iterator[None]:
    # The kernel drops the lock when the process ends, however it ends.
    with path.open("w") as file:
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, mode)
        yield
