"""What this machine can run and build, and what is missing for the rest."""

import importlib.util
import shutil
from typing import Any

from .cache import default_root
from .hashing import package_version
from .machine import describe_machine
from .preflight import BUILD_PACKAGES
from .processor import num_threads, vector_extensions

GIB = 2**30


def diagnose() -> dict[str, Any]:
    """Facts and verdicts as JSON data; looks at nothing but this machine, and changes nothing."""
    root = default_root()
    folder = next(path for path in (root, *root.absolute().parents) if path.exists())
    packages = (
        "numpy",
        "onnxruntime",
        "tokenizers",
        *(name for name in BUILD_PACKAGES if name != "onnxruntime"),
    )
    return {
        "machine": describe_machine(),
        "threads": num_threads(),
        "vector_extensions": vector_extensions(),
        "packages": {name: package_version(name) for name in packages},
        "onnxruntime_providers": _providers(),
        "cache": {"root": str(root), "free_gib": round(shutil.disk_usage(folder).free / GIB, 1)},
        "can": {
            "run a bundle": _why_not_run(),
            "build a bundle": _why_not_build(),
            "export to tensorrt": "not supported by this version",
        },
    }


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return onnxruntime.get_available_providers()


def _why_not_run() -> str:
    """Empty if it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'draftsmith[cpu]'"
    try:
        from ..speculate import binding

        binding.lib  # noqa: B018 (loads the native library)
    except Exception as error:  # whatever keeps it from loading is the answer
        return f"the native library does not load: {error}"
    return ""


def _why_not_build() -> str:
    missing = [name for name in BUILD_PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: pip install 'draftsmith[build,cpu]'" if missing else ""
