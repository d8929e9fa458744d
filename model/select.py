"""Which linears a stage works on: the `targets` and `ignore` lists of a recipe."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from .errors import ModelError

ALL = "Linear"


def select_linears(names: Sequence[str], targets: Iterable[str], ignore: Iterable[str]) -> list[str]:
    """Names that match any of `targets` and none of `ignore`, in the order of `names`.

    A pattern is "Linear" (all), a full name, a glob such as "*.down_proj", or "re:" and a regular expression
    that matches from the start of the name. A pattern that matches no name is an error, in either list.
    """
    wanted = _match_any(names, targets, "targets")
    unwanted = _match_any(names, ignore, "ignore")
    return [name for name in names if name in wanted and name not in unwanted]


def _match_any(names: Sequence[str], patterns: Iterable[str], key: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if matches(pattern, name)}
        if not found:
            raise ModelError(
                f"{key}: {pattern!r} matches no linear of this model; {_suggest(pattern, names)}"
            )
        matched |= found
    return matched


def matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise ModelError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern == ALL or fnmatchcase(name, pattern)


def _suggest(pattern: str, names: Sequence[str]) -> str:
    kinds = dict.fromkeys(f"*.{name.rsplit('.', 1)[-1]}" if "." in name else name for name in names)
    near = get_close_matches(pattern, [*names, *kinds, ALL], n=3, cutoff=0.6)
    return f"nearest: {', '.join(near)}" if near else f"it has {', '.join(kinds)}"
