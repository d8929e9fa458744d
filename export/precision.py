"""The portable graph as a TensorRT engine computes it: matrix products, attention and the cache in bfloat16
or float16, everything between them in float32.

What lies between costs next to nothing on a GPU, and norms, rotations and the residual stream lose digits in
16 bits that nobody gives back. Products of int8 keep their float32 scales. A layer's cache has a fixed number
of slots, as an update in place wants it, and there is one sequence.
"""

from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import TensorProto, helper

Precision = Literal["bfloat16", "float16"]

_TYPES = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}


def lower_precision(portable: Path, precision: Precision, num_slots: int) -> onnx.ModelProto:
    """The graph in the file `portable` with 16-bit products. Its weights stay where they are, beside that
    file, and must be looked for there.

    Inputs and outputs are those of the portable graph but for the caches, [1, H_kv, num_slots, D] in
    `precision`; logits stay float32.
    """
    model = onnx.load(portable, load_external_data=False)
    _Lowering(model.graph, _TYPES[precision]).run()
    _fix_dims(model.graph, {"batch": 1, "slots": num_slots})
    del model.graph.value_info[:]  # of values that have other dtypes now
    return model


def list_float_products(graph: onnx.GraphProto) -> list[str]:
    """The weights that are stored in int8 and yet multiplied in 16 bits, as their input has no static scale,
    by the names of their linears."""
    makers = _makers(graph)
    return [name for name, node in _list_int8_weights(graph, makers) if not _is_int8(node, makers)]


def list_split_inputs(graph: onnx.GraphProto) -> list[str]:
    """The linears whose input is the sum of several int8 parts, because one static scale would ruin it."""
    makers, split = _makers(graph), []
    for name, node in _list_int8_weights(graph, makers):
        if _is_int8(node, makers):
            rounded = makers[makers[node.input[0]].input[0]]  # QuantizeLinear
            source = makers.get(rounded.input[0])
            if source is not None and source.op_type == "Concat":
                split.append(name)
    return split


class _Lowering:
    """Puts casts around the nodes that compute in 16 bits; every other value keeps its name and dtype."""

    def __init__(self, graph: onnx.GraphProto, dtype: int) -> None:
        self.graph, self.dtype = graph, dtype
        self.makers = _makers(graph)
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()

    def run(self) -> None:
        for value in [v for v in [*self.graph.input, *self.graph.output] if _is_cache(v.name)]:
            value.type.tensor_type.elem_type = self.dtype
            self.made.add(value.name)
        for node in self.graph.node:
            match node.op_type:
                case "MatMul" if not _is_int8(node, self.makers):
                    node.input[:] = [self._half(name) for name in node.input]
                    self._widen(node)
                case "Attention":
                    node.input[:3] = [self._half(name) for name in node.input[:3]]
                    self._widen(node)
                case "TensorScatter":  # it writes the cache, which nothing but attention reads
                    node.input[1] = self._half(node.input[1])
                    self.nodes.append(node)
                case _:
                    self.nodes.append(node)
        kept = self._reachable()  # not the casts of weights that nobody reads in float32 any more
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def _widen(self, node: onnx.NodeProto) -> None:
        """Add `node`, which gives 16 bits now, and have its output in float32 for who reads it."""
        (output,) = node.output
        node.output[0] = f"{output}.half"
        self.nodes.append(node)
        self._add("Cast", [node.output[0]], output, to=TensorProto.FLOAT)

    def _half(self, value: str) -> str:
        """`value` in 16 bits. A weight is converted from what is stored, not by way of float32."""
        if value in self.made:  # a cache
            return value
        maker, half = self.makers.get(value), f"{value}.half"
        if maker is not None and maker.op_type == "Transpose" and self._is_stored(maker.input[0]):
            turned = self._half(maker.input[0])
            return self._add("Transpose", [turned], half, perm=list(maker.attribute[0].ints))
        if maker is not None and self._is_stored(value):
            value = maker.input[0]
        return self._add("Cast", [value], half, to=self.dtype)

    def _is_stored(self, value: str) -> bool:
        """Whether it is a weight of the file, cast to float32."""
        maker = self.makers.get(value)
        return maker is not None and maker.op_type == "Cast" and maker.input[0] not in self.makers

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        if output not in self.made:
            self.nodes.append(helper.make_node(kind, inputs, [output], f"{output}.{kind}", **attributes))
            self.made.add(output)
        return output

    def _reachable(self) -> list[onnx.NodeProto]:
        """The nodes that an output needs, in their order."""
        wanted, kept = {value.name for value in self.graph.output}, []
        for node in reversed(self.nodes):
            if not wanted.isdisjoint(node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1]


def _list_int8_weights(
    graph: onnx.GraphProto, makers: dict[str, onnx.NodeProto]
) -> list[tuple[str, onnx.NodeProto]]:
    """The products with weights that are stored in int8, by the names of their linears."""
    return [
        (weight.input[0].removesuffix(".weight"), node)
        for node in graph.node
        if node.op_type == "MatMul"
        and (weight := makers.get(node.input[1])) is not None
        and weight.op_type == "DequantizeLinear"
    ]


def _makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


def _is_int8(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether both operands come from int8, so that the product is one of int8."""
    operands = [makers.get(name) for name in node.input]
    return all(maker is not None and maker.op_type == "DequantizeLinear" for maker in operands)


def _is_cache(name: str) -> bool:
    return name.startswith(("past_key_values.", "present."))


def _fix_dims(graph: onnx.GraphProto, sizes: dict[str, int]) -> None:
    for value in [*graph.input, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
