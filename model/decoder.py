"""The decoder that `DecoderConfig` describes, in torch: the reference for every graph and engine made of it.

Arithmetic is float32 whatever dtype the weights are stored in, unless asked otherwise.
"""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, KVCache, RMSNorm, causal_mask
from .config import DecoderConfig
from .layout import EMBED_POSITIONS, EMBED_TOKENS, HEAD_IDS, linear_shapes, norm_names
from .linear import Linear
from .store import Checkpoint

__all__ = ["Decoder", "DecoderLayer", "Embedding", "Head", "KVCache", "Linear", "Norm", "causal_mask"]

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class LayerNorm(nn.Module):
    """(x - mean) / std · weight + bias over the last axis."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm
# Linears, by name relative to the layer, and the input that they are about to get; or none, and the output.
Step = tuple[tuple[str, ...], Tensor]


def last_of(steps: Iterator[Step]) -> Tensor:
    return deque(steps, maxlen=1)[0][1]


def make_norm(
    config: DecoderConfig, name: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> Norm:
    if config.norm == "rms":
        return RMSNorm(tensors[f"{name}.weight"], config.norm_eps, dtype)
    return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], config.norm_eps, dtype)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, tensors: dict[str, Tensor], dtype: torch.dtype):
        super().__init__()
        self.activate = ACTIVATIONS[config.activation]
        self.gate_proj = Linear("mlp.gate_proj", tensors, dtype) if config.gated_mlp else None
        self.up_proj = Linear("mlp.up_proj", tensors, dtype)
        self.down_proj = Linear("mlp.down_proj", tensors, dtype)

    def expand(self, x: Tensor) -> Tensor:
        """x [..., d] → what enters `down_proj` [..., intermediate_size]."""
        if self.gate_proj is None:
            return self.activate(self.up_proj(x))
        return self.activate(self.gate_proj(x)) * self.up_proj(x)


class DecoderLayer(nn.Module):
    """One layer, built from the tensors of its file in the checkpoint folder."""

    input_layernorm: Norm
    post_attention_layernorm: Norm

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        tensors: dict[str, Tensor],
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config, self.index = config, index
        self.self_attn = Attention(config, index, tensors, dtype)
        self.mlp = MLP(config, tensors, dtype)
        for name in norm_names(config):
            self.add_module(name, make_norm(config, name, tensors, dtype))

    def forward(
        self, hidden: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """hidden [B, S, d], positions int64 [B, S], mask bool [B or 1, 1, S, T] → hidden [B, S, d]. Without a
        cache T = S; with one T counts what it holds, these S tokens included. A mask of None lets all see
        all."""
        return last_of(self.steps(hidden, positions, mask, cache))

    def steps(
        self, hidden: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache | None = None
    ) -> Iterator[Step]:
        """`forward` with a stop before each group of linears that share an input, at which they may be
        changed."""
        attention, mlp = self.self_attn, self.mlp
        x = self.input_layernorm(hidden)
        yield (attention.q_proj.name, attention.k_proj.name, attention.v_proj.name), x
        x = attention.mix(x, positions, mask, cache)
        yield (attention.o_proj.name,), x
        hidden = hidden + self._norm_after("post_attention_norm", attention.o_proj(x))
        x = self.post_attention_layernorm(hidden)
        yield tuple(linear.name for linear in (mlp.gate_proj, mlp.up_proj) if linear is not None), x
        x = mlp.expand(x)
        yield (mlp.down_proj.name,), x
        yield (), hidden + self._norm_after("post_mlp_norm", mlp.down_proj(x))

    def _norm_after(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x) if self.config.post_norms else x

    def linears(self) -> dict[str, Linear]:
        """By relative name ("self_attn.q_proj"), in the order in which they run."""
        return {name: self._linear(name) for name in linear_shapes(self.config)}

    def norms(self) -> dict[str, Norm]:
        """Norms over the hidden state by relative name, in the order in which they run."""
        return {name: self.get_submodule(name) for name in norm_names(self.config)}  # pyright: ignore[reportReturnType]

    def _linear(self, name: str) -> Linear:
        linear = self.get_submodule(name)
        assert isinstance(linear, Linear)
        return linear


class Embedding(nn.Module):
    def __init__(self, config: DecoderConfig, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.scale, self.dtype = config.embedding_scale, dtype
        self.register_buffer("tokens", tensors[EMBED_TOKENS])
        self.register_buffer("places", tensors.get(EMBED_POSITIONS))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions int64 [B, S] → hidden [B, S, d]."""
        hidden = F.embedding(ids, self.get_buffer("tokens")).to(self.dtype) * self.scale
        if self.places is not None:
            hidden = hidden + F.embedding(positions, self.get_buffer("places")).to(self.dtype)
        return hidden


class Head(nn.Module):
    """The final norm and the output projection."""

    ids: Tensor | None

    def __init__(
        self,
        config: DecoderConfig,
        tensors: dict[str, Tensor],
        embed_tokens: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """`embed_tokens` [V, d] is needed where `tensors` (the head's file) has no ``lm_head.weight`` of its
        own."""
        super().__init__()
        self.softcap, self.vocab_size = config.logit_softcap, config.vocab_size
        self.register_buffer("ids", tensors.get(HEAD_IDS))
        self.norm = make_norm(config, "model.norm", tensors, dtype)
        if "lm_head.weight" not in tensors:
            assert embed_tokens is not None, "a tied head needs the embedding"
            tensors = {"lm_head.weight": embed_tokens}
        self.lm_head = Linear("lm_head", tensors, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, d] → float32 logits [B, S, V]."""
        return last_of(self.steps(hidden))

    def steps(self, hidden: Tensor) -> Iterator[Step]:
        """As of a layer."""
        x = self.norm(hidden)
        yield (self.lm_head.name,), x
        logits = self.lm_head(x).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        yield (), logits if self.ids is None else self._spread(logits)

    def _spread(self, logits: Tensor) -> Tensor:
        """Of the tokens in `ids` [n] to all: minus infinity for those that the projection does not know."""
        whole = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        whole[..., self.ids] = logits
        return whole


class Decoder(nn.Module):
    """A whole model in memory."""

    def __init__(
        self, config: DecoderConfig, embedding: Embedding, layers: list[DecoderLayer], head: Head
    ) -> None:
        super().__init__()
        self.config, self.embedding, self.head = config, embedding, head
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> "Decoder":
        """`dtype` is that of the arithmetic; the weights are converted to it."""
        config, embed = checkpoint.config, checkpoint.load_embed()
        return cls(
            config,
            Embedding(config, embed, dtype),
            [DecoderLayer(config, i, checkpoint.load_layer(i), dtype) for i in range(config.num_layers)],
            Head(config, checkpoint.load_head(), embed[EMBED_TOKENS], dtype),
        )

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids int64 [B, S] → float32 logits [B, S, V]. With a cache they come after the tokens that it
        holds."""
        return self.head(self.run_layers(ids, cache))

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """As `forward`, but the logits of the last token only: [B, V]."""
        return self.head(self.run_layers(ids, cache)[:, -1:])[:, 0]

    def run_layers(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        num_tokens = ids.shape[1]
        positions = torch.arange(start, start + num_tokens).expand(ids.shape)
        layer_of_window = {self.config.window_of(i): i for i in range(self.config.num_layers)}
        masks = {w: causal_mask(self.config, i, num_tokens, start) for w, i in layer_of_window.items()}
        masks = {w: None if mask.all() else mask for w, mask in masks.items()}
        hidden = self.embedding(ids, positions)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, positions, masks[self.config.window_of(index)], cache)
        if cache is not None:
            cache.length += num_tokens
        return hidden
