"""Walks a model one layer at a time over the calibration windows: never more than one layer in memory, and
every layer calibrated on what the layers before it, as the stage has left them, really give it.

What a stage does to a layer is a function, its `visit`. The walker does the rest: it runs the windows
through, keeps each finished layer in a work folder, and after a crash takes up the walk behind the last one,
with the same result bit for bit.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .attention import causal_mask
from .config import DecoderConfig
from .decoder import DecoderLayer, Embedding, Head, Step, last_of
from .errors import ModelError
from .files import write_text
from .layout import EMBED_TOKENS, linear_shapes
from .linear import Linear
from .progress import Progress
from .store import (
    EMBED,
    HEAD,
    Checkpoint,
    copy_tokenizer,
    link_part,
    read_part,
    write_config,
    write_part,
)

CHUNK_TOKENS = 4096  # per forward call; fixed, since another grouping of rows rounds differently

Rows = list[
    dict[str, Any]
]  # of a stage's report: one dict a linear, or a pair, or whatever the stage works on


@dataclass
class Part:
    """One decoder layer, or the head (the final norm and the output projection), and the states that enter
    it."""

    config: DecoderConfig
    name: str  # "layers/003" or "head"
    index: int  # of the layer; the head comes after the last
    tensors: dict[str, Tensor]  # a tied head's lm_head.weight included
    hidden: Tensor  # float32 [N, L, d]: all windows, in fixed order
    advanced: bool = False  # whether `hidden` is what leaves the part already

    @property
    def is_head(self) -> bool:
        return self.name == HEAD

    def linears(self) -> list[str]:
        """Names relative to the part, in the order in which they run."""
        return ["lm_head"] if self.is_head else list(linear_shapes(self.config))

    def full_name(self, linear: str) -> str:
        return linear if self.is_head else f"model.layers.{self.index}.{linear}"

    def build(self, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> DecoderLayer | Head:
        # Copies: a tensor mapped from a file may be aligned otherwise than one in memory, and summed
        # otherwise.
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        if self.is_head:
            return Head(self.config, copies, None, dtype)
        return DecoderLayer(self.config, self.index, copies, dtype)

    def steps(self, module: DecoderLayer | Head, hidden: Tensor) -> Iterator[Step]:
        """Windows [B, L, d] through the part, with its stops."""
        if isinstance(module, Head):
            return module.steps(hidden)
        batch, length, _ = hidden.shape
        mask = causal_mask(self.config, self.index, length)
        return module.steps(hidden, torch.arange(length).expand(batch, length), mask)

    def run(self, module: DecoderLayer | Head, hidden: Tensor) -> Tensor:
        """Windows [B, L, d] through the part → [B, L, d], or logits [B, L, V] of the head."""
        return last_of(self.steps(module, hidden))

    def inputs(self, module: DecoderLayer | Head) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
        """Run all windows side by side, with a stop before each group of linears that share an input: yields
        their relative names and that input in chunks [T, K]. What is changed in the module at a stop holds
        for all that follows. When it is used up, `hidden` is what leaves the layer; the head's logits, which
        nobody needs, are not computed."""
        chunks = self.hidden.split(max(1, CHUNK_TOKENS // self.hidden.shape[1]))
        for stops in zip(*(self.steps(module, chunk) for chunk in chunks), strict=True):
            names = stops[0][0]
            if names:
                yield names, [x.flatten(0, -2) for _, x in stops]
                if self.is_head:
                    return
            else:
                for chunk, (_, output) in zip(chunks, stops, strict=True):
                    chunk.copy_(output)
                self.advanced = True


def linears_of(module: DecoderLayer | Head) -> dict[str, Linear]:
    """By name relative to the part, in the order in which they run."""
    return {"lm_head": module.lm_head} if isinstance(module, Head) else module.linears()


Visit = Callable[[Part], tuple[dict[str, Tensor] | None, Rows]]


@torch.inference_mode()
def walk(
    src: Path,
    tokens: Path,
    out: Path,
    work: Path,
    visit: Visit,
    settings: dict[str, Any],
    progress: Progress,
    label: str,
    exact: bool = False,
    max_tokens: int | None = None,
) -> Rows:
    """Make the checkpoint `out` of `src` by visiting each layer and the head in order; return all report
    rows.

    `visit` gets a part and returns its new tensors, or None to leave it as it is, and rows of JSON values.
    `tokens` is a safetensors file with "tokens" int32 [N, L]. Finished parts are kept in `work`; a work
    folder of other `settings` or tokens is an error that names the difference. An `exact` stage does not
    change what a part computes: then the states go on through the parts of `src`. With `max_tokens` the walk
    takes only as many windows as hold them.
    """
    checkpoint = Checkpoint(src)
    windows = load_file(tokens)["tokens"]
    if max_tokens is not None:
        windows = windows[: -(-max_tokens // windows.shape[1])]
    _claim(work, settings | {"tokens": hashlib.sha256(tokens.read_bytes()).hexdigest()})
    parts = checkpoint.parts()[1:]
    finished = [(work / f"{part}.json").exists() for part in parts]
    homes, rows = {EMBED: src}, []
    hidden = torch.empty(0) if all(finished) else _embed(checkpoint, windows)
    for index, part_name in enumerate(parts):
        progress(index, len(parts), f"{label} {part_name}")
        part = Part(checkpoint.config, part_name, index, _load(checkpoint, part_name), hidden)
        if not finished[index]:
            tensors, part_rows = visit(part)
            if tensors is not None:
                write_part(work, part_name, tensors)
            _write_json(work / f"{part_name}.json", {"changed": tensors is not None, "rows": part_rows})
        record = json.loads((work / f"{part_name}.json").read_text())
        rows += record["rows"]
        if not part.advanced and not all(finished[index + 1 :]):
            use_src = exact or not record["changed"]
            module = part.build(part.tensors if use_src else read_part(work, part_name))
            for _ in part.inputs(module):
                pass
        homes[part_name] = work if record["changed"] else src
    progress(len(parts), len(parts), label)
    for part_name, home in homes.items():
        link_part(home, out, part_name)
    copy_tokenizer(src, out)
    tied = "lm_head.weight" not in read_part(out, HEAD)
    write_config(out, checkpoint.config.model_copy(update={"tied_head": tied}))
    return rows


def linear_names(config: DecoderConfig) -> list[str]:
    """Full names of all linears, in the order in which they run."""
    layers = [
        f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in linear_shapes(config)
    ]
    return [*layers, "lm_head"]


def _embed(checkpoint: Checkpoint, windows: Tensor) -> Tensor:
    embedding = Embedding(checkpoint.config, checkpoint.load_embed())
    positions = torch.arange(windows.shape[1]).expand(windows.shape)
    return embedding(windows.long(), positions)


def _load(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    tensors = read_part(checkpoint.path, part)
    if part == HEAD and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = checkpoint.load_embed()[EMBED_TOKENS]
    return tensors


def _claim(work: Path, settings: dict[str, Any]) -> None:
    """Bind a work folder to the settings of its first run."""
    file = work / "settings.json"
    work.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        _write_json(file, wanted)
        return
    found = json.loads(file.read_text())
    changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if changed:
        raise ModelError(
            f"{work} holds layers made with another {', '.join(changed)}; delete it or restore those settings"
        )


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")
