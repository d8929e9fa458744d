"""The graph for the CPU: the decoder in our operators, whose rows do not depend on each other.

`speculate/native/nodes.c` lists the operators. Next to the portable graph's inputs there is one more:

    num_logits  int64 [1]  logits are wanted of the last `num_logits` tokens only
"""

from typing import Any

from onnx import TensorProto

from ..model.layout import EMBED_TOKENS, HEAD_IDS
from ..speculate.binding import lib
from ..speculate.kernels import CACHE_TYPES, CacheDtype
from .builder import Graph
from .cache_dtype import WantedDtype, fits_bfloat16
from .decoder import BATCH, SLOTS, TOKENS, add_positions, embed_tokens, soften
from .onnx_files import WeightFile
from .packed import PackedLinear
from .weights import StoredLayer, StoredModel

LOGITS = "num_logits"


def build_cpu_graph(
    model: StoredModel, weights: WeightFile, packed: WeightFile, cache_dtype: CacheDtype
) -> Graph:
    """`weights` holds what is not a linear: embeddings, norms, rotary tables. `packed` holds the linears."""
    builder = _CpuBuilder(model, Graph(model.config.family, weights, packed), cache_dtype)
    hidden = builder.embed()
    for layer, stored in enumerate(model.layers):
        hidden = builder.layer(hidden, layer, stored)
    builder.head(hidden)
    return builder.graph


def choose_cache_dtype(model: StoredModel, wanted: WantedDtype) -> CacheDtype:
    """What the operators' cache holds. `auto`: bfloat16 where keys and values come out of quantized linears,
    whose own rounding is the coarser one, and heads fit; else float32."""
    if wanted != "auto":
        return wanted
    linears = [linear.packed for layer in model.layers for linear in layer.qkv]
    is_quantized = all(linear.format.startswith("int") for linear in linears)
    return "bfloat16" if is_quantized and fits_bfloat16(model.config) else "float32"


class _CpuBuilder:
    def __init__(self, model: StoredModel, graph: Graph, cache_dtype: CacheDtype) -> None:
        self.model, self.config, self.graph = model, model.config, graph
        self.cache_type = CACHE_TYPES[cache_dtype]
        self.tokens = graph.input("input_ids", TensorProto.INT64, [BATCH, TOKENS])
        self.positions = graph.input("position_ids", TensorProto.INT64, [BATCH, TOKENS])
        self.write_index = graph.input("write_index", TensorProto.INT64, [BATCH])
        self.mask = graph.input("attention_mask", TensorProto.BOOL, [BATCH, 1, TOKENS, SLOTS])
        self.num_logits = graph.input(LOGITS, TensorProto.INT64, [1])
        self.rows = TOKENS  # what the operators' outputs have as their second dimension
        self.part: dict[str, int] = {}  # the sublayer that they belong to, if any
        windows = {self.config.window_of(layer) for layer in range(self.config.num_layers)}
        self.is_straight = len(windows) == 1  # as nodes.c says; until something does not fit

    def embed(self) -> str:
        if self.config.tied_head:
            table = self.model.packed_head  # the output projection's weights serve both ends
            packed = {"format": getattr(lib, f"DS_{table.format.upper()}")}
            hidden = self._embed(f"{table.name}.packed", table.n, table.k, **packed)
        elif self.config.dtype != "float16":
            hidden = self._embed(EMBED_TOKENS, self.config.vocab_size, self.config.hidden_size)
        else:
            self.is_straight = False
            return embed_tokens(self.graph, self.config, self.tokens, self.positions)
        self.is_straight &= self.config.rotary is not None
        return add_positions(self.graph, self.config, hidden, self.positions)

    def _embed(self, table: str, n: int, k: int, **packed: Any) -> str:
        inputs, scale = [self.tokens, self.graph.weight(table)], self.config.embedding_scale
        return self._float("Embed", inputs, k, n=n, k=k, multiplier=scale, **packed)

    def layer(self, hidden: str, layer: int, stored: StoredLayer) -> str:
        name = f"model.layers.{layer}"
        with self.graph.scope(name):
            qkv, o, gate_up, down = (
                [linear.packed for linear in group]
                for group in (stored.qkv, stored.o, stored.gate_up, stored.down)
            )
            if len(qkv) == 1 and len(gate_up) == 1 and not self.config.post_norms:
                return self._whole(hidden, layer, [qkv[0], o[0], gate_up[0], down[0]])
            self.is_straight = False
            norm, self.part = f"{name}.input_layernorm", {"sublayer": 2 * layer}
            qkv = self._join([self._linear(linear, hidden, norm=norm) for linear in qkv])
            hidden = self._add(o, self._attend(qkv, layer), hidden, f"{name}.post_attention_norm")
            norm, self.part = f"{name}.post_attention_layernorm", {"sublayer": 2 * layer + 1}
            mixed = self._activate(gate_up, hidden, norm)
            return self._add(down, mixed, hidden, f"{name}.post_mlp_norm")

    def _whole(self, hidden: str, layer: int, linears: list[PackedLinear]) -> str:
        """A layer of the usual form as one operator."""
        name = f"model.layers.{layer}"
        norms = {"qkv": f"{name}.input_layernorm", "up": f"{name}.post_attention_layernorm"}
        weights, law = [], {}
        for role, linear in zip(("qkv", "o", "up", "down"), linears, strict=True):
            weights += self._parts(linear, norms.get(role, ""))
            activation = self.config.activation if role == "up" else "identity"
            law |= {f"{role}_{key}": value for key, value in _law_of(linear, activation).items()}
        law |= self._norm(norms["qkv"])[1] | {"sublayer": 2 * layer}
        return self._with_cache("Layer", hidden, layer, self.config.hidden_size, weights, **law)

    def head(self, hidden: str) -> None:
        graph, self.part = self.graph, {}
        first, end = graph.op("Neg", self.num_logits), graph.ints(2**31 - 1)
        hidden = graph.op("Slice", hidden, first, end, graph.ints(1))
        self.rows = LOGITS
        graph.declare(hidden, TensorProto.FLOAT, [BATCH, LOGITS, self.config.hidden_size])
        capped, cut = self.config.logit_softcap is not None, self.model.has_cut_head
        output = "" if capped or cut else "logits"
        if self.is_straight and output:
            self.part = {"straight": self.config.num_layers}
        logits = self._linear(self.model.packed_head, hidden, norm="model.norm", output=output)
        if capped:
            logits = soften(graph, self.config, logits)
        if cut:
            ids = graph.weight(HEAD_IDS)
            self._float("Spread", [logits, ids], self.config.vocab_size, "logits", n=self.config.vocab_size)
        elif capped:
            graph.op("Identity", logits, output="logits")
        graph.output("logits", TensorProto.FLOAT, [BATCH, LOGITS, self.config.vocab_size])

    def _attend(self, qkv: str, layer: int) -> str:
        width = self.config.num_heads * self.config.head_dim
        law = self.part | {"epsilon": self.config.norm_eps}
        return self._with_cache("Attend", qkv, layer, width, [], **law)

    def _with_cache(
        self, kind: str, x: str, layer: int, width: int, weights: list[str], **attributes: Any
    ) -> str:
        """An operator that attends; its first output, [B, S, width]."""
        graph, config = self.graph, self.config
        slots, counts = graph.ours(
            "ListSlots",
            [self.mask],
            [(TensorProto.INT32, [BATCH, TOKENS, SLOTS]), (TensorProto.INT32, [BATCH, TOKENS])],
            window=config.window_of(layer) or 0,
        )
        cache, past, present = [BATCH, config.num_kv_heads, SLOTS, config.head_dim], [], []
        for part in ("key", "value"):
            past.append(graph.input(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, cache))
            present.append(f"present.{layer}.{part}")
            graph.output(present[-1], TensorProto.FLOAT, cache)
        rotary, tables, norms = config.rotary_of(layer), ["", ""], ["", ""]
        if rotary is not None:
            name = "rotary" if rotary is config.rotary else "rotary_local"
            tables = [graph.weight(f"{name}.{table}") for table in ("cos", "sin")]
        if config.qk_norm:
            norms = [graph.weight(f"model.layers.{layer}.self_attn.{x}_norm.weight") for x in "qk"]
        made, *_ = graph.ours(
            kind,
            [x, self.positions, self.write_index, slots, counts, *past, *tables, *norms, *weights],
            [(TensorProto.FLOAT, [BATCH, TOKENS, width]), *((TensorProto.FLOAT, cache) for _ in past)],
            names=["", *present],
            num_heads=config.num_heads,
            scale=config.attention_scale,
            cache_type=self.cache_type,
            **attributes,
        )
        return made

    def _activate(self, linears: list[PackedLinear], hidden: str, norm: str) -> str:
        """act(gate) · up, or act(up) where there is no gate. Gate and up that could not be packed as one
        are multiplied afterwards."""
        mixed = self._linear(linears[0], hidden, norm=norm, activation=self.config.activation)
        for linear in linears[1:]:
            mixed = self.graph.op("Mul", mixed, self._linear(linear, hidden, norm=norm))
        return mixed

    def _add(self, linears: list[PackedLinear], mixed: str, hidden: str, post_norm: str) -> str:
        """The residual stream plus a linear of `mixed`."""
        (linear,) = linears
        if not self.config.post_norms:
            return self._linear(linear, mixed, residual=hidden)
        inputs, law = self._norm(post_norm)
        law |= self.part
        mixed = self._float("Norm", [self._linear(linear, mixed), *inputs], self.config.hidden_size, **law)
        return self.graph.op("Add", hidden, mixed)

    def _join(self, outputs: list[str]) -> str:
        return outputs[0] if len(outputs) == 1 else self.graph.op("Concat", *outputs, axis=2)

    def _norm(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """A norm's weight and, of a LayerNorm, its bias; and its attributes."""
        is_rms = self.config.norm == "rms"
        inputs = [self.graph.weight(f"{name}.{part}") for part in ("weight", "bias")[: 1 if is_rms else 2]]
        return inputs, {
            "norm": lib.DS_RMS_NORM if is_rms else lib.DS_LAYER_NORM,
            "epsilon": self.config.norm_eps,
        }

    def _linear(
        self,
        linear: PackedLinear,
        x: str,
        *,
        norm: str = "",
        activation: str = "identity",
        residual: str = "",
        output: str = "",
    ) -> str:
        """A linear of `x` or of its norm."""
        law = _law_of(linear, activation) | self._norm(norm or "model.norm")[1] | self.part
        parts = [x, *self._parts(linear, norm), residual, *self._screen(linear)]
        return self._float("Linear", parts, linear.n, output, **law)

    def _screen(self, linear: PackedLinear) -> list[str]:
        if not linear.has_screen:
            return []
        return [
            self.graph.weight(f"{linear.name}.{kind}") for kind in ("screen", "screen_scale", "screen_error")
        ]

    def _parts(self, linear: PackedLinear, norm: str) -> list[str]:
        """What stands for a linear among an operator's inputs: its own parts, and the norm's before it."""

        def part(kind: str, has: bool = True) -> str:
            return self.graph.weight(f"{linear.name}.{kind}") if has else ""

        norms = self._norm(norm)[0] if norm else []
        return [
            part("packed"),
            part("packed_scale", linear.has_scale),
            part("packed_starts", linear.format == "int8_bitmask"),
            part("packed_bias", linear.has_bias),
            *norms,
            *[""] * (2 - len(norms)),
        ]

    def _float(self, kind: str, inputs: list[str], width: int, output: str = "", **attributes) -> str:
        made = [(TensorProto.FLOAT, [BATCH, self.rows, width])]
        return self.graph.ours(kind, inputs, made, names=[output], **attributes)[0]


def _law_of(linear: PackedLinear, activation: str) -> dict[str, int]:
    """The attributes of a linear."""
    return {
        "n": linear.n,
        "k": linear.k,
        "format": getattr(lib, f"DS_{linear.format.upper()}"),
        "activation": getattr(lib, f"DS_{activation.upper()}") + (lib.DS_GATED if linear.gated else 0),
    }
