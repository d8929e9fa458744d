"""Why a ladder was chosen or lost, in a sentence, from the figures of a plan."""

from collections.abc import Mapping
from typing import Any

from ..speculate.levels import TARGET, split_engine_tree


def explain_candidates(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every candidate of a plan, with `chosen` and `why`."""
    rows = plan["candidates"]
    chosen = next((row for row in rows if row["ladder"] == plan["ladder"]), plan["predicted"])
    return [
        dict(row) | {"chosen": row["ladder"] == plan["ladder"], "why": _why(row, chosen, plan)}
        for row in rows
    ]


def _why(row: Mapping[str, Any], chosen: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    if row["ladder"] == chosen["ladder"]:
        return plan.get("why", "Chosen.")
    ratio = row["tokens_per_second"] / chosen["tokens_per_second"]
    lost = (
        f"{1 - ratio:.0%} slower than the chosen one" if ratio < 1 else "predicted faster, but not asked for"
    )
    if not row["ladder"]:
        return f"{lost}: every token costs a call of the target."
    calls, others = row["tokens_per_target_call"], chosen["tokens_per_target_call"]
    drafting, instead = (_drafting(one) for one in (row, chosen))
    agreement = plan.get("greedy_agreement", {})
    outermost = split_engine_tree(row["ladder"][-1])[0]
    doubt = (
        f" ({outermost} would choose {agreement[outermost]:.0%} of the target's tokens)"
        if outermost in agreement
        else ""
    )
    if calls < 0.95 * others:
        return f"{lost}: a target call gives {calls:.2f} tokens instead of {others:.2f}{doubt}" + (
            f", for {drafting:.1f} ms of drafting a token." if drafting else ", though drafts are free."
        )
    if drafting > instead:
        return f"{lost}: drafting costs {drafting:.1f} ms a token instead of {instead:.1f}."
    return f"{lost}: {calls:.2f} tokens a target call for {drafting:.1f} ms of drafting a token{doubt}."


def _drafting(row: Mapping[str, Any]) -> float:
    """Milliseconds a token of all engines but the target."""
    return sum(ms for name, ms in row.get("ms_per_token", {}).items() if name != TARGET)
