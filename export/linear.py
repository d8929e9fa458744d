"""The forms a linear layer takes in the portable graph. A row is a token: x is [B, S, K], y is [B, S, N]."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..model.linear import INT4_GROUP
from .builder import Graph
from .weights import StoredLinear


def apply_linears(graph: Graph, x: str, stored: Sequence[StoredLinear]) -> list[str]:
    """The output of every linear in `stored`, in the order in which they were stored."""
    outputs = []
    for linear in stored:
        with graph.scope(linear.name):
            if linear.packed.format == "int4":
                y = multiply_groups(graph, x, linear)
            else:
                y = (multiply_static if linear.is_quantized else multiply_float)(graph, x, linear)
            if linear.has_bias:
                y = graph.op("Add", y, graph.weight(f"{linear.name}.bias"))
            outputs += graph.split(y, linear.widths, axis=2)
    return outputs


def multiply_float(graph: Graph, x: str, linear: StoredLinear) -> str:
    return graph.op("MatMul", x, graph.matrix(f"{linear.name}.weight"))


def multiply_static(graph: Graph, x: str, linear: StoredLinear) -> str:
    """Standard Q/DQ as TensorRT takes it: one fixed scale for all activations, one a column for weights.

    The parts of an input are rows of one product, so that the weights are read once: what rounding leaves is
    blown up to the scale of the first part, and its product made small again.
    """
    kinds = ("weight", "weight_scale", "weight_zero_point")
    weight = graph.op("DequantizeLinear", *(graph.weight(f"{linear.name}.{kind}") for kind in kinds), axis=1)
    if not linear.input_scales:
        return graph.op("MatMul", x, weight)
    first = linear.input_scales[0]
    if len(linear.input_scales) == 1:
        return graph.op("MatMul", round_static(graph, x, first), weight)
    parts = [x]
    for coarse, fine in pairwise(linear.input_scales):
        rest = graph.op("Sub", parts[-1], round_static(graph, parts[-1], first))
        parts.append(graph.op("Mul", rest, graph.scalar(coarse / fine)))
    axis = graph.ints(2)  # [B, S, part, K]
    stacked = graph.op("Concat", *(graph.op("Unsqueeze", part, axis) for part in parts), axis=2)
    products = graph.op("MatMul", round_static(graph, stacked, first), weight)
    shares = graph.constant(np.array([[scale / first] for scale in linear.input_scales], np.float32))
    return graph.op("ReduceSum", graph.op("Mul", products, shares), axis, keepdims=0)


def round_static(graph: Graph, x: str, scale: float) -> str:
    step, zero_point = graph.scalar(scale), graph.scalar(0, np.int8)
    return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, step, zero_point), step, zero_point)


def multiply_groups(graph: Graph, x: str, linear: StoredLinear) -> str:
    """int4 weights by blocks of 32 inputs, activations in float. A standard block has a step but no base, so
    the blocks' sums of x are multiplied by what the blocks' weights lie around."""
    weight, step, middle = (
        graph.weight(f"{linear.name}.{kind}") for kind in ("weight", "weight_step", "weight_middle")
    )
    weight = graph.op("DequantizeLinear", weight, step, axis=0, block_size=INT4_GROUP)
    y = graph.op("MatMul", x, weight)
    if short := -linear.packed.k % INT4_GROUP:
        x = graph.op("Pad", x, graph.ints(0, 0, 0, 0, 0, short))
    blocks = graph.op("Reshape", x, graph.ints(0, 0, -1, INT4_GROUP))
    sums = graph.op("ReduceSum", blocks, graph.ints(3), keepdims=0)
    return graph.op("Add", y, graph.op("MatMul", sums, middle))
