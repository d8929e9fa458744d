"""Tune a bundle anew, on the machine where it runs."""

import json
from pathlib import Path
from typing import Any

from ..speculate.bundle import load
from ..speculate.manifest import PLAN
from .gate_prompts import read_ids
from .pack import replace_files
from .processor import num_threads
from .progress import Progress, no_progress
from .recipe import Speculate
from .tune import NEW_TOKENS, tune_bundle

PROMPTS = 8


def retune(
    bundle_dir: Path,
    prompts: Path | None,
    limit: int | None,
    threads: int | None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure, choose, and write the new plan.json and its hash into the bundle, both or neither. The rule of
    verification stays as it was. Raises BundleError."""
    bundle = load(bundle_dir, threads or num_threads())
    ids = read_ids([bundle], prompts, limit or PROMPTS, NEW_TOKENS)
    plan = tune_bundle(bundle, ids, Speculate(verify=bundle.plan.verify), progress)
    facts = {"retuned": {key: plan["tuned_on"][key] for key in ("date", "machine")}}
    replace_files(bundle_dir, {PLAN: json.dumps(plan, indent=2) + "\n"}, facts)
    return {"bundle": str(bundle_dir), **plan}
