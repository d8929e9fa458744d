"""What a busy neighbour costs: decoding alone, and with one core taken by another process, in turn."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from draftsmith.speculate.bundle import Bundle, load
from draftsmith.speculate.onnx_engine import default_threads
from measure import print_table, ratios, spread

MODES = {"plain": "none", "speculative": "auto"}
QUESTION = "What should I look at first when I buy a used bicycle?"


def main(
    bundle: Path,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
) -> None:
    """Print tokens a second alone and beside the neighbour, and how many times less that is."""
    opened = load(bundle, threads=threads)
    alone: dict[str, list[float]] = {mode: [] for mode in MODES}
    beside: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in MODES:
        measure_rate(opened, mode, new_tokens)  # warms up
    for _ in range(rounds):
        for mode in MODES:
            alone[mode].append(measure_rate(opened, mode, new_tokens))
        with busy_core():
            for mode in MODES:
                beside[mode].append(measure_rate(opened, mode, new_tokens))
    print(f"{threads} threads on {len(os.sched_getaffinity(0))} cores, one of them taken; {rounds} rounds")
    print_table(
        ["decoding", "tokens/s alone", "tokens/s beside", "x loss"],
        [
            [mode, spread(alone[mode], 1), spread(beside[mode], 1), spread(ratios(alone[mode], beside[mode]))]
            for mode in MODES
        ],
    )


def measure_rate(bundle: Bundle, mode: str, new_tokens: int) -> float:
    messages = [{"role": "user", "content": QUESTION}]
    prompt = messages if "chat_template.jinja" in bundle.manifest.files else QUESTION
    made = bundle.generate(prompt, new_tokens, speculate=MODES[mode], ignore_eos=True)
    milliseconds = made.stats.tpot_ms
    assert milliseconds is not None
    return 1e3 / milliseconds


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that computes without a pause, bound to the last of our cores."""
    core = max(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it runs
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    typer.run(main)
