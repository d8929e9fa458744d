"""The forms a linear layer takes in a graph. Rows are tokens: x is [R, K] and y is [R, N]."""

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
            outputs += graph.split(y, linear.widths, axis=1)
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


class DynamicMultiply:
    """One activation scale a row: s = max|x| / 127, y = s · weight_scale · (round(x / s) W), summed in int32.

    The rounded rows are unsigned bytes around 128: ONNX Runtime has no fast product of signed with signed
    bytes on x86 (it was 30 times slower).
    """

    def __init__(self, graph: Graph, tokens: str) -> None:
        """`tokens` [R] is any value with one element a row."""
        self._zero_point = graph.scalar(128, np.uint8)
        self._zero_points = graph.op("Expand", self._zero_point, graph.op("Shape", tokens))

    def __call__(self, graph: Graph, x: str, linear: StoredLinear) -> str:
        peak = graph.op("ReduceMax", graph.op("Abs", x), graph.ints(1), keepdims=0)
        scale = graph.op("Max", graph.op("Div", peak, graph.scalar(127)), graph.scalar(TINY))
        rows = graph.op("QuantizeLinear", x, scale, self._zero_points, axis=0)
        total = graph.op("MatMulInteger", rows, graph.weight(f"{linear.name}.weight"), self._zero_point)
        y = graph.op("Cast", total, to=TensorProto.FLOAT)
        y = graph.op("Mul", y, graph.weight(f"{linear.name}.weight_scale"))
        return graph.op("Mul", y, graph.op("Unsqueeze", scale, graph.ints(1)))
