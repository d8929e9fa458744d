"""Ladders side by side, category by category: the plan of `tune`, and settings that a person might pick.

Every prompt is decoded by each of them in turn, some times over, in an order that turns. Greedy repeats do
the same work round by round, so the calmer half of each round's timings counts.
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
from draftsmith.pipeline.rounds import Rounds, decode_in_turn
from draftsmith.speculate.bundle import Bundle, load
from draftsmith.speculate.onnx_engine import default_threads
from measure import print_table

PLAN, PLAIN = "plan", "no drafts"
CHAT = "chat"  # Spec-Bench counts the eight kinds of MT-Bench as one
OWN = ("translation", "summarization", "qa", "math_reasoning", "rag")


@dataclass(frozen=True)
class Setting:
    """A ladder and how much each of its levels drafts; None: as the plan says."""

    ladder: str | list[str]
    lengths: dict[str, int] | None = None


@dataclass
class Total:
    """Of one setting on the prompts of a category, behind the first token of each."""

    tokens: int = 0
    milliseconds: float = 0.0
    target_calls: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_ms: float = 0.0
    total_ms: float = 0.0

    def add(self, repeats: Sequence[Rounds]) -> None:
        self.tokens += len(repeats[0].token_ids) - 1
        self.milliseconds += sum(settle([one.milliseconds for one in repeats])[1:])
        for one in repeats:  # cost by part: all of them, since parts are not timed round by round
            self.draft_ms += sum(one.stats["ms"]["draft"].values())
            self.total_ms += sum(one.milliseconds[1:])
        stats = repeats[0].stats
        self.target_calls += stats["steps"]
        self.drafted += stats["drafted"]
        self.accepted += stats["accepted"]

    def figures(self) -> dict[str, float]:
        return {
            "tokens_per_second": 1e3 * self.tokens / self.milliseconds,
            "tokens_per_target_call": self.tokens / self.target_calls,
            "acceptance": self.accepted / max(1, self.drafted),
            "draft_share": self.draft_ms / self.total_ms,
        }


def main(
    bundle: Path,
    prompts: Annotated[Path, typer.Option(help="JSONL, as for bench")],
    limit: Annotated[int, typer.Option(min=1, help="prompts to take, evenly over the file")] = 26,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    ladders: Annotated[str | None, typer.Option(help='such as "suffix=16;suffix=16,int8=4"')] = None,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
    log: Annotated[Path | None, typer.Option(help="JSON: every figure")] = None,
) -> None:
    """Print tokens/s, tokens a target call, acceptance and the share of time that drafting takes, by
    category; and the plan beside the best of the others."""
    opened = load(bundle, threads)
    settings = {PLAN: Setting("auto"), PLAIN: Setting("none")}
    for text in (ladders or ";".join(list_ladders(opened.drafters))).split(";"):
        settings[text.strip()] = read_setting(text)
    encoded, problems = encode_prompts(
        opened, read_prompts(prompts, limit)[0], [{"speculate": s.ladder} for s in settings.values()]
    )
    print(*problems, sep="\n", end="\n" if problems else "")
    totals: dict[str, dict[str, Total]] = defaultdict(lambda: {name: Total() for name in settings})
    try:
        for index, (prompt, ids) in enumerate(encoded):
            category = prompt.category if prompt.category in OWN else CHAT
            for name, repeated in decode_settings(opened, ids, settings, max_new_tokens, repeats).items():
                totals[category][name].add(repeated)
            print(f"{index + 1}/{len(encoded)} {category}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: what was measured until then")
    figures = {
        category: {name: total.figures() for name, total in row.items()} for category, row in totals.items()
    }
    print(f"\nplan: {opened.plan_for()}")
    print_figures(figures)
    if log:
        log.write_text(json.dumps({"plan": opened.plan_for(), "categories": figures}, indent=2) + "\n")


def list_ladders(drafters: Sequence[str]) -> list[str]:
    """Every drafter alone, and each that is a model on top of prompt lookup."""
    free = ["suffix=8", "history=8", "recycling=4", "recycling+history=8", "recycling-tree=15"]
    models = [f"{name}={length}" for name in drafters for length in (4, 8)]
    return [*free, *models, *(f"suffix=16,{name}" for name in models)]


def read_setting(text: str) -> Setting:
    levels = [level.strip().partition("=") for level in text.split(",")]
    if not all(length.isdecimal() for _, _, length in levels):
        raise typer.BadParameter(f'{text}: wanted NAME=LENGTH, joined by commas: "suffix=16,int8=4"')
    return Setting([name for name, _, _ in levels], {name: int(length) for name, _, length in levels})


def decode_settings(
    bundle: Bundle, ids: list[int], settings: dict[str, Setting], max_new_tokens: int, repeats: int
) -> dict[str, list[Rounds]]:
    """One prompt by every setting. Raises SystemExit if two differ in a token."""
    rounds: dict[str, list[Rounds]] = {name: [] for name in settings}
    for repeat in range(repeats):
        names = [*settings]
        turn = repeat * len(names) // repeats
        for name in names[turn:] + names[:turn]:
            setting = settings[name]
            bundle.forget()  # nothing is read off another run of the same prompt
            run = bundle.stream(
                ids,
                max_new_tokens=max_new_tokens,
                speculate=setting.ladder,
                num_speculative_tokens=setting.lengths,
                ignore_eos=True,
            )
            rounds[name] += decode_in_turn([run])
    outputs = {name: repeated[0].token_ids for name, repeated in rounds.items()}
    if wrong := [name for name, output in outputs.items() if output != outputs[PLAIN]]:
        raise SystemExit(f"{wrong[0]} decodes other tokens than the target alone")
    return rounds


def print_figures(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    for key, digits in {
        "tokens_per_second": 1,
        "tokens_per_target_call": 2,
        "acceptance": 2,
        "draft_share": 3,
    }.items():
        print(f"\n{key}\n")
        names = next(iter(figures.values())).keys()
        rows = [[name, *(f"{row[name][key]:.{digits}f}" for row in figures.values())] for name in names]
        print_table(["ladder", *figures], rows)
    rows = []
    for category, row in figures.items():
        speed = {name: one["tokens_per_second"] for name, one in row.items()}
        best = max((name for name in speed if name != PLAN), key=speed.__getitem__)
        rows.append([category, f"{speed[PLAN] / speed[best]:.3f}", best])
    print()
    print_table(["category", "plan / best", "best"], rows)


if __name__ == "__main__":
    typer.run(main)
