"""Reading a prompt of 1,024 tokens: a W8A8 engine of ours beside stock ONNX Runtime on the same model, with
one scale for each row of activations, in turn.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer
from draftsmith.speculate.loop import PREFILL_ROWS
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime, default_threads
from engines import find_graphs, open_engine, some_tokens
from measure import print_table, ratios, spread, time_in_turn
from stock_graph import write_stock_graph


def main(
    path: Annotated[Path, typer.Argument(help="a bundle, or a folder of exported engines")],
    engine: str = "int8",
    tokens: Annotated[int, typer.Option(min=1)] = 1024,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
) -> None:
    """Print milliseconds, tokens a second, and ours against the faster of the two stock forms."""
    graph = find_graphs(path, [engine])[engine]
    ours = open_engine(engine, graph, OnnxRuntime(threads))
    ours.reserve(tokens)
    ids = some_tokens(ours, tokens)
    with TemporaryDirectory() as folder:
        stock = StockPrefill(write_stock_graph(graph.with_name("model.onnx"), Path(folder)), tokens, threads)
        calls = {
            "ours": lambda: read_in_chunks(ours, ids),
            "stock, at once": lambda: stock.read(ids, tokens),
            "stock, in our chunks": lambda: stock.read(ids, PREFILL_ROWS),
        }
        same = int(read_in_chunks(ours, ids).argmax()) == int(stock.read(ids, tokens).argmax())
        times = time_in_turn(calls, rounds, warm_calls=0)
    print(f"{tokens} tokens, {threads} threads, {rounds} rounds; same next token: {same}")
    print_table(
        ["engine", "ms", "tokens/s", "x ours"],
        [
            [
                name,
                spread(times[name], 1),
                spread([1e3 * tokens / t for t in times[name]], 0),
                spread(ratios(times[name], times["ours"])),
            ]
            for name in calls
        ],
    )


def read_in_chunks(engine: OnnxEngine, ids: np.ndarray) -> np.ndarray:
    logits = np.empty(0)
    for start in range(0, len(ids), PREFILL_ROWS):
        logits = engine.forward(ids[start : start + PREFILL_ROWS], start, num_logits=1)
    return logits[-1]


class StockPrefill:
    """A stock session and its cache."""

    def __init__(self, graph: Path, slots: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # it warns of every copy of a cache
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._slots = slots
        self._empty = {
            value.name: np.zeros((1, value.shape[1], slots, value.shape[3]), np.float32)
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def read(self, ids: np.ndarray, chunk: int) -> np.ndarray:
        names = [name.replace("past_key_values", "present") for name in self._empty]
        cache, logits = self._empty, np.empty(0)
        for start in range(0, len(ids), chunk):
            part = ids[None, start : start + chunk].astype(np.int64)
            slots = start + np.arange(part.shape[1])[None]
            feeds = {
                "input_ids": part,
                "position_ids": slots,
                "write_index": np.array([start], np.int64),
                "attention_mask": (np.arange(self._slots) <= slots[:, :, None])[:, None],
            }
            logits, *present = self._session.run(["logits", *names], feeds | cache)
            cache = dict(zip(cache, present, strict=True))
        return np.asarray(logits)[0, -1]


if __name__ == "__main__":
    typer.run(main)
