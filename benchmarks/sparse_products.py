"""Whether zeros pay on a GPU: products of few rows by `mma.sp` against dense ones by the same kernel."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from draftsmith.speculate import cuda
from draftsmith.speculate.cuda_linear import MOST_ROWS, Format, Linear
from draftsmith.speculate.driver import find_gpus
from measure import print_table, ratios, spread, time_in_turn

PAIRS: tuple[tuple[Format, Format], ...] = (("int8", "int8_2_4"), ("float16", "float16_2_4"))
REPEATS = 50  # products of one sample, as one graph: a launch by itself would be most of it


def main(
    shape: Annotated[list[str], typer.Option(help="outputs x inputs of a weight")] = [  # noqa: B006
        "2048x2048",
        "8192x2048",
        "2048x8192",
    ],
    rows: Annotated[list[int], typer.Option(min=1, max=MOST_ROWS)] = [1, 8, 16, 32],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Print microseconds of a product, and how many times those of the dense one it takes."""
    if reason := cuda.why_no_cuda():
        typer.echo(f"{Path(__file__).name}: {reason}", err=True)
        raise SystemExit(2)
    gpu = find_gpus()[0][0]
    print(f"{gpu.name} ({gpu.compute_capability}), {REPEATS} products a sample, {rounds} rounds")
    stream = cuda.Stream()
    table = []
    for name in shape:
        n, k = (int(size) for size in name.split("x"))
        for dense, sparse in PAIRS:
            weight = draw_weight(n, k, dense)
            linears = {form: make_linear(weight, form, stream) for form in (dense, sparse)}
            for count in rows:
                calls = {form: record(linear, count, stream) for form, linear in linears.items()}
                times = time_in_turn(calls, rounds)
                table.append(
                    [
                        name,
                        sparse,
                        str(count),
                        *(spread([1e3 * ms / REPEATS for ms in times[form]]) for form in (dense, sparse)),
                        spread(ratios(times[sparse], times[dense])),
                        f"{linears[sparse].num_bytes / linears[dense].num_bytes:.2f}",
                    ]
                )
    print_table(["shape", "format", "rows", "dense us", "2:4 us", "x dense", "bytes x dense"], table)


def draw_weight(n: int, k: int, kind: str) -> np.ndarray:
    """Two of every four inputs, at random."""
    rng = np.random.default_rng(0)
    is_kept = rng.permuted(np.tile([True, True, False, False], (n, k // 4, 1)), axis=2).reshape(n, k)
    drawn = rng.integers(-127, 128, (n, k)) if kind == "int8" else rng.normal(size=(n, k))
    return np.where(is_kept, drawn, 0).astype(kind)


def make_linear(weight: np.ndarray, form: Format, stream: cuda.Stream) -> Linear:
    scale = np.ones(len(weight), np.float32) if form.startswith("int8") else None
    return Linear(weight, form, stream, scale)


def record(linear: Linear, num_rows: int, stream: cuda.Stream) -> Callable[[], None]:
    """A call that runs the product REPEATS times and waits."""
    width = 1 if linear.is_int8 else 2
    x, y, scale = (cuda.Buffer(size) for size in (num_rows * linear.k * width, 4 * num_rows * linear.n, 128))
    graph = cuda.Graph(stream)
    for _ in range(REPEATS):
        linear.multiply(x, num_rows, y, scale)
    graph.finish().keeps = x, y, scale

    def run() -> None:
        graph.launch()
        stream.wait()

    return run


if __name__ == "__main__":
    typer.run(main)
