"""From timed generations to the figures that docs/metrics.md defines."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from ..speculate.bundle import Bundle
from ..speculate.plan import PLAIN, Plan
from .rounds import Rounds
from .snapshot import Mode


@dataclass(frozen=True)
class Run:
    """One prompt decoded one way."""

    prompt: int  # its place among those that were decoded
    mode: Mode
    category: str
    rounds: Rounds

    def to_dict(self) -> dict:
        stats = self.rounds.stats | {
            "token_times": self.rounds.token_times,
            "tokens_per_round": self.rounds.tokens,
            "round_ms": self.rounds.milliseconds,
        }
        return {"prompt": self.prompt, "mode": self.mode, "category": self.category, "stats": stats}


def summarise(runs: Sequence[Run]) -> dict:
    """Both modes, and how many times faster speculation was: prompt by prompt, then quantiles."""
    by_mode = {mode: [run for run in runs if run.mode == mode] for mode in ("plain", "speculative")}
    rates = [[run.rounds.stats["tokens_per_second"] for run in chosen] for chosen in by_mode.values()]
    speedups = [fast / slow for slow, fast in zip(*rates, strict=True)]
    return {mode: _figures(chosen) for mode, chosen in by_mode.items()} | {"speedup": _spread(speedups)}


def summarise_categories(runs: Sequence[Run]) -> dict[str, dict]:
    names = dict.fromkeys(run.category for run in runs)
    return {name: summarise([run for run in runs if run.category == name]) for name in names}


def compare_with_plan(plan: Plan, runs: Sequence[Run], max_new_tokens: int) -> dict | None:
    """Tokens/s, prompts included, that the plan foretells for generations of these lengths, beside those of
    the runs, which followed it or decoded plainly."""
    if plan.costs is None or not plan.choices:
        return None
    result = {}
    for mode in ("plain", "speculative"):
        tokens, predicted_ms, measured_ms = 0, 0.0, 0.0
        for stats in (run.rounds.stats for run in runs if run.mode == mode):
            prompt, new = stats["prompt_tokens"], stats["emitted"]
            choice = plan.choose(prompt, max_new_tokens) if mode == "speculative" else None
            tokens += new
            predicted_ms += (choice or PLAIN).milliseconds(plan.costs, prompt, new)
            measured_ms += stats["total_ms"]
        result[mode] = {
            "tokens_per_second": 1e3 * tokens / measured_ms,
            "predicted_tokens_per_second": 1e3 * tokens / predicted_ms,
            "prediction_error": measured_ms / predicted_ms - 1,
        }
    return result


def count_ladders(runs: Sequence[Run]) -> dict[str, int]:
    """How many of the speculative runs each ladder decoded: a plan's follows the lengths."""
    ladders = (run.rounds.stats["levels"] for run in runs if run.mode == "speculative")
    return dict(Counter(" → ".join([*levels, "target"]) for levels in ladders))


def describe_memory(bundle: Bundle, runs: Sequence[Run]) -> dict:
    """Bytes: the peak of this process so far, and what the engines that decoded map from their files."""
    import resource

    used = {name for run in runs for name in run.rounds.stats["calls"]}
    weights = {
        name: sum(file.size for file in bundle.manifest.engine_files(name).values())
        for name in bundle.manifest.engines
        if name in used
    }
    # Linux counts in kilobytes.
    return {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "engine_files": weights}


def _figures(runs: Sequence[Run]) -> dict:
    """One mode's figures over its runs; rates pooled, times as quantiles."""
    stats = [run.rounds.stats for run in runs]
    gaps = np.concatenate([np.diff(run.rounds.token_times) for run in runs] or [np.zeros(0)])
    tokens, steps, accepted = (sum(s[key] for s in stats) for key in ("emitted", "steps", "accepted"))
    parts: Counter[str] = Counter()
    for s in stats:
        parts.update({part: ms for part, ms in s["ms"].items() if part != "draft"})
        parts.update({f"draft by {name}": ms for name, ms in s["ms"]["draft"].items()})
    return {
        "tokens": tokens,
        "target_calls": steps,
        "mean_acceptance_length": 1 + accepted / steps if steps else None,
        "levels": {
            name: _pool_level([s["levels"][name] for s in stats if name in s["levels"]])
            for name in dict.fromkeys(name for s in stats for name in s["levels"])
        },
        "tokens_per_second": _spread([s["tokens_per_second"] for s in stats]),
        "decode_tokens_per_second": _spread([1e3 / s["tpot_ms"] for s in stats if s["tpot_ms"]]),
        "ttft_ms": _spread([s["ttft_ms"] for s in stats]),
        "tpot_ms": _spread([s["tpot_ms"] for s in stats if s["tpot_ms"] is not None]),
        "itl_ms": _spread(list(1e3 * gaps)),
        "e2el_ms": _spread([s["total_ms"] for s in stats]),
        "ms_per_token": {part: total / tokens for part, total in parts.items()} if tokens else {},
    }


def _pool_level(rows: Sequence[dict]) -> dict:
    """Counts are added over the runs, then divided."""
    rounds, drafted, accepted = (sum(row[key] for row in rows) for key in ("rounds", "drafted", "accepted"))
    drafted_at, accepted_at = (
        [sum(counts) for counts in zip_longest(*(row[key] for row in rows), fillvalue=0)]
        for key in ("drafted_at", "accepted_at")
    )
    return {
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "drafted_at": drafted_at,
        "accepted_at": accepted_at,
        "per_position_acceptance": [a / d for a, d in zip(accepted_at, drafted_at, strict=True)],
    }


def _spread(values: Sequence[float]) -> dict | None:
    if not len(values):
        return None
    quantiles = np.percentile(values, [10, 50, 90, 99])
    return {
        "mean": float(np.mean(values)),
        **dict(zip(("p10", "p50", "p90", "p99"), map(float, quantiles), strict=True)),
        "n": len(values),
    }
