"""The weights of a decoder as the graphs read them, put into two weight files.

Linears are stored twice: [in, out], the way a matrix product reads them, and packed for the native kernels.
Those of one input that are quantized alike (q, k, v; gate, up) stand side by side as one weight: one product
and one quantized input serve them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.config import DecoderConfig
from ..model.layout import EMBED_POSITIONS, EMBED_TOKENS, HEAD_IDS
from ..model.progress import Progress, no_progress
from ..model.store import TORCH_DTYPES, Checkpoint
from .onnx_files import WeightFile
from .packed import PackedLinear, add_packed, add_screen

HEAD_PLACES = "lm_head.places"


@dataclass(frozen=True)
class StoredLinear:
    """`{name}.weight` [K, N] with, if any, `{name}.weight_scale`, `.weight_zero_point` and `.bias` [N];
    N = sum(widths). Of 4 bits: with `.weight_step` and `.weight_middle` [ceil(K / 32), N]."""

    name: str
    widths: tuple[int, ...]  # output features of each linear in it
    is_quantized: bool
    has_bias: bool
    input_scales: tuple[float, ...]  # of each int8 part of a static input; none: it stays in float there
    packed: PackedLinear


@dataclass(frozen=True)
class StoredLayer:
    """The linears of one layer, by the input that they share."""

    qkv: list[StoredLinear]
    o: list[StoredLinear]
    gate_up: list[StoredLinear]  # up alone where the MLP has no gate
    down: list[StoredLinear]


@dataclass(frozen=True)
class StoredModel:
    """The file also holds the embeddings, the rotary tables, and every norm, by their own names; of a head
    that knows only some tokens their ids [n], and `HEAD_PLACES` [V]: which of these a token is, or n."""

    config: DecoderConfig
    num_positions: int
    layers: list[StoredLayer]
    head: list[StoredLinear]  # empty: the embedding is the output projection too
    packed_head: PackedLinear
    has_cut_head: bool = False  # it knows the tokens of HEAD_IDS alone

    def linears(self) -> list[StoredLinear]:
        groups = [group for layer in self.layers for group in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return [linear for group in [*groups, self.head] for linear in group]


def store_model(
    source: Checkpoint,
    weights: WeightFile,
    packed: WeightFile,
    num_positions: int,
    progress: Progress = no_progress,
) -> StoredModel:
    """Write the weights of `source`, one part at a time. `num_positions`: how long a sequence may get."""
    config = source.config
    store = _Store(weights, packed, TORCH_DTYPES[config.dtype])
    embed = source.load_embed()
    store.matrix(EMBED_TOKENS, embed[EMBED_TOKENS])
    if config.rotary is None:
        store.matrix(EMBED_POSITIONS, embed[EMBED_POSITIONS][:num_positions])
    _store_rotary(weights, config, num_positions)
    layers = []
    for layer in range(config.num_layers):
        layers.append(_store_layer(store, config, f"model.layers.{layer}.", source.load_layer(layer)))
        progress(layer + 1, config.num_layers, "export")
    tensors = source.load_head()
    store.norms("", tensors)
    if config.tied_head:
        weight = store.cast(embed[EMBED_TOKENS])
        table = _screened(packed, config, add_packed(packed, EMBED_TOKENS, [weight]), weight)
        return StoredModel(config, num_positions, layers, [], table)
    head = store.linears("", ["lm_head"], tensors)
    packed_head = _screened(packed, config, head[0].packed, store.cast(tensors["lm_head.weight"]))
    ids = tensors.get(HEAD_IDS)
    if ids is not None:
        places = torch.full((config.vocab_size,), len(ids))
        places[ids] = torch.arange(len(ids))
        weights.add(HEAD_IDS, ids)
        weights.add(HEAD_PLACES, places)
    return StoredModel(config, num_positions, layers, head, packed_head, ids is not None)


def _screened(packed: WeightFile, config: DecoderConfig, head: PackedLinear, weight: Tensor) -> PackedLinear:
    """A head with a screen, unless its outputs are capped: tanh in float makes equals of large ones, so
    another may be the first largest."""
    return head if config.logit_softcap is not None else add_screen(packed, head, weight)


def _store_layer(
    store: "_Store", config: DecoderConfig, prefix: str, tensors: dict[str, Tensor]
) -> StoredLayer:
    store.norms(prefix, tensors)
    qkv = [f"self_attn.{x}_proj" for x in "qkv"]
    gate_up = ["mlp.gate_proj", "mlp.up_proj"] if config.gated_mlp else ["mlp.up_proj"]
    return StoredLayer(
        qkv=store.linears(prefix, qkv, tensors, fused="self_attn.qkv_proj"),
        o=store.linears(prefix, ["self_attn.o_proj"], tensors),
        gate_up=store.linears(prefix, gate_up, tensors, fused="mlp.gate_up_proj"),
        down=store.linears(prefix, ["mlp.down_proj"], tensors),
    )


def _store_rotary(weights: WeightFile, config: DecoderConfig, num_positions: int) -> None:
    """`{name}.cos` and `.sin` [num_positions, R/2], worked out in float64: in float32 the angle of a late
    position has few digits left after the point."""
    for name, rotary in (("rotary", config.rotary), ("rotary_local", config.rotary_local)):
        if rotary is not None:
            angles = np.outer(np.arange(num_positions), np.array(rotary.inv_freq, np.float64))
            for table, values in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
                weights.add(f"{name}.{table}", torch.from_numpy(values * rotary.scale).float())


class _Store:
    def __init__(self, weights: WeightFile, packed: WeightFile, dtype: torch.dtype) -> None:
        self.weights, self.packed, self.dtype = weights, packed, dtype

    def cast(self, tensor: Tensor) -> Tensor:
        """A float matrix has the model's dtype whatever an earlier stage computed in."""
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def matrix(self, name: str, tensor: Tensor) -> None:
        self.weights.add(name, self.cast(tensor))

    def norms(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        for name in sorted(tensors):
            if "norm" in name:
                self.weights.add(prefix + name, tensors[name].float())

    def linears(
        self, prefix: str, names: Sequence[str], tensors: dict[str, Tensor], fused: str = ""
    ) -> list[StoredLinear]:
        """Store the linears `names` of one input: as one named `fused` if they are alike, else one by one.

        The static graph has int8 activations where all linears stored as one have a scale for them.
        """
        scales = {scales for name in names if (scales := _input_scales(tensors, name))}
        alike = len({_kind(tensors, name) for name in names}) == 1 and len(scales) <= 1
        if len(names) > 1 and not alike:
            return [self._linear(prefix + name, [name], tensors) for name in names]
        return [self._linear(prefix + (fused if len(names) > 1 else names[0]), names, tensors)]

    def _linear(self, stored: str, names: Sequence[str], tensors: dict[str, Tensor]) -> StoredLinear:
        def parts(kind: str) -> list[Tensor]:
            return [tensors[f"{name}.{kind}"] for name in names]

        dtype, has_bias = _kind(tensors, names[0])
        scales = [_input_scales(tensors, name) for name in names]
        weights, biases = parts("weight"), parts("bias") if has_bias else []
        weight_scales = parts("weight_scale") if weights[0].dtype == torch.int8 else []
        grids = parts("weight_grid") if weights[0].dtype == torch.uint8 else []
        if grids:
            self._groups(stored, torch.cat(weights), torch.cat(grids))
        else:
            self.matrix(f"{stored}.weight", torch.cat(weights).T)
        if weight_scales:
            self.weights.add(f"{stored}.weight_scale", torch.cat(weight_scales).float())
            # Zeros, spelled out: where ONNX Runtime turns int8 into uint8 it would make up a single one, and
            # then refuse it.
            self.weights.add(
                f"{stored}.weight_zero_point", torch.zeros(sum(map(len, weights)), dtype=torch.int8)
            )
        if has_bias:
            self.weights.add(f"{stored}.bias", torch.cat(biases).float())
        packed = add_packed(
            self.packed,
            stored,
            [self.cast(weight) for weight in weights],
            weight_scales,
            biases,
            grids,
            gated=names == ["mlp.gate_proj", "mlp.up_proj"],
        )
        widths = tuple(map(len, weights))
        input_scales = () if () in scales else scales[0]
        return StoredLinear(stored, widths, not dtype.is_floating_point, has_bias, input_scales, packed)

    def _groups(self, stored: str, weight: Tensor, grid: Tensor) -> None:
        """A weight [N, K] of 4 bits as step · q + middle, with q signed as standard operators have it."""
        step, base = grid.float().unbind(-1)
        self.weights.add_int4(f"{stored}.weight", (weight.to(torch.int8) - 8).T)
        self.weights.add(f"{stored}.weight_step", step.T)
        self.weights.add(f"{stored}.weight_middle", (base + 8 * step).T)


def _kind(tensors: dict[str, Tensor], name: str) -> tuple[torch.dtype, bool]:
    """Its dtype, and whether it has a bias: what linears stored as one agree in."""
    return tensors[f"{name}.weight"].dtype, f"{name}.bias" in tensors


def _input_scales(tensors: dict[str, Tensor], name: str) -> tuple[float, ...]:
    scales = tensors.get(f"{name}.input_scale")
    return () if scales is None else tuple(scales.reshape(-1).tolist())
