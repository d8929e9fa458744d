"""Measure plain and speculative decoding side by side, and check that they say the same thing."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..speculate.bundle import Bundle, load
from ..speculate.manifest import CHAT_TEMPLATE
from .figures import Run, compare_with_plan, count_ladders, describe_memory, summarise, summarise_categories
from .machine import describe_machine
from .processor import num_threads
from .progress import Progress, no_progress
from .prompts import Prompt, encode_prompts, read_prompts
from .rounds import decode_in_turn
from .snapshot import Mode, Sample, take_snapshot
from .steadiness import Reference, Watch
from .traces import measure_agreement

# Kernels round differently for one row and for several, so where the target's two best logits are closer than
# that moves them, the order of the two is chance. Anything wider that differs is a bug.
NEAR_TIE = 1e-2  # at least; more where reading the same tokens one by one moves the logits by more
STAGE_PROMPTS, STAGE_PROMPT_TOKENS, STAGE_NEW_TOKENS = 4, 64, 64


def bench(
    bundle: Bundle,
    prompts: Sequence[Prompt],
    *,
    speculate: str | list[str] = "auto",
    max_new_tokens: int = 128,
    ignore_eos: bool = False,
    temperature: float = 0.0,
    references: Sequence[str] = (),
    progress: Progress = no_progress,
) -> dict:
    """Decode every prompt plainly and speculatively, in alternating order, and compare.

    Drafters that learn from earlier outputs know those of the prompts before, and no others. A prompt that
    the bundle refuses is passed over. An interrupt ends the run early and keeps what was measured. Figures
    are defined in docs/metrics.md.
    """
    ladders: dict[Mode, str | list[str]] = {"plain": "none", "speculative": speculate}
    modes: dict[Mode, dict[str, Any]] = {mode: {"speculate": ladder} for mode, ladder in ladders.items()}
    modes["speculative"]["references"] = references
    options = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "temperature": temperature}
    encoded, passed_over = encode_prompts(bundle, prompts, [*modes.values()], **options)
    for mode in modes.values():  # warms the kernels
        bundle.generate(encoded[0][1], max_new_tokens=min(4, max_new_tokens), ignore_eos=True, **mode)
    bundle.forget()
    reference = Reference(bundle.threads)
    watch = Watch()
    runs: list[Run] = []
    divergences: list[dict] = []
    interrupted = False
    try:
        for index, (prompt, ids) in enumerate(encoded):
            pair: dict[str, Run] = {}
            for mode in list(modes) if index % 2 == 0 else reversed(modes):
                settings = options | modes[mode]
                pair[mode] = _decode(bundle, index, ids, mode, prompt.category, settings, reference)
            plain, speculative = (pair[mode].rounds.token_ids for mode in modes)
            if temperature == 0.0 and plain != speculative:
                found = find_divergence(bundle, ids, plain, speculative)
                divergences.append({"prompt": index, "line": prompt.line} | found)
            runs += pair.values()
            progress(index + 1, len(encoded), "plain and speculative in turn")
    except KeyboardInterrupt:
        interrupted = True
        if not runs:
            raise
    disturbance = watch.stop()
    greedy = temperature == 0.0 and ignore_eos and speculate == "auto"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": options
        | {"speculate": speculate, "plan": bundle.plan_for(speculate), "threads": bundle.threads}
        | {"ladders": count_ladders(runs)}
        | {
            "references": len(references),
            "datastore": str(bundle.datastore.path) if bundle.datastore else None,
        },
        "prompts": len(runs) // 2,
        "warm_up": {"prompts": 1, "new_tokens": min(4, max_new_tokens)},
        "passed_over": passed_over,
        "interrupted": interrupted,
        "identical": len(runs) // 2 - len(divergences) if temperature == 0.0 else None,
        "divergences": divergences,
        **summarise(runs),
        "categories": summarise_categories(runs),
        "prediction": compare_with_plan(bundle.plan, runs, max_new_tokens)
        if speculate == "auto" and bundle.plan_fits and temperature == 0.0 and not references
        else None,
        "memory": describe_memory(bundle, runs),
        "disturbance": asdict(disturbance),
        "snapshot": _snapshot(bundle, [ids for _, ids in encoded], max_new_tokens, runs, reference)
        if greedy
        else None,
        "runs": [run.to_dict() for run in runs],
    }


def _decode(
    bundle: Bundle,
    prompt: int,
    ids: list[int],
    mode: Mode,
    category: str,
    settings: dict,
    reference: Reference,
) -> Run:
    rounds = decode_in_turn([bundle.stream(ids, **settings)], reference.sometimes)[0]
    return Run(prompt, mode, category, rounds)


def _snapshot(
    bundle: Bundle, prompts: list[list[int]], max_new_tokens: int, runs: list[Run], reference: Reference
) -> dict:
    """For a gate to hold a later bundle against; only of greedy runs of a fixed length by the bundle's own
    plan."""
    count = len(runs) // 2
    samples = [
        Sample(
            prompt=run.prompt,
            mode=run.mode,
            tokens=run.rounds.tokens,
            milliseconds=run.rounds.milliseconds,
            repeats=1,
        )
        for run in runs
    ]
    outputs = {run.prompt: run.rounds.token_ids for run in runs if run.mode == "plain"}
    agreement = measure_agreement(bundle, prompts[:count], [outputs[index] for index in range(count)])
    snapshot = take_snapshot(
        bundle, prompts[:count], max_new_tokens, samples, reference.milliseconds, agreement=agreement
    )
    return snapshot.model_dump()


def find_divergence(bundle: Bundle, prompt: list[int], plain: list[int], speculative: list[int]) -> dict:
    """Where two outputs part, how close the target's two best tokens were there, and how far its logits move
    when the same tokens are read one by one instead of many at a time.
    """
    shorter = min(len(plain), len(speculative))
    position = next((i for i in range(shorter) if plain[i] != speculative[i]), shorter)
    context = [*prompt, *plain[:position]]
    together = bundle.logits(context)[-1].copy()
    engine = bundle.engine("target")
    engine.reserve(len(context))
    engine.forward(np.asarray(prompt, np.int32), 0)
    one_by_one = together
    for slot in range(len(prompt), len(context)):
        one_by_one = engine.forward(np.asarray(context[slot : slot + 1], np.int32), slot)[0]
    moved = float(np.abs(one_by_one - together).max())
    second, first = np.sort(together)[-2:]
    gap = float(first - second)
    return {
        "position": position,
        "top2_gap": gap,
        "rounding": moved,
        "near_tie": gap <= max(NEAR_TIE, 2 * moved),
    }


def bench_stage(
    bundle_dir: Path,
    tokens: Path,
    out: Path,
    progress: Progress = no_progress,
    questions: Path | None = None,
) -> dict:
    """The build's own measurement, on a few calibration windows and, where the bundle has a chat template, a
    file of prompts of several categories: writes ``bench.json``."""
    windows = load_file(tokens / "tokens.safetensors")["tokens"]
    # The far ends of the windows: tuning saw the beginnings.
    picked = windows[
        np.linspace(0, len(windows) - 1, min(STAGE_PROMPTS, len(windows))).astype(int), -STAGE_PROMPT_TOKENS:
    ]
    prompts = [Prompt(ids, "calibration", index) for index, ids in enumerate(picked.tolist())]
    bundle = load(bundle_dir, num_threads())
    if questions and CHAT_TEMPLATE in bundle.manifest.files:
        prompts += read_prompts(questions)[0]
    result = bench(
        bundle,
        prompts,
        max_new_tokens=STAGE_NEW_TOKENS,
        ignore_eos=True,
        progress=progress,
    )
    if result["interrupted"]:
        raise KeyboardInterrupt  # what is kept in the cache is whole
    (out / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    return result
