"""What one call of an engine costs against the number of its rows, beside the least it could cost.

The floor is the time to read the weights once or to do the multiply-adds of all rows, whichever is longer,
both measured in the same run, in turn with the calls.
"""

from pathlib import Path
from typing import Annotated

import typer
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime, default_threads
from engines import CONTEXT, Work, fill_cache, find_graphs, native_call, open_engine, read_work, some_tokens
from floor import Yardsticks, floors
from measure import print_table, ratios, spread, time_in_turn
from random_llama import write_engines

ROWS = (1, 2, 4, 8, 16, 32)
MiB = 1 << 20


def main(
    path: Annotated[Path, typer.Argument(help="a bundle, or a folder of engines (random_llama.py)")],
    engines: Annotated[list[str] | None, typer.Argument(help="by default all")] = None,
    random: Annotated[str | None, typer.Option(help="first write engines of a shape into the folder")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
) -> None:
    """Print milliseconds a call, x floor and x the engine's own call of one row."""
    if random is not None:
        write_engines(path, engines or ["w8a8"], random)
    graphs = find_graphs(path, engines or [])
    works = {name: read_work(graph) for name, graph in graphs.items()}
    runtime = OnnxRuntime(threads)
    yardsticks = Yardsticks(threads, max(work.weight_bytes for work in works.values()))
    print(
        f"{threads} threads, {runtime.isa}, {CONTEXT} tokens in the cache, {rounds} rounds; median (p10-p90)"
    )
    for name, graph in graphs.items():
        report(name, open_engine(name, graph, runtime), works[name], yardsticks, rounds)


def report(name: str, engine: OnnxEngine, work: Work, yardsticks: Yardsticks, rounds: int) -> None:
    fill_cache(engine, max(ROWS))
    tokens = some_tokens(engine, max(ROWS))
    calls = {rows: native_call(engine, tokens[:rows]) for rows in ROWS}
    times = time_in_turn({**yardsticks.calls(work), **calls}, rounds)
    lines = []
    for rows in ROWS:
        floor, bound = floors(work, rows, {key: times[key] for key in yardsticks.calls(work)})
        lines.append(
            [
                name,
                str(rows),
                spread(times[rows]),
                spread(floor),
                bound,
                spread(ratios(times[rows], floor)),
                spread(ratios(times[rows], times[1])),
            ]
        )
    rate = [work.weight_bytes / milliseconds / 1e6 for milliseconds in times["read"]]
    print(f"\n{name}: {work.weight_bytes / MiB:.0f} MiB of weights, read at {spread(rate, 1)} GB/s")
    print_table(["engine", "rows", "ms", "floor ms", "bound", "x floor", "x own 1 row"], lines)


if __name__ == "__main__":
    typer.run(main)
