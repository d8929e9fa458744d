"""Peak resident memory of a process that opens a bundle and decodes, against what it cannot do without: the
weights of its engines and their caches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import onnx
import typer
from draftsmith.speculate.bundle import load
from draftsmith.speculate.levels import TARGET
from draftsmith.speculate.manifest import EngineEntry
from draftsmith.speculate.onnx_engine import find_library
from engines import num_bytes
from measure import print_table

MODES = {"plain": "none", "speculative": "auto"}
PROMPT_TOKENS = 128
PROGRAM = Path(__file__).with_name("decode_once.py")
MiB = 1 << 20


def main(
    bundle: Path,
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    program: Annotated[Path | None, typer.Option(help="docs/stream.c, compiled")] = None,
) -> None:
    """Print peak, weights, caches and the ratio for plain and speculative decoding, and of a C program that
    drafts with int8. The screens of float heads, a copy more, are not among the weights."""
    entries = load(bundle).manifest.engines
    found = {mode: run_python(bundle, speculate, new_tokens) for mode, speculate in MODES.items()}
    if program is not None:
        found["in C"] = run_program(program, bundle, entries[TARGET], new_tokens)
    lines = []
    for mode, row in found.items():
        engines = [entries[name] for name in [TARGET, *row["ladder"]] if name in entries]
        weights = sum(weight_bytes(bundle / entry.graph) for entry in engines if not entry.skips)
        own = [entry for entry in engines if not (entry.skips or entry.shares_cache)]
        caches = sum(cache_bytes(entry, PROMPT_TOKENS + new_tokens) for entry in own)
        sizes = [row["before"], row["peak"], row["anonymous"], weights, caches]
        ratio = row["peak"] / (weights + caches)
        lines.append([mode, *(f"{size / MiB:.0f}" if size else "" for size in sizes), f"{ratio:.2f}"])
    print(f"MiB; {PROMPT_TOKENS} tokens of prompt, {new_tokens} new ones")
    print_table(
        ["decoding", "before opening", "peak", "of it anonymous", "weights", "caches", "x weights + caches"],
        lines,
    )


def run_python(bundle: Path, speculate: str, new_tokens: int) -> dict:
    arguments = [str(bundle), speculate, str(PROMPT_TOKENS), str(new_tokens)]
    return json.loads(subprocess.check_output([sys.executable, str(PROGRAM), *arguments]))


def run_program(program: Path, bundle: Path, target: EngineEntry, new_tokens: int) -> dict:
    """The kernel says the peak of a child that has ended, and no more."""
    words = [find_library(), bundle, target.max_seq_len, new_tokens, -1, *[1] * PROMPT_TOKENS]
    child = subprocess.Popen([program, *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{program} failed")
    return {"before": 0, "peak": used.ru_maxrss << 10, "anonymous": 0, "ladder": ["suffix", "int8"]}


def weight_bytes(graph: Path) -> int:
    initializers = onnx.load(graph, load_external_data=False).graph.initializer
    return sum(num_bytes(tensor) for tensor in initializers if ".screen" not in tensor.name)


def cache_bytes(entry: EngineEntry, slots: int) -> int:
    element = {"float32": 4, "bfloat16": 2}[entry.kv_cache_dtype]
    return element * 2 * entry.num_layers * entry.num_kv_heads * entry.head_dim * slots


if __name__ == "__main__":
    typer.run(main)
