"""Say in a few words why a stage has to run: what differs from the nearest stage that has run before."""

import reprlib
from collections.abc import Iterable
from typing import Any

from .cache import Entry, Record

MAX_NAMED = 3


def explain_miss(record: Record, label: str, earlier: Iterable[Entry]) -> str:
    """`earlier`: entries of the same stage, latest first. Those of another engine say nothing of this one."""
    nearest = nearest_entry(record, (entry for entry in earlier if entry.label == label))
    if nearest is None:
        return "first time"
    differences = list_differences(nearest.record, record)
    more = f" and {len(differences) - MAX_NAMED} more" if len(differences) > MAX_NAMED else ""
    return ", ".join(differences[:MAX_NAMED]) + more if differences else "replaced"


def nearest_entry(record: Record, earlier: Iterable[Entry]) -> Entry | None:
    """The one with the fewest differences; the first of several."""
    return min(earlier, key=lambda entry: len(list_differences(entry.record, record)), default=None)


def list_differences(old: Record, new: Record) -> list[str]:
    """One phrase for each leaf in which two records differ, settings first."""
    phrases = []
    for section in ("params", "inputs", "files", "packages", "arithmetic", "machine", "code"):
        before, after = _leaves(old.get(section, {})), _leaves(new.get(section, {}))
        for name in dict.fromkeys([*before, *after]):
            if before.get(name) != after.get(name):
                phrases.append(_phrase(section, name, before.get(name), after.get(name)))
    return phrases


def _phrase(section: str, name: str, before: Any, after: Any) -> str:
    match section:
        case "inputs" | "files":
            return f"{name} changed"
        case "code":
            return f"code of {name} changed"
    return f"{name} {_short(before)} → {_short(after)}"


def _short(value: Any) -> str:
    return (
        "unset"
        if value is None
        else value
        if isinstance(value, str) and len(value) < 40
        else reprlib.repr(value)
    )


def _leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves
