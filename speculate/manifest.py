"""A bundle's manifest: what is in the folder, and the proof that it is what was packed."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import BundleError

SCHEMA_VERSION = 2  # that is written
READABLE = (1, SCHEMA_VERSION)
MANIFEST = "manifest.json"
PLAN = "plan.json"
RECIPE = "recipe.yaml"  # of the build, every choice filled in
REPORTS = "reports.json"  # what each stage of the build reported
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
NGRAMS = "ngrams.table"
DATASTORE = "datastore.rest"

_READ_BYTES = 256 << 10  # more is no faster, and would stay with the process
_HASH_THREADS = 2
Model = TypeVar("Model", bound=BaseModel)


class FileEntry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class TensorrtEntry(BaseModel):
    """A TensorRT engine of the bundle; what its builder said of it is kept as it is."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    file: str
    builder: str  # package and version, which must be the runtime's
    compute_capability: tuple[str, ...] = Field(strict=False)
    precision: Literal["bfloat16", "float16"]  # of the cache
    rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(strict=False, min_length=1)  # by profile, rising
    max_seq_len: int = Field(ge=1)
    num_slots: int = Field(ge=1)  # of the cache


class Skips(BaseModel):
    """What a drafter leaves out of the target, whose weights and cache it shares."""

    model_config = ConfigDict(strict=True, frozen=True)

    attention: tuple[Annotated[int, Field(ge=0)], ...] = Field((), strict=False)  # layers whose attention is
    mlp: tuple[Annotated[int, Field(ge=0)], ...] = Field((), strict=False)  # layers whose MLP is
    # In place of these: of the sublayers between the first and the last layer, to be searched while decoding.
    share: float | None = Field(None, gt=0, lt=1)
    bytes_read: float = Field(gt=0, le=1)  # of the target's weights, by one call

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.share is None) != bool(self.attention or self.mlp):
            raise ValueError("skips wants a share, or layers, and not both")
        return self

    def table(self, num_layers: int) -> NDArray[np.bool_]:
        """bool [num_layers, 2]: whether attention and MLP of each layer are left out."""
        table = np.zeros((num_layers, 2), bool)
        for part, layers in enumerate((self.attention, self.mlp)):
            table[list(layers), part] = True
        return table


class EngineEntry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    graph: str  # path of the graph that this machine's runtime loads
    portable: str | None = None
    vocab_size: int = Field(ge=1)
    max_seq_len: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    weights: str = ""
    kv_cache_dtype: Literal["float32", "bfloat16"] = "float32"  # of a cache of its own, by our operators
    eos_token_ids: tuple[int, ...] = Field(default=(), strict=False)
    bos_token_id: int | None = None
    tensorrt: tuple[TensorrtEntry, ...] = Field(default=(), strict=False)
    skips: Skips | None = None  # of the target, whose graph this then is
    draft_vocab_size: Annotated[int, Field(ge=1)] | None = None  # tokens that its head knows, if not all
    screened_bytes: Annotated[int, Field(ge=0)] = 0  # of weights that a call of greedy decoding hardly reads
    shares_cache: bool = False  # the target's, in which it drafts where both run on the CPU


class Manifest(BaseModel):
    """The part of manifest.json that decoding needs; provenance and measurements are kept as they are."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    schema_version: int
    engines: dict[str, EngineEntry]
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _check_skips(self) -> Self:
        for name, engine in self.engines.items():
            if engine.skips is None:
                continue
            target = self.engines.get("target")
            if target is None or engine is target or engine.graph != target.graph:
                raise ValueError(f"{name} leaves out layers of a graph that is not the target's")
            if any(layer >= engine.num_layers for layer in (*engine.skips.attention, *engine.skips.mlp)):
                raise ValueError(f"{name} leaves out layers that its {engine.num_layers} are not")
        return self

    def engine_files(self, engine: str) -> dict[str, FileEntry]:
        """The graph that an engine runs on the CPU and, beside it, the file of its weights: by path. None of
        one that shares the target's."""
        if self.engines[engine].skips:
            return {}
        stem = self.engines[engine].graph.rpartition(".")[0]
        return {path: file for path, file in self.files.items() if path.rpartition(".")[0] == stem}

    def fingerprint(self, engine: str) -> str:
        """SHA-256 in hex of what an engine runs on the CPU: tells models apart."""
        hashes = [file.sha256 for _, file in sorted(self.engine_files(engine).items())]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_manifest(bundle: Path, *, engines: bool = True) -> Manifest:
    """The manifest of a bundle whose every listed file is there, inside the folder and unchanged. Without
    `engines`, those of TensorRT are not read: who opens one checks it."""
    if not bundle.is_dir():
        raise BundleError(f"{bundle} is not a folder: wanted a bundle, as `draftsmith build` writes it")
    path = bundle / MANIFEST
    if not path.is_file():
        raise BundleError(f"{bundle} holds no {MANIFEST}: wanted a bundle, as `draftsmith build` writes it")
    raw = read_json(path)
    version = raw.get("schema_version")
    if version not in READABLE:
        raise BundleError(
            f"{path}: schema_version is {version!r}, this draftsmith reads "
            f"{' and '.join(map(str, READABLE))}: rebuild the bundle or install the draftsmith that wrote it"
        )
    manifest = validate(Manifest, raw, path)
    if "target" not in manifest.engines:
        raise BundleError(
            f"{path}: no engine is named target, only {', '.join(manifest.engines) or 'none at all'}"
        )
    plans = {built.file for engine in manifest.engines.values() for built in engine.tensorrt}
    files = manifest.files.items()
    check_files(bundle, {name: file for name, file in files if engines or name not in plans})
    needed = {PLAN, TOKENIZER, *plans, *(engine.graph for engine in manifest.engines.values())}
    for name in sorted(needed - manifest.files.keys()):
        raise BundleError(f"{path} lists no hash for {name}, which decoding needs: rebuild the bundle")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    import json

    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} holds a {type(value).__name__}: wanted a JSON object")
    return value


def validate(model: type[Model], raw: dict[str, Any], path: Path) -> Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path}: {where}: {first['msg']}, found {first['input']!r:.80}") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def check_files(bundle: Path, files: dict[str, FileEntry]) -> None:
    """Refuse the bundle if a file is missing, changed, or not inside its folder."""
    paths = {name: resolve_inside(bundle, name) for name in files}
    for name, path in paths.items():
        if not path.is_file():
            raise BundleError(
                f"{bundle}: {name} is missing; the manifest lists it: copy the whole bundle again"
            )
        size = path.stat().st_size
        if size != files[name].size:
            raise BundleError(
                f"{bundle}: {name} has {size} bytes, the manifest says {files[name].size}: "
                "copy the whole bundle again"
            )
    largest_first = sorted(files, key=lambda name: -files[name].size)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashlib lets go of the interpreter lock
        digests = pool.map(lambda name: hash_file(paths[name]), largest_first)
        for name, digest in zip(largest_first, digests, strict=True):
            if digest != files[name].sha256:
                raise BundleError(
                    f"{bundle}: {name} was changed: its SHA-256 is {digest}, "
                    f"the manifest says {files[name].sha256}: copy the whole bundle again"
                )


def resolve_inside(bundle: Path, name: str) -> Path:
    """The path of a file that the manifest names; refused if it leads out of the bundle, by symbolic links
    too."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise BundleError(f"{bundle}: the manifest names {name!r}, which is not a path inside the bundle")
    path = bundle / pure
    if not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(f"{bundle}: {name} leads out of the bundle, to {path.resolve()}")
    return path
