"""The weights of a bundle's target in the forms that other engines read: a Hugging Face folder, .gguf files.

They come from the source that the bundle's recipe names, through our own loader, so that all have the same
numbers. Llama's form only: the writers know no other.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
import yaml
from draftsmith.model.from_gguf import NAMES
from draftsmith.model.layout import EMBED_TOKENS
from draftsmith.model.load import load_model
from draftsmith.model.store import Checkpoint, read_part
from gguf.quants import quantize
from safetensors.torch import save_file

FAMILY = "llama"
GGUF_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}


def load_source(bundle: Path, work: Path) -> Checkpoint:
    """The unquantized model that a bundle was built from."""
    model = yaml.safe_load((bundle / "recipe.yaml").read_text())["model"]
    folder = work / "checkpoint"
    if not (folder / "config.json").exists():
        load_model(model["source"], model.get("dtype", "bfloat16"), folder, work / "downloads")
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    if config.family != FAMILY or not config.tied_head or config.rotary is None or config.rotary.scale != 1:
        raise SystemExit(f"{model['source']}: only Llamas with a tied head can be written for other engines")
    return checkpoint


def write_folder(checkpoint: Checkpoint, out: Path) -> Path:
    """config.json, model.safetensors and the tokenizer."""
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    save_file(dict(_tensors(checkpoint)), out / "model.safetensors", {"format": "pt"})
    (out / "tokenizer.json").write_bytes(checkpoint.tokenizer_path.read_bytes())
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    config = checkpoint.config
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "tie_word_embeddings": True,
        "rope_theta": _rope_theta(checkpoint),
        "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(checkpoint)},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "dtype": config.dtype,
    }
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    return out


def write_gguf(checkpoint: Checkpoint, out: Path, variant: str) -> Path:
    """Matrices in one of `GGUF_TYPES`, norms in float32."""
    if out.exists():
        return out
    config, part = checkpoint.config, out.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(_rope_theta(checkpoint))
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_file_type(FILE_TYPES[variant])
    _add_tokenizer(writer, checkpoint)
    kind = GGUF_TYPES[variant]
    for name, tensor in _tensors(checkpoint):
        weight = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _turn_pairs(weight, config.head_dim)
        theirs = _gguf_name(name)
        if weight.ndim == 1:
            writer.add_tensor(theirs, weight)
        else:
            writer.add_tensor(theirs, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(out)
    return out


def _tensors(checkpoint: Checkpoint) -> list[tuple[str, torch.Tensor]]:
    """Under the names that Hugging Face's Llama has."""
    found: list[tuple[str, torch.Tensor]] = []
    for part in checkpoint.parts():
        prefix = f"model.layers.{int(part.split('/')[1])}." if "/" in part else ""
        found += [(prefix + name, tensor) for name, tensor in read_part(checkpoint.path, part).items()]
    return found


def _gguf_name(name: str) -> str:
    ours, _, kind = name.rpartition(".")
    if name == EMBED_TOKENS or not ours.startswith("model.layers."):
        return f"{NAMES[ours]}.{kind}"
    _, _, layer, ours = ours.split(".", 3)
    return f"blk.{layer}.{NAMES[ours]}.{kind}"


def _turn_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp turns neighbouring channels of a head together, others the i-th of each half."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _rope_theta(checkpoint: Checkpoint) -> float:
    rotary, half = checkpoint.config.rotary, checkpoint.config.head_dim // 2
    assert rotary is not None
    theta = float(np.float64(rotary.inv_freq[1]) ** -half)
    wanted = theta ** (-np.arange(half) / half)
    if not np.allclose(wanted, rotary.inv_freq, rtol=1e-5):
        raise SystemExit("only plain rotary embeddings can be written for other engines")
    return float(np.round(theta))


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Byte-level BPE. Engines are given token ids; they only want to find one."""
    tokenizer = json.loads(checkpoint.tokenizer_path.read_text())
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    by_id = {index: token for token, index in tokenizer["model"]["vocab"].items()} | special
    size = checkpoint.config.vocab_size
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([3 if index in special else 1 if index in by_id else 5 for index in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if checkpoint.config.bos_token_id is not None:
        writer.add_bos_token_id(checkpoint.config.bos_token_id)
    writer.add_eos_token_id(checkpoint.config.eos_token_ids[0])
