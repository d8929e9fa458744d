"""The forms a linear layer takes in a graph. A row is a token: x is [B, S, K] and y is [B, S, N]."""

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from .builder import Graph
from .weights import StoredLinear

# As the scale of a row of zeros the smallest normal number gives zeros, as any other would.
TINY = float(np.finfo(np.float32).tiny)

Multiply = Callable[[Graph, str, StoredLinear], str]


def apply_linears(graph: Graph, x: str, stored: Sequence[StoredLinear], multiply: Multiply) -> list[str]:
    """The output of every linear in `stored`, in the order in which they were stored."""
    outputs = []
    for linear in stored:
        with graph.scope(linear.name):
            y = (multiply if linear.is_quantized else multiply_float)(graph, x, linear)
            if linear.has_bias:
                y = graph.op("Add", y, graph.weight(f"{linear.name}.bias"))
            outputs += graph.split(y, linear.widths, axis=2)
    return outputs


def multiply_float(graph: Graph, x: str, linear: StoredLinear) -> str:
    return graph.op("MatMul", x, graph.matrix(f"{linear.name}.weight"))


def multiply_static(graph: Graph, x: str, linear: StoredLinear) -> str:
    """Standard Q/DQ as TensorRT takes it: one fixed scale for all activations, one a column for weights."""
    if linear.input_scale is not None:
        scale, zero_point = graph.scalar(linear.input_scale), graph.scalar(0, np.int8)
        x = graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, scale, zero_point), scale, zero_point)
    weight, weight_scale = graph.weight(f"{linear.name}.weight"), graph.weight(f"{linear.name}.weight_scale")
    return graph.op("MatMul", x, graph.op("DequantizeLinear", weight, weight_scale, axis=1))


def multiply_dynamic(graph: Graph, x: str, linear: StoredLinear) -> str:
    """One activation scale a row: s = max|x| / 127, y = s · weight_scale · (round(x / s) W), summed in int32.

    The rounded rows are unsigned bytes around 128: ONNX Runtime has no fast product of signed with signed
    bytes on x86 (it was 30 times slower).
    """
    one, zero_point = graph.scalar(1), graph.scalar(128, np.uint8)
    peak = graph.op("ReduceMax", graph.op("Abs", x), graph.ints(-1), keepdims=1)
    scale = graph.op("Max", graph.op("Div", peak, graph.scalar(127)), graph.scalar(TINY))
    rounded = graph.op("QuantizeLinear", graph.op("Div", x, scale), one, zero_point)
    total = graph.op("MatMulInteger", rounded, graph.weight(f"{linear.name}.weight"), zero_point)
    y, weight_scale = (
        graph.op("Cast", total, to=TensorProto.FLOAT),
        graph.weight(f"{linear.name}.weight_scale"),
    )
    if linear.has_bias:
        # As below, ONNX Runtime 1.31 would take in the bias too, and multiply it by the scale of the row.
        return graph.op("Mul", graph.op("Mul", y, scale), weight_scale)
    # Both scales on one side: ONNX Runtime makes one operator of all from the integer product on.
    return graph.op("Mul", y, graph.op("Mul", scale, weight_scale))
