"""What is in a bundle, without opening its engines."""

from pathlib import Path
from typing import Any

import msgspec

from ..speculate.manifest import MANIFEST, PLAN, read_json, read_manifest


def inspect(bundle_dir: Path) -> dict[str, Any]:
    """Check every file against the manifest and describe the bundle. Raises BundleError for a damaged one."""
    manifest = read_manifest(bundle_dir)
    plan = read_json(bundle_dir / PLAN)
    raw = read_json(bundle_dir / MANIFEST)
    engines = {}
    for name, engine in manifest.engines.items():
        folder = engine.graph.rpartition("/")[0]
        size = sum(file.size for path, file in manifest.files.items() if path.startswith(f"{folder}/"))
        said = msgspec.to_builtins(engine) | raw["engines"][name]  # which holds more of TensorRT's engines
        said["skips"] = msgspec.to_builtins(engine.skips)
        engines[name] = said | {"bytes": 0 if engine.skips else size}
    return {
        "bundle": str(bundle_dir),
        "files_checked": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files.values()),
        "draftsmith_version": raw.get("draftsmith_version"),
        "model": raw.get("model"),
        "engines": engines,
        "plan": {
            name: plan.get(name) for name in ("ladder", "num_speculative_tokens", "verify", "predicted")
        },
        "measurements": raw.get("measurements"),
        "recipe_sha256": raw.get("recipe_sha256"),
        "packages": raw.get("packages"),
    }
