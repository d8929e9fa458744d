"""Measure plain and speculative decoding side by side, and check that they say the same thing."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ..speculate.bundle import Bundle, load
from .machine import describe_machine
from .processor import num_threads
from .progress import Progress, no_progress
from .prompts import Prompt, encode_prompts

# Kernels round differently for one row and for several, so where the target's two best logits are closer than
# that moves them, the order of the two is chance. Anything wider that differs is a bug.
NEAR_TIE = 1e-2  # at least; more where reading the same tokens one by one moves the logits by more
STAGE_PROMPTS, STAGE_PROMPT_TOKENS, STAGE_NEW_TOKENS = 4, 64, 64


@dataclass
class Run:
    """One prompt decoded one way."""

    mode: str  # "plain" | "speculative"
    category: str
    token_ids: list[int]
    stats: dict


def bench(
    bundle: Bundle,
    prompts: Sequence[Prompt],
    *,
    speculate: str | list[str] = "auto",
    max_new_tokens: int = 128,
    ignore_eos: bool = False,
    temperature: float = 0.0,
    progress: Progress = no_progress,
) -> dict:
    """Decode every prompt plainly and speculatively, in alternating order, and compare.

    A prompt that the bundle refuses is passed over. An interrupt ends the run early and keeps what was
    measured. Figures are defined in docs/metrics.md.
    """
    modes = {"plain": "none", "speculative": speculate}
    options = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "temperature": temperature}
    encoded, passed_over = encode_prompts(bundle, prompts, list(modes.values()), **options)
    for mode in modes.values():  # warms the kernels
        bundle.generate(encoded[0][1], max_new_tokens=min(4, max_new_tokens), speculate=mode, ignore_eos=True)
    runs: list[Run] = []
    divergences: list[dict] = []
    interrupted = False
    try:
        for index, (prompt, ids) in enumerate(encoded):
            pair: dict[str, Run] = {}
            for mode in list(modes) if index % 2 == 0 else reversed(modes):
                pair[mode] = _decode(bundle, ids, mode, modes[mode], prompt.category, options)
            if temperature == 0.0 and pair["plain"].token_ids != pair["speculative"].token_ids:
                found = find_divergence(bundle, ids, pair["plain"].token_ids, pair["speculative"].token_ids)
                divergences.append({"prompt": index, "line": prompt.line} | found)
            runs += pair.values()
            progress(index + 1, len(encoded), "plain and speculative in turn")
    except KeyboardInterrupt:
        interrupted = True
        runs = runs[: len(runs) // 2 * 2]
        if not runs:
            raise
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": options
        | {"speculate": speculate, "plan": bundle.plan_for(speculate), "threads": bundle.threads},
        "prompts": len(runs) // 2,
        "passed_over": passed_over,
        "interrupted": interrupted,
        "identical": len(runs) // 2 - len(divergences) if temperature == 0.0 else None,
        "divergences": divergences,
        **_summarise(runs),
        "categories": {
            name: _summarise([r for r in runs if r.category == name]) for name in _categories(runs)
        },
        "runs": [{"mode": r.mode, "category": r.category, "stats": r.stats} for r in runs],
    }


def _decode(
    bundle: Bundle, ids: list[int], mode: str, speculate: str | list[str], category: str, options: dict
) -> Run:
    started = time.perf_counter()
    stream = bundle.stream(ids, speculate=speculate, **options)
    token_ids: list[int] = []
    times: list[float] = []
    for piece in stream:
        token_ids += piece.token_ids
        times += [time.perf_counter() - started] * len(piece.token_ids)
    return Run(mode, category, token_ids, stream.stats.to_dict() | {"token_times": times})


def find_divergence(bundle: Bundle, prompt: list[int], plain: list[int], speculative: list[int]) -> dict:
    """Where two outputs part, how close the target's two best tokens were there, and how far its logits move
    when the same tokens are read one by one instead of many at a time.
    """
    shorter = min(len(plain), len(speculative))
    position = next((i for i in range(shorter) if plain[i] != speculative[i]), shorter)
    context = [*prompt, *plain[:position]]
    together = bundle.logits(context)[-1].copy()
    engine = bundle.engine("target")
    engine.reserve(len(context))
    engine.forward(np.asarray(prompt, np.int32), 0)
    one_by_one = together
    for slot in range(len(prompt), len(context)):
        one_by_one = engine.forward(np.asarray(context[slot : slot + 1], np.int32), slot)[0]
    moved = float(np.abs(one_by_one - together).max())
    second, first = np.sort(together)[-2:]
    gap = float(first - second)
    return {
        "position": position,
        "top2_gap": gap,
        "rounding": moved,
        "near_tie": gap <= max(NEAR_TIE, 2 * moved),
    }


def bench_stage(bundle_dir: Path, tokens: Path, out: Path, progress: Progress = no_progress) -> dict:
    """The build's own measurement, on a few calibration windows: writes ``bench.json``."""
    windows = load_file(tokens / "tokens.safetensors")["tokens"]
    # The far ends of the windows: tuning saw the beginnings.
    picked = windows[
        np.linspace(0, len(windows) - 1, min(STAGE_PROMPTS, len(windows))).astype(int), -STAGE_PROMPT_TOKENS:
    ]
    prompts = [Prompt(ids, "calibration", index) for index, ids in enumerate(picked.tolist())]
    result = bench(
        load(bundle_dir, num_threads()),
        prompts,
        max_new_tokens=STAGE_NEW_TOKENS,
        ignore_eos=True,
        progress=progress,
    )
    if result["interrupted"]:
        raise KeyboardInterrupt  # what is kept in the cache is whole
    (out / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _categories(runs: Iterable[Run]) -> list[str]:
    return list(Counter(run.category for run in runs))


def _summarise(runs: list[Run]) -> dict:
    modes = {
        mode: _figures([run.stats for run in runs if run.mode == mode]) for mode in ("plain", "speculative")
    }
    pairs = zip(
        (run.stats["tokens_per_second"] for run in runs if run.mode == "speculative"),
        (run.stats["tokens_per_second"] for run in runs if run.mode == "plain"),
        strict=True,
    )
    return modes | {"speedup": _spread([fast / slow for fast, slow in pairs])}


def _figures(stats: list[dict]) -> dict:
    """One mode's figures over its runs; rates pooled, times as quantiles."""
    gaps = np.concatenate([np.diff(s["token_times"]) for s in stats] or [np.zeros(0)])
    levels: dict[str, dict] = {}
    for name in Counter(name for s in stats for name in s["levels"]):
        rows = [s["levels"][name] for s in stats if name in s["levels"]]
        drafted, accepted = (sum(row[key] for row in rows) for key in ("drafted", "accepted"))
        rate = accepted / drafted if drafted else None
        levels[name] = {"drafted": drafted, "accepted": accepted, "draft_acceptance_rate": rate}
    tokens, steps, accepted = (sum(s[key] for s in stats) for key in ("emitted", "steps", "accepted"))
    parts: Counter[str] = Counter()
    for s in stats:
        parts.update({part: ms for part, ms in s["ms"].items() if part != "draft"})
        parts.update({f"draft by {name}": ms for name, ms in s["ms"]["draft"].items()})
    return {
        "tokens": tokens,
        "target_calls": steps,
        "mean_acceptance_length": 1 + accepted / steps if steps else None,
        "levels": levels,
        "tokens_per_second": _spread([s["tokens_per_second"] for s in stats]),
        "decode_tokens_per_second": _spread([1e3 / s["tpot_ms"] for s in stats if s["tpot_ms"]]),
        "ttft_ms": _spread([s["ttft_ms"] for s in stats]),
        "tpot_ms": _spread([s["tpot_ms"] for s in stats if s["tpot_ms"] is not None]),
        "itl_ms": _spread(list(1e3 * gaps)),
        "ms_per_token": {part: total / tokens for part, total in parts.items()} if tokens else {},
    }


def _spread(values: Sequence[float]) -> dict | None:
    if not len(values):
        return None
    quantiles = np.percentile(values, [10, 50, 90, 99])
    return {
        "mean": float(np.mean(values)),
        **dict(zip(("p10", "p50", "p90", "p99"), map(float, quantiles), strict=True)),
    }
