"""Where draftsmith keeps what it can make again."""

import os
from pathlib import Path


def default_root() -> Path:
    return Path(os.environ.get("DRAFTSMITH_CACHE") or "~/.cache/draftsmith").expanduser()
