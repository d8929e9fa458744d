"""Tune a bundle anew, on the machine where it runs."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ..speculate.bundle import Bundle, load
from ..speculate.levels import TARGET
from ..speculate.manifest import MANIFEST, PLAN, RECIPE, REPORTS, read_json
from ..speculate.plan import Plan
from .bench import bench
from .describe import describe_measurements, resolve_recipe, write_documents
from .gate_prompts import choose_prompts
from .hashing import hash_json
from .pack import replace_files
from .processor import num_threads
from .progress import Progress, no_progress
from .recipe import Speculate
from .recipe_file import load_recipe
from .tune import NEW_TOKENS, tune_bundle

PROMPTS = 8


def retune(
    bundle_dir: Path,
    prompts: Path | None,
    limit: int | None,
    threads: int | None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure, choose, run the choice beside plain decoding; and write the new plan.json, with all that tells
    of it, into the bundle, everything or nothing. The rule of verification stays as it was. Raises
    BundleError."""
    bundle = load(bundle_dir, threads or num_threads())
    chosen = choose_prompts([bundle], prompts, limit or PROMPTS, NEW_TOKENS)
    spec = Speculate(verify=bundle.plan.verify)
    plan = tune_bundle(bundle, [ids for _, ids in chosen], spec, progress)
    texts, facts = {PLAN: json.dumps(plan, indent=2) + "\n"}, {}
    if REPORTS in bundle.manifest.files:
        bundle.plan = msgspec.convert(plan, Plan)
        shown = [replace(prompt, content=ids) for prompt, ids in chosen]
        measured = bench(bundle, shown, max_new_tokens=NEW_TOKENS, ignore_eos=True, progress=progress)
        more, facts = _tell_anew(bundle, plan, measured)
        texts |= more
    facts["retuned"] = {key: plan["tuned_on"][key] for key in ("date", "machine")}
    replace_files(bundle_dir, texts, facts)
    return {"bundle": str(bundle_dir), **plan}


def _tell_anew(bundle: Bundle, plan: dict, measured: dict) -> tuple[dict[str, str], dict[str, Any]]:
    """The bundle's documents, and what changes in its manifest, with another plan and measurement."""
    reports: Mapping[str, dict] = read_json(bundle.path / REPORTS) | {"tune": plan, "bench": measured}
    recipe = load_recipe(str(bundle.path / RECIPE)).recipe
    speculate = recipe.speculate.model_copy(update={"ladder": "auto", "num_speculative_tokens": "auto"})
    drafters = {
        name: drafter.model_copy(update={"cache": _cache_of(bundle, name)})
        for name, drafter in recipe.drafters.items()
    }
    caches = {
        name: bundle.manifest.engines[name].kv_cache_dtype
        for name in (TARGET, *recipe.drafters)
        if name == TARGET or _cache_of(bundle, name) == "own"
    }
    opened = recipe.model_copy(update={"speculate": speculate, "drafters": drafters})
    resolved = resolve_recipe(opened, plan, caches)
    facts = {
        "recipe_sha256": hash_json(resolved.model_dump()),
        "measurements": describe_measurements(reports),
    }
    provenance = read_json(bundle.path / MANIFEST) | facts
    return write_documents(bundle.path.name, resolved, provenance, reports), facts


def _cache_of(bundle: Bundle, name: str) -> str:
    """That a drafter has in this bundle: recipes of older ones do not say."""
    entry = bundle.manifest.engines[name]
    return "target" if entry.skips or entry.shares_cache else "own"
