"""Every packaged recipe loads, is short, says what it trades, is found by its name; the schema is current."""

import json

import pytest
from draftsmith.pipeline.errors import RecipeError
from draftsmith.pipeline.recipe import Recipe
from draftsmith.pipeline.recipe_file import (
    RECIPES,
    SCHEMA,
    dump_recipe,
    find_recipe,
    load_recipe,
    recipe_schema,
)

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_there_is_one_for_each_family_that_users_ask_for():
    sources = " ".join(load_recipe(name).recipe.model.source.lower() for name in NAMES)
    assert all(family in sources for family in ("smollm2", "opt", "llama", "qwen"))


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a bare name does not depend on where one stands
    recipe = load_recipe(name).recipe
    lines = find_recipe(name).read_text().splitlines()
    assert lines[0].startswith("# "), "the first line names the trade"
    assert len(lines) <= 20
    written = tmp_path / "resolved.yaml"
    written.write_text(dump_recipe(recipe))
    assert load_recipe(str(written)).recipe == recipe


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(RecipeError, match="did you mean smollm2-lossless"):
        find_recipe("smolm2-lossless")


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-lossless").write_text("version: 1\nmodel: {source: mine}\n")
    assert load_recipe("smollm2-lossless").recipe.model.source == "mine"


def test_the_published_schema_is_current():
    assert SCHEMA.read_text() == recipe_schema(), "run `draftsmith init --schema > recipes/schema.json`"


def test_the_schema_knows_every_key_and_forbids_others():
    schema = json.loads(SCHEMA.read_text())
    assert set(schema["properties"]) == set(Recipe.model_fields)
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
