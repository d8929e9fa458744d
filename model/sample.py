"""Lets a model write its own calibration text, many rows at a time.

A chat model gets the opening of a conversation and nothing else, so that it makes up the user's request as
well as the answer (Magpie, Xu et al. 2024): text of the kind that it will be asked to write.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import KVCache
from .config import DecoderConfig
from .decoder import Decoder
from .progress import Progress, no_progress
from .turns import Turns

CACHE_BYTES = 2 << 30  # of keys and values; more rows than this holds are sampled in groups


@torch.inference_mode()
def sample_rows(
    decoder: Decoder,
    turns: Turns,
    num_rows: int,
    length: int,
    seed: int,
    progress: Progress = no_progress,
) -> tuple[Tensor, Tensor]:
    """Texts of `length` tokens each, at temperature 1 over the whole vocabulary: int32 [num_rows, length].
    And how often each token was to be expected, the sum of the laws that they were drawn from: float64 [V].

    Row and position fix the random number, so a row hangs on the seed alone, up to the rounding of its
    logits; the same machine and number of threads give the same tokens bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(num_rows, length, generator=generator)
    opening = torch.randint(decoder.config.vocab_size, (num_rows, 1), generator=generator)
    if turns.opening:
        opening = torch.tensor(turns.opening).repeat(num_rows, 1)
    num_at_once = max(1, CACHE_BYTES // _cache_bytes(decoder.config, length))

    groups: list[Tensor] = []
    expected = torch.zeros(decoder.config.vocab_size, dtype=torch.float64)
    for rows in torch.arange(num_rows).split(num_at_once):

        def report(step: int, first: int = int(rows[0]), count: int = len(rows)) -> None:
            progress(first * length + count * step, num_rows * length, "sample")

        groups.append(_sample_group(decoder, turns, opening[rows], uniforms[rows], expected, report))
    return torch.cat(groups).to(torch.int32), expected


def _sample_group(
    decoder: Decoder,
    turns: Turns,
    opening: Tensor,
    uniforms: Tensor,
    expected: Tensor,
    report: Callable[[int], None],
) -> Tensor:
    """opening int64 [B, P], uniforms [B, L] → tokens int64 [B, L]. Adds their laws to `expected` [V]."""
    num_rows, length = uniforms.shape
    tokens = torch.zeros(num_rows, length, dtype=torch.int64)
    start = min(opening.shape[1], length)
    tokens[:, :start] = opening[:, :start]
    cache = KVCache(decoder.config, num_rows, length)
    scripts = [Script(turns) for _ in range(num_rows)]
    new = tokens[:, :start]
    for position in range(start, length):
        laws = decoder.step(new, cache).softmax(-1)
        expected += laws.sum(0)
        drawn = draw(laws, uniforms[:, position])
        said = [script.read(token) for script, token in zip(scripts, drawn.tolist(), strict=True)]
        tokens[:, position] = torch.tensor(said)
        new = tokens[:, position : position + 1]
        report(position + 1)
    return tokens


class Script:
    """Where one row stands in its turns: replaces what the model says by the change of turn that is due."""

    def __init__(self, turns: Turns):
        self.turns = turns
        self.num_changes = 0
        self.due: list[int] = []

    def read(self, token: int) -> int:
        if not self.due:
            if token not in self.turns.ends or not self.turns.changes:
                return token
            self.due = list(self.turns.changes[self.num_changes % len(self.turns.changes)])
            self.num_changes += 1
        return self.due.pop(0)


def draw(laws: Tensor, uniforms: Tensor) -> Tensor:
    """A token for each row of laws [B, V] by inverting its cumulative law at uniforms [B]: int64 [B]."""
    cumulative = laws.cumsum(-1)
    targets = uniforms.unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    return drawn.clamp(max=laws.shape[1] - 1)


def _cache_bytes(config: DecoderConfig, length: int) -> int:
    return config.num_layers * config.num_kv_heads * config.head_dim * length * 2 * 4
