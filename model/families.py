"""What is known of each architecture: how its config reads as a `DecoderConfig`, and what its tensors are
called.

A family is a function from a transformers config to a description, plus a table from our tensor names to its
own. Whatever the description cannot express is refused here, by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config import DecoderConfig, Dtype, Rotary
from .errors import ModelError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

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


def describe_llama(c: Any) -> dict[str, Any]:
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    bias = bool(getattr(c, "attention_bias", False))
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": c.num_key_value_heads or heads,
        "head_dim": head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "norm": "rms",
        "norm_eps": c.rms_norm_eps,
        "activation": read_activation(getattr(c, "hidden_act", None) or c.hidden_activation),
        "gated_mlp": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bool(getattr(c, "mlp_bias", False)),
        "rotary": None,  # filled in by the families below
        "attention_scale": head_dim**-0.5,
        "tied_head": bool(c.tie_word_embeddings),
        **read_sliding(c),
    }


def describe_rotary_llama(c: Any) -> dict[str, Any]:
    return describe_llama(c) | {"rotary": read_rotary(c)}


def describe_qwen2(c: Any) -> dict[str, Any]:
    return describe_rotary_llama(c) | {"qkv_bias": True}


def describe_qwen3(c: Any) -> dict[str, Any]:
    return describe_rotary_llama(c) | {"qk_norm": True}


def describe_gemma3(c: Any) -> dict[str, Any]:
    if c.attn_logit_softcapping or c.use_bidirectional_attention:
        raise ModelError("Gemma 3 with capped attention scores or bidirectional attention is not supported")
    return describe_llama(c) | {
        "rotary": read_rotary(c, "full_attention"),
        "rotary_local": read_rotary(c, "sliding_attention"),
        "qk_norm": True,
        "post_norms": True,
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "embedding_scale": c.hidden_size**0.5,
        "logit_softcap": c.final_logit_softcapping,
    }


def describe_phi3(c: Any) -> dict[str, Any]:
    fields = describe_rotary_llama(c)
    if c.rope_parameters["rope_type"] == "longrope":
        # Past this length the frequencies of all tokens would change, those in the cache included.
        fields["max_position_embeddings"] = c.rope_parameters["original_max_position_embeddings"]
    return fields


def describe_opt(c: Any) -> dict[str, Any]:
    if not c.do_layer_norm_before or c._remove_final_layer_norm or c.word_embed_proj_dim != c.hidden_size:
        raise ModelError(
            "this OPT (do_layer_norm_before false, no final norm, or word_embed_proj_dim other than "
            "hidden_size, as in opt-350m) is not supported; opt-125m and 1.3b and larger are"
        )
    if not c.layer_norm_elementwise_affine:
        raise ModelError("OPT without norm weights (layer_norm_elementwise_affine false) is not supported")
    return describe_absolute(c, c.ffn_dim) | {
        "norm_eps": 1e-5,
        "activation": read_activation(c.activation_function),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), bool(c.enable_bias)),
    }


def describe_gpt2(c: Any) -> dict[str, Any]:
    if c.scale_attn_by_inverse_layer_idx or c.add_cross_attention:
        raise ModelError("GPT-2 with scale_attn_by_inverse_layer_idx or cross attention is not supported")
    fields = describe_absolute(c, c.n_inner or 4 * c.hidden_size) | {
        "norm_eps": c.layer_norm_epsilon,
        "activation": read_activation(c.activation_function),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
    }
    return fields if c.scale_attn_weights else fields | {"attention_scale": 1.0}


def describe_absolute(c: Any, intermediate_size: int) -> dict[str, Any]:
    """A decoder of the GPT-2 generation: learned positions, LayerNorm, all heads with keys of their own."""
    heads = c.num_attention_heads
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": c.hidden_size // heads,
        "max_position_embeddings": c.max_position_embeddings,
        "norm": "layer",
        "gated_mlp": False,
        "rotary": None,
        "attention_scale": (c.hidden_size // heads) ** -0.5,
        "tied_head": bool(c.tie_word_embeddings),
    }


def read_activation(name: str) -> str:
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ModelError(f"activation {name!r} is not supported; {', '.join(ACTIVATIONS)} are") from None


def read_sliding(c: Any) -> dict[str, Any]:
    """Which layers see only a window: those that `layer_types` names or, without such a list, all."""
    window = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"layers of type {', '.join(sorted(unknown))} are not supported")
    if window is None:
        return {}
    return {
        "sliding_window": window,
        "sliding_layers": [i for i, k in enumerate(kinds) if k != "full_attention"],
    }


def read_rotary(c: Any, layer_type: str | None = None) -> Rotary:
    """The frequencies that transformers computes, so that every static scaling (linear, llama3, yarn,
    longrope's short factors) comes out the same. Transformers 5 keeps the settings in `rope_parameters` and
    moves old-style `rope_theta` and `rope_scaling` there."""
    parameters = c.rope_parameters[layer_type] if layer_type else c.rope_parameters
    kind = parameters["rope_type"]
    if kind == "default":
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        size = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return Rotary(inv_freq=tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()))
    if kind == "dynamic" or kind not in ROPE_INIT_FUNCTIONS:
        raise ModelError(
            f"rotary scaling of type {kind!r} is not supported: it changes with the length of the sequence, "
            "or is unknown to this version of transformers"
        )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu"), layer_type=layer_type)
    return Rotary(inv_freq=tuple(frequencies.tolist()), scale=scale)


@dataclass(frozen=True)
class Family:
    describe: Callable[[Any], dict[str, Any]]  # transformers config → fields of DecoderConfig
    names: dict[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    adapt: Adapt = keep  # (our name, their tensor, config) → our tensor
    root: str = "model."  # where the decoder sits in the model with a head; some files leave it out


FAMILIES = {
    "llama": Family(describe_rotary_llama),
    "mistral": Family(describe_rotary_llama),
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
        fields = FAMILIES[family].describe(config)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    except Exception as error:  # transformers raises what it likes for a config that it cannot read
        raise ModelError(f"{where} is not a valid {family} config: {error}") from error
    eos = config.eos_token_id
    return DecoderConfig(
        family=family,
        dtype=dtype,
        bos_token_id=config.bos_token_id,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        **fields,
    )
