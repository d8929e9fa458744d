"""Draftsmith beside other engines: greedy decoding of the same prompts, as token ids, from the same weights.

Every contender runs in its own process. Each prompt goes to all of them in turn, in an order that turns by
one from prompt to prompt, with a short warm call before each that is timed.
"""

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from contenders import OURS, VARIANTS, Contender, list_contenders, prepare
from draftsmith.pipeline.prompts import read_prompts
from draftsmith.speculate.bundle import load
from draftsmith.speculate.onnx_engine import default_threads
from environments import Unavailable
from worker import Answer, Worker

sys.path.append(str(Path(__file__).parents[1]))
from measure import print_table, ratios, spread

WARM_TOKENS = 4
Answers = dict[Contender, list[Answer]]


def main(
    bundles: Annotated[list[Path], typer.Argument(help="of one model; the first names the weights for all")],
    prompts: Annotated[Path, typer.Option(help="as `draftsmith bench` takes them")],
    limit: Annotated[int | None, typer.Option(help="so many prompts, evenly over the file")] = None,
    peers: Annotated[str, typer.Option(help="PEER or PEER:VARIANT, comma between")] = ",".join(VARIANTS),
    new_tokens: int = 128,
    threads: int = default_threads(),
    work: Annotated[Path, typer.Option(help="environments and models")] = Path("build/peers"),
    out: Annotated[Path | None, typer.Option("--json", help="write all answers")] = None,
) -> None:
    """Print a table of rates and of ratios to the first bundle's plain decoding."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    reader = load(bundles[0], threads=threads)
    asked = read_prompts(prompts, limit)[0]
    encoded = [reader.encode(prompt.content) for prompt in asked]
    skipped: dict[str, str] = {}
    contenders = list(list_contenders(bundles, [name for name in peers.split(",") if name]))
    workers = start(contenders, bundles[0], work, threads, skipped)
    answers = ask(workers, encoded, new_tokens, skipped)
    report(answers, [prompt.category for prompt in asked], skipped)
    if out is not None:
        found = {one.name: [answer.__dict__ for answer in answers[one]] for one in answers}
        out.write_text(json.dumps({"answers": found, "skipped": skipped}, indent=1) + "\n")


def start(
    contenders: list[Contender], bundle: Path, work: Path, threads: int, skipped: dict[str, str]
) -> list[Worker]:
    """Those that can take part; the others are entered in `skipped`."""
    workers = []
    for contender in contenders:
        try:
            python, model = prepare(contender, bundle, work)
            log = work / f"{contender.name.replace(' ', '_')}.log"
            workers.append(Worker(contender, python, model, log, threads))
        except Unavailable as error:
            skipped[contender.name] = str(error)
    return workers


def ask(workers: list[Worker], prompts: list[list[int]], count: int, skipped: dict[str, str]) -> Answers:
    """Who fails is entered in `skipped` and asked no more. An interrupt keeps what all have answered."""
    answers: Answers = {worker.contender: [] for worker in workers}
    answered = 0
    try:
        for index, ids in enumerate(prompts):
            turn = index % len(workers)
            for worker in [*workers[turn:], *workers[:turn]]:
                if worker.contender not in answers:
                    continue
                try:
                    worker.generate(prompts[index - 1], WARM_TOKENS)  # another one: some keep prefixes
                    answers[worker.contender].append(worker.generate(ids, count))
                except (Unavailable, BrokenPipeError) as error:
                    skipped[worker.contender.name] = str(error)
                    del answers[worker.contender]
            answered = index + 1
            print(f"prompt {answered} of {len(prompts)}", file=sys.stderr)
    except KeyboardInterrupt:
        if not answered:
            raise
        print(f"interrupted: {answered} of {len(prompts)} prompts count", file=sys.stderr)
    for worker in workers:
        worker.close()
    return {contender: given[:answered] for contender, given in answers.items()}


def report(answers: Answers, categories: list[str], skipped: dict[str, str]) -> None:
    base = next((contender for contender in answers if contender.peer == OURS), None)
    lines = []
    for contender, given in answers.items():
        rates = [answer.decode_tokens_per_second for answer in given]
        of_base = [answer.decode_tokens_per_second for answer in answers[base]] if base else rates
        line = [contender.name, spread(rates, 1), f"{mean_over_categories(rates, categories):.1f}"]
        line += [f"{pooled_rate(given):.1f}", spread(ratios(rates, of_base))]
        plain = answers.get(contender.plain)
        if contender.speculate and plain:
            same = sum(one.ids == other.ids for one, other in zip(given, plain, strict=True))
            gain = ratios(rates, [answer.decode_tokens_per_second for answer in plain])
            line += [spread(gain), f"{same}/{len(given)}"]
        else:
            line += ["", ""]
        lines.append(line)
    head = ["engine", "decode tokens/s", "mean over categories", "end to end"]
    print_table([*head, "x ours plain", "x own plain", "= own plain"], lines)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")


def mean_over_categories(rates: list[float], categories: list[str]) -> float:
    """The mean of each category's mean, over the categories of the prompts that were answered."""
    groups: dict[str, list[float]] = {}
    for rate, category in zip(rates, categories, strict=False):  # fewer rates: interrupted
        groups.setdefault(category, []).append(rate)
    return fmean(fmean(group) for group in groups.values())


def pooled_rate(answers: list[Answer]) -> float:
    """All tokens over all time, prefill included."""
    return sum(len(answer.ids) for answer in answers) / sum(answer.seconds[-1] for answer in answers)


if __name__ == "__main__":
    typer.run(main)
