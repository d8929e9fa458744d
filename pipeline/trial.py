"""Time bundles against each other on the same prompts, over and over, until it is clear which is slower."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..speculate.bundle import Bundle
from ..speculate.errors import BundleError
from .compare import settle
from .progress import Progress, no_progress
from .rounds import Rounds, decode_in_turn
from .snapshot import Mode, Sample
from .steadiness import Disturbance, Reference, Watch

MAX_DISTURBANCE = 0.3  # of the time that our threads wanted a core; a repetition with more is thrown away
MIN_REPEATS = 3
MIN_REPEATS_AGAIN = 2  # of a second look, which counts together with the first
LADDERS: Mapping[Mode, str] = {"plain": "none", "speculative": "auto"}


@dataclass
class Trial:
    """Timings of some bundles (usually baseline and candidate, or one alone) and how calm it was."""

    bundles: Sequence[Bundle]
    prompts: Sequence[list[int]]  # token ids
    max_new_tokens: int
    reference: Reference
    kept: dict[tuple[Mode, int], list[list[Rounds]]] = field(default_factory=dict)  # of each bundle in turn
    outputs: dict[tuple[Mode, int], list[Rounds]] = field(default_factory=dict)  # the first
    disturbances: list[Disturbance] = field(default_factory=list)
    num_disturbed: int = 0

    @property
    def modes(self) -> set[Mode]:
        """What was decoded at all."""
        return {mode for mode, _ in self.outputs}

    def warm_up(self) -> None:
        for bundle in self.bundles:
            for ladder in LADDERS.values():
                bundle.generate(self.prompts[0], 4, speculate=ladder, ignore_eos=True)

    def repeat(self, mode: Mode, until: float) -> None:
        """Decode the prompts that have the fewest undisturbed repetitions, usually all, once more on every
        bundle, round by round in turn; each once, and more only `until` some time of the clock."""
        least = self.count_repeats(mode)
        for index, prompt in enumerate(self.prompts):
            if len(self.kept.get((mode, index), ())) > least:
                continue
            if (mode, index) in self.outputs and time.monotonic() > until:
                break
            for bundle in self.bundles:
                bundle.forget()  # or a repetition would be read off the one before
            runs = [
                bundle.stream(prompt, self.max_new_tokens, speculate=LADDERS[mode], ignore_eos=True)
                for bundle in self.bundles
            ]
            repeats = self.kept.setdefault((mode, index), [])
            forward = (len(repeats) + self.num_disturbed) % 2 == 0
            watch = Watch()
            order = slice(None, None, 1 if forward else -1)
            rounds = decode_in_turn(runs[order], self.reference.sometimes)[order]
            disturbance = watch.stop()
            first = self.outputs.setdefault((mode, index), rounds)
            if [one.token_ids for one in rounds] != [one.token_ids for one in first]:
                raise BundleError(
                    "the same prompt was decoded to different tokens: the engines of this machine are not "
                    "repeatable, so their rounds cannot be compared"
                )
            self.disturbances.append(disturbance)
            if disturbance.worst > MAX_DISTURBANCE:
                self.num_disturbed += 1
            else:
                repeats.append(rounds)

    def count_repeats(self, mode: Mode) -> int:
        """Undisturbed ones of the prompt that has the fewest."""
        return min(len(self.kept.get((mode, index), ())) for index in range(len(self.prompts)))


def run_trial(
    trial: Trial,
    modes: Sequence[Mode],
    seconds: float,
    undecided: Callable[[Sequence[Mode]], Sequence[Mode]],
    progress: Progress = no_progress,
    min_repeats: int = MIN_REPEATS,
) -> None:
    """Repeat until `undecided`, asked once there are enough repeats, names no mode, or for `seconds`."""
    if not trial.outputs:
        trial.warm_up()
    started = time.monotonic()
    left, slowest = list(modes), 0.0
    while left and (now := time.monotonic()) - started + slowest <= seconds:
        for mode in left:
            trial.repeat(mode, started + seconds)
            progress(min(int(time.monotonic() - started), int(seconds)), int(seconds), "seconds of timing")
        slowest = max(slowest, time.monotonic() - now)
        if all(trial.count_repeats(mode) >= min_repeats for mode in left):
            left = list(undecided(left))


def take_samples(trials: Sequence[Trial], side: int, mode: Mode) -> list[Sample]:
    """What one of the bundles took for each prompt, over all of `trials`; empty without a repetition."""
    if not trials or not all(trial.count_repeats(mode) for trial in trials):
        return []
    samples = []
    for index in range(len(trials[0].prompts)):
        repeats = [rounds[side] for trial in trials for rounds in trial.kept[mode, index]]
        times = settle([rounds.milliseconds for rounds in repeats])
        samples.append(
            Sample(
                prompt=index, mode=mode, tokens=repeats[0].tokens, milliseconds=times, repeats=len(repeats)
            )
        )
    return samples
