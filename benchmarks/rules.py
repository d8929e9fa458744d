"""Rules of verification side by side at a temperature: recursive rejection and traversal on drafts that a
model samples, chains among them, where the two are the rules token by token and by block.

At some places of text that the target sampled, a drafter samples a tree, siblings without replacement. Both
rules then verify it, with the same uniforms, many times over: what varies is left to places and prompts.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from draftsmith.pipeline.prompts import encode_prompts, read_prompts
from draftsmith.speculate.bundle import Bundle, load
from draftsmith.speculate.engine import Engine
from draftsmith.speculate.levels import TARGET
from draftsmith.speculate.onnx_engine import default_threads
from draftsmith.speculate.sampling import laws
from draftsmith.speculate.verify import TreeRule, tree_of_laws
from measure import print_table
from numpy.typing import NDArray

RULES: tuple[TreeRule, TreeRule] = ("rrs", "traversal")
SHARE = 0.95  # of the interval

Nodes = tuple[NDArray[np.int32], NDArray[np.int32]]  # tokens and parents, -1 for the root


def main(
    bundle: Path,
    prompts: Annotated[Path, typer.Option(help="JSONL, as for bench")],
    limit: Annotated[int, typer.Option(min=2, help="prompts to take, evenly over the file")] = 26,
    places: Annotated[int, typer.Option(min=1, help="of each prompt's text")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="of that text")] = 64,
    drafter: Annotated[str | None, typer.Option(help="by default the bundle's first")] = None,
    shapes: Annotated[
        str, typer.Option(help="children of each node, by depth")
    ] = "1-1-1-1,1-1-1-1-1-1-1-1,4-2-1-1",
    temperature: float = 1.0,
    draws: Annotated[int, typer.Option(min=1, help="of uniforms, for each draft")] = 8,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
) -> None:
    """Print how many drafted tokens each rule accepts, and how many more the second one does: the mean over
    prompts, with a bootstrap interval."""
    opened = load(bundle, threads)
    encoded = [ids for _, ids in encode_prompts(opened, read_prompts(prompts, limit)[0], [{}])[0]]
    if not opened.drafters:
        raise typer.BadParameter("no drafter in it is a model: wanted one that samples", param_hint="BUNDLE")
    widths = [[int(width) for width in shape.split("-")] for shape in shapes.split(",")]
    rng = np.random.default_rng(0)
    lengths = np.zeros((len(encoded), len(widths), len(RULES)))
    for index, ids in enumerate(encoded):
        text = opened.generate(ids, max_new_tokens, temperature=temperature, seed=index, ignore_eos=True)
        for place in np.linspace(0, len(text.token_ids) - 1, places).astype(int):
            prefix = np.array([*ids, *text.token_ids[: place + 1]], np.int32)
            lengths[index] += accept(
                opened, drafter or opened.drafters[0], prefix, widths, temperature, draws, rng
            )
        print(f"{index + 1}/{len(encoded)}", flush=True)
    lengths /= places
    print(f"{len(encoded)} prompts x {places} places, temperature {temperature:g}: drafted tokens accepted")
    rows = []
    for shape, (first, second) in zip(shapes.split(","), lengths.transpose(1, 2, 0), strict=True):
        gains = second - first
        drawn = rng.choice(gains, size=(4000, len(gains))).mean(axis=1)
        low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
        more = f"{gains.mean():+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append([shape, f"{first.mean():.3f}", f"{second.mean():.3f}", more])
    print_table(["draft", "token / recursive rejection", "block / traversal", "more"], rows)


def accept(
    bundle: Bundle,
    drafter: str,
    prefix: NDArray[np.int32],
    shapes: list[list[int]],
    temperature: float,
    draws: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Tokens accepted behind `prefix`, the mean over the draws: [shapes, rules]."""
    engines = [bundle.engine(name) for name in (TARGET, drafter)]
    for engine in reversed(engines):  # one that drafts in the target's cache finds the target's rows there
        engine.reserve(len(prefix) + sum(np.cumprod(shape).sum() for shape in shapes))
        engine.forward(prefix[:-1], 0, num_logits=1)
    counts = np.zeros((len(shapes), len(RULES)))
    for row, shape in enumerate(shapes):
        nodes, q = draft_tree(engines[1], prefix, shape, temperature, rng)
        p = read_tree(engines[0], prefix, nodes, temperature)
        for uniforms in rng.random((draws, len(nodes[0]) + 2)):
            for column, rule in enumerate(RULES):
                counts[row, column] += len(tree_of_laws(rule, p, q, *nodes, uniforms)[0]) / draws
    return counts


def draft_tree(
    engine: Engine, prefix: NDArray[np.int32], shape: list[int], temperature: float, rng: np.random.Generator
) -> tuple[Nodes, NDArray[np.float64]]:
    """A tree sampled from the drafter, and its laws at the root and at every node."""
    tokens, parents, leaves = np.zeros(0, np.int32), np.zeros(0, np.int32), [-1]
    q = read_tree(engine, prefix, (tokens, parents), temperature)
    for width in shape:
        chosen = [draw_siblings(q[leaf + 1], width, rng) for leaf in leaves]
        first = len(tokens)
        tokens = np.concatenate([tokens, *chosen])
        parents = np.concatenate([parents, np.repeat(leaves, [len(row) for row in chosen]).astype(np.int32)])
        leaves = list(range(first, len(tokens)))
        q = read_tree(engine, prefix, (tokens, parents), temperature)
    return (tokens, parents), q


def draw_siblings(law: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """One after the other, without replacement: the largest logarithms with Gumbel noise, in their order."""
    with np.errstate(divide="ignore"):
        noisy = np.log(law) + rng.gumbel(size=law.shape)
    return np.argsort(-noisy)[: min(count, np.count_nonzero(law))].astype(np.int32)


def read_tree(
    engine: Engine, prefix: NDArray[np.int32], nodes: Nodes, temperature: float
) -> NDArray[np.float64]:
    """The laws [n + 1, V] behind the prefix, all but the last token of which has been read, and behind each
    node."""
    tokens, parents = nodes
    start, count = len(prefix) - 1, len(tokens) + 1
    seen, depths = np.zeros((count, start + count), bool), np.zeros(count, np.int64)
    seen[:, : start + 1] = True
    for node, parent in enumerate(parents, 1):
        seen[node] = seen[parent + 1]
        seen[node, start + node] = True
        depths[node] = depths[parent + 1] + 1
    rows = np.concatenate([prefix[-1:], tokens])
    return laws(engine.forward(rows, start, start + depths, seen), temperature)


if __name__ == "__main__":
    typer.run(main)
