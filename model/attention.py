"""Causal grouped-query attention over a sequence or over a static key/value cache."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import DecoderConfig, Rotary
from .linear import Linear


def causal_mask(config: DecoderConfig, layer: int, num_tokens: int, start: int = 0) -> Tensor:
    """Which of the tokens 0 … start + num_tokens - 1 (columns) each of the last `num_tokens` (rows) sees in
    this layer: bool [1, 1, num_tokens, start + num_tokens]."""
    rows = torch.arange(start, start + num_tokens).unsqueeze(1)
    columns = torch.arange(start + num_tokens).unsqueeze(0)
    mask = columns <= rows
    if (window := config.window_of(layer)) is not None:
        mask &= columns > rows - window
    return mask[None, None]


class KVCache:
    """Keys and values of every layer, float [B, H_kv, capacity, D]; the first `length` slots are filled."""

    def __init__(self, config: DecoderConfig, batch: int, capacity: int, dtype: torch.dtype = torch.float32):
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
        self.length = 0  # moved by the decoder once all layers have written

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, H_kv, S, D] behind the filled slots; returns all that is filled, the new included."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def rotate(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x [B, H, S, D]: channel i turns with channel i + R/2 of the first
    R; the rest passes. Angles are float32 whatever x is."""
    angles = positions[:, None, :, None].float() * torch.tensor(rotary.inv_freq, dtype=torch.float32)
    cos, sin = (angles.cos() * rotary.scale).to(x.dtype), (angles.sin() * rotary.scale).to(x.dtype)
    half = len(rotary.inv_freq)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int, tensors: dict[str, Tensor], dtype: torch.dtype):
        super().__init__()
        self.config, self.layer = config, layer
        self.rotary = config.rotary_of(layer)
        self.q_proj = Linear("self_attn.q_proj", tensors, dtype)
        self.k_proj = Linear("self_attn.k_proj", tensors, dtype)
        self.v_proj = Linear("self_attn.v_proj", tensors, dtype)
        self.o_proj = Linear("self_attn.o_proj", tensors, dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(tensors["self_attn.q_norm.weight"], config.norm_eps, dtype)
            self.k_norm = RMSNorm(tensors["self_attn.k_norm.weight"], config.norm_eps, dtype)

    def mix(
        self, hidden: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """hidden [B, S, d], positions int64 [B, S] → what enters `o_proj` [B, S, H · D]. `mask` is bool,
        broadcast to [B, 1, S, T] over the T tokens in the cache, these S included (no cache: T = S); None if
        every token sees all T."""
        config = self.config
        query = self._heads(self.q_proj(hidden), config.num_heads)
        key = self._heads(self.k_proj(hidden), config.num_kv_heads)
        value = self._heads(self.v_proj(hidden), config.num_kv_heads)
        if config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary is not None:
            query, key = rotate(query, positions, self.rotary), rotate(key, positions, self.rotary)
        if cache is not None:
            key, value = cache.write(self.layer, key, value)
        mixed = attend(query, key, value, mask, config.attention_scale)
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(2, (num_heads, self.config.head_dim)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [B, H, S, D], key and value [B, H_kv, T, D] → [B, H, S, D]; H / H_kv neighbouring heads share
    one head of keys and values."""
    batch, num_heads, num_tokens, size = query.shape
    num_kv_heads = key.shape[1]
    if num_tokens == 1:
        # The heads that share keys become rows of one small product: keys are read once and never repeated.
        query = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, size)
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).reshape(
            batch, num_heads, 1, size
        )
    return F.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=num_heads != num_kv_heads
    )


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, in float32 (Zhang & Sennrich 2019)."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
