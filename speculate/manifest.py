"""A bundle's manifest: what is in the folder, and the proof that it is what was packed.

What a bundle says of itself is read by msgspec. Pydantic reads what people write: its memory (10 MB) and its
import (60 ms) are not for every process that decodes.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

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
Model = TypeVar("Model", bound=Struct)
Number = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class FileEntry(Struct, frozen=True):
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size: Number


class TensorrtEntry(Struct, frozen=True):
    """A TensorRT engine of the bundle. The manifest holds more that its builder said of it."""

    file: str
    builder: str  # package and version, which must be the runtime's
    compute_capability: tuple[str, ...]
    precision: Literal["bfloat16", "float16"]  # of the cache
    rows: Annotated[tuple[Positive, ...], Meta(min_length=1)]  # by profile, rising
    max_seq_len: Positive
    num_slots: Positive  # of the cache


class Skips(Struct, frozen=True, kw_only=True):
    """What a drafter leaves out of the target, whose weights and cache it shares."""

    attention: tuple[Number, ...] = ()  # layers whose attention is
    mlp: tuple[Number, ...] = ()  # layers whose MLP is
    # In place of these: of the sublayers between the first and the last layer, to be searched while decoding.
    share: Annotated[float, Meta(gt=0, lt=1)] | None = None
    bytes_read: Annotated[float, Meta(gt=0, le=1)]  # of the target's weights, by one call

    def __post_init__(self) -> None:
        if (self.share is None) != bool(self.attention or self.mlp):
            raise ValueError("skips wants a share, or layers, and not both")

    def table(self, num_layers: int) -> NDArray[np.bool_]:
        """bool [num_layers, 2]: whether attention and MLP of each layer are left out."""
        table = np.zeros((num_layers, 2), bool)
        for part, layers in enumerate((self.attention, self.mlp)):
            table[list(layers), part] = True
        return table


class EngineEntry(Struct, frozen=True, kw_only=True):
    graph: str  # path of the graph that this machine's runtime loads
    portable: str | None = None
    vocab_size: Positive
    max_seq_len: Positive
    num_layers: Positive
    num_kv_heads: Positive
    head_dim: Positive
    weights: str = ""
    kv_cache_dtype: Literal["float32", "bfloat16"] = "float32"  # of a cache of its own, by our operators
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    tensorrt: tuple[TensorrtEntry, ...] = ()
    skips: Skips | None = None  # of the target, whose graph this then is
    draft_vocab_size: Positive | None = None  # tokens that its head knows, if not all
    screened_bytes: Number = 0  # of weights that a call of greedy decoding hardly reads
    shares_cache: bool = False  # the target's, in which it drafts where both run on the CPU


class Manifest(Struct, frozen=True):
    """The part of manifest.json that decoding needs. The file holds provenance and measurements too."""

    schema_version: int
    engines: dict[str, EngineEntry]
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        for name, engine in self.engines.items():
            if engine.skips is None:
                continue
            target = self.engines.get("target")
            if target is None or engine is target or engine.graph != target.graph:
                raise ValueError(f"{name} leaves out layers of a graph that is not the target's")
            if any(layer >= engine.num_layers for layer in (*engine.skips.attention, *engine.skips.mlp)):
                raise ValueError(f"{name} leaves out layers that its {engine.num_layers} are not")

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
    """What a file holds, less the keys that the model has not. Raises BundleError."""
    try:
        return msgspec.convert(raw, model)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path}: {_describe(error, model, raw)}") from error


def _describe(error: msgspec.ValidationError, model: type[Struct], raw: Any) -> str:
    """Where it is, what was wanted, what was found. `raw` is spent on it."""
    placed = re.fullmatch(r"(.*) - at `\$(.*)`", str(error), re.DOTALL)
    wanted, place = placed.groups() if placed else (str(error), "")
    names, kind, found = [], model, raw
    try:
        for step in re.findall(r"\[\.\.\.\]|\w+", place):
            key = _find_key(error, model, raw, found) if step == "[...]" else step
            names.append(key)
            kind, found = _step_into(kind, key), found[int(key) if isinstance(found, list) else key]
    except (LookupError, ValueError, TypeError):  # such words may come from the file itself
        return str(error)
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            wanted = f"Expected {' or '.join(map(repr, get_args(part)))}"
    return f"{'.'.join(names)}: {wanted}, found {found!r:.80}".removeprefix(": ")


def _find_key(error: msgspec.ValidationError, model: type[Struct], raw: Any, found: dict[str, Any]) -> str:
    """msgspec says [...] for any key of a dict: the one that it means brings the same error alone."""
    for key, value in dict(found).items():
        found.clear()
        found[key] = value
        try:
            msgspec.convert(raw, model)
        except msgspec.ValidationError as other:
            if str(other) == str(error):
                return key
    raise KeyError


def _step_into(kind: Any, key: str) -> Any:
    """The type of what a value of this type has at a key."""
    for part in (kind, *get_args(kind)):  # of a union too
        if isinstance(part, type) and issubclass(part, Struct):
            return get_type_hints(part)[key]
        if get_origin(part) is dict:
            return get_args(part)[1]
        if get_origin(part) is tuple:
            return get_args(part)[0]
    raise KeyError


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
