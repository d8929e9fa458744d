"""How often the gate is right: runs of a bundle against itself, runs with the target's calls made slower, and
runs beside a busy process.

Every forward call of the target is followed by a busy wait of a share of its own time; the baseline's target
is slowed in the same way, by a share of 0. Each run is a whole gate in this process, bundles opened anew.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from draftsmith.pipeline.gate import Request, gate
from draftsmith.pipeline.recipe import Gate
from draftsmith.speculate.binding import ffi
from draftsmith.speculate.bundle import Bundle, load
from draftsmith.speculate.onnx_engine import OnnxEngine, default_threads
from measure import print_table

OUTCOMES = ("pass", "regression", "cannot tell")
PLACES = ("baseline", "candidate")


def slow_down(engine: OnnxEngine, share: float) -> object:
    """Every call of an engine takes `share` longer. What it returns must live as long as the engine."""
    forward = engine.handle.forward

    def call(*arguments) -> int:
        started = time.perf_counter()
        status = forward(*arguments)
        until = time.perf_counter() + share * (time.perf_counter() - started)
        while time.perf_counter() < until:
            pass
        return status

    engine.handle.forward = slowed = ffi.callback(ffi.typeof(forward), call)
    return slowed


def main(
    bundle: Path,
    itself: Annotated[int, typer.Option(min=0, help="runs against itself")] = 20,
    slowed: Annotated[int, typer.Option(min=0, help="runs with slower target calls")] = 20,
    loaded: Annotated[int, typer.Option(min=0, help="runs beside a busy process on every core")] = 5,
    slowdown: Annotated[float, typer.Option(help="of each target call")] = 0.10,
    seconds: Annotated[float, typer.Option(help="of timing, at most, in each run")] = 75.0,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
    log: Annotated[Path | None, typer.Option(help="JSON lines: runs are added, the table is of all")] = None,
) -> None:
    """Print what each run said, and the table of outcomes."""
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    kinds = ["itself"] * itself + ["slowed"] * slowed + ["loaded"] * loaded
    for kind in kinds:
        with busy_cores() if kind == "loaded" else still():
            result = run_gate(bundle, slowdown if kind == "slowed" else 0.0, seconds, threads)
        latency = [check for check in result["checks"] if check["unit"] == "ms"]
        runs.append({"kind": kind, "outcome": result["outcome"], "seconds": result["seconds"]})
        runs[-1] |= {"trial": result["trial"], "checks": latency}
        print(f"{kind}: {result['outcome']} in {result['seconds']} s", flush=True)
        for check in latency:
            print(f"    {check['name']}: {check['why']}", flush=True)
        if log:
            with log.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    counts = Counter((run["kind"], run["outcome"]) for run in runs)
    print_table(
        ["runs", *OUTCOMES, "longest, s"],
        [
            [
                kind,
                *(str(counts[kind, outcome]) for outcome in OUTCOMES),
                f"{max(run['seconds'] for run in runs if run['kind'] == kind):.0f}",
            ]
            for kind in dict.fromkeys(run["kind"] for run in runs)
        ],
    )


def run_gate(bundle: Path, slowdown: float, seconds: float, threads: int) -> dict:
    """The bundle against itself, under two names."""
    slowed: list[object] = []

    def open_bundle(path: Path, threads: int) -> Bundle:
        opened = load(path, threads)
        share = slowdown if path.name == "candidate" else 0.0
        for name in opened.drafters:  # those in the target's cache are made while it is a plain engine
            opened.engine(name)
        target = opened.engine("target")
        assert isinstance(target, OnnxEngine)
        slowed.append(slow_down(target, share))
        return opened

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in PLACES]
        for path in paths:
            path.symlink_to(bundle.absolute(), target_is_directory=True)
        baseline, candidate = paths
        request = Request(seconds=seconds, threads=threads)
        return gate(candidate, baseline, Gate(), request, open_bundle)


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process on each of our cores that computes without a pause."""
    program = "import os, sys; os.sched_setaffinity(0, [int(sys.argv[1])])\nwhile True: pass"
    cores = sorted(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", program, str(core)]) for core in cores]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def still() -> Iterator[None]:
    yield


if __name__ == "__main__":
    typer.run(main)
