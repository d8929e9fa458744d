"""Reads a Hugging Face model folder: config.json, safetensors, tokenizer. Never a pickle, never its code."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import Dtype
from .errors import ModelError
from .families import FAMILIES, describe
from .tokenizer import read_end_tokens, write_tokenizer_of_folder

INDEX = "model.safetensors.index.json"
# Buffers that old versions of transformers saved, and the vision tower beside a text model.
NOT_OF_THE_DECODER = re.compile(
    r"rotary_emb\.inv_freq$|\battn\.(masked_)?bias$|vision_tower|multi_modal_projector"
)
WITH_A_TIED_HEAD = re.compile(NOT_OF_THE_DECODER.pattern + r"|lm_head\.weight$")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class FolderModel:
    """A model folder; tensors are read one at a time, under our names."""

    def __init__(self, folder: Path, dtype: Dtype):
        self.folder = folder
        raw = read_json(folder / "config.json")
        self.config = describe(raw, dtype, str(folder / "config.json"))
        if eos := read_end_tokens(folder):
            self.config = self.config.model_copy(update={"eos_token_ids": eos})
        self.family = FAMILIES[self.config.family]
        self._place = self._find_tensors()
        self._open: dict[Path, Any] = {}
        self._root = self._find_root()

    @property
    def files(self) -> list[Path]:
        """What the checkpoint is made of, for its provenance."""
        return [self.folder / "config.json", *sorted(set(self._place.values()))]

    @property
    def path(self) -> Path:
        return self.folder

    @property
    def names(self) -> list[str]:
        """Of the tensors in the files, but those that no decoder needs."""
        unused = NOT_OF_THE_DECODER if not self.config.tied_head else WITH_A_TIED_HEAD
        return [name for name in self._place if not unused.search(name)]

    def source_name(self, name: str, layer: int | None = None) -> str:
        ours, _, kind = name.rpartition(".")
        theirs = self.family.names[ours].format(layer)
        if theirs.startswith(self.family.root):
            theirs = self._root + theirs.removeprefix(self.family.root)
        return f"{theirs}.{kind}"

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Our tensor `name`, relative to the layer if one is given."""
        return self.family.adapt(name, self._read(self.source_name(name, layer)), self.config)

    def write_tokenizer(self, out: Path) -> None:
        write_tokenizer_of_folder(self.folder, out, self.config)

    def _read(self, name: str) -> Tensor:
        path = self._place[name]
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path].get_tensor(name)

    def _find_tensors(self) -> dict[str, Path]:
        """Tensor name → file."""
        if (self.folder / INDEX).exists():
            shards = read_json(self.folder / INDEX)["weight_map"]
            if strange := {shard for shard in shards.values() if Path(shard).name != shard}:
                raise ModelError(
                    f"{self.folder / INDEX} points outside its folder: {', '.join(sorted(strange))}"
                )
            return {name: self.folder / shard for name, shard in shards.items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) != 1:
            pickles = [path.name for pattern in PICKLES for path in self.folder.glob(pattern)]
            found = ", ".join([file.name for file in files] + pickles) or "no weights"
            message = f"{self.folder}: wanted model.safetensors or {INDEX}, found {found}"
            if pickles:
                message += "; pickled weights can run code and are not read: convert them to safetensors"
            raise ModelError(message)
        return dict.fromkeys(open_safetensors(files[0]).keys(), files[0])

    def _find_root(self) -> str:
        """What stands before the decoder's tensors: the model's root, nothing, or a text model's as well."""
        root = self.family.root
        embed = self.family.names["model.embed_tokens"].removeprefix(root) + ".weight"
        candidates = (root, "", f"language_model.{root}", f"{root}language_model.")
        for candidate in candidates:
            if candidate + embed in self._place:
                return candidate
        raise ModelError(
            f"{self.folder} has no tensor {root + embed!r}: is this a {self.config.family} model?"
        )


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: download the model again") from None
    except SafetensorError as error:
        raise ModelError(f"{path} is cut short or damaged ({error}): download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: this is not a model folder") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
