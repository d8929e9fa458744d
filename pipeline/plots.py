"""The plots of the report, as inline SVG. Small and with large letters, legible on a phone."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

COLORS = ("#1f5fa8", "#c2571a", "#3a7d44", "#7a4fa0", "#8a6d1c", "#b03060", "#20808a", "#555555")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "svg.hashsalt": "draftsmith",  # the same data, the same file
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}
WIDTH, HEIGHT = 4.8, 3.2  # inches: 346 units wide, so that 10 points are 10 pixels on a phone
MANY_ROWS = 32

Draw = Callable[[Any], None]


def draw(paint: Draw, alt: str, height: float = HEIGHT) -> str:
    """An <svg> element. paint: gets the axes. alt: what it shows, for those who cannot see it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    name = re.sub(r"\W+", "-", alt.lower())[:24]
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)  # ids are one page's, not one plot's
    head = f'<svg role="img" aria-label="{alt}"'
    text = re.sub(r'<svg\b([^>]*?) width="[^"]*"', rf"{head}\1", text, count=1)
    return re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)


def plot_costs(costs: Mapping[str, Any]) -> str:
    """Milliseconds of a call against its rows, with few to many slots of the cache in use, and the time to
    read the weights once."""
    shown = costs["contexts"][len(costs["contexts"]) // 2]

    def paint(axes) -> None:
        kept = [index for index, rows in enumerate(costs["rows"]) if rows <= MANY_ROWS]
        for (name, values), color in zip(costs["milliseconds"].items(), COLORS * 9, strict=False):
            rows = [costs["rows"][index] for index in kept]
            for context, row in zip(costs["contexts"], values, strict=True):
                style: dict[str, Any] = {"ls": "--", "lw": 0.8}
                if context == shown:
                    style = {"ls": "-", "marker": "o", "ms": 3, "label": name}
                axes.plot(rows, [row[index] for index in kept], color=color, **style)
            if floor := costs.get("floor_ms", {}).get(name):
                axes.axhline(floor, color=color, lw=1, ls=":")
        axes.set(xlabel="rows (tokens) in one call", ylabel="milliseconds", ylim=(0, None))
        axes.legend(title="engine; dotted: reading its weights", title_fontsize=9)

    return draw(paint, "Milliseconds of one call against its rows")


def plot_parts(modes: Mapping[str, Mapping[str, float]]) -> str:
    """Milliseconds a token by part, one bar a kind of decoding."""
    parts = list(dict.fromkeys(part for shares in modes.values() for part in shares))

    def paint(axes) -> None:
        left = [0.0] * len(modes)
        for part, color in zip(parts, COLORS * 9, strict=False):
            widths = [max(0.0, shares.get(part, 0.0)) for shares in modes.values()]
            axes.barh(list(modes), widths, left=left, color=color, label=part, height=0.6)
            left = [sum(pair) for pair in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="milliseconds a token")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.28), ncols=2)

    return draw(paint, "Where the time of a token goes", 3.0)


def plot_positions(levels: Mapping[str, Mapping[str, Any]]) -> str:
    """Share of drafted tokens that were accepted, by their place in the draft."""

    def paint(axes) -> None:
        for (name, level), color in zip(levels.items(), COLORS, strict=False):
            shares = level["per_position_acceptance"]
            axes.plot(range(1, len(shares) + 1), shares, "o-", ms=4, color=color, label=name)
        axes.set(xlabel="place in the draft", ylabel="share accepted", ylim=(0, 1.05))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()

    return draw(paint, "Acceptance by place in the draft")


def plot_bars(values: Mapping[str, float], xlabel: str, alt: str, marks: Mapping[str, float]) -> str:
    """A bar for each name; `marks` puts a diamond for some, the measured beside the predicted."""
    names = list(values)

    def paint(axes) -> None:
        axes.barh(names, list(values.values()), color=COLORS[0], height=0.6, label="predicted" * bool(marks))
        known = [name for name in names if name in marks]
        if known:
            axes.plot([marks[name] for name in known], known, "D", color=COLORS[1], ms=7, label="measured")
            axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2)
        axes.invert_yaxis()
        axes.set(xlabel=xlabel)

    return draw(paint, alt, 1.3 + 0.27 * len(names))


def plot_layers(series: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, alt: str) -> str:
    """Points (layer, value) by kind of linear, on a logarithmic scale."""

    def paint(axes) -> None:
        for (name, points), color in zip(series.items(), COLORS * 9, strict=False):
            drawn = [(layer, value) for layer, value in points if value > 0]
            axes.plot(*zip(*drawn, strict=True), "o", ms=3, color=color, label=name) if drawn else None
        axes.set(xlabel="layer", ylabel=ylabel, yscale="log")
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=3, handletextpad=0.2)

    return draw(paint, alt, 3.7)
