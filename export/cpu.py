"""The graph for the CPU: the decoder in our operators, whose rows do not depend on each other.

`speculate/native/operators.c` lists the operators. Next to the portable graph's inputs there is one more:

    num_logits  int64 [1]  logits are wanted of the last `num_logits` tokens only
"""

from onnx import TensorProto

from ..speculate.binding import lib
from .builder import Graph
from .decoder import BATCH, SLOTS, TOKENS, add_positions, embed_tokens, soften
from .onnx_files import WeightFile
from .packed import PackedLinear
from .weights import StoredLayer, StoredModel

LOGITS = "num_logits"


def build_cpu_graph(model: StoredModel, weights: WeightFile, packed: WeightFile) -> Graph:
    """`weights` holds what is not a linear: embeddings, norms, rotary tables. `packed` holds the linears."""
    builder = _CpuBuilder(model, Graph(model.config.family, weights, packed))
    hidden = builder.embed()
    for layer, stored in enumerate(model.layers):
        hidden = builder.layer(hidden, layer, stored)
    builder.head(hidden)
    return builder.graph


class _CpuBuilder:
    def __init__(self, model: StoredModel, graph: Graph) -> None:
        self.model, self.config, self.graph = model, model.config, graph
        self.tokens = graph.input("input_ids", TensorProto.INT64, [BATCH, TOKENS])
        self.positions = graph.input("position_ids", TensorProto.INT64, [BATCH, TOKENS])
        self.write_index = graph.input("write_index", TensorProto.INT64, [BATCH])
        self.mask = graph.input("attention_mask", TensorProto.BOOL, [BATCH, 1, TOKENS, SLOTS])
        self.num_logits = graph.input(LOGITS, TensorProto.INT64, [1])
        self.rows = TOKENS  # what the operators' outputs have as their second dimension

    def embed(self) -> str:
        if not self.config.tied_head:
            return embed_tokens(self.graph, self.config, self.tokens, self.positions)
        table = self.model.packed_head  # the output projection's weights serve both ends
        hidden = self._float(
            "Embed",
            [self.tokens, self.graph.weight(f"{table.name}.packed")],
            self.config.hidden_size,
            n=table.n,
            k=table.k,
            format=getattr(lib, f"DS_{table.format.upper()}"),
            multiplier=self.config.embedding_scale,
        )
        return add_positions(self.graph, self.config, hidden, self.positions)

    def layer(self, hidden: str, layer: int, stored: StoredLayer) -> str:
        name = f"model.layers.{layer}"
        with self.graph.scope(name):
            qkv, o, gate_up, down = (
                [linear.packed for linear in group]
                for group in (stored.qkv, stored.o, stored.gate_up, stored.down)
            )
            rows = self._norm_for(qkv, hidden, f"{name}.input_layernorm")
            mixed = self._attend(self._join([self._linear(linear, rows) for linear in qkv]), layer)
            hidden = self._add(o, mixed, hidden, f"{name}.post_attention_norm")
            rows = self._norm_for(gate_up, hidden, f"{name}.post_attention_layernorm")
            mixed = self._activate(gate_up, rows)
            return self._add(down, mixed, hidden, f"{name}.post_mlp_norm")

    def head(self, hidden: str) -> None:
        graph = self.graph
        first, end = graph.op("Neg", self.num_logits), graph.ints(2**31 - 1)
        hidden = graph.op("Slice", hidden, first, end, graph.ints(1))
        self.rows = LOGITS
        graph.declare(hidden, TensorProto.FLOAT, [BATCH, LOGITS, self.config.hidden_size])
        head = self.model.packed_head
        rows = self._norm_for([head], hidden, "model.norm")
        if self.config.logit_softcap is None:
            self._linear(head, rows, output="logits")
        else:
            graph.op("Identity", soften(graph, self.config, self._linear(head, rows)), output="logits")
        graph.output("logits", TensorProto.FLOAT, [BATCH, LOGITS, self.config.vocab_size])

    def _attend(self, qkv: str, layer: int) -> str:
        graph, config = self.graph, self.config
        slots, counts = graph.ours(
            "ListSlots",
            [self.mask],
            [(TensorProto.INT32, [BATCH, TOKENS, SLOTS]), (TensorProto.INT32, [BATCH, TOKENS])],
            window=config.window_of(layer) or 0,
        )
        cache, past, present = [BATCH, config.num_kv_heads, SLOTS, config.head_dim], [], []
        for kind in ("key", "value"):
            past.append(graph.input(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, cache))
            present.append(f"present.{layer}.{kind}")
            graph.output(present[-1], TensorProto.FLOAT, cache)
        rotary, tables = config.rotary_of(layer), ["", ""]
        if rotary is not None:
            name = "rotary" if rotary is config.rotary else "rotary_local"
            tables = [graph.weight(f"{name}.{table}") for table in ("cos", "sin")]
        norms = []
        if config.qk_norm:
            norms = [graph.weight(f"model.layers.{layer}.self_attn.{x}_norm.weight") for x in "qk"]
        width = config.num_heads * config.head_dim
        mixed, *_ = graph.ours(
            "Attend",
            [qkv, self.positions, self.write_index, slots, counts, *past, *tables, *norms],
            [(TensorProto.FLOAT, [BATCH, TOKENS, width]), *((TensorProto.FLOAT, cache) for _ in past)],
            names=["", *present],
            num_heads=config.num_heads,
            scale=config.attention_scale,
            epsilon=config.norm_eps,
        )
        return mixed

    def _activate(self, linears: list[PackedLinear], rows: dict[bool, str]) -> str:
        """act(gate) · up, or act(up) where there is no gate. Gate and up that could not be packed as one
        are multiplied afterwards."""
        activation = getattr(lib, f"DS_{self.config.activation.upper()}")
        first = self._linear(linears[0], rows, activation=activation)
        return first if len(linears) == 1 else self.graph.op("Mul", first, self._linear(linears[1], rows))

    def _add(self, linears: list[PackedLinear], mixed: str, hidden: str, post_norm: str) -> str:
        """The residual stream plus a linear of `mixed`."""
        (linear,) = linears
        rows = {linear.is_quantized: self._quantize(mixed, linear.k) if linear.is_quantized else mixed}
        if not self.config.post_norms:
            return self._linear(linear, rows, residual=hidden)
        return self.graph.op("Add", hidden, self._norm("Norm", self._linear(linear, rows), post_norm))

    def _join(self, outputs: list[str]) -> str:
        return outputs[0] if len(outputs) == 1 else self.graph.op("Concat", *outputs, axis=2)

    def _norm_for(self, linears: list[PackedLinear], x: str, name: str) -> dict[bool, str]:
        """The norm of `x` in the forms that `linears` read: by whether they are quantized."""
        forms = {linear.is_quantized for linear in linears}
        return {form: self._norm("NormQuantize" if form else "Norm", x, name) for form in sorted(forms)}

    def _norm(self, kind: str, x: str, name: str) -> str:
        weight, config = self.graph.weight(f"{name}.weight"), self.config
        is_rms = config.norm == "rms"
        inputs = [x, weight] if is_rms else [x, weight, self.graph.weight(f"{name}.bias")]
        law = lib.DS_RMS_NORM if is_rms else lib.DS_LAYER_NORM
        make = self._rows if kind == "NormQuantize" else self._float
        return make(kind, inputs, config.hidden_size, norm=law, epsilon=config.norm_eps)

    def _quantize(self, x: str, width: int) -> str:
        return self._rows("Quantize", [x], width)

    def _linear(
        self,
        linear: PackedLinear,
        rows: dict[bool, str],
        *,
        activation: int = 0,
        residual: str = "",
        output: str = "",
    ) -> str:
        def part(kind: str) -> str:
            return self.graph.weight(f"{linear.name}.{kind}")

        inputs = [rows[linear.is_quantized], part("packed")]
        bias = part("packed_bias") if linear.has_bias else ""
        if linear.is_quantized:
            starts = part("packed_starts") if linear.format == "int8_bitmask" else ""
            inputs += [part("packed_scale"), bias, residual, starts]
        else:
            inputs += [bias, residual]
        return self._float(
            "LinearInt8" if linear.is_quantized else "LinearFloat",
            inputs,
            linear.n,
            output,
            n=linear.n,
            k=linear.k,
            format=getattr(lib, f"DS_{linear.format.upper()}"),
            activation=activation + (lib.DS_GATED if linear.gated else 0),
        )

    def _float(self, kind: str, inputs: list[str], width: int, output: str = "", **attributes) -> str:
        made = [(TensorProto.FLOAT, [BATCH, self.rows, width])]
        return self.graph.ours(kind, inputs, made, names=[output], **attributes)[0]

    def _rows(self, kind: str, inputs: list[str], width: int, **attributes) -> str:
        made = [(TensorProto.UINT8, [BATCH, self.rows, int(lib.ds_int8_stride(width))])]
        return self.graph.ours(kind, inputs, made, **attributes)[0]
