"""From the description of a decoder to its graph: hidden states [B, S, d] and a cache of S_max slots.

Shapes are spelled so that shape inference can follow B and S through the whole graph. Where it loses them,
ONNX Runtime reuses no buffer, and planning takes a time quadratic in the number of operators.
"""

import numpy as np
from onnx import TensorProto

from ..model.config import DecoderConfig
from ..model.layout import EMBED_POSITIONS, EMBED_TOKENS
from .builder import Graph
from .linear import apply_linears
from .onnx_files import WeightFile
from .weights import HEAD_PLACES, StoredLayer, StoredModel

BATCH, TOKENS, SLOTS = "batch", "tokens", "slots"


def build_graph(model: StoredModel, weights: WeightFile) -> Graph:
    builder = _DecoderBuilder(model, weights)
    hidden = builder.embed()
    for layer, stored in enumerate(model.layers):
        hidden = builder.layer(hidden, layer, stored)
    builder.head(hidden)
    return builder.graph


def embed_tokens(graph: Graph, config: DecoderConfig, tokens: str, positions: str) -> str:
    hidden = _gather(graph, EMBED_TOKENS, tokens)
    if config.embedding_scale != 1.0:
        hidden = graph.op("Mul", hidden, graph.scalar(config.embedding_scale))
    return add_positions(graph, config, hidden, positions)


def add_positions(graph: Graph, config: DecoderConfig, hidden: str, positions: str) -> str:
    """Learned positions, of the models whose queries and keys do not turn."""
    if config.rotary is not None:
        return hidden
    return graph.op("Add", hidden, _gather(graph, EMBED_POSITIONS, positions))


def soften(graph: Graph, config: DecoderConfig, logits: str) -> str:
    """cap · tanh(logits / cap), of the models that cap their logits."""
    if (cap := config.logit_softcap) is None:
        return logits
    logits = graph.op("Tanh", graph.op("Div", logits, graph.scalar(cap)))
    return graph.op("Mul", logits, graph.scalar(cap))


def _gather(graph: Graph, table: str, index: str) -> str:
    """Rows are converted after they are picked: a float32 copy of the table would only cost memory."""
    return graph.op("Cast", graph.op("Gather", graph.weight(table), index), to=TensorProto.FLOAT)


class _DecoderBuilder:
    def __init__(self, model: StoredModel, weights: WeightFile) -> None:
        self.model, self.config = model, model.config
        self.graph = graph = Graph(self.config.family, weights)
        self.tokens = graph.input("input_ids", TensorProto.INT64, [BATCH, TOKENS])
        self.positions = graph.input("position_ids", TensorProto.INT64, [BATCH, TOKENS])
        self.write_index = graph.input("write_index", TensorProto.INT64, [BATCH])
        self.mask = graph.input("attention_mask", TensorProto.BOOL, [BATCH, 1, TOKENS, SLOTS])

    def embed(self) -> str:
        return embed_tokens(self.graph, self.config, self.tokens, self.positions)

    def layer(self, hidden: str, layer: int, stored: StoredLayer) -> str:
        graph, name = self.graph, f"model.layers.{layer}"
        with graph.scope(name):
            mixed = self._attention(self._norm(hidden, f"{name}.input_layernorm"), layer, stored)
            if self.config.post_norms:
                mixed = self._norm(mixed, f"{name}.post_attention_norm")
            hidden = graph.op("Add", hidden, mixed)
            mixed = self._mlp(self._norm(hidden, f"{name}.post_attention_layernorm"), stored)
            if self.config.post_norms:
                mixed = self._norm(mixed, f"{name}.post_mlp_norm")
            return graph.op("Add", hidden, mixed)

    def head(self, hidden: str) -> None:
        graph, vocab = self.graph, self.config.vocab_size
        hidden = self._norm(hidden, "model.norm")
        if self.model.head:
            (logits,) = apply_linears(graph, hidden, self.model.head)
        else:
            table = graph.op("Transpose", graph.matrix(EMBED_TOKENS), perm=[1, 0])
            logits = graph.op("MatMul", hidden, table)
        logits = soften(graph, self.config, logits)
        if self.model.has_cut_head:
            whole = graph.op("Pad", logits, graph.ints(0, 0, 0, 0, 0, 1), graph.scalar(-np.inf))
            logits = graph.op("Gather", whole, graph.weight(HEAD_PLACES), axis=2)
        graph.op("Identity", logits, output="logits")
        graph.output("logits", TensorProto.FLOAT, [BATCH, TOKENS, vocab])

    def _attention(self, x: str, layer: int, stored: StoredLayer) -> str:
        graph, config = self.graph, self.config
        query, key, value = apply_linears(graph, x, stored.qkv)
        query, key, value = (
            self._heads(query, config.num_heads),
            self._heads(key, config.num_kv_heads),
            self._heads(value, config.num_kv_heads),
        )
        if config.qk_norm:
            query = self._norm(query, f"model.layers.{layer}.self_attn.q_norm")
            key = self._norm(key, f"model.layers.{layer}.self_attn.k_norm")
        query, key = self._rotate(query, layer), self._rotate(key, layer)
        keys, values = self._write(key, layer, "key"), self._write(value, layer, "value")
        mask = self.mask if (window := config.window_of(layer)) is None else self._window(window)
        mixed = graph.op("Attention", query, keys, values, mask, scale=config.attention_scale)
        mixed = graph.op("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = graph.op("Reshape", mixed, graph.ints(0, 0, config.num_heads * config.head_dim))
        return apply_linears(graph, mixed, stored.o)[0]

    def _heads(self, x: str, num_heads: int) -> str:
        """[B, S, heads · D] → [B, heads, S, D]."""
        x = self.graph.op("Reshape", x, self.graph.ints(0, 0, num_heads, self.config.head_dim))
        return self.graph.op("Transpose", x, perm=[0, 2, 1, 3])

    def _rotate(self, x: str, layer: int) -> str:
        rotary = self.config.rotary_of(layer)
        if rotary is None:
            return x
        name = "rotary" if rotary is self.config.rotary else "rotary_local"
        cos, sin = self.graph.weight(f"{name}.cos"), self.graph.weight(f"{name}.sin")
        # The operator takes 0 for "all channels of a head".
        width = 2 * len(rotary.inv_freq) % self.config.head_dim
        return self.graph.op("RotaryEmbedding", x, cos, sin, self.positions, rotary_embedding_dim=width)

    def _write(self, update: str, layer: int, kind: str) -> str:
        """[B, H_kv, S, D] into the cache, which is returned whole: [B, H_kv, S_max, D]."""
        graph, config = self.graph, self.config
        shape = [BATCH, config.num_kv_heads, SLOTS, config.head_dim]
        past = graph.input(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, shape)
        present = f"present.{layer}.{kind}"
        graph.output(present, TensorProto.FLOAT, shape)
        return graph.op(
            "TensorScatter", past, update, self.write_index, output=present, axis=-2, mode="linear"
        )

    def _window(self, size: int) -> str:
        """The last `size` of the slots that a token sees. They are counted along its own path: in a tree a
        token's ancestors do not stand in neighbouring slots."""
        graph = self.graph
        visible = graph.op("Cast", self.mask, to=TensorProto.INT32)
        from_end = graph.op("CumSum", visible, graph.scalar(3, np.int32), reverse=1)
        return graph.op("And", self.mask, graph.op("LessOrEqual", from_end, graph.scalar(size, np.int32)))

    def _mlp(self, x: str, stored: StoredLayer) -> str:
        *gate, up = apply_linears(self.graph, x, stored.gate_up)
        x = self.graph.op("Mul", self._activate(gate[0]), up) if gate else self._activate(up)
        return apply_linears(self.graph, x, stored.down)[0]

    def _activate(self, x: str) -> str:
        match self.config.activation:
            case "silu":
                return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))
            case "relu":
                return self.graph.op("Relu", x)
            case "gelu":
                return self.graph.op("Gelu", x, approximate="none")
            case "gelu_tanh":
                return self.graph.op("Gelu", x, approximate="tanh")

    def _norm(self, x: str, name: str) -> str:
        weight, epsilon = self.graph.weight(f"{name}.weight"), self.config.norm_eps
        if self.config.norm == "rms":
            return self.graph.op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon)
        bias = self.graph.weight(f"{name}.bias")
        return self.graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)
