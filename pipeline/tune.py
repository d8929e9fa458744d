"""Choose the ladder and its draft lengths from measurements on this machine, and say what they were."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ..speculate.bundle import Bundle, load
from .processor import num_threads
from .progress import Progress, no_progress
from .recipe import Speculate
from .replay import SUFFIX, CallCosts, Plan, best_plan, predict
from .traces import Recording, record, trace

PROMPT_TOKENS = 64  # of each calibration window, as the prompt to tune on
NEW_TOKENS = 64
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
COST_CONTEXT = 256  # cache slots in use while calls are timed
COST_REPEATS = 7
SUFFIX_LENGTHS = (1, 2, 3, 4, 6, 8, 12)
ENGINE_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10)


def tune(
    bundle_dir: Path, tokens: Path, spec: Speculate, out: Path, progress: Progress = no_progress
) -> dict:
    """Write ``plan.json``: the ladder, its draft lengths, the predicted speed, and every figure that led
    there.

    The prompts are the first tokens of evenly spaced calibration windows (`tokens`, a folder with
    ``tokens.safetensors``). Nothing is decoded speculatively here: see `replay`. A ladder or lengths that
    the recipe names are kept, and only what is `auto` is chosen.
    """
    bundle = load(bundle_dir, num_threads())
    windows = load_file(tokens / "tokens.safetensors")["tokens"]
    chosen = windows[
        np.linspace(0, len(windows) - 1, min(spec.tune_prompts, len(windows))).astype(int), :PROMPT_TOKENS
    ]
    recordings: list[Recording] = []
    for index, prompt in enumerate(chosen.tolist()):
        recordings.append(record(bundle, prompt, bundle.drafters, NEW_TOKENS))
        progress(index + 1, len(chosen), "recording the target and its drafters")
    traces = [trace(recording) for recording in recordings]
    costs = measure_costs(bundle, progress)

    options = _length_options(spec, bundle.drafters)
    plain = predict(traces, (), {}, costs)
    plans = [
        plain if not ladder else best_plan(traces, ladder, options, costs)
        for ladder in _ladders(bundle.drafters)
    ]
    plans.sort(key=lambda plan: -plan.tokens_per_second)
    best = plans[0] if spec.ladder == "auto" else _planned(spec, traces, options, costs)
    plan = {
        "ladder": list(best.ladder),
        "num_speculative_tokens": dict(best.num_speculative_tokens),
        "verify": spec.verify,
        "predicted": _figures(best, plain),
        "candidates": [_figures(plan, plain) for plan in plans],
        "greedy_agreement": {
            name: float(np.mean([recording.agreement(name) for recording in recordings]))
            for name in bundle.drafters
        },
        "costs": {
            "context_at_most": COST_CONTEXT,
            "rows": list(costs.rows),
            "milliseconds": dict(costs.milliseconds),
        },
        "tuned_on": {"prompts": len(recordings), "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS},
    }
    (out / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    return plan


def measure_costs(bundle: Bundle, progress: Progress = no_progress) -> CallCosts:
    """Median milliseconds of one call of every engine for each row count, taken in turn so that drift falls
    on all alike.
    """
    engines = {name: bundle.engine(name) for name in ["target", *bundle.drafters]}
    context = min(COST_CONTEXT, min(engine.max_seq_len for engine in engines.values()) - max(ROWS))
    ids = np.ones(context, np.int32)  # what they say does not matter to the clock
    for engine in engines.values():
        engine.reserve(context + max(ROWS))
        engine.forward(ids, 0)
    samples: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in engines for rows in ROWS}
    for repeat in range(COST_REPEATS + 1):
        for (name, rows), times in samples.items():
            started = time.perf_counter()
            engines[name].forward(ids[:rows], context)
            if repeat:  # the first round warms up
                times.append(1e3 * (time.perf_counter() - started))
        progress(repeat, COST_REPEATS, "timing calls")
    return CallCosts(
        ROWS, {name: [statistics.median(samples[name, rows]) for rows in ROWS] for name in engines}
    )


def _ladders(drafters: Sequence[str]) -> list[tuple[str, ...]]:
    """No drafter, each alone, and the suffix drafter under each engine."""
    return [(), (SUFFIX,), *chain.from_iterable(((name,), (SUFFIX, name)) for name in drafters)]


def _length_options(spec: Speculate, drafters: Sequence[str]) -> dict[str, Sequence[int]]:
    options: dict[str, Sequence[int]] = {SUFFIX: SUFFIX_LENGTHS}
    options.update((name, ENGINE_LENGTHS) for name in drafters)
    match spec.num_speculative_tokens:
        case "auto":
            return options
        case int(length):
            return dict.fromkeys(options, (length,))
        case lengths:
            return options | {name: (length,) for name, length in lengths.items()}


def _planned(spec: Speculate, traces: list, options: Mapping[str, Sequence[int]], costs: CallCosts) -> Plan:
    ladder = () if spec.ladder == "none" else tuple(spec.ladder)
    return best_plan(traces, ladder, options, costs) if ladder else predict(traces, (), {}, costs)


def _figures(plan: Plan, plain: Plan) -> dict:
    return {
        "ladder": list(plan.ladder),
        "num_speculative_tokens": dict(plan.num_speculative_tokens),
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_target_call": plan.tokens_per_target_call,
        "estimated_speedup": plan.tokens_per_second / plain.tokens_per_second,
    }
