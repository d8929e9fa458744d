"""Rules of verification side by side at a temperature: token by token and by block on chains that a model
samples, and their counterparts on drafted trees, recursive rejection and traversal."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from draftsmith.pipeline.prompts import encode_prompts, read_prompts
from draftsmith.speculate.bundle import load
from draftsmith.speculate.onnx_engine import default_threads
from measure import print_table

RULES = ("token", "block")
SHARE = 0.95  # of the interval


def main(
    bundle: Path,
    prompts: Annotated[Path, typer.Option(help="JSONL, as for bench")],
    limit: Annotated[int, typer.Option(min=2, help="prompts to take, evenly over the file")] = 26,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    ladders: Annotated[
        str, typer.Option(help="such as int8=6;recycling-tree=15")
    ] = "int8=6;recycling-tree=15",
    temperature: float = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="generations of each prompt")] = 2,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
) -> None:
    """Print tokens a target call by rule, and what block and traversal give more: the mean over prompts, with
    a bootstrap interval."""
    opened = load(bundle, threads)
    encoded = [ids for _, ids in encode_prompts(opened, read_prompts(prompts, limit)[0], [{}])[0]]
    rng, rows = np.random.default_rng(0), []
    for ladder in ladders.split(";"):
        name, _, length = ladder.partition("=")
        lengths = np.zeros((len(encoded), len(RULES)))
        for index, ids in enumerate(encoded):
            for column, rule in enumerate(RULES):
                stats = [
                    opened.generate(
                        ids,
                        max_new_tokens,
                        temperature=temperature,
                        seed=seed,
                        speculate=[name],
                        num_speculative_tokens=int(length),
                        verify=rule,
                        ignore_eos=True,
                    ).stats
                    for seed in range(seeds)
                ]
                emitted = sum(one.emitted - 1 for one in stats)
                lengths[index, column] = emitted / sum(one.steps for one in stats)
        gains = lengths[:, 1] - lengths[:, 0]
        drawn = rng.choice(gains, size=(4000, len(gains))).mean(axis=1)
        low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
        token, block = lengths.mean(axis=0)
        rows.append(
            [ladder, f"{token:.3f}", f"{block:.3f}", f"{gains.mean():+.3f} ({low:+.3f} to {high:+.3f})"]
        )
    print(f"{len(encoded)} prompts x {seeds}, temperature {temperature:g}, tokens a target call")
    print_table(["drafts", "token / recursive rejection", "block / traversal", "more"], rows)


if __name__ == "__main__":
    typer.run(main)
