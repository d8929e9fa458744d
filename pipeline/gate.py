"""Is a bundle slower, or worse, than its baseline? A verdict for continuous integration that can be trusted:
pass, regression, or cannot tell. docs/gate.md says how it is taken."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..speculate.bundle import Bundle, load
from ..speculate.errors import BundleError
from .checks import Check, check_agreement, check_perplexity, check_size
from .compare import Outcome
from .evaluate import measure_perplexity
from .gate_prompts import choose_prompts
from .hashing import hash_file
from .machine import describe_machine
from .processor import num_threads
from .progress import Progress, no_progress
from .prompts import pick_evenly
from .race import Race
from .recipe import Gate
from .snapshot import (
    Perplexity,
    Snapshot,
    describe_bundle,
    find_differences,
    find_other_model,
    read_snapshot,
    take_snapshot,
)
from .steadiness import Reference
from .traces import measure_agreement
from .trial import take_samples

NEW_TOKENS = 24
SECONDS = 75.0
PROMPTS = {"tpot": 4, "itl": 4, "ttft": 8, "e2el": 8}  # by metric; the last two give one figure a prompt
TEXT_WINDOW, TEXT_WINDOWS = 512, 8

Opener = Callable[[Path, int], Bundle]


@dataclass(frozen=True)
class Request:
    """What to measure and for how long. What is None is the default, or as the baseline did."""

    prompts: Path | None = None
    text: Path | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    seconds: float = SECONDS
    threads: int | None = None


def gate(
    bundle_dir: Path,
    baseline: Path,
    settings: Gate,
    request: Request,
    open_bundle: Opener = load,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Hold a bundle against a baseline: another bundle, or a file that `bench --json` or an earlier gate
    wrote. Returns the outcome, every check, and a snapshot that can be a baseline later.

    Raises BundleError for a bundle, baseline, prompts or text that cannot be read.
    """
    started = time.monotonic()
    then = None if baseline.is_dir() else read_snapshot(baseline)
    threads = request.threads or num_threads()

    def open_all(forward: bool = True) -> list[Bundle]:
        paths = [baseline, bundle_dir] if then is None else [bundle_dir]
        opened = [open_bundle(path, threads) for path in (paths if forward else paths[::-1])]
        return opened if forward else opened[::-1]

    def conclude(checks: Sequence[Check], **more: Any) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "bundle": str(bundle_dir),
            "baseline": str(baseline),
            "settings": settings.model_dump(),
            "outcome": _worst([check.outcome for check in checks]),
            "checks": [asdict(check) for check in checks],
            "seconds": round(time.monotonic() - started, 1),
            **more,
        }

    bundles = open_all()
    candidate = bundles[-1]
    if reasons := _why_incomparable(bundles, then):
        checks = [Check("baseline", "cannot tell", "", None, None, "same", "; ".join(reasons))]
        return conclude(checks, trial=None, snapshot=None)
    assert not isinstance(then, str)

    if then:
        prompts, then = _choose_earlier(then, request, settings)
        max_new_tokens = then.max_new_tokens
    else:
        max_new_tokens = request.max_new_tokens or NEW_TOKENS
        limit = request.limit or PROMPTS[settings.metric]
        prompts = [ids for _, ids in choose_prompts(bundles, request.prompts, limit, max_new_tokens)]
    race = Race(
        open_all, then, prompts, max_new_tokens, settings, request.seconds, Reference(candidate.threads)
    )
    race.run(bundles, progress)
    checks = race.judge(bundles)

    outputs = race.plain_outputs()  # of each bundle, for each prompt
    agreements = [measure_agreement(b, prompts, words) for b, words in zip(bundles, outputs, strict=True)]
    sizes = [describe_bundle(bundle)["bytes"] for bundle in bundles]
    perplexities = [_read_text(bundle, request.text, progress) for bundle in bundles]
    if then:
        agreements.insert(0, then.agreement)
        sizes.insert(0, then.bytes)
        perplexities.insert(0, then.perplexity)
    checks += check_agreement(agreements[0], agreements[-1], settings)
    if (now := perplexities[-1]) is not None:
        checks += check_perplexity(perplexities[0], now, settings)
    checks.append(check_size(sizes[0], sizes[-1], settings))
    snapshot = take_snapshot(
        candidate,
        prompts,
        max_new_tokens,
        [sample for mode in race.modes(bundles) for sample in take_samples(race.trials[:1], -1, mode)],
        race.reference.milliseconds,
        agreement=agreements[-1],
        perplexity=now,
    )
    return conclude(checks, trial=race.describe(), snapshot=snapshot.model_dump())


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    for outcome in ("regression", "cannot tell"):
        if outcome in outcomes:
            return outcome
    return "pass"


def _why_incomparable(bundles: Sequence[Bundle], then: Snapshot | str | None) -> list[str]:
    if isinstance(then, str):
        return [then]
    if then is not None:
        return find_differences(then, bundles[-1])
    facts = describe_bundle(bundles[0])
    return find_other_model(facts["model"], facts["tokenizer_sha256"], bundles[-1])


def _choose_earlier(then: Snapshot, request: Request, settings: Gate) -> tuple[list[list[int]], Snapshot]:
    """Some of the prompts that the baseline decoded, and its samples of those, numbered anew."""
    for option, value in (("--prompts", request.prompts), ("--max-new-tokens", request.max_new_tokens)):
        if value is not None and value != then.max_new_tokens:
            raise BundleError(f"{option}: with a baseline file, what is decoded is what the baseline decoded")
    measured = sorted({sample.prompt for sample in then.samples})
    chosen = pick_evenly(measured, request.limit or PROMPTS[settings.metric])
    samples = [
        sample.model_copy(update={"prompt": chosen.index(sample.prompt)})
        for sample in sorted(then.samples, key=lambda sample: sample.prompt)
        if sample.prompt in chosen
    ]
    return [then.prompts[index] for index in chosen], then.model_copy(update={"samples": samples})


def _read_text(bundle: Bundle, text: Path | None, progress: Progress) -> Perplexity | None:
    if text is None:
        return None
    engines = measure_perplexity(bundle, text, TEXT_WINDOW, TEXT_WINDOWS, progress)
    return Perplexity(
        text_sha256=hash_file(text), window=TEXT_WINDOW, max_windows=TEXT_WINDOWS, engines=engines
    )
