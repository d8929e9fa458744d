"""A stage turns input folders and settings into an output folder; a task is one use of it."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cache import Cache, Entry, Record
from .explain import MAX_NAMED, explain_miss
from .hashing import hash_code, hash_function, package_version
from .machine import describe_machine
from .processor import num_threads, vector_extensions
from .progress import Progress, show_progress


@dataclass(frozen=True)
class Call:
    """What a stage gets: folders to read, settings, an empty folder to fill, one that survives a crash."""

    inputs: Mapping[str, Path]
    files: Mapping[str, Path]
    params: Mapping[str, Any]
    out: Path
    work: Path
    progress: Progress


@dataclass(frozen=True)
class Stage:
    """`run` returns a report of what it did, as JSON data. It is pure: it reads nothing but its call."""

    name: str
    run: Callable[[Call], dict]
    code: tuple[str, ...]  # folders and files whose code it runs, beside `run` itself
    packages: tuple[str, ...] = ()
    sums: bool = False  # adds floating-point numbers in an order that threads and vector width decide
    measured: bool = False  # its result holds for this machine only


@dataclass(frozen=True, eq=False)
class Task:
    stage: Stage
    label: str = ""  # for people; not part of the key
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, "Task"] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)  # from outside the cache, by content

    @property
    def name(self) -> str:
        return f"{self.stage.name} {self.label}".strip()


@dataclass(frozen=True)
class Outcome:
    task: Task
    entry: Entry
    hit: bool
    why: str
    seconds: float


def describe_inputs(task: Task, done: Mapping[Task, Entry], cache: Cache) -> Record:
    """Everything that decides the output of a task; its hash is the task's key.

    An input counts by its content and not by its key, so a stage that was made again and came out the same
    changes nothing after it.
    """
    stage = task.stage
    record: Record = {
        "stage": stage.name,
        "params": dict(task.params),
        "inputs": {name: done[source].content for name, source in task.inputs.items()},
        "files": {name: cache.file_hashes.of(path) for name, path in task.files.items()},
        "code": {part: hash_code(part) for part in stage.code} | {"stage": hash_function(stage.run)},
        "packages": {name: package_version(name) for name in stage.packages},
    }
    if stage.sums:
        # A matrix product splits its sums by thread and vector width, and float addition does not associate.
        record["arithmetic"] = {"threads": num_threads(), "vectors": vector_extensions()}
    if stage.measured:
        record["machine"] = {**describe_machine(), "threads": num_threads(), "vectors": vector_extensions()}
    return record


def run_task(
    task: Task,
    done: Mapping[Task, Entry],
    cache: Cache,
    *,
    again: bool = False,
    say: Callable[[str], None],
) -> Outcome:
    """Take the result of `task` from the cache or make it. With `again`, make it in any case."""
    record, started = describe_inputs(task, done, cache), time.monotonic()
    waited = False

    def waiting() -> None:
        nonlocal waited
        waited = True
        say(f"{task.name}: another build is making it; waiting")

    entry, why = (None, "asked for again") if again else cache.find(record)
    if entry is None:
        with cache.lock(record, waiting):
            if not again:  # another build may have made it since
                entry, why = cache.find(record)
            if entry is None:
                why = why or explain_miss(record, task.label, cache.entries(record["stage"]))
                entry = cache.make(record, task.label, lambda out, work: _call(task, done, out, work))
                return Outcome(task, entry, False, why, time.monotonic() - started)
    why = "made by the other build" if waited else _describe_hit(record)
    os.utime(entry.path)  # last used, for the collection of what is not
    return Outcome(task, entry, True, why, time.monotonic() - started)


def _call(task: Task, done: Mapping[Task, Entry], out: Path, work: Path) -> dict:
    if task.stage.sums:
        import torch

        torch.set_num_threads(num_threads())
    inputs = {name: done[source].output for name, source in task.inputs.items()}
    with show_progress(task.name) as progress:
        return task.stage.run(Call(inputs, task.files, task.params, out, work, progress))


def _describe_hit(record: Record) -> str:
    inputs = [*record["inputs"], *record["files"]]
    named = inputs if len(inputs) <= MAX_NAMED else [f"{len(inputs)} inputs"]
    return f"same {', '.join([*named, 'settings', 'code'])}"
