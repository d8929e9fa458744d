"""An output projection that knows only the most frequent tokens (FR-Spec, arXiv 2502.14856).

A drafter that never proposes a rare word loses little, and its largest matrix shrinks with its vocabulary.
The other tokens get no probability, so the output keeps its width and its ids.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import ModelError
from .layout import EMBED_TOKENS, HEAD_IDS
from .store import HEAD, Checkpoint, copy_tokenizer, link_part, write_config, write_part

BY_OUTPUT = tuple(f"lm_head.{part}" for part in ("weight", "weight_scale", "weight_grid", "bias"))


def cut_vocabulary(src: Path, tokens: Path, size: int, out: Path) -> dict[str, float]:
    """Write the checkpoint `src` to `out` with an output projection for the `size` tokens that are the most
    frequent by the calibration `tokens` (``tokens.safetensors``).

    The report has `covered`, their share of the calibration text. Raises ModelError where the model has no
    more tokens than that.
    """
    checkpoint = Checkpoint(src)
    config = checkpoint.config
    if size >= config.vocab_size:
        raise ModelError(
            f"draft_vocab_size is {size} and the model has {config.vocab_size} tokens: lower it, or leave it "
            "out to draft them all"
        )
    frequencies = load_file(tokens)["frequencies"]
    ids = choose_tokens(frequencies, config.eos_token_ids, size)
    for part in checkpoint.parts():
        if part != HEAD:
            link_part(src, out, part)
    head = checkpoint.load_head()
    weight = head.get("lm_head.weight")
    head["lm_head.weight"] = checkpoint.load_embed()[EMBED_TOKENS] if weight is None else weight
    rows = {name: head[name][ids] for name in BY_OUTPUT if name in head}
    write_part(out, HEAD, head | rows | {HEAD_IDS: ids})
    copy_tokenizer(src, out)
    write_config(out, config.model_copy(update={"tied_head": False}))
    covered = (frequencies[ids].sum() / frequencies.sum()).item()
    return {"tokens": size, "of": config.vocab_size, "covered": covered}


def choose_tokens(frequencies: Tensor, ends: Sequence[int], size: int) -> Tensor:
    """int64 [size], ascending: those that end a text, then the most frequent, of equals the lowest, since
    tokenizers number their tokens by when they were merged, so by how frequent they were."""
    order = frequencies.argsort(descending=True, stable=True)
    ends_first = torch.cat([torch.tensor(ends, dtype=torch.long), order])
    return torch.tensor(list(dict.fromkeys(ends_first.tolist()))[:size]).sort().values
