"""Which levels decode together: from the name of a ladder to the chain of levels, target last."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from .binding import lib
from .drafters import Drafter, Sources
from .engine import Engine
from .errors import BundleError
from .levels import DRAFTERS, JOINT, TARGET, TREE, check_parts, is_drafter, split_engine_tree, wants_tree
from .loop import Decoder, Level

DEFAULT_NUM_SPECULATIVE_TOKENS = 4
MAX_NUM_SPECULATIVE_TOKENS: int = lib.DS_MAX_DRAFT

Speculate = Literal["auto", "none"] | Iterable[str]


@dataclass(frozen=True)
class Rung:
    name: str
    num_speculative_tokens: int  # proposed to the level above per call; of a tree, its nodes


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
    models = [name for name in engines if name != TARGET]
    known, used = [*DRAFTERS, *models], set()
    for i, name in enumerate(names):
        engine, tree = split_engine_tree(str(name))
        if name == TARGET:
            raise BundleError(
                f"ladder {names} names the target, which always comes last by itself: leave it out"
            )
        if is_drafter(name) or JOINT in str(name):
            check_parts(name)
        elif tree and is_drafter(engine):
            raise BundleError(f"ladder {names}: only models draft {tree}; take {engine}{TREE}")
        elif tree and name in models:
            raise BundleError(
                f"ladder {names}: {name} asks for a tree of {engine}, and a drafter is called so: build the "
                "bundle again with another name"
            )
        elif engine not in models:
            near = get_close_matches(engine, known, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0] + tree!r}?" if near else ""
            raise BundleError(
                f"ladder {names}: this bundle has no drafter {name!r}, only {', '.join(known)}{hint}"
            )
        if engine in used:
            raise BundleError(f"ladder {names} names {engine!r} twice")
        used.add(engine)
        if is_drafter(name) and i > 0:
            raise BundleError(f"ladder {names}: {name} needs no drafter, so it comes first")
        if tree and i > 0:
            raise BundleError(
                f"ladder {names}: {name} drafts its tree from the text alone, so it comes first; to let it "
                f"verify {names[i - 1]}, name it {engine}"
            )


def build_ladder(
    rungs: list[Rung],
    open_engine: Callable[[str], Engine],
    costs: Mapping[str, Sequence[float]] | None = None,
    open_drafter: Callable[[str, int], Drafter] | None = None,
) -> Decoder:
    """The decoder of a ladder with the target on top.

    costs: name -> milliseconds of a call with 1, 2, ... rows, by which drafts end where they stop to pay.
    """
    known, open_drafter = costs or {}, open_drafter or Sources().open
    target = open_engine(TARGET)

    def level(rung: Rung) -> Level:
        if is_drafter(rung.name):
            drafter = open_drafter(rung.name, target.vocab_size)
            tree = TREE if wants_tree(rung.name) else ""
            return Level(rung.name, None, rung.num_speculative_tokens, drafter=drafter, tree=tree)
        engine, tree = split_engine_tree(rung.name)
        return Level(
            rung.name, open_engine(engine), rung.num_speculative_tokens, known.get(engine), tree=tree
        )

    return Decoder([*map(level, rungs), Level(TARGET, target, costs=known.get(TARGET))])
