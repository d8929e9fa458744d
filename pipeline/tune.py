"""Choose the ladder and its draft lengths from measurements on this machine, and say what they were."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import permutations, product
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ..speculate.bundle import Bundle, load
from ..speculate.costs import Costs
from ..speculate.drafters import Sources
from ..speculate.levels import JOINT, SUFFIX, TARGET, TREE, is_drafter, split_engine_tree, wants_tree
from ..speculate.plan import Candidate, Plan, spell_plan
from .call_costs import CostMeter
from .compare import settle
from .machine import describe_machine
from .processor import num_threads
from .progress import Progress, no_progress
from .recipe import Speculate
from .replay import Prediction, Recording, best_plan, predict
from .rounds import Rounds, decode_in_turn
from .traces import record

PROMPT_TOKENS = 64  # of each calibration window, as the prompt to tune on
NEW_TOKENS = 64
COST_SWEEPS = 4  # before the recordings, and again after them
FREE_LENGTHS = (2, 4, 8, 16)
TREE_SIZES = (8, 16, 31)  # with the token before it a call of the rows that are timed
ENGINE_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
LENGTHS = tuple(product((32, 128, 512, 1024), (32, 128, 512)))  # of prompts and outputs, to show
LEAST_GAIN = 1.02  # predicted, over plain decoding: less is not worth a drafter
CHECK_PROMPTS, CHECK_REPEATS = 4, 3


def tune(
    bundle_dir: Path, tokens: Path, spec: Speculate, out: Path, progress: Progress = no_progress
) -> dict:
    """The stage: write ``plan.json``. The prompts are the first tokens of evenly spaced calibration windows
    (`tokens`, a folder with ``tokens.safetensors``)."""
    windows = load_file(tokens / "tokens.safetensors")["tokens"]
    chosen = windows[
        np.linspace(0, len(windows) - 1, min(spec.tune_prompts, len(windows))).astype(int), :PROMPT_TOKENS
    ]
    plan = tune_bundle(load(bundle_dir, num_threads()), chosen.tolist(), spec, progress)
    (out / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    return plan


def tune_bundle(
    bundle: Bundle, prompts: Sequence[list[int]], spec: Speculate, progress: Progress = no_progress
) -> dict:
    """The plan for `bundle`: the ladder, its draft lengths, the predicted and the measured speed, and every
    figure that led there.

    Candidates are not decoded: see `replay`. A ladder or lengths that the recipe names are kept, and only
    what is `auto` is chosen; the choice is then run beside plain decoding, which wins if it is faster.
    """
    meter = CostMeter(bundle)
    meter.sweep(COST_SWEEPS, progress)
    recordings: list[Recording] = []
    for index, prompt in enumerate(prompts):
        recordings.append(record(bundle, prompt, bundle.drafters, NEW_TOKENS))
        progress(index + 1, len(prompts), "recording the target and its drafters")
    overhead = _measure_overhead(bundle, prompts[0])
    meter.sweep(COST_SWEEPS, progress)
    costs = meter.costs(overhead)

    free = _list_free_drafters(bundle)
    options = _length_options(spec, free, bundle.drafters)
    plain = predict(recordings, (), {}, costs)
    plans = [plain]
    ladders = _list_ladders(free, _list_settled(bundle), costs)
    sources = Sources(datastore=bundle.datastore, ngrams=bundle.ngrams)
    for index, ladder in enumerate(ladders):
        plans.append(best_plan(recordings, ladder, options, costs, sources))
        progress(index + 1, len(ladders), "predicting ladders")
    plans.sort(key=lambda plan: -plan.tokens_per_second)
    choices = _choose(spec, plans, plain, recordings, options, costs, sources)
    kept: list[tuple[Prediction, dict]] = []
    slower: list[str] = []
    for choice in choices:
        if choice is plain and any(other.work.keys() == {TARGET} for other, _ in kept):
            continue
        found = check_prediction(bundle, recordings, spec, choice, costs, sources, progress)
        if choice is not plain and spec.ladder == "auto" and found["speedup"] < 1:
            slower.append(_say_slower(choice, plain, found))
        else:
            kept.append((choice, found))
    best, measured = kept[0]
    others = [choice for choice, _ in kept[1:]]
    plan = Plan(
        ladder=best.ladder,
        num_speculative_tokens=dict(best.num_speculative_tokens),
        verify=spec.verify,
        costs=costs,
        choices=tuple(map(_make_choice, [best, *others])),
    )
    chosen = spell_plan(plan)
    chosen["costs"]["floor_ms"] = meter.floors()
    return {
        **chosen,
        "by_length": _list_by_length(plan, bundle.manifest.engines[TARGET].max_seq_len),
        "why": " ".join([*slower, _say_why(spec, best, plain, measured), *map(_say_other, others)]),
        "predicted": _figures(best, plain),
        "measured": measured,
        "candidates": [_figures(plan, plain) for plan in plans],
        "greedy_agreement": {
            name: float(np.mean([recording.agreement(name) for recording in recordings]))
            for name in bundle.drafters
        },
        "tuned_on": {
            "prompts": len(recordings),
            "prompt_tokens": float(np.mean([len(recording.prompt) for recording in recordings])),
            "new_tokens": NEW_TOKENS,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "threads": bundle.threads,
        },
    }


def check_prediction(
    bundle: Bundle,
    recordings: Sequence[Recording],
    spec: Speculate,
    best: Prediction,
    costs: Costs,
    sources: Sources,
    progress: Progress = no_progress,
) -> dict:
    """Run the choice beside plain decoding, in turn, and compare with what was predicted for these prompts:
    `prediction_error` is predicted / measured - 1. Nothing is read off an earlier run of the same prompt."""
    chosen = recordings[:CHECK_PROMPTS]
    bundle.plan = Plan(
        ladder=best.ladder,
        num_speculative_tokens=dict(best.num_speculative_tokens),
        verify=spec.verify,
        costs=costs,
    )
    modes = {"plain": "none", "chosen": "auto"} if best.ladder else {"plain": "none"}
    timings: dict[str, list[list[Rounds]]] = {mode: [[] for _ in chosen] for mode in modes}
    for repeat in range(CHECK_REPEATS):
        for index, recording in enumerate(chosen):
            for mode in list(modes)[:: 1 if (repeat + index) % 2 == 0 else -1]:
                bundle.forget()
                run = bundle.stream(recording.prompt, NEW_TOKENS, speculate=modes[mode], ignore_eos=True)
                timings[mode][index] += decode_in_turn([run])
        progress(repeat + 1, CHECK_REPEATS, "checking the prediction")
    predictions = {"plain": predict(chosen, (), {}, costs)}
    if best.ladder:
        predictions["chosen"] = predict(chosen, best.ladder, best.num_speculative_tokens, costs, sources)
    result: dict = {}
    for mode, prompts in timings.items():
        tokens = sum(len(repeats[0].token_ids) - 1 for repeats in prompts)
        spent = sum(sum(settle([one.milliseconds for one in repeats])[1:]) for repeats in prompts)
        measured, predicted = 1e3 * tokens / spent, predictions[mode].tokens_per_second
        result[mode] = {
            "tokens_per_second": measured,
            "predicted_tokens_per_second": predicted,
            "prediction_error": predicted / measured - 1,
        }
    last = result["chosen" if best.ladder else "plain"]
    speedup = last["tokens_per_second"] / result["plain"]["tokens_per_second"]
    return result | {"speedup": speedup, "prediction_error": last["prediction_error"]}


def _measure_overhead(bundle: Bundle, prompt: list[int]) -> float:
    """Milliseconds of a round of plain decoding that are no call."""
    stats = bundle.generate(prompt, 32, speculate="none", ignore_eos=True).stats
    return (stats.sampling_ms + stats.bookkeeping_ms) / max(1, stats.steps)


def _list_free_drafters(bundle: Bundle) -> list[str]:
    """Those that are no models and have here what they draft from: alone, the likely hybrids, and the trees
    that hold most. Of equally sure proposals a hybrid takes the first one's: a guess of the model is worth
    more than a short match."""
    lookups = [SUFFIX, "history", *(["rest"] if bundle.datastore else [])]
    guesses = ["recycling", *(["bigram"] if bundle.ngrams else [])]
    hybrids = [JOINT.join(parts) for parts in ([*guesses[:1], "history"], [*guesses, *lookups[1:]])]
    merged = [(guesses[0],), (SUFFIX, guesses[0]), (SUFFIX, *guesses, *lookups[1:])]
    trees = [JOINT.join(parts) + TREE for parts in merged]
    return list(dict.fromkeys([*lookups, *guesses, *hybrids, *trees]))


def _list_settled(bundle: Bundle) -> list[str]:
    """The drafters that are models, but those whose layers are searched while decoding: a recording does not
    tell what will be found."""
    skips = {name: bundle.manifest.engines[name].skips for name in bundle.drafters}
    return [name for name, left_out in skips.items() if not (left_out and left_out.share)]


def _list_ladders(free: Sequence[str], drafters: Sequence[str], costs: Costs) -> list[tuple[str, ...]]:
    """Each drafter alone, each on top of a cheaper one, and all of these with one below that is no model;
    trees for the target alone, since few of their tokens are left when a drafter has verified them."""
    pairs = [
        (inner, outer)
        for inner, outer in permutations(drafters, 2)
        if costs.milliseconds[inner][0][0] < costs.milliseconds[outer][0][0]
    ]
    ladders: list[tuple[str, ...]] = [(), *((name,) for name in drafters), *pairs]
    below = ((name, *ladder) for name in free for ladder in ladders if not (ladder and wants_tree(name)))
    return [*ladders[1:], *below]


def _length_options(
    spec: Speculate, free: Sequence[str], drafters: Sequence[str]
) -> dict[str, Sequence[int]]:
    named = spec.ladder if isinstance(spec.ladder, list) else []
    options: dict[str, Sequence[int]] = {name: _lengths_to_try(name) for name in [*free, *drafters, *named]}
    match spec.num_speculative_tokens:
        case "auto":
            return options
        case int(length):
            return dict.fromkeys(options, (length,))
        case lengths:
            return options | {name: (length,) for name, length in lengths.items()}


def _lengths_to_try(level: str) -> Sequence[int]:
    if is_drafter(level):
        return TREE_SIZES if wants_tree(level) else FREE_LENGTHS
    return TREE_SIZES if split_engine_tree(level)[1] else ENGINE_LENGTHS


def _choose(
    spec: Speculate,
    plans: Sequence[Prediction],
    plain: Prediction,
    recordings: Sequence[Recording],
    options: Mapping[str, Sequence[int]],
    costs: Costs,
    sources: Sources,
) -> list[Prediction]:
    """What the recipe names; else of `plans` (fastest first) those among which the lengths of prompt and
    output may decide: the fastest for every set of models, unless fewer are as fast;
    and plain decoding, in case all of these are slower when they are run."""
    if spec.ladder == "none" or not spec.ladder:
        return [plain]
    if spec.ladder != "auto":
        return [best_plan(recordings, tuple(spec.ladder), options, costs, sources)]
    paying = [plan for plan in plans if plan.tokens_per_second >= LEAST_GAIN * plain.tokens_per_second]
    choices: dict[frozenset[str], Prediction] = {}
    for plan in paying:
        choices.setdefault(frozenset(plan.work), plan)
    faster = [*choices]
    return [
        *(
            plan
            for models, plan in choices.items()
            if not any(other < models for other in faster[: faster.index(models)])
        ),
        plain,
    ]


def _make_choice(plan: Prediction) -> Candidate:
    return Candidate(
        ladder=plan.ladder, num_speculative_tokens=dict(plan.num_speculative_tokens), work=dict(plan.work)
    )


def _list_by_length(plan: Plan, max_seq_len: int) -> list[dict]:
    """Which ladder decodes prompts and outputs of some lengths, where that depends on them."""
    chosen = {lengths: plan.choose(*lengths) or plan for lengths in LENGTHS if sum(lengths) <= max_seq_len}
    if len({choice.ladder for choice in chosen.values()}) < 2:
        return []
    return [
        {"prompt_tokens": prompt, "new_tokens": new, "ladder": list(choice.ladder)}
        for (prompt, new), choice in chosen.items()
    ]


def _say_other(plan: Prediction) -> str:
    ladder = " → ".join(plan.ladder) or "the target alone"
    return f"Where the lengths of prompt and output make it faster: {ladder}."


def _say_slower(plan: Prediction, plain: Prediction, measured: Mapping) -> str:
    return (
        f"{' → '.join(plan.ladder)} was predicted to be "
        f"{plan.tokens_per_second / plain.tokens_per_second:.2f} times as fast as plain decoding, but was "
        f"{measured['speedup']:.2f} times when it was run."
    )


def _say_why(spec: Speculate, best: Prediction, plain: Prediction, measured: Mapping) -> str:
    gain = best.tokens_per_second / plain.tokens_per_second
    if spec.ladder != "auto":
        speeds = f"{gain:.2f} times plain decoding by prediction, {measured['speedup']:.2f} when run"
        return f"Named by the recipe: {speeds}." if best.ladder else "The recipe names no drafter."
    if not best.ladder:
        return "No drafter is predicted to pay on this machine, so the target decodes alone."
    return f"The fastest by prediction: {gain:.2f} times plain decoding, {measured['speedup']:.2f} when run."


def _figures(plan: Prediction, plain: Prediction) -> dict:
    return {
        "ladder": list(plan.ladder),
        "num_speculative_tokens": dict(plan.num_speculative_tokens),
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_target_call": plan.tokens_per_target_call,
        "estimated_speedup": plan.tokens_per_second / plain.tokens_per_second,
        "ms_per_token": dict(plan.ms_per_token),
    }
