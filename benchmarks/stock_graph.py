"""The portable graph of a W8A8 engine for stock ONNX Runtime, with one scale for each row of activations.

A row is rounded to unsigned bytes around 128: ONNX Runtime has no fast product of signed with signed bytes
on x86. Both scales stand on one side of the last product, so that its optimizer makes one operator of all
from the integer product on. Logits come for the last row only, as ours do in a prefill.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

HEAD = "lm_head.weight"
TINY = float(np.finfo(np.float32).tiny)
CONSTANTS = {
    "stock.zero_point": np.array(128, np.uint8),
    "stock.one": np.array(1, np.float32),
    "stock.limit": np.array(127, np.float32),
    "stock.tiny": np.array(TINY, np.float32),
    "stock.last_axis": np.array([-1], np.int64),
    "stock.tokens": np.array([1], np.int64),
    "stock.end": np.array([2**31 - 1], np.int64),
}


def write_stock_graph(portable: Path, folder: Path) -> Path:
    """`folder` gets the graph and its weights."""
    model = onnx.load(portable, load_external_data=False)
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        weight = made.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.op_type == "DequantizeLinear" and weight.input[0] in stored:
            nodes += _multiply_rows(node, _before_rounding(node.input[0], made), *weight.input[:2])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in CONSTANTS.items())
    _drop_unused(graph)
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    for location in {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}:
        shutil.copyfile(portable.parent / location, folder / location)
    path = folder / "stock.onnx"
    onnx.save(model, path)
    return path


def _before_rounding(x: str, made: dict[str, NodeProto]) -> str:
    """What a pair of QuantizeLinear and DequantizeLinear was given."""
    node = made.get(x)
    if node is None or node.op_type != "DequantizeLinear":
        return x
    return made[node.input[0]].input[0]


def _multiply_rows(node: NodeProto, x: str, weight: str, weight_scale: str) -> list[NodeProto]:
    out = node.output[0]

    def add(kind: str, inputs: list[str], **attributes) -> str:
        name = f"{out}.{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    nodes: list[NodeProto] = []
    if weight == HEAD:
        x = add("Slice", [x, "stock.last_axis", "stock.end", "stock.tokens"])
    peak = add("ReduceMax", [add("Abs", [x]), "stock.last_axis"], keepdims=1)
    scale = add("Max", [add("Div", [peak, "stock.limit"]), "stock.tiny"])
    rounded = add("QuantizeLinear", [add("Div", [x, scale]), "stock.one", "stock.zero_point"])
    total = add("MatMulInteger", [rounded, weight, "stock.zero_point"])
    y = add("Cast", [total], to=TensorProto.FLOAT)
    scales = add("Mul", [scale, weight_scale])
    nodes.append(helper.make_node("Mul", [y, scales], [out], name=out))
    return nodes


def _drop_unused(graph: onnx.GraphProto) -> None:
    wanted = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    used = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(used)
    del graph.value_info[:]
