"""ONNX files on disk: one file of weights that several graphs share; each file is written beside and renamed.

The bytes depend only on what is stored and in which order, so equal models give equal files.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import onnx
import torch
from onnx import TensorProto

# The ONNX specification asks for page-aligned offsets, so that a runtime can map tensors instead of copying.
PAGE = 4096

_ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}


class WeightFile:
    """Writes tensors one after another into an external-data file; use as a context manager.

    The file appears under its own name when the block ends without an error, and not at all otherwise.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._stored: dict[str, TensorProto] = {}

    def __enter__(self) -> "WeightFile":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store `tensor` (a float, int8, uint8 or int64) under a name not used before."""
        tensor = tensor.detach().contiguous()
        self._add(name, _ONNX_TYPES[tensor.dtype], tensor.shape, tensor)

    def add_int4(self, name: str, tensor: torch.Tensor) -> None:
        """Store `tensor`, int8 in [-8, 7], as INT4: two in a byte, the first one low."""
        halves = tensor.reshape(-1).view(torch.uint8) & 15
        halves = torch.nn.functional.pad(halves, (0, halves.numel() % 2))
        self._add(name, TensorProto.INT4, tensor.shape, halves[::2] | halves[1::2] << 4)

    def _add(self, name: str, kind: int, dims: Sequence[int], tensor: torch.Tensor) -> None:
        if name in self._stored:
            raise ValueError(f"{name} is stored already")
        self._file.write(b"\0" * (-self._file.tell() % PAGE))
        proto = TensorProto(name=name, data_type=kind, dims=dims)
        proto.data_location = TensorProto.EXTERNAL
        size = tensor.numel() * tensor.element_size()
        for key, value in (("location", self._path.name), ("offset", self._file.tell()), ("length", size)):
            proto.external_data.add(key=key, value=str(value))
        self._file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        self._stored[name] = proto

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> TensorProto:
        """The initializer that stands for the stored tensor `name` in a graph."""
        return self._stored[name]


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Check `model` and write it; its external data must lie in the same folder already."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(part, full_check=True)
    except Exception:
        part.unlink()
        raise
    part.replace(path)


def list_weight_bytes(graph: Path, location: str) -> dict[str, int]:
    """Of the initializers of a graph that lie in the file `location` beside it: bytes, by name."""
    sizes: dict[str, int] = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        if facts.get("location") == location:
            sizes[tensor.name] = int(facts["length"])
    return sizes
