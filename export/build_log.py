"""What a TensorRT builder says of the engine that it made, read from its verbose log.

An engine can be inspected only where it can be loaded, on its GPU. The log lists the same layers:

    Name: …, LayerType: gemm, Inputs: [ { Name: …, Datatype: Int8, … } ], Constants: […], Outputs: […],
    TacticName: …, StreamId: 0, Metadata: [ONNX Layer: …]
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PRODUCTS = {"gemm", "runtime_fusion"}  # what matrix products become; one row of a few columns can be a kgen
ATTENTION = re.compile(r"_mha_v\d+")

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>[^,]*)"
    r"(?:.*?Metadata: (?P<metadata>.*))?$"
)
_TENSOR = re.compile(r"Name: (?P<name>.*?), Dimensions:.*?Datatype: (?P<dtype>\w+)")
_SPARSE = re.compile(r"\(Sparsity\) Chose (\d+)")


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str
    reads: tuple[tuple[str, str], ...]  # (tensor, dtype) of what changes from call to call
    constants: tuple[str, ...]  # dtypes
    writes: tuple[str, ...]  # dtypes
    tactic: str
    made_of: str  # the nodes of the graph that it stands for

    @property
    def is_product(self) -> bool:
        return self.kind in PRODUCTS and "MatMul" in self.made_of + self.name

    @property
    def is_int8_product(self) -> bool:
        """Whether int8 is multiplied by int8. Weights alone in int8 do not make it one."""
        return (
            self.is_product and all(dtype == "Int8" for _, dtype in self.reads) and "Int8" in self.constants
        )


def read_layers(lines: Iterable[str]) -> list[Layer]:
    """The layers of every profile, in the order of execution."""
    return [layer for line in lines if line.startswith("Name: ") and (layer := _read(line))]


def summarize(lines: Iterable[str]) -> dict[str, Any]:
    """What a manifest records of a build, over all profiles of the engine.

    layers             number of each kind with the dtypes that it reads and writes
    int8_products      matrix products of int8 with int8
    fused_attention    number of attention kernels
    caches_in_place    caches that layers read under the name of the output: the update was in place
    sparse_tactics     products for which the builder says that it chose a 2:4 kernel; 0 where it says
                       nothing, and then nothing may be claimed of sparsity
    """
    lines = list(lines)
    layers = read_layers(lines)
    read = {_plain(name) for layer in layers for name, _ in layer.reads}
    chosen = [int(match[1]) for line in lines if (match := _SPARSE.search(line))]
    return {
        "layers": dict(sorted(Counter(map(_describe, layers)).items())),
        "int8_products": sum(layer.is_int8_product for layer in layers),
        "fused_attention": sum(bool(ATTENTION.search(layer.name)) for layer in layers),
        "caches_in_place": sum(name.startswith("present.") for name in read),
        "sparse_tactics": max(chosen, default=0),
    }


def _read(line: str) -> Layer | None:
    match = _LAYER.match(line.strip())
    if match is None:
        return None

    def tensors(part: str) -> list[tuple[str, str]]:
        return [(found["name"], found["dtype"]) for found in _TENSOR.finditer(match[part])]

    return Layer(
        match["name"],
        match["kind"],
        tuple(tensors("inputs")),
        tuple(dtype for _, dtype in tensors("constants")),
        tuple(dtype for _, dtype in tensors("outputs")),
        match["tactic"],
        match["metadata"] or "",
    )


def _plain(name: str) -> str:
    """Without the profile, "present.0.key [profile 1]"."""
    return name.partition(" [profile")[0]


def _describe(layer: Layer) -> str:
    """Such as "gemm Int8 × Int8 → Float"; the scales among the constants are left out."""
    kind = "attention" if ATTENTION.search(layer.name) else layer.kind
    read = sorted({dtype for _, dtype in layer.reads})
    if layer.is_product:
        weights = [dtype for dtype in layer.constants if dtype != "Float"] or list(layer.constants)
        return f"{kind} {'+'.join(read)} × {weights[0] if weights else '?'} → {'+'.join(layer.writes)}"
    return f"{kind} {'+'.join(read)} → {'+'.join(sorted(set(layer.writes)))}"
