"""The gate section of a bundle's own recipe."""

from collections.abc import Sequence
from pathlib import Path

from ..speculate.manifest import RECIPE
from .errors import RecipeError
from .recipe import Gate
from .recipe_file import load_recipe


def read_settings(bundle_dir: Path, overrides: Sequence[str]) -> Gate:
    """As the bundle's recipe says, with `gate.field=value` overrides. Raises RecipeError."""
    for override in overrides:
        if not override.startswith("gate."):
            raise RecipeError(f"override {override}: the gate takes gate.field=value only")
    recipe = bundle_dir / RECIPE
    if not recipe.is_file():
        if overrides:
            raise RecipeError(f"{bundle_dir} holds no {RECIPE} that {overrides[0]} could change")
        return Gate()
    return load_recipe(str(recipe), overrides).recipe.gate
