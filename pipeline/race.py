"""The gate's check of latency: timing, bounds, a second look at suspects, and when there is no telling."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..speculate.bundle import Bundle
from .checks import Check
from .compare import MIN_PASSAGES, Comparison, compare
from .progress import Progress, no_progress
from .recipe import Gate
from .snapshot import Mode, Snapshot
from .steadiness import Disturbance, Reference, calm, spread
from .trial import MAX_DISTURBANCE, MIN_REPEATS, MIN_REPEATS_AGAIN, Trial, run_trial, take_samples

TRIAL_SHARE = 0.65  # of the time; measuring suspects again gets as much, where there are any
FILE_ALLOWANCE = 0.02  # what one bundle differs by from process to process, which no reference shows
MAX_REFERENCE_SPREAD = 1.6  # p90 / p10 of the reference kernel, where it has to stand for the clock


@dataclass
class Race:
    """A candidate against another bundle that runs beside it, or against an earlier run of some prompts.

    open_bundles: opens the baseline, if it is a bundle, and the candidate, in the order given by its
        argument ("forward": the baseline first), and returns them in that order.
    then: the earlier run, with the prompts of this one only.
    """

    open_bundles: Callable[[bool], list[Bundle]]
    then: Snapshot | None
    prompts: Sequence[list[int]]  # token ids
    max_new_tokens: int
    settings: Gate
    seconds: float
    reference: Reference
    trials: list[Trial] = field(default_factory=list)

    def run(self, bundles: Sequence[Bundle], progress: Progress = no_progress) -> None:
        """Time `bundles` (the candidate last). What seems slower is timed again, on bundles opened anew in
        the other order: where memory was had decides a little too, and a chance must strike twice."""
        modes = self.modes(bundles)
        enough = TRIAL_SHARE * self.seconds
        trial = self._add_trial(bundles)
        run_trial(trial, modes, enough, self._undecided, progress)
        suspects: list[Mode] = [mode for mode in modes if self._is_slower(mode)]
        if suspects:
            again = self._add_trial(self.open_bundles(False))
            run_trial(again, suspects, enough, self._unconfirmed, progress, MIN_REPEATS_AGAIN)
        elif open_ones := self._undecided(modes):
            run_trial(trial, open_ones, self.seconds - enough, self._undecided, progress)

    def modes(self, bundles: Sequence[Bundle]) -> list[Mode]:
        """Without drafts, which shows the target; and as planned, if either side drafts at all."""
        ladders = [bundle.plan.ladder for bundle in bundles]
        drafts = any(ladders) or (self.then is not None and bool(self.then.plan.get("ladder")))
        plain: list[Mode] = ["plain"]
        return [*plain, "speculative"] if drafts else plain

    def compare(self, mode: Mode, trials: Sequence[Trial]) -> Comparison | None:
        """None without a repetition that was left in peace. Trials of other modes are passed over."""
        trials = [trial for trial in trials if mode in trial.modes]
        candidate = take_samples(trials, -1, mode)
        if not candidate:
            return None
        new = [sample.series() for sample in candidate]
        if self.then is None:
            old = [sample.series() for sample in take_samples(trials, 0, mode)]
            return compare(old, new, self.settings.metric)
        # What the baseline would take today, if all went as much slower or faster as the reference kernel.
        scale = calm(self.reference.milliseconds) / calm(self.then.reference_ms)
        known = {sample.prompt: sample for sample in self.then.samples if sample.mode == mode}
        if not all(sample.prompt in known for sample in candidate):
            return None
        old = [known[sample.prompt].series(scale) for sample in candidate]
        found = compare(old, new, self.settings.metric)
        return replace(
            found, lower=found.lower * (1 - FILE_ALLOWANCE), upper=found.upper * (1 + FILE_ALLOWANCE)
        )

    def judge(self, bundles: Sequence[Bundle]) -> list[Check]:
        return [self._judge(mode) for mode in self.modes(bundles)]

    def plain_outputs(self) -> list[list[list[int]]]:
        """The target's own words, by bundle and prompt: token ids."""
        first = self.trials[0]
        rounds = [first.outputs["plain", index] for index in range(len(self.prompts))]
        return [[row[side].token_ids for row in rounds] for side in range(len(first.bundles))]

    def describe(self) -> dict[str, Any]:
        """How the timing went, for those who doubt it."""
        seen = [one for trial in self.trials for one in trial.disturbances]
        return {
            "repetitions": len(seen),
            "disturbed": sum(trial.num_disturbed for trial in self.trials),
            "measured_again": len(self.trials) > 1,
            "worst_disturbance": asdict(max(seen, key=lambda one: one.worst)) if seen else None,
            "median_waited": _median([one.waited for one in seen if one.waited is not None]),
            "reference_spread": spread(self.reference.milliseconds),
        }

    def _add_trial(self, bundles: Sequence[Bundle]) -> Trial:
        self.trials.append(Trial(bundles, self.prompts, self.max_new_tokens, self.reference))
        return self.trials[-1]

    def _is_slower(self, mode: Mode) -> bool:
        found = self.compare(mode, self.trials)
        return found is not None and found.slower_than(self.settings.max_regression, self.settings.floor_ms)

    def _is_fine(self, mode: Mode, trials: Sequence[Trial]) -> bool:
        found = self.compare(mode, trials)
        return found is not None and found.surely_within(self.settings.max_regression, self.settings.floor_ms)

    def _is_confirmed(self, mode: Mode) -> bool:
        """Slower over both trials, and by itself in the second one."""
        second = self.compare(mode, self.trials[1:])
        return (
            second is not None and second.ratio > 1 + self.settings.max_regression and self._is_slower(mode)
        )

    def _undecided(self, modes: Sequence[Mode]) -> Sequence[Mode]:
        if any(self._is_slower(mode) for mode in modes):
            return ()  # the rest of the time is for measuring it again
        return [mode for mode in modes if not self._is_fine(mode, self.trials)]

    def _unconfirmed(self, modes: Sequence[Mode]) -> Sequence[Mode]:
        return [
            mode for mode in modes if not (self._is_confirmed(mode) or self._is_fine(mode, self.trials[1:]))
        ]

    def _judge(self, mode: Mode) -> Check:
        settings = self.settings
        name, limit = f"{mode} {settings.metric}", f"+{settings.max_regression:.0%}"
        limit += f" and +{settings.floor_ms:g} ms"
        found = self.compare(mode, self.trials)
        trials = [trial for trial in self.trials if mode in trial.modes]
        if found is None or sum(trial.count_repeats(mode) for trial in trials) < MIN_REPEATS:
            if self.then is not None and mode not in {sample.mode for sample in self.then.samples}:
                return Check(name, "cannot tell", "ms", None, None, limit, "the baseline did not measure it")
            return Check(name, "cannot tell", "ms", None, None, limit, self._why_too_few())
        bounds = f"{found.ratio:.3f} times the baseline, {found.lower:.3f} to {found.upper:.3f}"
        check = Check(name, "pass", "ms", found.baseline_ms, found.candidate_ms, limit, bounds)
        if self.then is not None:
            for when, varied in (
                ("the baseline was taken", spread(self.then.reference_ms)),
                ("this was", spread(self.reference.milliseconds)),
            ):
                if varied > MAX_REFERENCE_SPREAD:
                    why = (
                        f"while {when}, the reference kernel's time varied {varied:.2f}-fold (p90 / p10), so "
                        "it cannot stand for the clock: give the baseline bundle, or a quieter machine"
                    )
                    return replace(check, outcome="cannot tell", why=f"{bounds}; {why}")
        if found.slower_than(settings.max_regression, settings.floor_ms):
            if self._is_confirmed(mode):
                return replace(check, outcome="regression", why=f"{bounds}; so again when measured anew")
            why = "measured again, it did not show as clearly"
            if len(trials) == 1:
                why = "no time was left to measure it again: raise --seconds"
            return replace(check, outcome="cannot tell", why=f"{bounds}; {why}")
        if not found.tells(settings.max_regression, settings.floor_ms):
            why = f"too noisy to see twice the slowdown that is allowed, over {found.passages} passages"
            if found.passages < MIN_PASSAGES:
                why = f"only {found.passages} passages of text, {MIN_PASSAGES} are wanted: raise --limit"
            return replace(check, outcome="cannot tell", why=f"{bounds}; {why}")
        return check

    def _why_too_few(self) -> str:
        seen = [one for trial in self.trials for one in trial.disturbances]
        disturbed = sum(trial.num_disturbed for trial in self.trials)
        few = f"fewer than {MIN_REPEATS} undisturbed repetitions"
        if disturbed:
            return (
                f"{few}: a loaded neighbour: in {disturbed} of {len(seen)} others had more than "
                f"{MAX_DISTURBANCE:.0%} of the time that our threads wanted a core ({_describe(seen)})"
            )
        return f"{few} in {self.seconds:g} s: raise --seconds, or lower --limit or --max-new-tokens"


def _describe(seen: Sequence[Disturbance]) -> str:
    waited = _median([one.waited for one in seen if one.waited is not None])
    stolen = _median([one.stolen for one in seen if one.stolen is not None])
    switches = _median([one.switches for one in seen])
    return f"median: waited {waited or 0:.0%}, stolen {stolen or 0:.0%}, {switches or 0:.0f} switches/s"


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None
