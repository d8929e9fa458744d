"""What the verbs on a bundle do: open it, run it, give back JSON data."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError
from .processor import num_threads
from .progress import show_progress

if TYPE_CHECKING:
    from ..speculate.bundle import Bundle
    from ..speculate.joint import JointLaw


def parse_ladder(text: str) -> str | list[str]:
    """ "auto", "none", or drafters joined by commas, innermost first: "suffix,int8". Several that are no
    models make one by plus signs: "recycling+history,int8"."""
    return text if text in ("auto", "none") else [name.strip() for name in text.split(",")]


def generate(
    bundle_dir: Path,
    prompt: str,
    *,
    chat: bool,
    threads: int | None,
    device: str,
    quiet: bool,
    speculate: str,
    references: Sequence[Path] = (),
    datastore: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Continue `prompt` ("-": standard input), or with `chat` answer it.

    The text is written as it comes, unless `quiet`; `settings` are those of `Bundle.stream`.
    """
    bundle = _open(bundle_dir, threads, device, datastore)
    text = sys.stdin.read() if prompt == "-" else prompt
    run = bundle.stream(
        [{"role": "user", "content": text}] if chat else text,
        speculate=parse_ladder(speculate),
        references=[_read_text(path) for path in references],
        **settings,
    )
    pieces = []
    for piece in run:
        pieces.append(piece)
        if not quiet:
            print(piece.text, end="", flush=True)
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [token for piece in pieces for token in piece.token_ids],
        "finish_reason": run.finish_reason,
        "stats": run.stats.to_dict(),
    }


def choose_law(ensemble: float | None, contrast: float | None, cutoff: float) -> "JointLaw":
    from ..speculate.joint import Contrast, Ensemble

    if (ensemble is None) == (contrast is None):
        raise RecipeError("a joint law is wanted: give one of --ensemble WEIGHT and --contrast WEIGHT")
    if cutoff and contrast is None:
        raise RecipeError("--cutoff belongs to --contrast; an ensemble has none")
    return Contrast(contrast, cutoff) if contrast is not None else Ensemble(ensemble or 0.0)


def generate_jointly(
    bundle_dir: Path,
    second: str,
    law: "JointLaw",
    prompt: str,
    *,
    chat: bool,
    threads: int | None,
    **settings: Any,
) -> dict[str, Any]:
    """Continue `prompt` by `law` of the bundle's target and `second`, a drafter of its or another bundle."""
    from ..speculate.joint import generate_jointly as decode

    bundle = _open(bundle_dir, threads, "cpu")
    other = (
        second
        if second in bundle.drafters or not Path(second).is_dir()
        else _open(Path(second), threads, "cpu")
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    return asdict(
        decode(bundle, other, law, [{"role": "user", "content": text}] if chat else text, **settings)
    )


def bench(
    bundle_dir: Path,
    prompts: Path,
    *,
    limit: int | None,
    threads: int | None,
    device: str,
    speculate: str,
    json_out: Path | None,
    references: Sequence[Path] = (),
    datastore: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure plain and speculative decoding of the prompts of a file; keeps the result in `json_out`."""
    from .bench import bench as measure
    from .prompts import read_prompts

    if json_out and str(json_out) != "-" and not json_out.absolute().parent.is_dir():
        raise RecipeError(f"--json {json_out}: its folder is not there; make it first")
    chosen, problems = read_prompts(prompts, limit)
    settings["references"] = [_read_text(path) for path in references]
    bundle = _open(bundle_dir, threads, device, datastore)
    with show_progress("bench") as progress:
        result = measure(bundle, chosen, speculate=parse_ladder(speculate), progress=progress, **settings)
    result |= {"prompts_file": str(prompts), "passed_over": problems + result["passed_over"]}
    if json_out and str(json_out) != "-":
        json_out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def evaluate(
    bundle_dir: Path,
    text: Path | None,
    prompts: Path | None,
    *,
    threads: int | None,
    device: str,
    **settings: Any,
) -> dict[str, Any]:
    """Perplexity on `text` and greedy agreement on `prompts` of every engine of a bundle."""
    from .evaluate import evaluate as measure

    with show_progress("eval") as progress:
        return measure(_open(bundle_dir, threads, device), text, prompts, progress=progress, **settings)


def tune(bundle_dir: Path, prompts: Path | None, *, limit: int | None, threads: int | None) -> dict[str, Any]:
    """Tune a bundle anew on this machine; rewrites its plan."""
    from .retune import retune

    with show_progress("tune") as progress:
        return retune(bundle_dir, prompts, limit, threads, progress)


def gate(
    bundle_dir: Path, baseline: Path, overrides: Sequence[str], out: Path | None, **request: Any
) -> dict[str, Any]:
    """Hold a bundle against its baseline; writes the verdict into the folder `out`."""
    from .gate import Request
    from .gate import gate as hold
    from .gate_files import write_files
    from .gate_settings import read_settings

    settings = read_settings(bundle_dir, overrides)
    with show_progress("gate") as progress:
        result = hold(bundle_dir, baseline, settings, Request(**request), progress=progress)
    if out is not None:
        result["files"] = write_files(result, out)
    return result


def has_bug(bench_result: dict[str, Any]) -> bool:
    """Whether an output differs from plain decoding other than by the chance order of near-equal logits."""
    return any(not divergence["near_tie"] for divergence in bench_result["divergences"])


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise RecipeError(f"--reference {path}: no such file; a text that the output may quote is wanted")
    return path.read_text(encoding="utf-8", errors="replace")


def _open(bundle_dir: Path, threads: int | None, device: str, datastore: Path | None = None) -> "Bundle":
    """With as many threads as `tune` measured with, unless told otherwise."""
    from ..speculate.bundle import Bundle

    bundle = Bundle(bundle_dir, num_threads() if threads is None else threads, datastore, device)
    if bundle.why_cpu:
        print(f"runs on the CPU: {bundle.why_cpu}", file=sys.stderr)
    return bundle
