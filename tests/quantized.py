"""Rounds a tiny checkpoint to int8 by hand, so that graphs can be tested without the quantize stage."""

from pathlib import Path

import torch
from draftsmith.model.config import DecoderConfig
from draftsmith.model.layout import EMBED_TOKENS, layer_part, linear_shapes
from draftsmith.model.store import Checkpoint, write_config, write_part

# Small enough that some activations of the tiny models are cut off at both ends.
INPUT_SCALE = 0.02
NO_INPUT_SCALE = ("mlp.down_proj",)


def quantize_checkpoint(
    source: Path, out: Path, leave: tuple[str, ...] = (), no_scale: tuple[str, ...] = NO_INPUT_SCALE
) -> Path:
    """Every linear but those in `leave`, the output projection (which gets weights of its own) included.
    All but `no_scale` have a static scale for their input."""
    checkpoint = Checkpoint(source)
    config, embed, head = checkpoint.config, checkpoint.load_embed(), checkpoint.load_head()
    write_part(out, "embed", embed)
    for layer in range(config.num_layers):
        tensors = checkpoint.load_layer(layer)
        for name in set(linear_shapes(config)) - set(leave):
            round_linear(tensors, name, name not in no_scale)
        write_part(out, layer_part(layer), tensors)
    head.setdefault("lm_head.weight", embed[EMBED_TOKENS])
    round_linear(head, "lm_head")
    write_part(out, "head", head)
    write_config(out, DecoderConfig(**(config.model_dump() | {"tied_head": False})))
    return out


def round_linear(tensors: dict[str, torch.Tensor], name: str, has_input_scale: bool = True) -> None:
    weight = tensors[f"{name}.weight"]
    scale = weight.abs().amax(1) / 127
    tensors[f"{name}.weight"] = torch.round(weight / scale[:, None]).to(torch.int8)
    tensors[f"{name}.weight_scale"] = scale
    if has_input_scale:
        tensors[f"{name}.input_scale"] = torch.tensor(INPUT_SCALE)
