"""A checkpoint folder: one safetensors file a layer, so that no stage ever holds more than the layer it works
on.

    config.json            DecoderConfig
    embed.safetensors      token embedding (and learned positions)
    layers/000.safetensors one file a layer; names in `layout.py`
    head.safetensors       final norm and output projection
    tokenizer.json, chat_template.jinja, generation_config.json

A quantized linear `X` is `X.weight` int8 [N, K] with `X.weight_scale` float32 [N] (w ≈ int8 · scale, |int8| ≤
127) and, if its activations have static scales as well, `X.input_scale` float32 [P]: those of the int8 parts
whose sum is the input, each of what rounding to the one before it leaves. One of 4 bits is `X.weight` uint8
[N, K] of 0 to 15 with `X.weight_grid` bfloat16 [N, ceil(K / 32), 2], the step and the base of every 32 inputs
(w ≈ step · uint8 + base).

A head that knows only some tokens (`vocabulary.py`) has their ids in `lm_head.ids`, int64 and ascending, and
as many rows in `lm_head.weight`.
"""

import os
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import DecoderConfig
from .errors import ModelError
from .files import link_file, write_text
from .layout import layer_part

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
EMBED, HEAD = "embed", "head"


class Checkpoint:
    """Reads a checkpoint folder, one part at a time."""

    def __init__(self, path: Path):
        """Raises ModelError where `path` holds no checkpoint of this version."""
        self.path = Path(path)
        file = self.path / "config.json"
        try:
            self.config = DecoderConfig.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise ModelError(f"{self.path} is not a checkpoint folder: it has no config.json") from None
        except ValidationError as error:
            raise ModelError(f"{file} does not describe a decoder: {error}") from None

    def load_embed(self) -> dict[str, Tensor]:
        return read_part(self.path, EMBED)

    def load_layer(self, layer: int) -> dict[str, Tensor]:
        return read_part(self.path, layer_part(layer))

    def load_head(self) -> dict[str, Tensor]:
        return read_part(self.path, HEAD)

    def parts(self) -> list[str]:
        return [EMBED, *map(layer_part, range(self.config.num_layers)), HEAD]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"


def part_path(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part, mapped from its file. Raises ModelError for a missing or damaged file."""
    path = part_path(folder, part)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the checkpoint is not complete; build it again") from None
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}): delete it and build the checkpoint again") from None


def write_part(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Writes ``folder/part.safetensors`` so that a reader finds the whole file or none. `part`: "embed",
    "layers/003", "head"."""
    path = part_path(folder, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file({name: _own_storage(tensor) for name, tensor in tensors.items()}, temporary)
        temporary.chmod(0o644)  # the library makes files that only their owner may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _own_storage(tensor: Tensor) -> Tensor:
    """safetensors refuses views that share a storage."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def link_part(src: Path, dst: Path, part: str) -> None:
    """Gives `dst` an unchanged part of `src`: a hard link, or a copy where the file system has none."""
    link_file(part_path(src, part), part_path(dst, part))


def write_config(folder: Path, config: DecoderConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", config.model_dump_json(indent=2) + "\n")


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Carries tokenizer, chat template and generation defaults over from one checkpoint folder to the
    next."""
    for name in TOKENIZER_FILES:
        if (src / name).exists():
            link_file(src / name, dst / name)
