"""Two models decoded together: by turns, as `draftsmith joint` does, beside a call of both for each token."""

from pathlib import Path
from typing import Annotated

import typer
from draftsmith.pipeline.compare import settle
from draftsmith.pipeline.prompts import encode_prompts, read_prompts
from draftsmith.speculate.bundle import load
from draftsmith.speculate.joint import Contrast, Ensemble, JointLaw, generate_jointly
from draftsmith.speculate.onnx_engine import default_threads
from measure import print_table, ratios, spread

WAYS = {"each token": (0, 0), "one proposes": (0, 4), "by turns": (1, 4)}
LAWS: list[JointLaw] = [Ensemble(0.3), Ensemble(0.7), Contrast(0.1), Contrast(0.3, cutoff=0.1)]


def main(
    bundle: Path,
    second: Annotated[str, typer.Argument(help="a drafter of the bundle")],
    prompts: Annotated[Path, typer.Option(help="JSONL, as for bench")],
    limit: Annotated[int, typer.Option(min=1, help="prompts to take, evenly over the file")] = 6,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    temperature: float = 0.0,
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    threads: Annotated[int, typer.Option(min=1)] = default_threads(),
) -> None:
    """Print, by law: tokens a call of the target, and how many times as fast as calling both each time."""
    opened = load(bundle, threads)
    encoded = [
        ids for _, ids in encode_prompts(opened, read_prompts(prompts, limit)[0], [{"speculate": "none"}])[0]
    ]
    rows = []
    for law in LAWS:
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        calls = dict.fromkeys(WAYS, 0)
        for number, ids in enumerate(encoded):
            repeated: dict[str, list[float]] = {way: [] for way in WAYS}
            outputs = set()
            for repeat in range(repeats):
                for way in [*WAYS][:: 1 if (number + repeat) % 2 else -1]:
                    made = generate_jointly(
                        opened,
                        second,
                        law,
                        ids,
                        max_new_tokens,
                        temperature,
                        ignore_eos=True,
                        num_proposed=WAYS[way],
                    )
                    repeated[way].append(made.total_ms - made.ttft_ms)
                    calls[way] += made.models["target"]["calls"]
                    outputs.add(tuple(made.token_ids))
            if temperature == 0 and len(outputs) > 1:
                raise SystemExit(f"{law}: outputs differ with who proposes")
            for way, milliseconds in repeated.items():
                times[way] += settle([[ms] for ms in milliseconds])
        total = len(encoded) * repeats * max_new_tokens
        rows += [
            [str(law), way, f"{total / calls[way]:.2f}", spread(ratios(times["each token"], times[way]))]
            for way in WAYS
        ]
    print_table(["law", "way", "tokens / target call", "x each token"], rows)


if __name__ == "__main__":
    typer.run(main)
