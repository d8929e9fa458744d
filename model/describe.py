"""Reads the configs of transformers, one function a family, as the fields of `DecoderConfig`."""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config import Rotary
from .errors import ModelError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


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
        "rotary": read_rotary(c),
        "attention_scale": head_dim**-0.5,
        "tied_head": bool(c.tie_word_embeddings),
        **read_sliding(c),
    }


def describe_qwen2(c: Any) -> dict[str, Any]:
    return describe_llama(c) | {"qkv_bias": True}


def describe_qwen3(c: Any) -> dict[str, Any]:
    return describe_llama(c) | {"qk_norm": True}


def describe_gemma3(c: Any) -> dict[str, Any]:
    if c.attn_logit_softcapping or c.use_bidirectional_attention:
        raise ModelError("Gemma 3 with capped attention scores or bidirectional attention is not supported")
    return describe_llama(c) | {
        "rotary_local": read_rotary(c, "sliding_attention"),
        "qk_norm": True,
        "post_norms": True,
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "embedding_scale": c.hidden_size**0.5,
        "logit_softcap": c.final_logit_softcapping,
    }


def describe_phi3(c: Any) -> dict[str, Any]:
    fields = describe_llama(c)
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


def read_rotary(c: Any, layer_type: str = "full_attention") -> Rotary:
    """The frequencies that transformers computes, so that every static scaling (linear, llama3, yarn,
    longrope's short factors) comes out the same.

    Transformers 5 keeps the settings in `rope_parameters`, of each type of layer where they differ, and moves
    old-style `rope_theta` and `rope_scaling` there."""
    parameters, which = c.rope_parameters, {}
    if layer_type in parameters:
        parameters, which = parameters[layer_type], {"layer_type": layer_type}
    kind = parameters["rope_type"]
    if kind == "default":
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        size = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return Rotary(inv_freq=tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()))
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise ModelError(
            f"rotary scaling of type {kind!r} is not supported, since the frequencies must not change with "
            "the length of the text; linear, llama3, yarn and longrope are"
        )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu"), **which)
    return Rotary(inv_freq=tuple(frequencies.tolist()), scale=scale)
