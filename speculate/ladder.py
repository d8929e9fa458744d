"""Which levels decode together: from the name of a ladder to the chain of levels, target last."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from .engine import Engine
from .errors import BundleError
from .level import EngineLevel, Level, SuffixLevel
from .settings import Sampling
from .verdict import Judge

SUFFIX = "suffix"
TARGET = "target"
DEFAULT_NUM_SPECULATIVE_TOKENS = 4
MAX_NUM_SPECULATIVE_TOKENS = 64

Speculate = Literal["auto", "none"] | Iterable[str]


@dataclass(frozen=True)
class Rung:
    name: str
    num_speculative_tokens: int  # proposed to the level above per call


def choose_ladder(
    speculate: Speculate,
    num_speculative_tokens: int | Mapping[str, int] | None,
    planned: Iterable[Rung],
    engines: Iterable[str],
) -> list[Rung]:
    """The drafters to use, innermost first.

    speculate: "auto" is the bundle's plan, "none" the target alone, else the names themselves.
    num_speculative_tokens: of the outermost drafter, or by name; where it is silent the plan's figure holds.
    planned: the plan's ladder. engines: the engines that the bundle has.
    """
    plan = {rung.name: rung for rung in planned}
    if isinstance(speculate, str):
        if speculate not in ("auto", "none"):
            raise BundleError(
                f'speculate="{speculate}": wanted "auto", "none" or a list such as ["{speculate}"]'
            )
        names = list(plan) if speculate == "auto" else []
    else:
        names = list(speculate)
    check_names(names, engines)

    counts = {name: plan[name].num_speculative_tokens for name in names if name in plan}
    if isinstance(num_speculative_tokens, Mapping):
        for name in num_speculative_tokens:
            if name not in names:
                raise BundleError(
                    f"num_speculative_tokens names {name!r}, which is not in the ladder {names}"
                )
        counts |= num_speculative_tokens
    elif num_speculative_tokens is not None and names:
        counts[names[-1]] = num_speculative_tokens
    for name, count in counts.items():
        if not isinstance(count, int) or not 1 <= count <= MAX_NUM_SPECULATIVE_TOKENS:
            raise BundleError(
                f"num_speculative_tokens={count!r} for {name}: wanted 1 to {MAX_NUM_SPECULATIVE_TOKENS}; "
                'to decode without drafts, speculate="none"'
            )
    return [Rung(name, counts.get(name, DEFAULT_NUM_SPECULATIVE_TOKENS)) for name in names]


def check_names(names: list[str], engines: Iterable[str]) -> None:
    """Refuse a ladder with a name that is unknown, doubled or out of its place."""
    known = [SUFFIX, *(name for name in engines if name != TARGET)]
    for i, name in enumerate(names):
        if name == TARGET:
            raise BundleError(
                f"ladder {names} names the target, which always comes last by itself: leave it out"
            )
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BundleError(
                f"ladder {names}: this bundle has no drafter {name!r}, only {', '.join(known)}{hint}"
            )
        if name in names[:i]:
            raise BundleError(f"ladder {names} names {name!r} twice")
        if name == SUFFIX and i > 0:
            raise BundleError(f"ladder {names}: suffix needs no drafter, so it comes first")


def build_ladder(
    rungs: list[Rung], open_engine: Callable[[str], Engine], sampling: Sampling, capacity: int
) -> EngineLevel:
    """The target's level with all the drafters below it, caches reserved for `capacity` tokens."""
    if (
        not rungs
    ):  # nothing to verify: draw as the exact rule does, so that its output and plain sampling's agree
        sampling = replace(sampling, rule="exact")
    target = open_engine(TARGET)
    inner: Level | None = None
    num_inner = 0
    for i, rung in enumerate(rungs):
        if rung.name == SUFFIX:
            inner = SuffixLevel()
        else:
            engine = open_engine(rung.name)
            engine.reserve(capacity)
            judge = Judge(sampling, i, target.vocab_size, rung.num_speculative_tokens)
            inner = EngineLevel(rung.name, engine, judge, inner, num_inner)
        num_inner = rung.num_speculative_tokens
    target.reserve(capacity)
    judge = Judge(sampling, len(rungs), target.vocab_size, num_inner + 1)
    return EngineLevel(TARGET, target, judge, inner, num_inner)
