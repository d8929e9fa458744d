"""Peak resident memory of a process that opens a bundle and decodes, against what it cannot do without: the
weights of its engines and their caches.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import onnx
import typer
from draftsmith.speculate.bundle import load
from draftsmith.speculate.levels import TARGET
from draftsmith.speculate.manifest import EngineEntry
from engines import num_bytes
from measure import print_table

MODES = {"plain": "none", "speculative": "auto"}
PROMPT_TOKENS = 128
PROGRAM = Path(__file__).with_name("decode_once.py")
MiB = 1 << 20


def main(bundle: Path, new_tokens: Annotated[int, typer.Option(min=1)] = 128) -> None:
    """Print peak, weights, caches and the ratio for plain and speculative decoding."""
    entries = load(bundle).manifest.engines
    lines = []
    for mode, speculate in MODES.items():
        arguments = [str(bundle), speculate, str(PROMPT_TOKENS), str(new_tokens)]
        found = json.loads(subprocess.check_output([sys.executable, str(PROGRAM), *arguments]))
        engines = [entries[name] for name in [TARGET, *found["ladder"]] if name in entries]
        weights = sum(weight_bytes(bundle / entry.graph) for entry in engines)
        caches = sum(cache_bytes(entry, PROMPT_TOKENS + new_tokens) for entry in engines)
        sizes = [found["before"], found["peak"], found["anonymous"], weights, caches]
        ratio = found["peak"] / (weights + caches)
        lines.append([mode, *(f"{size / MiB:.0f}" for size in sizes), f"{ratio:.2f}"])
    print(f"MiB; {PROMPT_TOKENS} tokens of prompt, {new_tokens} new ones")
    print_table(
        ["decoding", "before opening", "peak", "of it anonymous", "weights", "caches", "x weights + caches"],
        lines,
    )


def weight_bytes(graph: Path) -> int:
    return sum(map(num_bytes, onnx.load(graph, load_external_data=False).graph.initializer))


def cache_bytes(entry: EngineEntry, slots: int) -> int:
    """float32 keys and values."""
    return 4 * 2 * entry.num_layers * entry.num_kv_heads * entry.head_dim * slots


if __name__ == "__main__":
    typer.run(main)
