"""What a bundle says of itself: where it comes from, what was chosen, what was measured."""

import json
from collections.abc import Mapping
from typing import Any

from ..speculate.levels import TARGET
from ..speculate.manifest import RECIPE, REPORTS
from .cache import Entry
from .hashing import hash_json
from .recipe import Recipe
from .recipe_file import dump_recipe
from .report import render_report
from .stage import Task
from .stages import Plan

PROVENANCE = ("model", "weights", "recipe_sha256", "calibration", "packages")  # that the report shows
BENCH_FIGURES = ("settings", "prompts", "identical", "divergences", "plain", "speculative", "speedup")


def resolve_recipe(
    recipe: Recipe,
    chosen: Mapping[str, Any],
    caches: Mapping[str, str],
    skipped: Mapping[str, Mapping[str, Any]] | None = None,
) -> Recipe:
    """The recipe with the ladder and the draft lengths that tuning chose, and with the layers `skipped` by
    drafters that were searched, where it left them open; and with what the `caches` of engines hold.

    An `auto` smoothing strength stays: it is a choice for every fold of the model, and the report lists them.
    """
    data = recipe.model_dump()
    if recipe.speculate.ladder == "auto":
        data["speculate"]["ladder"] = chosen["ladder"] or "none"
    if recipe.speculate.num_speculative_tokens == "auto":
        data["speculate"]["num_speculative_tokens"] = chosen["num_speculative_tokens"]
    for name, dtype in caches.items():
        engine = data["target"] if name == TARGET else data["drafters"][name]
        engine["kv_cache_dtype"] = dtype
    for name, layers in (skipped or {}).items():
        data["drafters"][name]["skip_layers"] = layers
    return Recipe.model_validate(data)


def describe_provenance(
    resolved: Recipe, weights: Mapping[str, str], plan: Plan, done: Mapping[Task, Entry]
) -> dict[str, Any]:
    """The part of a manifest that decoding does not need. `weights`: what each engine's are kept in, the
    target first."""
    packages: dict[str, str] = {}
    for entry in done.values():
        packages |= entry.record["packages"]
    return {
        "model": done[plan.load].report,
        "weights": dict(weights),
        "recipe_sha256": hash_json(resolved.model_dump()),
        "calibration": {"content_sha256": done[plan.tokens].content} | done[plan.tokens].report,
        "packages": dict(sorted(packages.items())),
        "measurements": describe_measurements({task.name: entry.report for task, entry in done.items()}),
    }


def describe_measurements(reports: Mapping[str, dict]) -> dict[str, Any]:
    """What was measured of the bundle, from what its stages reported."""
    bench, chosen = reports.get("bench", {}), reports.get("tune", {})
    return {
        "date": bench.get("date"),
        "machine": bench.get("machine"),
        "predicted": chosen.get("predicted"),
        "greedy_agreement": chosen.get("greedy_agreement"),
        "bench": {name: bench[name] for name in BENCH_FIGURES if name in bench},
        "check": reports.get("check", {}),
    }


def write_documents(
    title: str, resolved: Recipe, provenance: Mapping[str, Any], reports: Mapping[str, dict]
) -> dict[str, str]:
    """A bundle's texts for people, by file name, and the reports that they are written from, by stage or
    "stage engine"."""
    shown = dict(reports) | {"manifest": {name: provenance[name] for name in PROVENANCE}}
    return {
        RECIPE: "# As resolved when this bundle was made or tuned.\n" + dump_recipe(resolved),
        "report.html": render_report(title, shown),
        "MODEL_CARD.md": write_card(resolved, provenance, reports.get("tune")),
        REPORTS: json.dumps(reports, indent=1) + "\n",
    }


def write_card(
    resolved: Recipe,
    provenance: Mapping[str, Any],
    plan: Mapping[str, Any] | None = None,
) -> str:
    """A model card, from the same data as the manifest and the report. `plan`: what tuning found."""
    model, measured, plan = provenance["model"], provenance["measurements"], plan or {}
    agreement = measured.get("greedy_agreement") or {}
    rows = [
        f"| {name} | {weights} | {f'{agreement[name]:.0%}' if name in agreement else ''} |"
        for name, weights in provenance["weights"].items()
    ]
    ladder = resolved.speculate.ladder
    chain = " → ".join([*ladder, "target"]) if isinstance(ladder, list) else "the target alone"
    lines = [
        f"# {model['source']}, with drafters of its own",
        "",
        f"Made by Draftsmith from `{model['source']}` ({model['architecture']}). The target's words are what",
        "you get: drafters propose them, and every one is checked.",
        "",
        "| engine | weights | of the target's tokens, would choose the same |",
        "|---|---|---|",
        *rows,
        "",
        f"Decoding: {chain}. {plan.get('why', '')}".rstrip(),
        "",
        *_measured_lines(measured),
        "```sh",
        "draftsmith generate . 'Once upon a time'",
        "```",
        "",
        "Licence, intended use and limits are those of the original model.",
    ]
    return "\n".join(lines) + "\n"


def _measured_lines(measured: Mapping[str, Any]) -> list[str]:
    bench = measured["bench"]
    speedup = (bench.get("speedup") or {}).get("p50")
    if not speedup:
        return []
    machine = measured["machine"] or {}
    where = f"{machine.get('processor', 'an unknown processor')}, {machine.get('cores', '?')} cores"
    rows = []
    for label, key in (("tokens/s", "tokens_per_second"), ("TTFT, ms", "ttft_ms"), ("TPOT, ms", "tpot_ms")):
        plain, fast = ((bench[mode].get(key) or {}).get("p50") for mode in ("plain", "speculative"))
        if plain and fast:
            rows.append(f"| {label} | {plain:.1f} | {fast:.1f} |")
    return [
        f"Measured on {where}, {measured['date']}: {speedup:.2f} times plain decoding (median over "
        f"{bench['prompts']} prompts), {bench['identical']} of {bench['prompts']} outputs the same token for",
        "token. How it was taken, and what was not chosen: `report.html`.",
        "",
        "| median | plain | speculative |",
        "|---|---:|---:|",
        *rows,
        "",
    ]
