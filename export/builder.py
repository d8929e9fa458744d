"""A thin layer over `onnx.helper`: values are names, and an operator is a call that returns one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .onnx_files import WeightFile

OPSET = 24  # the first with TensorScatter
IR_VERSION = 11  # goes with opset 24

DOMAIN = "draftsmith"  # of our own operators

Dim = int | str  # a name stands for a size known at run time
Kind = tuple[int, Sequence[Dim]]  # element type and shape of a value


class Graph:
    """An ONNX graph under construction.

    Values are named after the scope and the operator that made them. An operator asked for twice with the
    same inputs and attributes is added once.
    """

    def __init__(self, name: str, *weights: WeightFile) -> None:
        self._name = name
        self._weights = weights
        self._scope = ""
        self._nodes: list[onnx.NodeProto] = []
        self._declared: dict[str, onnx.ValueInfoProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._made: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names made within by `name`."""
        outer, self._scope = self._scope, f"{self._scope}{name}."
        yield
        self._scope = outer

    def input(self, name: str, dtype: int, shape: Sequence[Dim]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[Dim]) -> None:
        """Declare the value `name`, which some operator was told to write, an output of the graph."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, name: str) -> str:
        """A tensor of the weight files as a value."""
        self._initializers[name] = self._stored(name)
        return name

    def matrix(self, name: str) -> str:
        """A tensor of the weight files in float32, the dtype of all arithmetic."""
        if self._stored(name).data_type == TensorProto.FLOAT:
            return self.weight(name)
        return self.op("Cast", self.weight(name), to=TensorProto.FLOAT)

    def constant(self, value: np.ndarray) -> str:
        """A small array kept in the graph itself, once for every distinct value."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self._initializers[name] = numpy_helper.from_array(value, name)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float, dtype: type[np.generic] = np.float32) -> str:
        return self.constant(np.array(value, dtype))

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add an operator of the standard domain that has one output; return the output's name."""
        return self._add(kind, inputs, [output], attributes)[0]

    def ours(
        self,
        kind: str,
        inputs: Sequence[str],
        made: Sequence[Kind],
        names: Sequence[str] = (),
        **attributes: Any,
    ) -> list[str]:
        """Add an operator of our domain; return the names of its outputs, which `names` may settle. Nobody
        else can infer what it makes, so `made` says it."""
        while inputs and not inputs[-1]:  # missing ones need no place at the end
            inputs = inputs[:-1]
        outputs = self._add(kind, inputs, list(names) or [""] * len(made), attributes | {"domain": DOMAIN})
        for name, (dtype, shape) in zip(outputs, made, strict=True):
            self.declare(name, dtype, shape)
        return outputs

    def declare(self, name: str, dtype: int, shape: Sequence[Dim]) -> str:
        """Say what inference cannot find out: where shapes are not known, no memory is reused."""
        if name not in self._declared and name not in {value.name for value in self._outputs}:
            self._declared[name] = helper.make_tensor_value_info(name, dtype, shape)
        return name

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Cut `x` along `axis` into pieces of `sizes`."""
        if len(sizes) == 1:
            return [x]
        return self._add("Split", (x, self.ints(*sizes)), [""] * len(sizes), {"axis": axis})

    def model(self) -> onnx.ModelProto:
        initializers = list(self._initializers.values())
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            self._outputs,
            initializers,
            value_info=list(self._declared.values()),
        )
        domains = [helper.make_opsetid("", OPSET)]
        if any(node.domain == DOMAIN for node in self._nodes):
            domains.append(helper.make_opsetid(DOMAIN, 1))
        model = helper.make_model(graph, opset_imports=domains)
        model.ir_version, model.producer_name = IR_VERSION, "draftsmith"
        return model

    def _add(
        self, kind: str, inputs: Sequence[str], outputs: list[str], attributes: dict[str, Any]
    ) -> list[str]:
        """Outputs named "" get names of their own."""
        key = f"{kind}{inputs}{outputs}{sorted(attributes.items())}"
        if key not in self._made:
            names = self._made[key] = [output or self._unique(kind) for output in outputs]
            self._nodes.append(helper.make_node(kind, inputs, names, name=names[0], **attributes))
        return self._made[key]

    def _stored(self, name: str) -> TensorProto:
        return next(file[name] for file in self._weights if name in file)

    def _unique(self, kind: str) -> str:
        name = self._scope + kind
        count = self._counts[name] = self._counts.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"
