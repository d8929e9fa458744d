"""Whether the plan of `tune` is as fast as the best setting that a person could have picked, by category.

Every prompt is decoded by the plan and by each hand-picked setting in turn, some times over, in an order that
turns. Greedy repeats do the same work round by round, so the calmer half of each round's timings counts.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from draftsmith.pipeline.compare import settle
from draftsmith.pipeline.prompts import encode_prompts, read_prompts
from draftsmith.pipeline.rounds import decode_in_turn
from draftsmith.speculate.bundle import Bundle, load
from draftsmith.speculate.onnx_engine import default_threads
from measure import print_table

PLAN = "plan"
FREE = ("suffix", "recycling")
FREE_LENGTH = 16  # of a drafter below another drafter
CHAT = "chat"  # Spec-Bench counts the eight kinds of MT-Bench as one
OWN = ("translation", "summarization", "qa", "math_reasoning", "rag")


@dataclass(frozen=True)
class Setting:
    """A ladder and what it drafts at most; None: as the plan says."""

    ladder: str | list[str]
    lengths: dict[str, int] | None = None


def main(
    bundle: Path,
    prompts: Annotated[Path, typer.Option(help="JSONL, as for bench")],
    limit: Annotated[int, typer.Option(min=1, help="prompts to take, evenly over the file")] = 26,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    lengths: Annotated[str, typer.Option(help="of drafts of the level below the target")] = "4,8",
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
    log: Annotated[Path | None, typer.Option(help="JSON: every figure")] = None,
) -> None:
    """Print tokens/s by category: of the plan, of the best hand-picked setting, and of all of these."""
    opened = load(bundle, threads)
    settings = list_settings(opened.drafters, [int(length) for length in lengths.split(",")])
    encoded, problems = encode_prompts(
        opened, read_prompts(prompts, limit)[0], [s.ladder for s in settings.values()], ignore_eos=True
    )
    print(*problems, sep="\n", end="\n" if problems else "")
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # category, setting: ms
    tokens: dict[str, int] = defaultdict(int)
    for index, (prompt, ids) in enumerate(encoded):
        category = prompt.category if prompt.category in OWN else CHAT
        for name, milliseconds in time_settings(opened, ids, settings, max_new_tokens, repeats).items():
            spent[category][name] += milliseconds
        tokens[category] += max_new_tokens - 1
        print(f"{index + 1}/{len(encoded)} {category}", flush=True)
    speeds = {
        category: {name: 1e3 * tokens[category] / ms for name, ms in row.items()}
        for category, row in spent.items()
    }
    print_speeds(speeds, opened)
    if log:
        log.write_text(json.dumps({"tokens_per_second": speeds, "tokens": tokens}, indent=2) + "\n")


def list_settings(drafters: Sequence[str], lengths: Sequence[int]) -> dict[str, Setting]:
    """The plan; no drafts; every drafter alone, and each that is a model on top of prompt lookup."""
    ladders = [[name] for name in (*FREE, *drafters)] + [[FREE[0], name] for name in drafters]
    picked = {
        f"{' → '.join(ladder)}, {length}": Setting(
            ladder, dict.fromkeys(ladder, FREE_LENGTH) | {ladder[-1]: length}
        )
        for ladder in ladders
        for length in lengths
    }
    return {PLAN: Setting("auto"), "no drafts": Setting("none"), **picked}


def time_settings(
    bundle: Bundle, ids: list[int], settings: dict[str, Setting], max_new_tokens: int, repeats: int
) -> dict[str, float]:
    """Milliseconds behind the first token. Raises SystemExit if two settings differ in a token."""
    rounds = {name: [] for name in settings}
    for repeat in range(repeats):
        names = [*settings]
        turn = repeat * len(names) // repeats
        for name in names[turn:] + names[:turn]:
            setting = settings[name]
            run = bundle.stream(
                ids,
                max_new_tokens=max_new_tokens,
                speculate=setting.ladder,
                num_speculative_tokens=setting.lengths,
                ignore_eos=True,
            )
            rounds[name] += decode_in_turn([run])
    outputs = {name: repeated[0].token_ids for name, repeated in rounds.items()}
    if wrong := [name for name, output in outputs.items() if output != outputs[PLAN]]:
        raise SystemExit(f"{wrong[0]} decodes other tokens than the plan")
    return {
        name: sum(settle([one.milliseconds for one in repeated])[1:]) for name, repeated in rounds.items()
    }


def print_speeds(speeds: dict[str, dict[str, float]], bundle: Bundle) -> None:
    rows = []
    for category, row in speeds.items():
        best = max((name for name in row if name != PLAN), key=row.__getitem__)
        ratio = row[PLAN] / row[best]
        rows.append([category, f"{row[PLAN]:.1f}", f"{row[best]:.1f}", f"{ratio:.3f}", best])
    print(f"\nplan: {bundle.plan_for()}; tokens/s\n")
    print_table(["category", "plan", "best hand-picked", "plan / best", "which"], rows)
    print()
    names = next(iter(speeds.values())).keys()
    rows = [[name, *(f"{row[name]:.1f}" for row in speeds.values())] for name in names]
    print_table(["setting", *speeds], rows)


if __name__ == "__main__":
    typer.run(main)
