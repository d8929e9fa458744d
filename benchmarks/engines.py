"""Engines of a bundle, or of a folder that holds a graph, opened without the rest of a bundle."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from draftsmith.speculate.binding import check, ffi, lib, view
from draftsmith.speculate.manifest import MANIFEST, EngineEntry, read_json
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime

CONTEXT = 128  # tokens in the cache while calls are timed


@dataclass(frozen=True)
class Work:
    """What one call of an engine cannot do without: its linears' weights, read once, and their multiply-adds
    for every row."""

    weight_bytes: int
    int8_operations: int
    float_operations: int


def find_graphs(path: Path, names: list[str]) -> dict[str, Path]:
    """Engine → graph: of a bundle, or of a folder of engines (`NAME/cpu.onnx` or `NAME.onnx`)."""
    if (path / MANIFEST).is_file():
        graphs = {
            name: path / entry["graph"] for name, entry in read_json(path / MANIFEST)["engines"].items()
        }
    else:
        graphs = {file.parent.name: file for file in sorted(path.glob("*/cpu.onnx"))}
        graphs |= {file.stem: file for file in sorted(path.glob("*.onnx"))}
    if missing := [name for name in names if name not in graphs]:
        raise SystemExit(f"{path} has no engine {missing[0]!r}, only {', '.join(graphs) or 'none at all'}")
    return {name: graphs[name] for name in names or graphs}


def open_engine(name: str, graph: Path, runtime: OnnxRuntime, max_seq_len: int = 2048) -> OnnxEngine:
    entry = EngineEntry(
        graph=graph.name, vocab_size=1, max_seq_len=max_seq_len, num_layers=1, num_kv_heads=1, head_dim=1
    )
    return OnnxEngine(name, graph, entry, runtime)


def fill_cache(engine: OnnxEngine, rows: int) -> None:
    """Read `CONTEXT` tokens and leave room for `rows` more."""
    engine.reserve(CONTEXT + rows)
    engine.forward(some_tokens(engine, CONTEXT), 0)


def native_call(engine: OnnxEngine, tokens: np.ndarray) -> Callable[[], object]:
    """A call of these rows behind `CONTEXT` tokens, as the loop in C makes it. What Python would add takes
    0.1 ms: after all weights have passed through the caches, none of it is left there."""
    handle, logits = engine.handle, ffi.new("const float **")
    forward, rows, ids = handle.forward, len(tokens), view("int32_t[]", tokens)
    arguments = (handle, rows, ids, CONTEXT, ffi.NULL, ffi.NULL, rows, logits)
    return lambda: check(forward(*arguments))


def some_tokens(engine: OnnxEngine, count: int) -> np.ndarray:
    return (np.arange(count, dtype=np.int32) * 7919 + 11) % engine.vocab_size


def read_work(graph: Path) -> Work:
    """From the linears in the graph of an engine."""
    model = onnx.load(graph, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in model.initializer}
    weight_bytes = int8_operations = float_operations = 0
    for node in model.node:
        attributes = {item.name: item.i for item in node.attribute}
        if node.op_type in ("Linear", "Layer"):
            weight_bytes += sum(num_bytes(stored[name]) for name in node.input if ".packed" in name)
        # A layer has four linears; a table of embeddings, though packed like one, has no activation.
        for prefix in (name.removesuffix("activation") for name in attributes if name.endswith("activation")):
            outputs = attributes[f"{prefix}n"] * (
                2 if attributes[f"{prefix}activation"] >= lib.DS_GATED else 1
            )
            operations = outputs * attributes[f"{prefix}k"]
            if attributes[f"{prefix}format"] in (lib.DS_FLOAT32, lib.DS_BFLOAT16):
                float_operations += operations
            else:
                int8_operations += operations
    return Work(weight_bytes, int8_operations, float_operations)


def num_bytes(tensor: onnx.TensorProto) -> int:
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)
