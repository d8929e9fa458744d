"""A bundle with real graphs: a tiny random Llama, and the same rounded to int8 as its drafter."""

import json
from pathlib import Path

import torch
from draftsmith.export.portable import export_onnx
from draftsmith.model.config import DecoderConfig, Rotary
from draftsmith.model.layout import embed_shapes, head_shapes, is_matrix, layer_part, layer_shapes
from draftsmith.model.store import write_config, write_part
from draftsmith.speculate.manifest import SCHEMA_VERSION
from fake_engine import BOS, BYTE_VOCAB, EOS, byte_tokenizer, write_manifest

CONFIG = DecoderConfig(
    family="llama",
    dtype="float32",
    vocab_size=BYTE_VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_position_embeddings=320,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    rotary=Rotary(inv_freq=tuple(10000.0 ** (-i / 6) for i in range(6))),
    attention_scale=12**-0.5,
    tied_head=False,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
)


def write_tiny_bundle(folder: Path, config: DecoderConfig = CONFIG) -> Path:
    """Export both engines into `folder`, which becomes a complete bundle."""
    engines = {}
    for name, inside in (("target", "target"), ("int8", "drafters/int8")):
        checkpoint, out = folder.parent / f"{name}.checkpoint", folder / inside
        write_tiny_checkpoint(checkpoint, quantized=name == "int8", config=config)
        out.mkdir(parents=True)
        written = export_onnx(checkpoint, out)
        engines[name] = {
            "graph": f"{inside}/{written['graph']}",
            "portable": f"{inside}/{written['portable']}",
            "vocab_size": config.vocab_size,
            "max_seq_len": written["max_seq_len"],
            "num_layers": config.num_layers,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "weights": "W8A8" if name == "int8" else "float32",
            "eos_token_ids": [EOS],
            "bos_token_id": BOS,
        }
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    plan = {
        "ladder": ["suffix", "int8"],
        "num_speculative_tokens": {"suffix": 4, "int8": 3},
        "verify": "block",
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    write_manifest(folder, {"schema_version": SCHEMA_VERSION, "draftsmith_version": "0", "engines": engines})
    return folder


def write_tiny_checkpoint(folder: Path, quantized: bool, config: DecoderConfig = CONFIG) -> None:
    torch.manual_seed(0)
    write_part(folder, "embed", _fill(embed_shapes(config), False))
    for layer in range(config.num_layers):
        write_part(folder, layer_part(layer), _fill(layer_shapes(config), quantized))
    write_part(folder, "head", _fill(head_shapes(config), quantized))
    write_config(folder, config)


def _fill(shapes: dict[str, tuple[int, ...]], quantized: bool) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape) * 0.25 if is_matrix(name) else torch.ones(shape)
        if quantized and is_matrix(name):
            scale = weight.abs().amax(1) / 127
            tensors[f"{name}_scale"] = scale
            weight = (weight / scale[:, None]).round().to(torch.int8)
        tensors[name] = weight
    return tensors
