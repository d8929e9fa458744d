"""A portable graph as a TensorRT engine: built in a process of its own, described by the builder's own log.

TensorRT keeps state for the life of a process and can end it, and its memory is gone only when it does. So it
runs in a child that reads a job, and writes a plan and a report.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from ..model.errors import ModelError
from ..model.progress import Progress, no_progress
from . import build_log
from .capabilities import choose_builder, name_plan
from .portable import PORTABLE, WEIGHTS
from .precision import Precision, list_float_products, list_split_inputs, lower_precision

ENGINES = "engines"  # the folder of plans, in an engine's own

GIB = 2**30
ALIGNMENT = 64  # slots of a cache come in multiples of this
# Peak memory of a build over the size of the weights: 1.5 and 2.3 GB were seen for 195 and 271 MB.
MEMORY_BASE, MEMORY_PER_BYTE = GIB, 6


def build_engine(
    export: Path,
    out: Path,
    *,
    compute_capability: Sequence[str],
    rows: Sequence[int],
    max_seq_len: int,
    precision: Precision = "bfloat16",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Build one plan of the folder `export` (`model.onnx` and its weights) for all of `compute_capability`
    into `out`/engines, and return what a manifest says of it.

    rows: the numbers of tokens that a call can have, each an optimization profile of its own with shapes that
        are fixed, so that each can become one CUDA graph. A call with fewer is filled up.
    max_seq_len: tokens of a sequence; its cache has a few slots more, for the rows that fill up a call.

    Raises ModelError for what no builder here builds, for too little memory, and for what the builder
    refuses.
    """
    builder = choose_builder(compute_capability, precision)
    check_memory((export / WEIGHTS).stat().st_size, available_memory())
    rows = sorted(set(rows))
    num_slots = -(-(max_seq_len + rows[-1] - 1) // ALIGNMENT) * ALIGNMENT
    portable = export / PORTABLE
    plan = out / ENGINES / name_plan(compute_capability)
    plan.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        graph, log = Path(folder, "graph.onnx"), Path(folder, "log.txt")
        graph.write_bytes(lower_precision(portable, precision, num_slots).SerializeToString())
        job = {
            "package": builder,
            "graph": str(graph),
            "portable": str(portable),
            "plan": str(plan),
            "log": str(log),
            "compute_capability": list(compute_capability),
            "rows": rows,
        }
        progress(0, 1, f"TensorRT for {', '.join(compute_capability)}")
        made = _run_child(job, Path(folder))
        progress(1, 1, "TensorRT")
        with log.open(encoding="utf-8") as lines:
            described = build_log.summarize(lines)
    source = onnx.load(portable, load_external_data=False).graph
    products = len(rows) * sum(node.op_type == "MatMul" for node in source.node)
    return {
        "file": plan.relative_to(out).as_posix(),
        "builder": f"{builder} {made.pop('version')}",
        "compute_capability": list(compute_capability),
        "precision": precision,
        "rows": rows,
        "max_seq_len": max_seq_len,
        "num_slots": num_slots,
        "size": plan.stat().st_size,
        **made,
        "matrix_products": {"int8": described.pop("int8_products"), "total": products},
        **described,
        "kept_in_higher_precision": list_float_products(source),
        "inputs_in_two_int8_parts": list_split_inputs(source),
    }


def estimate_memory(weight_bytes: int) -> int:
    """Bytes that a build takes at its peak."""
    return MEMORY_BASE + MEMORY_PER_BYTE * weight_bytes


def check_memory(weight_bytes: int, available: int) -> None:
    """Raises ModelError where a build would not fit."""
    needed = estimate_memory(weight_bytes)
    if needed > available:
        raise ModelError(
            f"building a TensorRT engine of {weight_bytes / GIB:.1f} GiB of weights takes about "
            f"{needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are free here; end other "
            "programs, or build on a larger machine"
        )


def available_memory() -> int:
    """Bytes that a new process can have without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _run_child(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Its report: {"version", "build_seconds", "peak_memory", "kv_cache_updates"}."""
    path, package = folder / "job.json", job["package"]
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", f"{__package__}.tensorrt_builder", str(path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode < 0:
        cause = (
            "which is what a machine out of memory does" if child.returncode == -9 else "a fault of its own"
        )
        raise ModelError(f"{package} ended by signal {-child.returncode}, {cause}")
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        raise ModelError(f"{package} failed: {(child.stderr.strip().splitlines() or ['no word'])[-1]}")
    report = json.loads(lines[-1])
    if "error" in report:
        raise ModelError(
            f"{package}: {report['error']}; without format: tensorrt in export the bundle is for the CPU and "
            "for ONNX Runtime's GPU provider"
        )
    return report
