"""Put bundles together: engines, tokenizer, plan, and a manifest with the hash of every file."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..speculate.levels import TARGET
from ..speculate.manifest import (
    CHAT_TEMPLATE,
    DATASTORE,
    MANIFEST,
    NGRAMS,
    PLAN,
    SCHEMA_VERSION,
    TOKENIZER,
)
from .errors import RecipeError
from .hashing import hash_file, list_files, package_version

ENGINE_FILE = "engine.json"  # in an export: what the manifest says of the engine, and its files
TENSORRT_FILE = "tensorrt.json"  # beside a TensorRT engine: what the manifest says of it
MODEL_FILES = (TOKENIZER, CHAT_TEMPLATE, "generation_config.json")
NO_PLAN = {"ladder": [], "num_speculative_tokens": {}, "verify": "block"}

Place = Callable[[Path, Path], None]  # (source, destination)


@dataclass(frozen=True)
class Layout:
    """What goes into a bundle: files by their relative path, and the manifest that lists them."""

    sources: dict[str, Path]
    texts: dict[str, str]
    manifest: dict[str, Any]

    def write(self, folder: Path, place: Place) -> None:
        """Fill `folder`, the manifest last."""
        for name, source in self.sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            place(source, folder / name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / MANIFEST).write_text(self._manifest_text(), encoding="utf-8")

    def difference(self, folder: Path) -> str:
        """Why `folder` is not this bundle, or "" if it is."""
        path = folder / MANIFEST
        if not path.is_file():
            return "first time"
        if path.read_text(encoding="utf-8") != self._manifest_text():
            return "its content changed"
        written = path.stat().st_mtime_ns
        found = list_files(folder)
        for name, facts in self.manifest["files"].items():
            if name not in found or found[name].st_size != facts["size"] or found[name].st_mtime_ns > written:
                return f"{name} was {'edited' if name in found else 'deleted'}"
        return ""

    def _manifest_text(self) -> str:
        return json.dumps(self.manifest, indent=2) + "\n"


def lay_out(
    engines: Mapping[str, Path],
    model: Path,
    texts: Mapping[str, str],
    provenance: Mapping[str, Any],
    compiled: Mapping[str, Sequence[Path]] | None = None,
    tables: Mapping[str, Path] | None = None,
    sharing: Collection[str] = (),
) -> Layout:
    """A bundle of exports by engine, the target first, the tokenizer of the checkpoint `model`, and `texts`
    by file name. An export that says what it skips is the target's otherwise.
    `compiled`: the folders of TensorRT's engines, by engine; `tables`: what drafters read, by file name;
    `sharing`: the drafters that draft in the target's cache."""
    sources: dict[str, Path] = {}
    files: dict[str, dict] = {}
    entries: dict[str, dict] = {}
    for name, export in engines.items():
        prefix = TARGET if name == TARGET else f"drafters/{name}"
        entry = json.loads((export / ENGINE_FILE).read_text())
        if "skips" in entry:
            shared = {key: value for key, value in entries[TARGET].items() if key != "tensorrt"}
            entries[name] = shared | entry | {"shares_cache": True}
            continue
        for file, facts in entry.pop("files").items():
            sources[f"{prefix}/{file}"] = export / file
            files[f"{prefix}/{file}"] = facts
        entries[name] = entry | {key: f"{prefix}/{entry[key]}" for key in ("graph", "portable")}
        entries[name]["shares_cache"] = name in sharing
        for folder in (compiled or {}).get(name, ()):
            built = json.loads((folder / TENSORRT_FILE).read_text())
            file, digest = built["file"], built.pop("sha256")
            sources[f"{prefix}/{file}"] = folder / file
            files[f"{prefix}/{file}"] = {"sha256": digest, "size": built["size"]}
            entries[name].setdefault("tensorrt", []).append(built | {"file": f"{prefix}/{file}"})
    named = {file: model / file for file in MODEL_FILES if (model / file).exists()} | dict(tables or {})
    for file, source in named.items():
        sources[file] = source
        files[file] = {"sha256": hash_file(source), "size": source.stat().st_size}
    for file, text in texts.items():
        data = text.encode()
        files[file] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "draftsmith_version": package_version("draftsmith"),
        "engines": entries,
        **provenance,
        "files": dict(sorted(files.items())),
    }
    return Layout(sources, dict(texts), manifest)


def list_tables(ngrams: Path | None, datastore: Path | None) -> dict[str, Path]:
    """What drafters read, by its name in the bundle: the stage's folder with n-grams, and a datastore."""
    tables = {} if ngrams is None else {NGRAMS: ngrams / NGRAMS}
    return tables if datastore is None else tables | {DATASTORE: datastore}


def try_bundle(
    work: Path,
    inputs: Mapping[str, Path],
    datastore: Path | None = None,
    sharing: Collection[str] = (),
) -> Path:
    """A bundle to measure, made of links, from the inputs "model", "engine NAME" and possibly "plan" and
    "ngrams"."""
    folder = work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    plan = json.loads((inputs["plan"] / PLAN).read_text()) if "plan" in inputs else NO_PLAN
    names = [name for name in inputs if name.startswith("engine ")]
    engines = {name.removeprefix("engine "): inputs[name] for name in names}
    tables = list_tables(inputs.get("ngrams"), datastore)
    layout = lay_out(engines, inputs["model"], {PLAN: json.dumps(plan)}, {}, tables=tables, sharing=sharing)
    layout.write(folder, link_file)
    return folder


def check_output(out: Path) -> None:
    """Raises RecipeError unless `out` can become a bundle without losing anything that is not one's."""
    if out.is_file():
        raise RecipeError(f"-o {out} is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        known = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError(f"-o {out} is there and is no bundle, so it is left alone; give another") from None
    strangers = [name for name in list_files(out) if name not in known and name != MANIFEST]
    if strangers:
        raise RecipeError(
            f"-o {out} holds {strangers[0]}, which is no part of its bundle; move it, or give another folder"
        )


def publish(out: Path, layout: Layout) -> str:
    """Make `out` the bundle; returns why it had to be written, or "" if it was there.

    It is copied: a bundle is its user's to edit, and the cache must not change with it. Only one process at a
    time may do this to one folder.
    """
    check_output(out)
    why = layout.difference(out)
    if not why:
        return ""
    out.parent.mkdir(parents=True, exist_ok=True)
    _exchange(out, lambda part: layout.write(part, copy_file))
    return why


def _exchange(out: Path, fill: Callable[[Path], None]) -> None:
    """Put the folder that `fill` writes in the place of `out`; as it was, if that fails."""
    part, old = (out.parent / f".{out.name}.{suffix}" for suffix in ("part", "old"))
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a build that was killed
        part.mkdir()
        fill(part)
        if out.exists():
            out.rename(old)
        try:
            part.rename(out)
        except OSError:
            old.rename(out)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def replace_files(bundle_dir: Path, texts: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Change text files of a bundle together with their hashes, and add `facts` to its manifest: a folder
    with all files, most of them as links, takes the place of the old one, so nobody sees half of it."""
    out = bundle_dir.absolute()
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8")) | facts
    for name, text in texts.items():
        data = text.encode()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    sources = {name: out / name for name in manifest["files"] if name not in texts}
    _exchange(out, lambda part: Layout(sources, dict(texts), manifest).write(part, link_file))


def link_file(source: Path, destination: Path) -> None:
    """A second name for the same file, or a copy where the file system has no such thing."""
    try:
        os.link(source, destination)
    except OSError:
        copy_file(source, destination)


def copy_file(source: Path, destination: Path) -> None:
    """A copy that shares its blocks with the source where the file system can, and never its inode."""
    with source.open("rb") as reader, destination.open("wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left:
                copied = os.copy_file_range(reader.fileno(), writer.fileno(), left)
                if not copied:
                    break
                left -= copied
        except OSError:  # between file systems, on older kernels
            shutil.copyfileobj(reader, writer)
