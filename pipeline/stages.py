"""The stages of a build, and which of them a recipe asks for.

    load → calibrate → smooth → prune → quantize → vocabulary → export → skip → compile → ngrams → tune
    → check → bench

Smoothing, pruning, quantizing, cutting the vocabulary and exporting happen once for every engine; engines
that ask for the same thing share it. Smoothing comes first, so that the mask is chosen on the grid that
quantization will use; a pruned int8 engine is pruned and quantized jointly, and the quantize stage then adds
what is left. A drafter that skips layers goes through none of this: it is the exported target without what
one stage chooses. Compiling makes TensorRT engines of the exported graphs; what it makes is not the same to
the byte every time, and nothing after it reads it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model.config import DecoderConfig
from ..speculate.levels import TARGET
from .gate_prompts import DEFAULT_PROMPTS
from .hashing import hash_file, hash_json, write_json
from .pack import ENGINE_FILE, TENSORRT_FILE, try_bundle
from .recipe import Drafter, Engine, Export, Recipe, SkipLayers, Speculate
from .stage import Call, Stage, Task

ARITHMETIC = ("torch", "numpy", "safetensors")
RUNTIME = ("onnxruntime", "numpy", "tokenizers")
TENSORRT_PACKAGES = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-cu13", "tensorrt-cu12", "tensorrt")

DRAFT_LENGTH = 15  # that engines are built for where the recipe leaves the length to `tune`
TREE_SIZE, PREFILL_CHUNK = 64, 128


def _load(call: Call) -> dict:
    from ..model.load import load_model

    source, dtype = str(call.files["source"]), call.params["dtype"]
    report = load_model(source, dtype, call.out, call.work, call.progress)
    return report | {"source": call.params["source"]}


def _calibrate(call: Call) -> dict:
    from ..model.calibration import write_tokens

    params = dict(call.params)
    named = params.pop("text")
    names = [named] if isinstance(named, str) else named
    text = named if named == "self" else [str(call.files.get(name, name)) for name in names]
    report = write_tokens(call.inputs["model"], text, out=call.out, progress=call.progress, **params)
    return report | {"text": named}


def _smooth(call: Call) -> dict:
    from ..quantize.smooth import smooth_model

    tokens = call.inputs["tokens"] / "tokens.safetensors"
    return smooth_model(
        call.inputs["model"], tokens, call.out, call.work, progress=call.progress, **call.params
    )


def _prune(call: Call) -> dict:
    from ..prune.stage import prune_model

    tokens = call.inputs["tokens"] / "tokens.safetensors"
    return prune_model(
        call.inputs["model"], tokens, call.out, call.work, progress=call.progress, **call.params
    )


def _quantize(call: Call) -> dict:
    from ..quantize import w4a8, w8a8

    params = dict(call.params)
    scheme = {"W8A8": w8a8, "W4A8": w4a8}[params.pop("scheme")]
    tokens = call.inputs["tokens"] / "tokens.safetensors"
    return scheme.quantize_model(
        call.inputs["model"], tokens, call.out, call.work, progress=call.progress, **params
    )


def _vocabulary(call: Call) -> dict:
    from ..model.vocabulary import cut_vocabulary

    tokens = call.inputs["tokens"] / "tokens.safetensors"
    return cut_vocabulary(call.inputs["model"], tokens, call.params["draft_vocab_size"], call.out)


def _export(call: Call) -> dict:
    from ..export.portable import export_onnx

    checkpoint = call.inputs["model"]
    report = export_onnx(
        checkpoint,
        call.out,
        max_seq_len=call.params["max_seq_len"],
        kv_cache_dtype=call.params["kv_cache_dtype"],
        progress=call.progress,
    )
    config = DecoderConfig.model_validate_json((checkpoint / "config.json").read_bytes())
    files = sorted(path for path in call.out.rglob("*") if path.is_file())
    write_json(
        call.out / ENGINE_FILE,
        {
            **report,
            "vocab_size": config.vocab_size,
            "num_layers": config.num_layers,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "weights": call.params["weights"] or config.dtype,
            "eos_token_ids": list(config.eos_token_ids),
            "bos_token_id": config.bos_token_id,
            "files": {
                path.relative_to(call.out).as_posix(): {
                    "sha256": hash_file(path),
                    "size": path.stat().st_size,
                }
                for path in files
            },
        },
    )
    return report


def _compile(call: Call) -> dict:
    from ..export.tensorrt import build_engine

    export, params = call.inputs["graph"], dict(call.params)
    known = json.loads((export / ENGINE_FILE).read_text())["max_seq_len"]
    params["max_seq_len"] = min(params["max_seq_len"] or known, known)
    report = build_engine(export, call.out, progress=call.progress, **params)
    plan = call.out / report["file"]
    write_json(call.out / TENSORRT_FILE, report | {"sha256": hash_file(plan)})
    return report


def _skip(call: Call) -> dict:
    from .skips import choose_skips

    return choose_skips(
        try_bundle(call.work, call.inputs),
        call.inputs["tokens"],
        call.params["skip_layers"],
        call.params["weights"],
        call.out,
        call.progress,
    )


def _ngrams(call: Call) -> dict:
    from .ngrams import write_ngrams

    return write_ngrams(try_bundle(call.work, call.inputs), call.out, call.progress)


def _tune(call: Call) -> dict:
    from .tune import tune

    params = dict(call.params)
    bundle = try_bundle(call.work, call.inputs, call.files.get("datastore"), params.pop("sharing"))
    spec = Speculate.model_validate(params)
    return tune(bundle, call.inputs["tokens"], spec, call.out, call.progress)


def _check(call: Call) -> dict:
    from .check import check

    bundle = try_bundle(call.work, call.inputs)
    checkpoints = {
        name.removeprefix("checkpoint "): path
        for name, path in call.inputs.items()
        if name.startswith("checkpoint ")
    }
    return check(bundle, checkpoints, call.inputs["tokens"], call.out, call.progress)


def _bench(call: Call) -> dict:
    from .bench import bench_stage

    bundle = try_bundle(call.work, call.inputs, call.files.get("datastore"), call.params["sharing"])
    return bench_stage(bundle, call.inputs["tokens"], call.out, call.progress, call.files["questions"])


LOAD = Stage("load", _load, code=("model",), packages=("torch", "safetensors", "transformers", "gguf"))
CALIBRATE = Stage("calibrate", _calibrate, ("model",), (*ARITHMETIC, "tokenizers"), sums=True)
SMOOTH = Stage("smooth", _smooth, ("model", "quantize"), ARITHMETIC, sums=True)
PRUNE = Stage("prune", _prune, ("model", "quantize", "prune"), ARITHMETIC, sums=True)
QUANTIZE = Stage("quantize", _quantize, ("model", "quantize", "prune"), ARITHMETIC, sums=True)
VOCABULARY = Stage("vocabulary", _vocabulary, ("model",), ARITHMETIC)
EXPORT = Stage("export", _export, ("model", "export"), ("onnx", "torch", "numpy"))
COMPILE = Stage("compile", _compile, ("export",), ("onnx", *TENSORRT_PACKAGES))
MEASURING = (
    *("speculate", "pipeline/pack.py", "pipeline/prompts.py"),
    *("pipeline/machine.py", "pipeline/processor.py", "pipeline/replay.py", "pipeline/traces.py"),
    *("pipeline/rounds.py", "pipeline/compare.py"),
)
SKIP = Stage(
    "skip",
    _skip,
    ("speculate", "pipeline/skips.py", "pipeline/pack.py", "export/onnx_files.py"),
    (*RUNTIME, "onnx"),
)
NGRAMS = Stage("ngrams", _ngrams, ("speculate", "pipeline/ngrams.py", "pipeline/pack.py"), RUNTIME)
TUNE = Stage(
    "tune",
    _tune,
    (*MEASURING, "pipeline/tune.py", "pipeline/call_costs.py"),
    RUNTIME,
    measured=True,
)
CHECK = Stage(
    "check",
    _check,
    (*MEASURING, "pipeline/check.py", "model"),
    (*RUNTIME, "torch"),
    sums=True,
    measured=True,
)
TIMING = tuple(f"pipeline/{name}.py" for name in ("bench", "figures", "snapshot", "steadiness"))
BENCH = Stage("bench", _bench, (*MEASURING, *TIMING), RUNTIME, measured=True)


@dataclass
class Plan:
    """The tasks of a recipe. Iterating gives each once, after all that it reads."""

    load: Task
    tokens: Task
    checkpoints: dict[str, Task] = field(default_factory=dict)  # by engine, the target first
    exports: dict[str, Task] = field(default_factory=dict)  # or what is skipped of the target's
    engines: dict[str, list[Task]] = field(default_factory=dict)  # TensorRT's, by engine
    ngrams: Task | None = None

    def __post_init__(self) -> None:
        self.tune = self.check = self.bench = self.load

    def __iter__(self) -> Iterator[Task]:
        seen: dict[Task, None] = {}

        def visit(task: Task) -> None:
            for source in task.inputs.values():
                visit(source)
            seen.setdefault(task)

        compiled = [task for tasks in self.engines.values() for task in tasks]
        for last in (self.tokens, *self.exports.values(), *compiled, self.tune, self.check, self.bench):
            visit(last)
        return iter(seen)


def plan_tasks(
    recipe: Recipe, source: Path, texts: Mapping[str, Path], datastore: Path | None = None
) -> Plan:
    """`source`: the resolved model; `texts`: the files to calibrate on, by their names in the recipe;
    `datastore`: what `rest` drafts from."""
    shared: dict[str, Task] = {}

    def task(stage: Stage, label: str, params: dict[str, Any], **inputs: Task) -> Task:
        """One task for equal work, under the label of the engine that asked first."""
        key = hash_json([stage.name, params, {name: id(task) for name, task in inputs.items()}])
        return shared.setdefault(key, Task(stage, label, params, inputs))

    load = Task(LOAD, "", recipe.model.model_dump(), files={"source": source})
    tokens = Task(CALIBRATE, "", recipe.calibration.model_dump(), {"model": load}, texts)
    plan = Plan(load, tokens)
    graphs = [export for export in recipe.export if export.format == "onnx"]
    limit = min((export.max_seq_len for export in graphs if export.max_seq_len), default=None)
    for name, engine in {TARGET: recipe.target, **recipe.drafters}.items():
        if isinstance(engine, Drafter) and engine.skip_layers:
            params = engine.model_dump(include={"skip_layers"}, exclude_none=True)
            params |= {"weights": describe_weights(engine)}
            target = {f"engine {TARGET}": plan.exports[TARGET]}
            plan.exports[name] = task(SKIP, name, params, model=load, tokens=tokens, **target)
            continue
        model = load
        prune, quantize = engine.prune, engine.quantize
        if quantize and quantize.smoothing_strength != "none":
            params = quantize.model_dump()
            model = task(SMOOTH, name, params, model=model, tokens=tokens)
        if prune:
            unused = {"block_size", "dampening_frac", "refit"} if prune.method == "magnitude" else set()
            params = prune.model_dump(exclude=unused) | {"joint_int8": quantize is not None}
            model = task(PRUNE, name, params, model=model, tokens=tokens)
        if quantize:
            params = quantize.model_dump(include={"scheme", "targets", "ignore"})
            model = task(QUANTIZE, name, params, model=model, tokens=tokens)
        if isinstance(engine, Drafter) and engine.draft_vocab_size:
            params = engine.model_dump(include={"draft_vocab_size"})
            model = task(VOCABULARY, name, params, model=model, tokens=tokens)
        plan.checkpoints[name] = model
        params = {
            "max_seq_len": limit,
            "kv_cache_dtype": engine.kv_cache_dtype,
            "weights": describe_weights(engine),
        }
        plan.exports[name] = task(EXPORT, name, params, model=model)
        plan.engines[name] = [
            task(COMPILE, name, describe_engine(export, recipe.speculate), graph=plan.exports[name])
            for export in recipe.export
            if export.format == "tensorrt"
        ]
    engines = {f"engine {name}": export for name, export in plan.exports.items()}
    common = {"model": load, "tokens": tokens, **engines}
    checkpoints = {f"checkpoint {name}": model for name, model in plan.checkpoints.items()}
    plan.check = Task(CHECK, "", {}, common | checkpoints)
    if recipe.speculate.needs_table:
        target = {"model": load, f"engine {TARGET}": plan.exports[TARGET]}
        plan.ngrams = Task(NGRAMS, "", {}, target)
        common |= {"ngrams": plan.ngrams}
    stores = {} if datastore is None else {"datastore": datastore}
    sharing = {"sharing": list_sharing(recipe)}
    plan.tune = Task(TUNE, "", recipe.speculate.model_dump() | sharing, common, stores)
    measured = common | {"plan": plan.tune}
    plan.bench = Task(BENCH, "", sharing, measured, {"questions": DEFAULT_PROMPTS, **stores})
    return plan


def list_sharing(recipe: Recipe) -> list[str]:
    """The drafters that draft in the target's cache."""
    return [name for name, drafter in recipe.drafters.items() if drafter.cache == "target"]


def describe_engine(export: Export, speculate: Speculate) -> dict[str, Any]:
    """What a TensorRT engine is built for. Its calls read one token, a draft behind the token that it
    follows, a tree, or a chunk of the prompt."""
    lengths = speculate.num_speculative_tokens
    if isinstance(lengths, dict):
        draft = max(lengths.values(), default=DRAFT_LENGTH)
    else:
        draft = lengths if isinstance(lengths, int) else DRAFT_LENGTH
    rows = {1, 1 + draft, export.tree_size or TREE_SIZE, export.prefill_chunk or PREFILL_CHUNK}
    return {
        "compute_capability": export.compute_capability,
        "precision": export.precision or "bfloat16",
        "rows": sorted(rows),
        "max_seq_len": export.max_seq_len,
    }


def describe_weights(engine: Engine) -> str:
    """What a manifest calls the weights of an engine; empty for those of the model itself."""
    if isinstance(engine, Drafter) and engine.skip_layers:
        searched = isinstance(engine.skip_layers, SkipLayers) and engine.skip_layers.swift
        return f"of the target, without some layers{', searched while decoding' if searched else ''}"
    structure = ""
    if engine.prune:
        sparse = engine.prune.mask_structure
        structure = f"{engine.prune.sparsity:.0%} sparse" if sparse == "unstructured" else f"{sparse} sparse"
    scheme = engine.quantize.scheme if engine.quantize else ""
    size = engine.draft_vocab_size if isinstance(engine, Drafter) else None
    return " ".join(filter(None, [structure, scheme, f"for {size} tokens" if size else ""]))
