"""Finds what can be smoothed in a decoder by probing it, not by a table of names.

A *fold* moves a positive factor per channel from the output of a norm or a linear into the input columns of
the linears behind it: exact where those inputs scale with that output, channel by channel. It is found by
trying. A copy of the part with random weights runs with the channels of one producer multiplied by random
factors. A linear whose input channels all scale by constants over the tokens is a consumer, and the factor
that a channel shows tells where it comes from. The fold counts only if dividing the consumers' columns by
those factors gives back the part's output.

So norm → query, key, value and norm → gate, up are found in every family, and where the arithmetic allows it
up → down of a gated MLP, and up → down across a ReLU. Value → output would be one too (through grouped
queries), but is left alone: then all copies of a model, smoothed or not, have the same keys and values, and
one can draft in the cache of another.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.layout import norm_names
from ..model.walk import Part

PROBE_TOKENS = 64
CACHED = ("self_attn.k_proj", "self_attn.v_proj")  # are no producers
TOLERANCE = 1e-9  # relative, in float64: what does not match misses it by orders of magnitude


@dataclass(frozen=True)
class Fold:
    """Factors on the outputs of `producer` that all of `consumers` can undo."""

    producer: str  # a norm or a linear, by its name in the part
    consumers: dict[str, Tensor]  # linear → int64 [K]: the producer's channel behind each input channel

    def apply(self, tensors: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
        """The part's tensors with the producer's outputs divided by `factors` [C], the consumers' columns
        multiplied by them. Same function, float32 (or wider) where changed."""
        changed = _scale_outputs(tensors, self.producer, 1 / factors)
        for consumer, source in self.consumers.items():
            changed[f"{consumer}.weight"] = _widen(changed[f"{consumer}.weight"]) * factors[source]
        return changed


def find_folds(part: Part) -> list[Fold]:
    """All folds of a part, in the order of their producers: norms first, then linears."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _random_like(name, tensor, generator) for name, tensor in part.tensors.items()}
    hidden = torch.randn(1, PROBE_TOKENS, part.hidden.shape[2], generator=generator, dtype=torch.float64)
    probe = replace(part, tensors=tensors, hidden=hidden)
    inputs, output = _observe(probe, tensors)
    norms = ("model.norm",) if part.is_head else norm_names(part.config)
    folds = []
    for producer in (*norms, *(name for name in part.linears() if name not in CACHED)):
        channels = len(tensors[f"{producer}.weight"])
        spaced = torch.linspace(-0.7, 0.7, channels + 2, dtype=torch.float64)[1:-1].exp()
        factors = spaced[torch.randperm(channels, generator=generator)]
        changed, _ = _observe(probe, _scale_outputs(tensors, producer, factors))
        sources = {name: _trace(inputs[name], changed[name], factors) for name in inputs}
        fold = Fold(producer, {name: source for name, source in sources.items() if source is not None})
        if not fold.consumers:
            continue
        _, undone = _observe(probe, fold.apply(tensors, 1 / factors))
        if (undone - output).norm() <= TOLERANCE * output.norm():
            folds.append(fold)
    return folds


def _observe(probe: Part, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What enters each linear [T, K], and the output of the part."""
    stops = dict(probe.steps(probe.build(tensors, torch.float64), probe.hidden))
    output = stops.pop(())
    return {name: x.flatten(0, -2) for names, x in stops.items() for name in names}, output


def _trace(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """The channel of `factors` [C] by which each column of `before` [T, K] was multiplied, int64 [K]; None
    where the columns were not all multiplied by one of them."""
    ratio = (before * after).sum(0) / before.square().sum(0)
    if not (after - ratio * before).norm() <= TOLERANCE * after.norm():
        return None
    ordered, order = factors.sort()
    above = torch.searchsorted(ordered, ratio * (1 - TOLERANCE)).clamp(max=len(factors) - 1)
    if ((ordered[above] - ratio).abs() > 2 * TOLERANCE * ratio).any():
        return None
    return order[above]


def _scale_outputs(tensors: dict[str, Tensor], producer: str, factors: Tensor) -> dict[str, Tensor]:
    changed = dict(tensors)
    weight = _widen(tensors[f"{producer}.weight"])
    changed[f"{producer}.weight"] = weight * factors.view(-1, *[1] * (weight.dim() - 1))
    if f"{producer}.bias" in tensors:
        changed[f"{producer}.bias"] = _widen(tensors[f"{producer}.bias"]) * factors
    return changed


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _random_like(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    # Small biases, so that every channel of a ReLU is open for some token.
    size = 0.1 if name.endswith(".bias") else 1.0 if tensor.dim() == 1 else tensor.shape[1] ** -0.5
    return size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
