"""What a later gate needs to know of a bundle and of the run that measured it. `bench --json` and `gate` keep
one under "snapshot"."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..speculate.bundle import Bundle
from ..speculate.errors import BundleError
from ..speculate.manifest import MANIFEST, read_json
from .compare import Series
from .machine import describe_machine
from .steadiness import REFERENCE

SNAPSHOT_VERSION = 1
SAME_MACHINE = ("processor", "cores", "memory_gib", "system")

Mode = Literal["plain", "speculative"]


class Sample(BaseModel):
    """One prompt decoded one way."""

    model_config = ConfigDict(frozen=True)

    prompt: int = Field(ge=0)
    mode: Mode
    tokens: list[int] = Field(min_length=1)  # of each round
    milliseconds: list[float]  # that stand for each round
    repeats: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        if len(self.tokens) != len(self.milliseconds):
            raise ValueError("tokens and milliseconds must have one figure for each round")
        return self

    def series(self, scale: float = 1.0) -> Series:
        return Series(self.tokens, [ms * scale for ms in self.milliseconds])


class Perplexity(BaseModel):
    model_config = ConfigDict(frozen=True)

    text_sha256: str
    window: int
    max_windows: int
    engines: dict[str, float]

    def described(self) -> tuple[str, int, int]:
        return self.text_sha256, self.window, self.max_windows


class Snapshot(BaseModel):
    model_config = ConfigDict(frozen=True)

    version: int
    model: dict[str, Any] | None
    tokenizer_sha256: str
    machine: dict[str, Any]
    threads: int
    max_new_tokens: int
    prompts: list[list[int]] = Field(min_length=1)  # token ids
    plan: dict[str, Any]
    samples: list[Sample]
    reference: str = REFERENCE
    reference_ms: list[float] = Field(min_length=1)  # sorted
    agreement: dict[str, float] = {}  # drafter -> share of the target's own tokens that it would choose
    perplexity: Perplexity | None = None
    bytes: int

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if any(sample.prompt >= len(self.prompts) for sample in self.samples):
            raise ValueError("a sample is of a prompt that is not there")
        return self


def take_snapshot(
    bundle: Bundle,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    samples: Sequence[Sample],
    reference_ms: Sequence[float],
    **measured: Any,
) -> Snapshot:
    """`measured`: agreement, perplexity."""
    return Snapshot(
        version=SNAPSHOT_VERSION,
        **describe_bundle(bundle),
        machine=describe_machine(),
        threads=bundle.threads,
        max_new_tokens=max_new_tokens,
        prompts=list(prompts),
        plan=bundle.plan_for(),
        samples=list(samples),
        reference_ms=sorted(reference_ms),
        **measured,
    )


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """What of a bundle is compared without a clock."""
    files = bundle.manifest.files
    return {
        "model": identify_model(read_json(bundle.path / MANIFEST).get("model")),
        "tokenizer_sha256": files["tokenizer.json"].sha256,
        "bytes": sum(file.size for file in files.values()),
    }


def identify_model(model: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A model is what its files hold; where a manifest has no hashes, where they came from."""
    if model is None:
        return None
    if model.get("files"):
        return {"files": model["files"]}
    return {key: model.get(key) for key in ("source", "architecture", "num_parameters")}


def read_snapshot(path: Path) -> Snapshot | str:
    """The snapshot in a file of `bench --json` or `gate`; a sentence where it is there but of no use.

    Raises BundleError if the file is none of them.
    """
    if not path.is_file():
        raise BundleError(
            f"--baseline {path} not found; it takes a bundle, or a JSON file of `draftsmith bench --json` or "
            "`draftsmith gate`"
        )
    raw = read_json(path).get("snapshot")
    if not isinstance(raw, dict):
        raise BundleError(
            f'--baseline {path} holds no "snapshot": wanted a JSON file of `draftsmith gate`, or of '
            "`draftsmith bench --json` at temperature 0 with --ignore-eos"
        )
    if raw.get("version") != SNAPSHOT_VERSION:
        return (
            f"the baseline has snapshot version {raw.get('version')!r}, this draftsmith reads "
            f"{SNAPSHOT_VERSION}: measure it again"
        )
    try:
        return Snapshot.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("snapshot", *first["loc"])))
        raise BundleError(f"--baseline {path}: {where}: {first['msg']}") from None


def find_differences(then: Snapshot, bundle: Bundle) -> list[str]:
    """Why timings of `then` cannot be held against `bundle` on this machine; empty if they can."""
    reasons = find_other_model(then.model, then.tokenizer_sha256, bundle)
    now = describe_machine()
    for key in SAME_MACHINE:
        if then.machine.get(key) != now[key]:
            reasons.append(
                f"another machine: {key} was {then.machine.get(key)!r} for the baseline, is {now[key]!r} here"
            )
    if then.threads != bundle.threads:
        reasons.append(
            f"the baseline ran with {then.threads} threads, this with {bundle.threads}: "
            f"give --threads {then.threads}"
        )
    if then.reference != REFERENCE:
        reasons.append("the baseline has another reference kernel: measure it again")
    return reasons


def find_other_model(model: Mapping[str, Any] | None, tokenizer_sha256: str, bundle: Bundle) -> list[str]:
    mine = describe_bundle(bundle)
    if model != mine["model"]:
        return [f"another model: the baseline is of {_name(model)}, the candidate of {_name(mine['model'])}"]
    if tokenizer_sha256 != mine["tokenizer_sha256"]:
        return ["another tokenizer than the baseline's"]
    return []


def _name(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return "a model of unknown source"
    return ", ".join(model["files"]) if model.get("files") else str(model.get("source"))
