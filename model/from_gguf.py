"""Reads a .gguf file: its metadata as a transformers config, its tensors dequantized one at a time."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from .config import DecoderConfig, Dtype
from .errors import ModelError
from .families import describe, split_fused
from .tokenizer import write_tokenizer_of_gguf

# general.architecture → model_type of transformers. Mistral's files say "llama" and give no window.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_attention_norm": "post_attention_norm",
    "post_mlp_norm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED_QKV = {f"self_attn.{x}_proj": "attn_qkv" for x in "qkv"}
FUSED = {"phi3": FUSED_QKV | {"mlp.gate_proj": "ffn_up"}, "gpt2": FUSED_QKV}
SPLIT_FILE = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class GgufModel:
    """A .gguf file; a model that is split over several is given by its first."""

    def __init__(self, path: Path, dtype: Dtype):
        self.path = path
        self._readers = [open_gguf(part) for part in find_parts(path)]
        self._tensors = {tensor.name: tensor for reader in self._readers for tensor in reader.tensors}
        self.metadata = read_metadata(self._readers[0])
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{path}: general.architecture {self.architecture!r} is refused. "
                f"Supported: {', '.join(ARCHITECTURES)} (SmolLM and Mistral files say llama)"
            )
        self.config = self._scale_rotary(describe(self._transformers_config(), dtype, str(path)))
        self._names = NAMES | FUSED.get(self.architecture, {})

    @property
    def files(self) -> list[Path]:
        return find_parts(self.path)

    @property
    def names(self) -> list[str]:
        """Of the tensors in the file, but those that `config` has taken up."""
        return [name for name in self._tensors if not name.startswith("rope_")]

    def source_name(self, name: str, layer: int | None = None) -> str:
        ours, _, kind = name.rpartition(".")
        theirs = f"{self._names[ours]}.{kind}"
        return theirs if layer is None else f"blk.{layer}.{theirs}"

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """Our tensor `name`, relative to the layer if one is given, as float32."""
        ours = name.rpartition(".")[0]
        tensor = self._read(self.source_name(name, layer))
        if self.architecture == "llama" and ours.endswith(("q_proj", "k_proj")):
            tensor = unpermute(tensor, self.config.head_dim)
        return split_fused(name, tensor, self.config) if self.architecture in FUSED else tensor

    def write_tokenizer(self, out: Path) -> None:
        write_tokenizer_of_gguf(self.path, self.metadata, out, self.config)

    def _read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ModelError(f"{self.path}: {name} is stored as {kind}, which cannot be read") from None
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def _transformers_config(self) -> dict[str, Any]:
        heads = self._key("attention.head_count")
        width = self._key("embedding_length")
        head_dim = self._key("attention.key_length", width // heads)
        config = {
            "model_type": ARCHITECTURES[self.architecture],
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": width,
            "intermediate_size": self._key("feed_forward_length"),
            "num_hidden_layers": self._key("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._key("attention.head_count_kv", heads),
            "max_position_embeddings": self._key("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }
        if self._key("expert_count", 0):
            raise ModelError(f"{self.path}: mixtures of experts are not supported")
        if self.architecture == "gpt2":
            config["layer_norm_epsilon"] = self._key("attention.layer_norm_epsilon")
            config["n_inner"] = config.pop("intermediate_size")
            return config
        config["rms_norm_eps"] = self._key("attention.layer_norm_rms_epsilon")
        if self.architecture != "phi3":
            config["head_dim"] = head_dim
        if self.architecture == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self._tensors
        return config | self._rotary_config(head_dim) | self._window_config(head_dim)

    def _rotary_config(self, head_dim: int) -> dict[str, Any]:
        theta = self._key("rope.freq_base", 10000.0)
        config: dict[str, Any] = {"rope_theta": theta}
        kind = self._key("rope.scaling.type", "none")
        original = self._key("rope.scaling.original_context_length", self._key("context_length"))
        if self.architecture == "phi3":
            config["partial_rotary_factor"] = self._key("rope.dimension_count", head_dim) / head_dim
            if "rope_factors_short.weight" in self._tensors:
                config["original_max_position_embeddings"] = original
                config["rope_scaling"] = {
                    "rope_type": "longrope",
                    "short_factor": self._read("rope_factors_short.weight").tolist(),
                    "long_factor": self._read("rope_factors_long.weight").tolist(),
                    "attention_factor": self._key("rope.scaling.attn_factor", 1.0),
                }
        elif kind not in ("none", ""):
            config["rope_scaling"] = {"rope_type": kind, "factor": self._key("rope.scaling.factor")}
            if kind == "yarn":
                config["rope_scaling"]["original_max_position_embeddings"] = original
        return config

    def _window_config(self, head_dim: int) -> dict[str, Any]:
        window = self._key("attention.sliding_window", None)
        if self.architecture == "phi3":
            return {"sliding_window": window}
        if self.architecture != "gemma3":
            return {}
        # The 27B scales its queries by the width per head, which there is not the head's size.
        wide = self._key("block_count") == 62
        per_head = self._key("embedding_length") // self._key("attention.head_count")
        return {
            "sliding_window": window,
            "sliding_window_pattern": self._key("attention.sliding_window_pattern", 6),
            "rope_local_base_freq": self._key("rope.freq_base_swa", 10000.0),
            "query_pre_attn_scalar": per_head if wide else head_dim,
            "final_logit_softcapping": self._key("final_logit_softcapping", None),
        }

    def _scale_rotary(self, config: DecoderConfig) -> DecoderConfig:
        """Llama 3's scaling is kept as a divisor for each frequency."""
        if "rope_freqs.weight" not in self._tensors or config.rotary is None:
            return config
        frequencies = torch.tensor(config.rotary.inv_freq) / self._read("rope_freqs.weight")
        rotary = config.rotary.model_copy(update={"inv_freq": tuple(frequencies.tolist())})
        return config.model_copy(update={"rotary": rotary})

    def _key(self, key: str, *default: Any) -> Any:
        name = f"{self.architecture}.{key}"
        if name not in self.metadata and not default:
            raise ModelError(f"{self.path} lacks the metadata key {name}: convert the model again")
        return self.metadata.get(name, *default)


def unpermute(tensor: Tensor, head_dim: int) -> Tensor:
    """llama.cpp turns neighbouring channels of a head together, and stores the rows of q and k so; ours turn
    channel i with i + head_dim / 2."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


class PlainReader(gguf.GGUFReader):
    """Reads the mapped pages as a plain array: a vocabulary takes a million slices, and one of a memmap costs
    several times as much."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)


def open_gguf(path: Path) -> gguf.GGUFReader:
    try:
        return PlainReader(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (ValueError, IndexError, OverflowError, KeyError, MemoryError) as error:
        raise ModelError(f"{path} is cut short, damaged or not GGUF ({error}): download it again") from None


def read_metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """All keys but the vocabulary and merges, which the tokenizer reads for itself."""
    long = (
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
    )
    return {name: item.contents() for name, item in reader.fields.items() if name not in long}


def find_parts(path: Path) -> list[Path]:
    """A file and, if its name ends in -00001-of-0000N.gguf, those that follow it."""
    if not SPLIT_FILE.search(path.name):
        return [path]
    stem, count = path.name[:-20], int(path.name[-10:-5])
    return [path.with_name(f"{stem}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
