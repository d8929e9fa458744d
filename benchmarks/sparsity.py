"""Whether zeros pay: one call of one row of the sparse engines against the dense one, in turn, and the proof
that a sparse layout says what the dense layout of the same zeros says, bit for bit.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from draftsmith.speculate.onnx_engine import OnnxRuntime, default_threads
from engines import CONTEXT, fill_cache, find_graphs, native_call, open_engine, read_work, some_tokens
from measure import print_table, ratios, spread, time_in_turn
from random_llama import SPARSITIES, write_engines

DENSE = "w8a8"
SPARSE = [name for name, sparsity in SPARSITIES.items() if sparsity and sparsity != "4 bits"]
CHECKED_LAYERS = 2


def main(
    folder: Annotated[Path, typer.Argument(help="engines, as random_llama.py writes them")],
    shape: Annotated[str, typer.Option(help="of the engines that are compared bit for bit")] = "llama-1b",
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
    check: Annotated[bool, typer.Option(help="compare logits (builds engines of two layers)")] = True,
) -> None:
    """Print the time of one row against dense."""
    found = find_graphs(folder, [])
    sparse = [name for name in SPARSE if name in found]
    graphs = find_graphs(folder, [DENSE, *sparse])
    runtime = OnnxRuntime(threads)
    same = {name: str(has_same_logits(name, shape, runtime)) if check else "-" for name in sparse}
    engines = {name: open_engine(name, graph, runtime) for name, graph in graphs.items()}
    for engine in engines.values():
        fill_cache(engine, 1)
    token = some_tokens(engines[DENSE], 1)
    calls = {name: native_call(engine, token) for name, engine in engines.items()}
    times = time_in_turn(calls, rounds)
    size = {name: read_work(graph).weight_bytes for name, graph in graphs.items()}
    print(f"{threads} threads, {runtime.isa}, 1 row, {CONTEXT} tokens in the cache, {rounds} rounds")
    print_table(
        ["engine", "ms", "x dense", "bytes x dense", "same logits"],
        [
            [
                name,
                spread(times[name]),
                spread(ratios(times[name], times[DENSE])),
                f"{size[name] / size[DENSE]:.2f}",
                same.get(name, ""),
            ]
            for name in engines
        ],
    )
    if "False" in same.values():
        raise SystemExit(1)


def has_same_logits(name: str, shape: str, runtime: OnnxRuntime) -> bool:
    """Of the sparse layout and of the dense layout of the same weights, for a prompt, 1 row and 8 rows."""
    logits = []
    for layout in (None, "int8"):
        with TemporaryDirectory() as folder:
            graph = write_engines(Path(folder), [name], shape, CHECKED_LAYERS, layout)[name]
            engine = open_engine(name, graph, runtime)
            fill_cache(engine, 8)
            tokens = some_tokens(engine, 8)
            logits.append([engine.forward(tokens[:rows], CONTEXT).copy() for rows in (1, 8)])
    finite = all(np.isfinite(one).all() and one.std() > 0 for one in logits[0])
    return finite and all(np.array_equal(one, other) for one, other in zip(*logits, strict=True))


if __name__ == "__main__":
    typer.run(main)
