"""Results on standard output: JSON for machines, a table for people."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

UNITS = ("B", "kB", "MB", "GB", "TB")


def emit(result: Any, as_json: bool, show: Callable[[Any], str]) -> None:
    """Print `result` as one JSON document, or what `show` makes of it."""
    if as_json:
        print(json.dumps(_without_nan(result), indent=2, ensure_ascii=False, allow_nan=False), flush=True)
    else:
        print(show(result), flush=True)


def teller(as_json: bool) -> Callable[[str], None]:
    """Where lines about work under way go: standard output, unless it is kept for JSON."""
    stream = sys.stderr if as_json else sys.stdout
    return lambda line: print(line, file=stream, flush=True)


def format_size(size: int) -> str:
    power = 0
    while size >= 1000 ** (power + 1) and power < 4:
        power += 1
    amount = size / 1000**power
    return f"{amount:.1f} {UNITS[power]}" if power and amount < 10 else f"{amount:.0f} {UNITS[power]}"


def format_number(value: float) -> str:
    """Four significant digits; integers whole."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def format_table(rows: Sequence[Sequence[Any]]) -> str:
    """Columns padded to their widest cell; figures to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
    lines = []
    for row, values in zip(cells, rows, strict=True):
        padded = [
            text.rjust(width)
            if isinstance(value, int | float) and not isinstance(value, bool)
            else text.ljust(width)
            for text, width, value in zip(row, widths, values, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
    return str(value)


def _without_nan(value: Any) -> Any:
    """JSON has no number for NaN and infinity; null stands for them."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
    return value
