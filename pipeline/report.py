"""report.html: what was built, chosen and measured, in one self-contained page."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .plots import plot_bars, plot_costs, plot_layers, plot_parts, plot_positions
from .reasons import explain_candidates

COMPRESSION_STAGES = ("load", "calibrate", "smooth", "prune", "quantize", "export")
LAYER = re.compile(r"(?:layers\.|layers/)(\d+)(?:\.(?:\w+\.)?(\w+))?$")
# Of each stage: the list in its report, the figure in a row, and what to call it.
QUALITY = {
    "prune": ("linears", "loss", "squared error of the output, a token"),
    "quantize": ("linears", "dynamic_error", "relative error, quantized"),
    "smooth": ("parts", "error", "relative error, smoothed and quantized"),
}


def render_report(title: str, reports: Mapping[str, dict]) -> str:
    """The page of `reports` (stage or "stage engine" -> what it reported)."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"figure": format_figure}
    plan, bench = reports.get("tune", {}), reports.get("bench", {})
    return environment.get_template("report.html.j2").render(
        title=title,
        plan=plan,
        candidates=explain_candidates(plan) if plan else [],
        plots=_plan_plots(plan) | _bench_plots(bench),
        quality=_quality_plots(reports),
        bench=bench,
        check=reports.get("check", {}),
        provenance=reports.get("manifest", {}),
        tables=_tables(reports),
        notes={
            name: _flat(report) for name, report in reports.items() if name.split()[0] in COMPRESSION_STAGES
        },
    )


def format_figure(value: object) -> str:
    """A number as a person reads it: three or four significant digits, lists joined."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(format_figure, value)) or "none"
        case dict():
            return ", ".join(f"{key} {format_figure(item)}" for key, item in value.items()) or "none"
        case None:
            return "–"
    return str(value)


def _plan_plots(plan: Mapping[str, Any]) -> dict[str, str]:
    if "costs" not in plan:
        return {}
    names = [" → ".join(row["ladder"]) or "none (plain)" for row in plan["candidates"]]
    speeds = [row["tokens_per_second"] for row in plan["candidates"]]
    measured = {}
    for mode, ladder in (("plain", []), ("chosen", plan["ladder"])):
        run = plan.get("measured", {}).get(mode)
        name = " → ".join(ladder) or "none (plain)"
        if run and name in names:
            measured[name] = run["tokens_per_second"]
    predicted = dict(zip(names, speeds, strict=True))
    alt = "Predicted and measured tokens per second"
    return {
        "costs": plot_costs(plan["costs"]),
        "speeds": plot_bars(predicted, "tokens per second, decoding", alt, measured),
    }


def _bench_plots(bench: Mapping[str, Any]) -> dict[str, str]:
    if not bench:
        return {}
    plots = {"parts": plot_parts({mode: bench[mode]["ms_per_token"] for mode in ("plain", "speculative")})}
    levels = bench["speculative"]["levels"]
    drafted = {name: level for name, level in levels.items() if level.get("per_position_acceptance")}
    if drafted:
        plots["positions"] = plot_positions(drafted)
    lengths = {
        name: part["speculative"]["mean_acceptance_length"] for name, part in bench["categories"].items()
    }
    lengths = {name: length for name, length in lengths.items() if length is not None}
    if levels and len(lengths) > 1:
        alt = "Tokens per target call by category"
        plots["categories"] = plot_bars(lengths, "tokens per target call", alt, {})
    return plots


def _quality_plots(reports: Mapping[str, dict]) -> dict[str, str]:
    """By stage: how much each linear, or layer, lost."""
    plots = {}
    for name, report in reports.items():
        rows, figure, label = QUALITY.get(name.split()[0], ("", "", ""))
        series: dict[str, list[tuple[int, float]]] = {}
        for row in report.get(rows) or ():
            place = LAYER.search(str(row.get("linear") or row.get("part")))
            if place and isinstance(value := row.get(figure), float):
                series.setdefault(place[2] or "whole layer", []).append((int(place[1]), value))
        if series:
            plots[name] = plot_layers(series, label, f"{name}: {label}, by layer")
    return plots


def _tables(reports: Mapping[str, dict]) -> dict[str, list[dict]]:
    """What the compressing stages report of each linear or part: their lists of rows."""
    return {
        f"{name}: {key}": value
        for name, report in reports.items()
        if name.split()[0] in COMPRESSION_STAGES
        for key, value in report.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }


def _flat(report: Mapping) -> dict[str, object]:
    """The scalar facts of a stage's report; its tables are shown on their own."""
    return {
        key: value
        for key, value in report.items()
        if not isinstance(value, list) or not value or not isinstance(value[0], dict)
    }
