"""Engines in the shape of a Llama with random weights: for speed, which does not ask what weights say.

Every engine of the folder is one graph and one file of packed weights; embeddings, norms and rotary tables
are shared. The weights of all layers are drawn once, but each layer is stored, and so read, by itself.
"""

from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from draftsmith.export.cpu import build_cpu_graph, choose_cache_dtype
from draftsmith.export.onnx_files import WeightFile, write_model
from draftsmith.export.packed import PackedLinear, add_packed
from draftsmith.export.weights import StoredLayer, StoredLinear, StoredModel
from draftsmith.model.config import DecoderConfig, Rotary
from draftsmith.model.layout import EMBED_TOKENS
from draftsmith.speculate.kernels import Format

SHAPES = {
    "llama-1b": {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "smollm2-135m": {"hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocab": 49152},
}
HEAD_DIM, NUM_POSITIONS, REPEATS = 64, 2048, 16
# The ways to keep two of four.
PAIRS = np.array([[i in kept for i in range(4)] for kept in combinations(range(4), 2)], np.int8)
# Engine → share of zeros, or "2:4"; "4 bits": dense; None: bfloat16 weights.
SPARSITIES = {
    "w8a8": 0.0,
    "bitmask50": 0.5,
    "two_four": "2:4",
    "bitmask70": 0.7,
    "w4a8": "4 bits",
    "bf16": None,
}


def main(
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    engines: Annotated[
        list[str] | None, typer.Argument(help=f"of {', '.join(SPARSITIES)}; by default all")
    ] = None,
    shape: str = "llama-1b",
) -> None:
    """Write engines with random weights."""
    write_engines(out, engines or list(SPARSITIES), shape)


def write_engines(
    out: Path, names: list[str], shape: str, num_layers: int | None = None, layout: Format | None = None
) -> dict[str, Path]:
    """Engine → graph. `layout`: by default the one that suits the zeros."""
    config = make_config(shape, num_layers)
    models = {}
    with WeightFile(out / "shared.data") as shared:
        share_weights(config, shared)
        for name in names:
            with WeightFile(out / f"{name}.data") as packed:
                model = _Drawer(config, packed, layout).draw(SPARSITIES[name])
            models[name] = build_cpu_graph(model, shared, packed, choose_cache_dtype(model, "auto")).model()
    graphs = {name: out / f"{name}.onnx" for name in names}
    for name, graph in graphs.items():
        write_model(models[name], graph)
    return graphs


def make_config(shape: str, num_layers: int | None = None) -> DecoderConfig:
    if shape not in SHAPES:
        raise SystemExit(f"no shape {shape!r}, only {', '.join(SHAPES)}")
    sizes = SHAPES[shape]
    return DecoderConfig(
        family="llama",
        dtype="bfloat16",
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inner"],
        num_layers=num_layers or sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=HEAD_DIM,
        max_position_embeddings=NUM_POSITIONS,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rotary=Rotary(inv_freq=tuple(500000.0 ** (-i / (HEAD_DIM // 2)) for i in range(HEAD_DIM // 2))),
        attention_scale=HEAD_DIM**-0.5,
        tied_head=False,  # an int8 output projection stands beside the table of embeddings
    )


def share_weights(config: DecoderConfig, shared: WeightFile) -> None:
    """Embeddings, rotary tables and norms."""
    random = np.random.default_rng(1)
    # Drawn in part and repeated: a table of a quarter of a billion numbers takes long to draw.
    part = random.standard_normal((config.vocab_size // REPEATS, config.hidden_size), np.float32)
    shared.add(EMBED_TOKENS, torch.from_numpy(part).to(torch.bfloat16).repeat(REPEATS, 1))
    angles = np.outer(np.arange(NUM_POSITIONS), np.array(config.rotary.inv_freq if config.rotary else ()))
    for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        shared.add(f"rotary.{name}", torch.from_numpy(table).float())
    layers, norms = range(config.num_layers), ("input_layernorm", "post_attention_layernorm")
    for name in [f"model.layers.{layer}.{norm}" for layer in layers for norm in norms] + ["model.norm"]:
        shared.add(f"{name}.weight", torch.ones(config.hidden_size))


class _Drawer:
    def __init__(self, config: DecoderConfig, packed: WeightFile, layout: Format | None) -> None:
        self.config, self.packed = config, packed
        self.layout: Format | None = layout
        self.random = np.random.default_rng(0)

    def draw(self, sparsity: float | str | None) -> StoredModel:
        """`sparsity`: None for bfloat16 weights."""
        config = self.config
        d, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * HEAD_DIM
        kv = config.num_kv_heads * HEAD_DIM
        shapes = {
            "self_attn.qkv_proj": [(heads + 2 * kv, d)],
            "self_attn.o_proj": [(d, heads)],
            "mlp.gate_up_proj": [(inner, d), (inner, d)],
            "mlp.down_proj": [(d, inner)],
        }
        weights = {name: [self._weight(*size, sparsity) for size in sizes] for name, sizes in shapes.items()}
        layers = []
        for layer in range(config.num_layers):
            groups = [[self._store(f"model.layers.{layer}.{name}", weights[name])] for name in shapes]
            layers.append(StoredLayer(*groups))
        part = self._weight(config.vocab_size // REPEATS, d, sparsity)
        head = self._store("lm_head", [part.repeat(REPEATS, 1)])
        return StoredModel(config, NUM_POSITIONS, layers, [head], head.packed)

    def _weight(self, n: int, k: int, sparsity: float | str | None) -> torch.Tensor:
        if sparsity is None:
            return torch.from_numpy(self.random.standard_normal((n, k), np.float32) / k**0.5).bfloat16()
        if sparsity == "4 bits":
            return torch.from_numpy(self.random.integers(0, 16, (n, k), np.uint8))
        weight = self.random.integers(-127, 128, (n, k), np.int8)
        weight[weight == 0] = 1  # the only zeros are those that are asked for
        if sparsity == "2:4":
            weight *= PAIRS[self.random.integers(0, len(PAIRS), (n, k // 4), np.int8)].reshape(n, k)
        elif isinstance(sparsity, float):
            weight[self.random.random((n, k), np.float32) < sparsity] = 0
        return torch.from_numpy(weight)

    def _store(self, name: str, weights: list[torch.Tensor]) -> StoredLinear:
        widths = tuple(map(len, weights))
        dtype, k = weights[0].dtype, weights[0].shape[1]
        scales, grids = [], []
        if dtype == torch.int8:
            scales = [torch.full((width,), 1 / (73 * k**0.5)) for width in widths]
        if dtype == torch.uint8:  # levels from -7.5 to 7.5 steps
            step = 1 / (4.6 * k**0.5)
            grids = [torch.tensor([step, -7.5 * step]).bfloat16().repeat(n, k // 32, 1) for n in widths]
        packed: PackedLinear = add_packed(
            self.packed, name, weights, scales, grids=grids, gated=len(weights) == 2, layout=self.layout
        )
        return StoredLinear(name, widths, not dtype.is_floating_point, False, None, packed)


if __name__ == "__main__":
    typer.run(main)
