"""Rounds a tiny checkpoint to int8 by hand, so that graphs can be tested without the quantize stage."""

from pathlib import Path

import torch
from draftsmith.export.portable import export_onnx
from draftsmith.model.config import DecoderConfig
from draftsmith.model.layout import EMBED_TOKENS, layer_part, linear_shapes
from draftsmith.model.store import Checkpoint, read_part, write_config, write_part

# Small enough that some activations of the tiny models are cut off at both ends.
INPUT_SCALE = 0.02
IN_TWO_PARTS = ("mlp.down_proj",)


def quantize_checkpoint(
    source: Path,
    out: Path,
    leave: tuple[str, ...] = (),
    no_scale: tuple[str, ...] = (),
    zeros: str = "",
    bits: int = 8,
) -> Path:
    """Every linear but those in `leave`, the output projection (which gets weights of its own) included.
    All but `no_scale` have static scales for their input, those of `IN_TWO_PARTS` two. `zeros`: "half" of
    the weights, or "2:4". With `bits` of 4 there are no static scales and no zeros."""
    checkpoint = Checkpoint(source)
    config, embed, head = checkpoint.config, checkpoint.load_embed(), checkpoint.load_head()
    write_part(out, "embed", embed)
    for layer in range(config.num_layers):
        tensors = checkpoint.load_layer(layer)
        for name in set(linear_shapes(config)) - set(leave):
            if bits == 4:
                round_to_4_bits(tensors, name)
            else:
                round_linear(tensors, name, name not in no_scale, zeros)
        write_part(out, layer_part(layer), tensors)
    head.setdefault("lm_head.weight", embed[EMBED_TOKENS])
    round_to_4_bits(head, "lm_head") if bits == 4 else round_linear(head, "lm_head")
    write_part(out, "head", head)
    write_config(out, DecoderConfig(**(config.model_dump() | {"tied_head": False})))
    return out


def cast_checkpoint(source: Path, out: Path, dtype: str) -> Path:
    """The same model, its matrices to be exported in `dtype`."""
    checkpoint = Checkpoint(source)
    for part in checkpoint.parts():
        write_part(out, part, read_part(source, part))
    write_config(out, checkpoint.config.model_copy(update={"dtype": dtype}))
    return out


def round_linear(
    tensors: dict[str, torch.Tensor], name: str, has_input_scale: bool = True, zeros: str = ""
) -> None:
    weight = tensors[f"{name}.weight"]
    if zeros:
        shape, group = weight.shape, 4 if zeros == "2:4" else weight.shape[1]
        groups = weight.reshape(len(weight), -1, group)
        least = groups.abs().argsort(-1)[..., : group // 2]
        weight = groups.scatter(-1, least, 0).reshape(shape)
    scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127  # a row of zeros stays one
    tensors[f"{name}.weight"] = torch.round(weight / scale[:, None]).to(torch.int8)
    tensors[f"{name}.weight_scale"] = scale
    if has_input_scale:
        num_parts = 2 if name in IN_TWO_PARTS else 1
        tensors[f"{name}.input_scale"] = torch.tensor([INPUT_SCALE, INPUT_SCALE / 254][:num_parts])


def round_to_4_bits(tensors: dict[str, torch.Tensor], name: str) -> None:
    weight = tensors[f"{name}.weight"].float()
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -k % 32)).reshape(n, -1, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    grid = torch.stack(((high - low) / 15, low), dim=-1).bfloat16()
    step, base = (part.unsqueeze(-1) for part in grid.float().unbind(-1))
    levels = torch.round((groups - base) / step).clamp(0, 15)
    tensors[f"{name}.weight"] = levels.reshape(n, -1)[:, :k].to(torch.uint8)
    tensors[f"{name}.weight_grid"] = grid


KINDS = ["float32", "bfloat16", "int8", "half", "2:4", "int4"]  # of weights


def export_kind(source: Path, kind: str, folder: Path, kv_cache_dtype: str = "auto") -> None:
    """The graphs of a model with weights of one of `KINDS`; the zeros of "half" and "2:4" are int8's."""
    checkpoint = folder / "checkpoint"
    if kind in ("float32", "bfloat16"):
        cast_checkpoint(source, checkpoint, kind)
    elif kind == "int4":
        quantize_checkpoint(source, checkpoint, bits=4)
    else:
        quantize_checkpoint(source, checkpoint, zeros="" if kind == "int8" else kind)
    export_onnx(checkpoint, folder, kv_cache_dtype=kv_cache_dtype)
