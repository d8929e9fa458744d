"""The tensors of a checkpoint folder: their names and shapes, worked out from the description of the decoder.

The names are Llama's for every family, relative to the layer; a matrix is [out, in] as in torch. Norms,
biases and scales are float32; matrices and embeddings have `DecoderConfig.dtype`.
"""

from .config import DecoderConfig

Shapes = dict[str, tuple[int, ...]]

EMBED_TOKENS = "model.embed_tokens.weight"
EMBED_POSITIONS = "model.embed_positions.weight"
HEAD_IDS = "lm_head.ids"  # of a head that knows only some tokens (`vocabulary.py`)


def linear_shapes(config: DecoderConfig) -> Shapes:
    """[out, in] of the linears of one layer, in the order in which they run."""
    d, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    q_out, kv_out = config.num_heads * head, config.num_kv_heads * head
    shapes: Shapes = {
        "self_attn.q_proj": (q_out, d),
        "self_attn.k_proj": (kv_out, d),
        "self_attn.v_proj": (kv_out, d),
        "self_attn.o_proj": (d, q_out),
    }
    if config.gated_mlp:
        shapes["mlp.gate_proj"] = (inner, d)
    return shapes | {"mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner)}


def has_bias(config: DecoderConfig, linear: str) -> bool:
    if linear.startswith("mlp."):
        return config.mlp_bias
    return config.o_bias if linear == "self_attn.o_proj" else config.qkv_bias


def norm_names(config: DecoderConfig) -> tuple[str, ...]:
    """Norms over the hidden state in one layer, in the order in which they run."""
    if config.post_norms:
        return ("input_layernorm", "post_attention_norm", "post_attention_layernorm", "post_mlp_norm")
    return ("input_layernorm", "post_attention_layernorm")


def layer_shapes(config: DecoderConfig) -> Shapes:
    shapes: Shapes = {}
    for name, shape in linear_shapes(config).items():
        shapes[f"{name}.weight"] = shape
        if has_bias(config, name):
            shapes[f"{name}.bias"] = shape[:1]
    for name in norm_names(config):
        shapes |= _norm_shapes(config, name)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def embed_shapes(config: DecoderConfig) -> Shapes:
    shapes: Shapes = {EMBED_TOKENS: (config.vocab_size, config.hidden_size)}
    if config.rotary is None:
        shapes[EMBED_POSITIONS] = (config.max_position_embeddings, config.hidden_size)
    return shapes


def head_shapes(config: DecoderConfig) -> Shapes:
    """The final norm and, unless it is the embedding used a second time, the output projection."""
    shapes = _norm_shapes(config, "model.norm")
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def is_matrix(name: str) -> bool:
    """Whether a tensor is stored in the model's dtype, as linears and embeddings are, and not in float32."""
    return name.endswith(("_proj.weight", "lm_head.weight")) or name in (EMBED_TOKENS, EMBED_POSITIONS)


def layer_part(layer: int) -> str:
    return f"layers/{layer:03d}"


def _norm_shapes(config: DecoderConfig, name: str) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (config.hidden_size,)}
    if config.norm == "layer":
        shapes[f"{name}.bias"] = (config.hidden_size,)
    return shapes
