"""Say in a few words why a stage has to run: what differs from the nearest stage that has run before."""

import reprlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from .cache import Entry, Record

MAX_NAMED = 3
SECTIONS = ("params", "inputs", "files", "packages", "arithmetic", "machine", "code")


class Difference(NamedTuple):
    section: str
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        match self.section:
            case "inputs" | "files":
                return f"{self.name} changed"
            case "code":
                return f"code of {self.name} changed"
        return f"{self.name} {_short(self.before)} → {_short(self.after)}"


def explain_miss(record: Record, label: str, earlier: Iterable[Entry]) -> str:
    """`earlier`: entries of the same stage, latest first. Those of another engine say nothing of this one."""
    nearest = nearest_entry(record, (entry for entry in earlier if entry.label == label))
    if nearest is None:
        return "first time"
    differences = list_differences(nearest.record, record)
    settings = [str(each) for each in differences if each.section not in ("inputs", "files", "code")]
    inputs = [each.name for each in differences if each.section in ("inputs", "files")]
    code = [each.name for each in differences if each.section == "code"]
    phrases = [
        _enumerate(settings),
        _enumerate(inputs) + " changed" if inputs else "",
        f"code of {_enumerate(code)} changed" if code else "",
    ]
    return "; ".join(filter(None, phrases)) or "replaced"


def nearest_entry(record: Record, earlier: Iterable[Entry]) -> Entry | None:
    """The one with the fewest differences; the first of several."""
    return min(earlier, key=lambda entry: len(list_differences(entry.record, record)), default=None)


def list_differences(old: Record, new: Record) -> list[Difference]:
    """Every leaf in which two records differ, settings first."""
    differences = []
    for section in SECTIONS:
        before, after = _leaves(old.get(section, {})), _leaves(new.get(section, {}))
        for name in dict.fromkeys([*before, *after]):
            if before.get(name) != after.get(name):
                differences.append(Difference(section, name, before.get(name), after.get(name)))
    return differences


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _short(value: Any) -> str:
    if value is None or value == "":
        return "unset"
    return value if isinstance(value, str) and len(value) < 40 else reprlib.repr(value)


def _leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves
