"""The description of a decoder: all that graph, walker and kernels need to know of an architecture.

A family (Llama, Qwen, Gemma, …) is a function that fills in this description and renames tensors; nothing
past `families.py` asks which family a model came from.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["float32", "float16", "bfloat16"]


class Rotary(BaseModel):
    """Rotary embedding of the first ``2 * len(inv_freq)`` channels of a head, in half-split (NeoX) layout."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inv_freq: tuple[float, ...]
    scale: float = 1.0  # multiplies cos and sin (YaRN's and LongRoPE's attention factor)


class DecoderConfig(BaseModel):
    """A pre-norm decoder with grouped-query attention.

    One layer computes ``h += post(attention(norm(h)))`` and ``h += post(mlp(norm(h)))``; ``post`` is the
    identity unless `post_norms`. The MLP is ``down(act(gate(x)) * up(x))`` when `gated_mlp`, else
    ``down(act(up(x)))``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    dtype: Dtype  # of stored weights; norms are kept in float32
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int

    norm: Literal["rms", "layer"]
    norm_eps: float
    post_norms: bool = False  # norms after attention and after the MLP (Gemma 3)
    qk_norm: bool = False  # RMSNorm over each head of queries and keys, before the rotary embedding

    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated_mlp: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    rotary: Rotary | None  # None: learned absolute positions (`model.embed_positions`)
    rotary_local: Rotary | None = None  # of the sliding-window layers, where it differs
    sliding_window: int | None = None  # a token sees itself and `sliding_window - 1` before it
    sliding_layers: tuple[int, ...] = ()

    attention_scale: float
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    tied_head: bool

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def is_sliding(self, layer: int) -> bool:
        return layer in self.sliding_layers

    def window_of(self, layer: int) -> int | None:
        return self.sliding_window if self.is_sliding(layer) else None

    def rotary_of(self, layer: int) -> Rotary | None:
        return self.rotary_local if self.is_sliding(layer) and self.rotary_local else self.rotary
