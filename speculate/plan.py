"""plan.json: the measured choice that ``speculate="auto"`` follows."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from .costs import FINITE, Costs
from .levels import TARGET, list_models
from .manifest import read_json, validate


class Work(Struct, frozen=True):
    """How much one engine has to do."""

    calls_per_token: Annotated[float, Meta(ge=0, le=FINITE)]
    rows_per_call: Annotated[float, Meta(ge=1, le=FINITE)]
    reads_prompt: bool = True  # not where it drafts in the target's cache


class Candidate(Struct, frozen=True):
    """A ladder, and what its engines were predicted to do for a token, the reading of the prompt aside."""

    ladder: tuple[str, ...]  # innermost first, without the target
    num_speculative_tokens: dict[str, int]
    work: dict[str, Work]

    @property
    def readers(self) -> frozenset[str]:
        """The engines that have to read the prompt."""
        return frozenset(name for name, work in self.work.items() if work.reads_prompt)

    def milliseconds(self, costs: Costs, prompt_tokens: int, new_tokens: int) -> float:
        """Of a whole generation: the prompt is read, and each token costs what the one in the middle does."""
        context = prompt_tokens + new_tokens // 2
        decoding = self.work[TARGET].calls_per_token * costs.overhead_ms + sum(
            work.calls_per_token * float(costs.of(name, work.rows_per_call, context))
            for name, work in self.work.items()
        )
        reading = sum(costs.of_reading(name, prompt_tokens) for name in self.readers)
        return reading + (new_tokens - 1) * decoding


PLAIN = Candidate(
    ladder=(), num_speculative_tokens={}, work={TARGET: Work(calls_per_token=1.0, rows_per_call=1.0)}
)


class Plan(Struct, frozen=True):
    """The ladder for prompts like those that it was tuned on, and the `choices`, of which it is the first.
    For other lengths of prompt and output another may be faster: a drafter with a cache of its own has to
    read the prompt too, and what calls cost grows unevenly with the text before them."""

    ladder: tuple[str, ...] = ()  # innermost first, without the target
    num_speculative_tokens: dict[str, int] = {}
    verify: Literal["token", "block", "exact"] = "block"
    costs: Costs | None = None
    choices: tuple[Candidate, ...] = ()

    def __post_init__(self) -> None:
        timed = self.costs.milliseconds if self.costs else {}
        for choice in self.choices:
            for name in choice.work:
                if name not in timed:
                    raise ValueError(f"choices need the costs of {name}")
            models = {TARGET, *list_models(choice.ladder)}
            if models != choice.work.keys():
                raise ValueError(f"a choice needs the work of {', '.join(sorted(models))}")

    def choose(self, prompt_tokens: int, new_tokens: int) -> Candidate | None:
        """The fastest for a generation of these lengths; None for a plan without choices."""
        costs = self.costs
        if costs is None or not self.choices:
            return None
        return min(self.choices, key=lambda choice: choice.milliseconds(costs, prompt_tokens, new_tokens))


def spell_plan(plan: Plan) -> dict[str, Any]:
    """As plan.json is to hold it. Raises msgspec.ValidationError for one that would be refused when read."""
    raw = json.loads(msgspec.json.encode(plan))
    msgspec.convert(raw, Plan)
    return raw


def read_plan(path: Path) -> Plan:
    """Raises BundleError."""
    raw = read_json(path)
    costs = raw.get("costs")
    if isinstance(costs, dict) and "context" in costs:
        # Version 1 had those of one context. Without any the ladder stands; `draftsmith tune` makes some.
        raw["costs"] = None
    return validate(Plan, raw, path)
