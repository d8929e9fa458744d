"""Find, read and write recipes: YAML and overrides in, a checked `Recipe` or one clear line out."""

import difflib
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from .errors import RecipeError
from .recipe import Recipe, Section
from .strict_yaml import Path as KeyPath
from .strict_yaml import parse_yaml

RECIPES = Path(__file__).parent.parent / "recipes"
SCHEMA = RECIPES / "schema.json"

WANTED = {  # pydantic's types of error, in our words
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} of them",
    "string_too_short": "at least {min_length} character",
}

Origins = dict[KeyPath, str]  # where a key was written: "recipe.yaml:7", or the override


@dataclass(frozen=True)
class LoadedRecipe:
    recipe: Recipe
    path: Path

    def find(self, name: str) -> Path | None:
        """A file or folder that the recipe names: beside the recipe, else in the working directory."""
        for folder in (self.path.parent, Path()):
            path = folder / Path(name).expanduser()
            if path.exists():
                return path.resolve()
        return None


def load_recipe(name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read the recipe file, or the packaged recipe, called `name` and apply `overrides` in order.

    Raises RecipeError with the place, the path of the key, what was found and what was wanted.
    """
    path = find_recipe(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    data, lines = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    origins: Origins = {}
    data = _canonical(
        data, Recipe, (), {key: f"{path}:{line}" for key, line in lines.items()}, origins, str(path)
    )
    for override in overrides:
        _apply_override(data, override, origins)
    try:
        return LoadedRecipe(Recipe.model_validate(data), path)
    except ValidationError as error:
        raise RecipeError(_describe(error, data, origins, str(path))) from None


def find_recipe(name: str) -> Path:
    """The file `name`, or the packaged recipe of that bare name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    if name in packaged:
        return packaged[name]
    nearest = difflib.get_close_matches(name, packaged, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"packaged recipes: {', '.join(packaged)}"
    raise RecipeError(f"no recipe file {name}; {hint}")


def dump_recipe(recipe: Recipe) -> str:
    """YAML that loads to the same recipe, every default written out."""
    data = recipe.model_dump(exclude_none=True)
    for engine, kept in [(recipe.target, data["target"])] + [
        (drafter, data["drafters"][name]) for name, drafter in recipe.drafters.items()
    ]:
        if engine.quantize is None:
            kept["quantize"] = "none"
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def recipe_schema() -> str:
    """The JSON schema of a recipe, for editors; `recipes/schema.json` holds it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()
    return json.dumps(schema, indent=2) + "\n"


def _canonical(
    data: dict, section: type[Section], path: KeyPath, written: Origins, origins: Origins, place: str
) -> dict[str, Any]:
    """`data` with our own names for its keys; notes in `origins` where each was written.

    Raises RecipeError for a key that no section knows, with the nearest one that it does.
    """

    def descend(value: object, annotation: object, old: KeyPath, new: KeyPath) -> object:
        container, inner = _section_in(annotation)
        if inner is None:
            return value
        if container is dict and isinstance(value, dict):
            for key in value:
                note((*old, key), (*new, key))
            return {key: descend(item, inner, (*old, key), (*new, key)) for key, item in value.items()}
        if container is list and isinstance(value, list):
            return [descend(item, inner, (*old, index), (*new, index)) for index, item in enumerate(value)]
        return rename(value, inner, old, new) if container is None and isinstance(value, dict) else value

    def rename(mapping: dict, section: type[Section], old: KeyPath, new: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        given: dict[str, str] = {}
        for key, value in mapping.items():
            where = written.get((*old, key), place)
            try:
                name = section.canonical_key(key)
            except ValueError as error:
                raise RecipeError(f"{where}: {_dotted((*old, key))}: {error}") from None
            if name in given:
                raise RecipeError(
                    f"{where}: {_dotted((*old, key))}: means the same as {given[name]}, which is there too"
                )
            given[name] = key
            note((*old, key), (*new, name))
            result[name] = descend(value, section.model_fields[name].annotation, (*old, key), (*new, name))
        return result

    def note(old: KeyPath, new: KeyPath) -> None:
        origins[new] = written.get(old, place)

    return rename(data, section, path, path)


def _section_in(annotation: Any) -> tuple[type | None, Any]:
    """The Section that values of this type are made of, and whether they come in a dict or a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return None, annotation
    if get_origin(annotation) in (dict, list):
        inner = _section_in(get_args(annotation)[-1])[1]
        return (get_origin(annotation), inner) if inner else (None, None)
    found = (_section_in(argument) for argument in get_args(annotation))
    return next((hit for hit in found if hit[1]), (None, None))


def _apply_override(data: dict[str, Any], override: str, origins: Origins) -> None:
    dotted, equals, text = override.partition("=")
    place = f"override {override}"
    if not equals or not all(dotted.split(".")):
        raise RecipeError(
            f"{place}: write section.field=value, such as drafters.int8.quantize.smoothing_strength=0.7"
        )
    value, _ = parse_yaml(text, place, numbered=False)
    keys = dotted.split(".")
    if keys[0] == "drafters" and len(keys) > 2 and keys[1] not in data.get("drafters", {}):
        known = ", ".join(data.get("drafters", {})) or "none"
        raise RecipeError(f"{place}: the recipe has no drafter {keys[1]}; it has {known}")
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    value = _canonical(value, Recipe, (), {}, origins, place)
    # The dotted part goes down into what is there; the value at its end replaces.
    for _ in keys[:-1]:
        ((key, value),) = value.items()
        if not isinstance(data.get(key), dict):
            data[key] = {}
        data = data[key]
    data.update(value)


def _describe(error: ValidationError, data: dict, origins: Origins, name: str) -> str:
    """The first thing that is wrong, in one line."""
    found = [(*_locate(details["loc"], data), details) for details in error.errors(include_url=False)]
    # The members of a union each report: what counts is the deepest place, and all that was wanted there.
    first = found[0][0]
    path, value, _ = max(
        (item for item in found if item[0][: len(first)] == first), key=lambda item: len(item[0])
    )
    details = [details for other, _, details in found if other == path]
    others = len({other for other, _, _ in found if other[: len(first)] != first})
    match details[0]["type"]:
        case "missing":
            path = (*path, details[0]["loc"][-1])
            message = "missing"
        case "value_error":
            message = details[0]["msg"].removeprefix("Value error, ")
            # A check over the whole recipe can only name its key in the message.
            head, _, rest = message.partition(": ")
            if key := next((key for key in origins if _dotted(key) == head), None):
                path, message = key, rest
        case _:
            wanted = dict.fromkeys(map(_wanted, details))
            message = f"found {reprlib.repr(value)}, wanted {' or '.join(wanted)}"
    places = (origins[path[:length]] for length in range(len(path), 0, -1) if path[:length] in origins)
    more = f" (and {others} more)" if others else ""
    return f"{next(places, name)}: {_dotted(path)}{': ' if path else ''}{message}{more}"


def _wanted(details: Any) -> str:
    words = WANTED.get(details["type"])
    return (
        words.format(**details.get("ctx", {})) if words else details["msg"].removeprefix("Input should be ")
    )


def _locate(location: KeyPath, data: Any) -> tuple[KeyPath, Any]:
    """The path of an error in the data; pydantic mixes the members of unions into its own."""
    path: list[int | str] = []
    for key in location:
        items: Any = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(items, dict) and key in items:
            data = items[key]
            path.append(key)
    return tuple(path), data


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
