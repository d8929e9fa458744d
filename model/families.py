"""What is known of each architecture: how its config is read, and what its tensors are called.

A family is a function from a transformers config to a description, plus a table from our tensor names to its
own. Whatever the description cannot express is refused here, by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING

from .config import DecoderConfig, Dtype
from .describe import (
    describe_gemma3,
    describe_gpt2,
    describe_llama,
    describe_opt,
    describe_phi3,
    describe_qwen2,
    describe_qwen3,
)
from .errors import ModelError

# Ours → theirs, without ".weight" or ".bias"; per layer, "{}" stands for its number.
LLAMA_NAMES = {
    "model.embed_tokens": "model.embed_tokens",
    "model.norm": "model.norm",
    "lm_head": "lm_head",
    "input_layernorm": "model.layers.{}.input_layernorm",
    "post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    **{f"self_attn.{x}": f"model.layers.{{}}.self_attn.{x}" for x in ("q_norm", "k_norm")},
    **{f"self_attn.{x}_proj": f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up", "down")},
}
GEMMA3_NAMES = LLAMA_NAMES | {
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "post_attention_layernorm": "model.layers.{}.pre_feedforward_layernorm",
    "post_mlp_norm": "model.layers.{}.post_feedforward_layernorm",
}
PHI3_NAMES = LLAMA_NAMES | {
    **{f"self_attn.{x}_proj": "model.layers.{}.self_attn.qkv_proj" for x in "qkv"},
    **{f"mlp.{x}_proj": "model.layers.{}.mlp.gate_up_proj" for x in ("gate", "up")},
}
OPT_NAMES = {
    "model.embed_tokens": "model.decoder.embed_tokens",
    "model.embed_positions": "model.decoder.embed_positions",
    "model.norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
    "input_layernorm": "model.decoder.layers.{}.self_attn_layer_norm",
    "post_attention_layernorm": "model.decoder.layers.{}.final_layer_norm",
    **{f"self_attn.{x}_proj": f"model.decoder.layers.{{}}.self_attn.{x}_proj" for x in "qkv"},
    "self_attn.o_proj": "model.decoder.layers.{}.self_attn.out_proj",
    "mlp.up_proj": "model.decoder.layers.{}.fc1",
    "mlp.down_proj": "model.decoder.layers.{}.fc2",
}
GPT2_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "transformer.h.{}.ln_1",
    "post_attention_layernorm": "transformer.h.{}.ln_2",
    **{f"self_attn.{x}_proj": "transformer.h.{}.attn.c_attn" for x in "qkv"},
    "self_attn.o_proj": "transformer.h.{}.attn.c_proj",
    "mlp.up_proj": "transformer.h.{}.mlp.c_fc",
    "mlp.down_proj": "transformer.h.{}.mlp.c_proj",
}

# Why the best known of the others are refused.
STATE = "its recurrent state cannot be rolled back when a draft is rejected"
EXPERTS = "mixtures of experts are not supported"
REASONS = {
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba"), STATE
    ),
    **dict.fromkeys(("qwen3_next", "granitemoehybrid", "falcon_h1", "lfm2", "nemotron_h"), STATE),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "phimoe"), EXPERTS
    ),
    "gpt_oss": "attention sinks and mixtures of experts are not supported",
    "smollm3": "its layers without a rotary embedding are not supported",
    "gemma2": "its caps on attention scores are not supported",
    **dict.fromkeys(("bloom", "mpt"), "ALiBi positions are not supported"),
}

Adapt = Callable[[str, Tensor, DecoderConfig], Tensor]


def keep(name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
    return tensor


def split_fused(name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
    """The rows of q, k, v (or gate, up) out of a tensor in which they stand one after the other."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    rows = {
        "self_attn.q_proj": (0, q, q + 2 * kv),
        "self_attn.k_proj": (q, kv, q + 2 * kv),
        "self_attn.v_proj": (q + kv, kv, q + 2 * kv),
        "mlp.gate_proj": (0, inner, 2 * inner),
        "mlp.up_proj": (inner, inner, 2 * inner),
    }
    start, length, height = rows.get(name.rpartition(".")[0], (0, -1, -1))
    # A tensor of another height is passed on as it is, for the shape check to name.
    return tensor[start : start + length] if len(tensor) == height else tensor


def adapt_gpt2(name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
    """GPT-2 stores its matrices [in, out]."""
    return split_fused(name, tensor.T if name.endswith("_proj.weight") else tensor, config)


def adapt_gemma3(name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
    """Gemma multiplies by 1 + weight; we store that sum."""
    return tensor.float() + 1 if "norm" in name else tensor


def adapt_opt(name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
    """OPT counts positions from 2."""
    return tensor[2:] if name == "model.embed_positions.weight" else tensor


@dataclass(frozen=True)
class Family:
    describe: Callable[[Any], dict[str, Any]]  # transformers config → fields of DecoderConfig
    names: dict[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    adapt: Adapt = keep  # (our name, their tensor, config) → our tensor
    root: str = "model."  # where the decoder sits in the model with a head; some files leave it out


FAMILIES = {
    "llama": Family(describe_llama),
    "mistral": Family(describe_llama),
    "qwen2": Family(describe_qwen2),
    "qwen3": Family(describe_qwen3),
    "gemma3_text": Family(describe_gemma3, GEMMA3_NAMES, adapt_gemma3),
    "phi3": Family(describe_phi3, PHI3_NAMES, split_fused),
    "opt": Family(describe_opt, OPT_NAMES, adapt_opt),
    "gpt2": Family(describe_gpt2, GPT2_NAMES, adapt_gpt2, root="transformer."),
}


def describe(raw: dict[str, Any], dtype: Dtype, where: str) -> DecoderConfig:
    """A config.json of transformers as a description. `where` names it in errors."""
    if raw.get("model_type") == "gemma3":  # with a vision tower, which is left out
        raw = {"model_type": "gemma3_text"} | raw["text_config"]
    family = raw.get("model_type", "")
    if family not in FAMILIES:
        reason = REASONS.get(family, "this architecture is not known")
        raise ModelError(
            f"{where}: model_type {family!r} is refused: {reason}. Supported: {', '.join(FAMILIES)} "
            "(SmolLM and SmolLM2 are llama)"
        )
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method")
        raise ModelError(
            f"{where}: the weights are already quantized ({method}); give the original model, or a .gguf file"
        )
    try:
        config = CONFIG_MAPPING[family].from_dict(dict(raw))
        eos = config.eos_token_id
        return DecoderConfig(
            family=family,
            dtype=dtype,
            bos_token_id=config.bos_token_id,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            **FAMILIES[family].describe(config),
        )
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    except Exception as error:  # transformers raises what it likes for a config that it cannot read
        raise ModelError(f"{where} is not a valid {family} config: {error}") from error
