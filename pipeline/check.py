"""Hold the graph that this machine runs of each engine against the compressed checkpoint it is made from."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ..speculate.bundle import load
from .errors import CheckFailed
from .processor import num_threads
from .progress import Progress, no_progress

CHECK_TOKENS = 64
# Root mean square difference of the logits, relative to their own spread. In floating point the two sides
# differ by the order of their sums. In int8 such a difference moves some activation across a rounding
# boundary, by a whole step of 1/127 of its row, and the layers behind it amplify that to a share of what
# quantization itself costs.
TOLERANCE = {"float": 1e-4, "int8": 0.3}


def check(
    bundle_dir: Path,
    checkpoints: Mapping[str, Path],
    tokens: Path,
    out: Path,
    progress: Progress = no_progress,
) -> dict:
    """Write ``check.json``: per engine, how far the graph's logits are from the checkpoint's in torch, and
    their common argmax.

    Raises CheckFailed, naming engine and figure, if one is further off than rounding explains.
    """
    bundle = load(bundle_dir, num_threads())
    ids = load_file(tokens / "tokens.safetensors")["tokens"][0, :CHECK_TOKENS].tolist()
    result: dict[str, dict] = {}
    for index, (name, checkpoint) in enumerate(checkpoints.items()):
        reference, quantized = _reference_logits(checkpoint, ids)
        logits = bundle.logits(ids, engine=name)
        known = ~np.isneginf(reference).any(axis=0)  # a drafter may know only some tokens
        if not np.array_equal(known, ~np.isneginf(logits).any(axis=0)):
            raise CheckFailed(
                f"the exported graph of {name!r} knows other tokens than its checkpoint; please report this "
                "with the recipe"
            )
        logits, reference = logits[:, known], reference[:, known]
        error = float(np.sqrt(np.mean((logits - reference) ** 2)) / reference.std())
        tolerance = TOLERANCE["int8" if quantized else "float"]
        agreement = float(np.mean(logits.argmax(-1) == reference.argmax(-1)))
        result[name] = {"relative_error": error, "tolerance": tolerance, "argmax_agreement": agreement}
        progress(index + 1, len(checkpoints), "graphs against checkpoints")
    (out / "check.json").write_text(json.dumps(result, indent=2) + "\n")
    if failed := {name: row for name, row in result.items() if not row["relative_error"] <= row["tolerance"]}:
        name, row = next(iter(failed.items()))
        raise CheckFailed(
            f"the exported graph of {name!r} is not its checkpoint: logits differ by "
            f"{row['relative_error']:.2e} of their spread, rounding explains {row['tolerance']:.0e}; "
            "please report this with the recipe"
        )
    return result


def _reference_logits(folder: Path, ids: list[int]) -> tuple[np.ndarray, bool]:
    """float32 [T, V] of the checkpoint in torch, one layer in memory at a time, and whether any weight is
    int8. Float matrices are rounded to the model's dtype, as they are exported: pruning leaves them so.
    """
    import torch

    from ..model.decoder import DecoderLayer, Embedding, Head, causal_mask
    from ..model.store import TORCH_DTYPES, Checkpoint

    checkpoint = Checkpoint(folder)
    config = checkpoint.config

    def rounded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dtype = TORCH_DTYPES[config.dtype]
        return {
            name: x.to(dtype) if x.is_floating_point() and x.ndim == 2 else x for name, x in tensors.items()
        }

    embed = rounded(checkpoint.load_embed())
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids))[None]
    quantized = False
    with torch.inference_mode():
        hidden = Embedding(config, embed)(tokens, positions)
        for index in range(config.num_layers):
            layer = DecoderLayer(config, index, rounded(checkpoint.load_layer(index)))
            quantized |= any(linear.is_quantized for linear in layer.linears().values())
            hidden = layer(hidden, positions, causal_mask(config, index, len(ids), 0))
        head = Head(config, rounded(checkpoint.load_head()), embed["model.embed_tokens.weight"])
        return head(hidden)[0].numpy(), quantized or head.lm_head.is_quantized
