"""plan.json: the measured choice that ``speculate="auto"`` follows."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .costs import Costs
from .levels import TARGET, list_models


class Work(BaseModel):
    """How much one engine has to do."""

    model_config = ConfigDict(strict=True, frozen=True)

    calls_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    rows_per_call: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    reads_prompt: bool = True  # not where it drafts in the target's cache


class Candidate(BaseModel):
    """A ladder, and what its engines were predicted to do for a token, the reading of the prompt aside."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    ladder: tuple[str, ...] = Field(strict=False)  # innermost first, without the target
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


class Plan(BaseModel):
    """The ladder for prompts like those that it was tuned on, and the `choices`, of which it is the first.
    For other lengths of prompt and output another may be faster: a drafter with a cache of its own has to
    read the prompt too, and what calls cost grows unevenly with the text before them."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    ladder: tuple[str, ...] = Field(default=(), strict=False)  # innermost first, without the target
    num_speculative_tokens: dict[str, int] = {}
    verify: Literal["token", "block", "exact"] = "block"
    costs: Costs | None = None
    choices: tuple[Candidate, ...] = Field(default=(), strict=False)

    @model_validator(mode="before")
    @classmethod
    def _forget_older_costs(cls, raw: Any) -> Any:
        """Version 1 had those of one context. Without any the ladder stands; `draftsmith tune` makes some."""
        costs = raw.get("costs") if isinstance(raw, dict) else None
        return raw | {"costs": None} if isinstance(costs, dict) and "context" in costs else raw

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        timed = self.costs.milliseconds if self.costs else {}
        for choice in self.choices:
            for name in choice.work:
                if name not in timed:
                    raise ValueError(f"choices need the costs of {name}")
            models = {TARGET, *list_models(choice.ladder)}
            if models != choice.work.keys():
                raise ValueError(f"a choice needs the work of {', '.join(sorted(models))}")
        return self

    def choose(self, prompt_tokens: int, new_tokens: int) -> Candidate | None:
        """The fastest for a generation of these lengths; None for a plan without choices."""
        costs = self.costs
        if costs is None or not self.choices:
            return None
        return min(self.choices, key=lambda choice: choice.milliseconds(costs, prompt_tokens, new_tokens))
