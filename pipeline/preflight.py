"""What can be known to go wrong is found before hours are spent, the cheapest first."""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..model.config import DecoderConfig
from ..model.errors import ModelError
from ..model.layout import embed_shapes, head_shapes, layer_shapes, linear_shapes
from ..model.select import select_linears
from ..speculate.datastore import Datastore
from ..speculate.errors import BundleError
from ..speculate.levels import TARGET
from .errors import RecipeError
from .hashing import hash_file
from .recipe import Drafter, Engine, Export, Recipe, SkipLayers
from .recipe_file import LoadedRecipe

BUILD_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "matplotlib")
TEXTS = "self, text files, or dataset:NAME"
GIB = 2**30
PLAN_SIZE = 2  # of a TensorRT engine, times the weights: profiles have layouts of their own
LEAST_CONTEXT = 160  # tokens: the prompts that are tuned and measured on, their continuation, and a draft


def check_recipe(recipe: Recipe) -> None:
    """Raises RecipeError for what this version or this machine cannot build."""
    _check_exports(recipe.export)
    missing = [name for name in BUILD_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"building needs {', '.join(missing)}: pip install 'draftsmith[build,cpu]'")


def _check_exports(exports: Sequence[Export]) -> None:
    from ..export.capabilities import choose_builder, name_plan

    named: dict[str, int] = {}
    for index, export in enumerate(exports):
        if export.compute_capability:
            try:
                choose_builder(export.compute_capability, export.precision or "bfloat16")
            except ModelError as error:
                raise RecipeError(f"export.{index}: {error}") from None
            if (other := named.setdefault(name_plan(export.compute_capability), index)) != index:
                raise RecipeError(f"export.{index}: the same compute_capability as export.{other}")


def find_texts(loaded: LoadedRecipe) -> dict[str, Path]:
    """The text files to calibrate on, by their names in the recipe; none for `self` and data sets."""
    text = loaded.recipe.calibration.text
    names = [text] if isinstance(text, str) else text
    if not names:
        raise RecipeError(f"calibration.text: an empty list; wanted {TEXTS}")
    if len(names) > 1 and (odd := [name for name in names if name == "self" or name.startswith("dataset:")]):
        raise RecipeError(f"calibration.text: {odd[0]} stands in a list with others; it can only stand alone")
    found = {name: loaded.find(name) for name in names if name != "self" and not name.startswith("dataset:")}
    for name, path in found.items():
        if path is None or not path.is_file():
            raise RecipeError(
                f"calibration.text: no file {name} in {loaded.path.parent.absolute()} or {Path.cwd()}; "
                f"wanted {TEXTS}"
            )
    return {name: path for name, path in found.items() if path}


def find_datastore(loaded: LoadedRecipe) -> Path | None:
    """The file that `rest` drafts from, if the recipe names one."""
    if loaded.recipe.speculate.rest is None:
        return None
    name = loaded.recipe.speculate.rest.datastore
    path = loaded.find(name)
    if path is None or not path.is_file():
        raise RecipeError(
            f"speculate.rest.datastore: no file {name} in {loaded.path.parent.absolute()} or {Path.cwd()}; "
            "make it with `draftsmith datastore`"
        )
    return path


def check_datastore(path: Path, config: DecoderConfig, tokenizer: Path) -> None:
    """Raises RecipeError unless a file is a datastore for this model."""
    try:
        Datastore(path, config.vocab_size, hash_file(tokenizer))
    except BundleError as error:
        raise RecipeError(f"speculate.rest.datastore: {error}") from None


def check_model(recipe: Recipe, config: DecoderConfig, cache: Path, out: Path) -> list[str]:
    """Hold a recipe against the loaded model; returns warnings.

    Raises RecipeError for a pattern that matches nothing, a mask structure that does not divide a linear, a
    cache that heads do not fit into, and a model that this machine's memory cannot hold.
    """
    from ..export.cache_dtype import check_cache_dtype

    for name, engine in {TARGET: recipe.target, **recipe.drafters}.items():
        where = TARGET if name == TARGET else f"drafters.{name}"
        try:
            _check_engine(engine, config)
            check_cache_dtype(config, engine.kv_cache_dtype)
            if isinstance(engine, Drafter):
                _check_skips(engine, config)
                _check_vocabulary(engine, config)
        except ValueError as error:
            raise RecipeError(f"{where}.{error}") from None
    limits = [export.max_seq_len for export in recipe.export if export.max_seq_len]
    if (room := min([config.max_position_embeddings, *limits])) < LEAST_CONTEXT:
        raise RecipeError(
            f"{room} tokens of context are too few to tune on; at least {LEAST_CONTEXT} are needed"
        )
    if recipe.calibration.max_seq_length > config.max_position_embeddings:
        raise RecipeError(
            f"calibration.max_seq_length is {recipe.calibration.max_seq_length}, but the model has "
            f"{config.max_position_embeddings} positions"
        )
    return list(_check_room(recipe, config, cache, out))


def count_parameters(config: DecoderConfig) -> int:
    shapes = [*embed_shapes(config).values(), *head_shapes(config).values()]
    shapes += config.num_layers * list(layer_shapes(config).values())
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)


def estimate_disk(recipe: Recipe, config: DecoderConfig) -> tuple[int, int]:
    """Bytes that a build writes into the cache and into the bundle: a little more than it will."""
    parameters, stored = count_parameters(config), {"float32": 4, "bfloat16": 2, "float16": 2}[config.dtype]
    embedding = sum(rows * columns for rows, columns in embed_shapes(config).values())
    plain = stored * parameters
    # The embedding stays, and a tied head becomes a matrix of its own. A checkpoint has 4 bits in a byte too.
    int8 = parameters + stored * embedding
    copies = [drafter for drafter in recipe.drafters.values() if not drafter.skip_layers]
    engines = [recipe.target, *copies]
    quantized = [engine.quantize for engine in engines if engine.quantize]
    smoothed = {settings.model_dump_json() for settings in quantized if settings.smoothing_strength != "none"}
    kept = plain + 4 * parameters * len(smoothed)  # in float32, once for all that smooth alike
    packed = 0
    compiled = PLAN_SIZE * sum(export.format == "tensorrt" for export in recipe.export)
    for engine in engines:
        size = int8 if engine.quantize else plain
        written = [section for section in (engine.prune, engine.quantize) if section]
        kept += size * len(written) + size + compiled * size  # what each stage writes, and the exports
        packed += size + compiled * size
    return kept, packed


def _check_engine(engine: Engine, config: DecoderConfig) -> None:
    shapes = linear_shapes(config)
    names = [f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in shapes]
    names.append("lm_head")
    for key, section in (("prune", engine.prune), ("quantize", engine.quantize)):
        if section is None:
            continue
        try:
            selected = select_linears(names, section.targets, section.ignore)
        except ValueError as error:
            raise ValueError(f"{key}.{error}") from None
        if key == "prune" and "lm_head" in section.targets:
            raise ValueError("prune.targets: lm_head is the output projection, which is never pruned")
        if not set(selected) - ({"lm_head"} if key == "prune" else set()):
            raise ValueError(f"{key}: ignore leaves none of the linears that targets selects")
        if key == "prune" and engine.prune and ":" in engine.prune.mask_structure:
            group = int(engine.prune.mask_structure.partition(":")[2])
            for name in selected:
                width = shapes[name.split(".", 3)[3]][1] if name != "lm_head" else 0
                if width % group:
                    raise ValueError(
                        f"prune: {name} has {width} inputs, which do not divide into groups of {group}; "
                        "add it to ignore or set mask_structure: unstructured"
                    )


def _check_skips(drafter: Drafter, config: DecoderConfig) -> None:
    if not isinstance(skips := drafter.skip_layers, SkipLayers):
        return
    if skips.swift and config.num_layers < 3:
        raise ValueError(
            f"skip_layers: swift keeps the first and the last layer, and the model has {config.num_layers}: "
            "name layers, or take auto"
        )
    for part, layers in (("attention", skips.attention), ("mlp", skips.mlp)):
        if layers and layers[-1] >= config.num_layers:
            raise ValueError(
                f"skip_layers.{part}: there is no layer {layers[-1]}; the model's are 0 to "
                f"{config.num_layers - 1}"
            )
    if len(skips.attention) + len(skips.mlp) == 2 * config.num_layers:
        raise ValueError("skip_layers: all layers are skipped, so nothing is left to draft with")


def _check_vocabulary(drafter: Drafter, config: DecoderConfig) -> None:
    if drafter.draft_vocab_size and drafter.draft_vocab_size >= config.vocab_size:
        raise ValueError(
            f"draft_vocab_size is {drafter.draft_vocab_size}, and the model has {config.vocab_size} tokens: "
            "lower it, or leave it out to draft them all"
        )


def _check_room(recipe: Recipe, config: DecoderConfig, cache: Path, out: Path) -> Iterator[str]:
    parameters = count_parameters(config)
    # The largest thing ever held: the model in float32, where it samples its own text or is checked.
    calibration = recipe.calibration
    states = calibration.num_calibration_samples * calibration.max_seq_length * config.hidden_size * 4
    largest = max(rows * columns for rows, columns in linear_shapes(config).values())
    needed = (4 * parameters if calibration.text == "self" else 0) + states + 8 * largest
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if any(export.format == "tensorrt" for export in recipe.export):
        from ..export.tensorrt import check_memory

        check_memory({"float32": 4}.get(config.dtype, 2) * parameters, memory)
    if needed > memory:
        raise RecipeError(
            f"building this model takes about {needed / GIB:.1f} GiB of memory and this machine has "
            f"{memory / GIB:.1f}; calibrate on text files instead of self, or on fewer or shorter samples"
        )
    for folder, size in zip((cache, out), estimate_disk(recipe, config), strict=True):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if size > free:
            yield (
                f"this build writes up to {size / GIB:.1f} GiB to {folder}, "
                f"which has {free / GIB:.1f} GiB left"
            )
