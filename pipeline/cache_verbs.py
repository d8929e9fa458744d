"""What `draftsmith cache` does: list the cache, say why a stage ran, make room."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .cache import Cache
from .errors import RecipeError
from .explain import list_differences, nearest_entry
from .hashing import list_files


def list_cache() -> dict[str, Any]:
    """Every finished stage, the latest first; a file that several stages share counts once in the total."""
    cache = Cache()
    rows = [
        {
            "name": entry.path.name,
            "key": entry.key,
            "created": entry.created,
            "last_used": _last_used(entry.path).isoformat(),
            "seconds": entry.seconds,
            "bytes": entry.size,
        }
        for entry in cache.entries()
    ]
    return {
        "root": str(cache.root),
        "bytes": _disk_use(cache.stages, cache.work),
        "models_bytes": _disk_use(cache.models),
        "stages": rows,
    }


def explain_stage(name: str) -> dict[str, Any]:
    """Why the latest stage called `name` ran: what its key has that the nearest earlier one's had not.

    `name`: a stage ("smooth"), a stage and an engine ("smooth-int8"), or any beginning of an entry's name.
    """
    cache = Cache()
    matching = [entry for entry in cache.entries() if entry.path.name.startswith(name)]
    if not matching:
        known = ", ".join(dict.fromkeys(entry.stage for entry in cache.entries()))
        raise RecipeError(f"the cache has no stage {name}; it has {known or 'none at all'}")
    latest = matching[0]
    earlier = [entry for entry in cache.entries(latest.stage) if entry.created < latest.created]
    same = [entry for entry in earlier if entry.label == latest.label]
    nearest = nearest_entry(latest.record, same)
    return {
        "stage": latest.path.name,
        "compared_with": nearest.path.name if nearest else None,
        "differences": [str(each) for each in list_differences(nearest.record, latest.record)]
        if nearest
        else [],
        "record": latest.record,
    }


def collect_cache(unused_days: float, max_bytes: int | None, everything: bool) -> dict[str, Any]:
    """Remove entries and leftovers of crashes unused for `unused_days`, then the longest unused until
    `max_bytes` are left; or `everything`. Raises RecipeError while a build is under way."""
    cache = Cache()
    with cache.alone():
        before = _disk_use(cache.stages, cache.work)
        removed = []
        for path in sorted((entry.path for entry in cache.entries()), key=_last_used):
            too_much = max_bytes is not None and _disk_use(cache.stages, cache.work) > max_bytes
            if everything or too_much or _age(path) > unused_days:
                shutil.rmtree(path)
                removed.append(path.name)
        for folder in cache.leftovers():
            if everything or _age(folder) > unused_days:
                shutil.rmtree(folder)
                removed.append(folder.name)
        cache.drop_locks()
        after = _disk_use(cache.stages, cache.work)
    return {"root": str(cache.root), "removed": removed, "freed_bytes": before - after, "bytes": after}


def _last_used(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _age(path: Path) -> float:
    """Days since it was last used."""
    return (datetime.now(UTC) - _last_used(path)).total_seconds() / 86400


def _disk_use(*folders: Path) -> int:
    stats = [stat for folder in folders if folder.exists() for stat in list_files(folder).values()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())
