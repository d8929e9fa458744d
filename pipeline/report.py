"""report.html: what was built, chosen and measured, in one self-contained page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SERIES_COLORS = ("#1f5fa8", "#c2571a", "#3a7d44", "#7a4fa0", "#8a6d1c", "#555")


def write_report(bundle_dir: Path, reports: Mapping[str, dict], out_file: Path) -> None:
    """Render `reports` (stage or "stage engine" -> what it reported) for the bundle in `bundle_dir`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"figure": _figure}
    plan = reports.get("tune", {})
    page = environment.get_template("report.html.j2").render(
        title=bundle_dir.name,
        plan=plan,
        chart=_cost_chart(plan["costs"]) if "costs" in plan else "",
        bench=reports.get("bench", {}),
        check=reports.get("check", {}),
        provenance=reports.get("manifest", {}),
        tables=_tables(reports),
        notes={
            name: _flat(report) for name, report in reports.items() if name.split()[0] in COMPRESSION_STAGES
        },
    )
    out_file.write_text(page, encoding="utf-8")


COMPRESSION_STAGES = ("load", "calibrate", "smooth", "prune", "quantize", "export")


def _figure(value: object) -> str:
    """A number as a person reads it: three or four significant digits, lists joined."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(_figure, value)) or "none"
        case dict():
            return ", ".join(f"{key} {_figure(item)}" for key, item in value.items()) or "none"
        case None:
            return "–"
    return str(value)


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


def _cost_chart(costs: Mapping) -> str:
    """Milliseconds of a call against its rows, one line an engine, as inline SVG."""
    width, height, left, bottom = 640, 320, 56, 44
    rows: Sequence[float] = costs["rows"]
    series: Mapping[str, Sequence[float]] = costs["milliseconds"]
    top = 1.1 * max(max(values) for values in series.values())

    def place(row: float, ms: float) -> tuple[float, float]:
        return left + (width - left - 130) * row / max(rows), (height - bottom) * (1 - ms / top) + 8

    label = "Milliseconds of one call against its rows"
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    for tick in range(5):
        value = top * tick / 4
        x, y = place(0, value)
        parts.append(f'<line x1="{x}" y1="{y:.1f}" x2="{width - 130}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for row in rows:
        x, y = place(row, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{row}</text>')
    x, y = place(max(rows) / 2, 0)
    parts.append(f'<text x="{x:.1f}" y="{y + 34:.1f}" text-anchor="middle">rows in one call</text>')
    parts.append(
        f'<text text-anchor="middle" transform="translate(14 {height / 2}) rotate(-90)">milliseconds</text>'
    )
    for (name, values), color in zip(series.items(), SERIES_COLORS * len(series), strict=False):
        points = [place(row, ms) for row, ms in zip(rows, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        x, y = points[-1]
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{color}">{name}</text>')
    return "".join([*parts, "</svg>"])
