"""The gate's checks that need no clock: drafters' agreement, perplexity and size."""

from collections.abc import Mapping
from dataclasses import dataclass

from .compare import Outcome
from .recipe import Gate
from .snapshot import Perplexity


@dataclass(frozen=True)
class Check:
    name: str  # such as "plain tpot" or "agreement of int8"
    outcome: Outcome
    unit: str
    baseline: float | None
    candidate: float | None
    limit: str
    why: str = ""


def check_size(baseline: int, candidate: int, settings: Gate) -> Check:
    allowed = settings.max_size_growth
    outcome: Outcome = "regression" if candidate > baseline * (1 + allowed) else "pass"
    why = f"{candidate / baseline:.3f} times the baseline" if baseline else ""
    return Check("size", outcome, "bytes", baseline, candidate, f"+{allowed:.0%}", why)


def check_agreement(
    baseline: Mapping[str, float], candidate: Mapping[str, float], settings: Gate
) -> list[Check]:
    """Of every drafter that both have."""
    allowed = settings.max_acceptance_drop
    return [
        Check(
            f"agreement of {name}",
            "regression" if candidate[name] < baseline[name] - allowed else "pass",
            "",
            baseline[name],
            candidate[name],
            f"-{allowed:g}",
            f"{candidate[name] - baseline[name]:+.3f}",
        )
        for name in baseline
        if name in candidate
    ]


def check_perplexity(baseline: Perplexity | None, candidate: Perplexity, settings: Gate) -> list[Check]:
    """Of every engine that the baseline has, if both read the same text in the same way."""
    limit = f"+{settings.max_perplexity_growth:.0%}"
    if baseline is None or baseline.described() != candidate.described():
        why = "the baseline has none" if baseline is None else "the baseline read another text"
        figure = candidate.engines["target"]
        return [Check("perplexity", "not compared", "", None, figure, limit, f"{why}: measure it again")]
    checks = []
    for name, then in baseline.engines.items():
        now = candidate.engines.get(name)
        outcome: Outcome = "not compared"
        why = "it has none now"
        if now is not None:
            worse = now > then * (1 + settings.max_perplexity_growth)
            outcome, why = "regression" if worse else "pass", f"{now / then:.4f} times the baseline"
        checks.append(Check(f"perplexity of {name}", outcome, "", then, now, limit, why))
    return checks
