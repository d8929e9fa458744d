"""A key, value, tag or override that means nothing is refused in one clear line, never guessed at."""

import re

import pytest
from draftsmith.pipeline.errors import RecipeError
from draftsmith.pipeline.recipe import ALIASES, Recipe
from draftsmith.pipeline.recipe_file import dump_recipe, load_recipe

RECIPE = """\
version: 1
model: {source: org/name, dtype: bfloat16}
calibration: {text: self, num_calibration_samples: 64}
target: {quantize: none}
drafters:
  int8:
    quantize: {scheme: W8A8, smoothing_strength: auto}
  sparse8:
    prune: {method: sparsegpt, mask_structure: 2:4}
    quantize: {scheme: W8A8}
export: [{format: onnx, device: cpu}, {format: tensorrt, compute_capability: ["8.9"], max_seq_len: 2048}]
"""


@pytest.fixture
def load(tmp_path):
    def load(text=RECIPE, *overrides) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(str(path), overrides).recipe

    return load


def refusal(load, *arguments) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "calibration:",
            "calibratoin:",
            r"recipe\.yaml:3: calibratoin: no such key; did you mean calibration\?",
        ),
        (
            "scheme: W8A8, s",
            "shceme: W8A8, s",
            r":7: drafters\.int8\.quantize\.shceme: .* did you mean scheme\?",
        ),
        ("mask_structure", "prunen", r":9: drafters\.sparse8\.prune\.prunen: .* mask_structure: \"2:4\""),
        (
            "method",
            "zzz",
            r":9: drafters\.sparse8\.prune\.zzz: no such key; valid here: method, mask_structure",
        ),
        ("auto", "atuo", r":7: .*smoothing_strength: found 'atuo', wanted a number or 'auto' or 'none'"),
        (
            "scheme: W8A8, s",
            "targets: 're:[', s",
            r":7: .*quantize\.targets: 're:\[' is not a regular expression",
        ),
        ("auto", "1.5", r":7: .*smoothing_strength: found 1\.5, wanted at most 1"),
        ("auto", ".nan", r":7: .*smoothing_strength: found '\.nan'"),
        ("64", "'64'", r":3: calibration\.num_calibration_samples: found '64', wanted an integer"),
        ("64", "true", r":3: calibration\.num_calibration_samples: found True, wanted an integer"),
        ("64", "0", r":3: calibration\.num_calibration_samples: found 0, wanted at least 1"),
        ("2:4", "4:2", r":9: drafters\.sparse8\.prune: mask_structure is '4:2', wanted"),
        ("2:4", "2:4, sparsity: 0.6", r":9: drafters\.sparse8\.prune: sparsity is 0\.6 but .* means 0\.5"),
        ("2:4", "2:4, block_size: 6", r":9: drafters\.sparse8\.prune: block_size 6"),
        ("source: org/name, ", "", r":2: model\.source: missing"),
        ("int8:", "suffix:", r":6: drafters\.suffix: wanted a name"),
        ("int8:", "rest:", r":6: drafters\.rest: wanted a name"),
        ("int8:", "../up:", r":6: drafters\.\.\./up: wanted a name"),
        ("{quantize: none}", "[]", r":4: target: found \[\], wanted a mapping"),
        ("version: 1", "version: 2", r":1: version: found 2, wanted 1"),
        (
            "onnx, device: cpu",
            "onnx, compute_capability: [x]",
            r":11: export\.0: .* belongs to format: tensorrt",
        ),
        ("64}", "64, nsamples: 3}", r":3: calibration\.nsamples: means the same as num_calibration_samples"),
        ("drafters:\n", "drafters:\n  idle: {}\n", r":6: drafters\.idle: neither prune nor quantize"),
        (
            "scheme: W8A8, s",
            "scheme: W4A16, s",
            r":7: .*quantize\.scheme: found 'W4A16', wanted 'W8A8' or 'W4A8'",
        ),
        ("scheme: W8A8, s", "scheme: W4A8, s", r"drafters\.int8: TensorRT cannot hold .*; take scheme: W8A8"),
        ("{scheme: W8A8}", "{scheme: W4A8}", r":8: drafters\.sparse8: .* a pruned engine takes scheme: W8A8"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_was_wanted(load, old, new, expected):
    assert old in RECIPE
    assert re.search(expected, refusal(load, RECIPE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 1\nversion: 1\n", r":2: the key version is given twice \(first on line 1\)"),
        ("model: {source: a, source: b}\n", r":1: the key source is given twice"),
        ("a: !!python/object/apply:os.system [true]\n", r":1: the tag !!python/object/apply:os.system is"),
        ("a: !!python/name:os.system\n", r":1: the tag !!python/name:os\.system is refused"),
        ("a: !include /etc/passwd\n", r":1: the tag !include is refused"),
        ("a: !!binary aGk=\n", r":1: the tag !!binary is refused"),
        ("<<: {a: 1}\n", r":1: the tag !!merge is refused"),
        ("1: a\n", r":1: the key 1 is not a string"),
        ("a: [\n", r":2: not valid YAML"),
        ("a: 1\n---\na: 1\n", r":2: not valid YAML"),
        ("a: &a [*a]\n", r"an alias that contains itself"),
        ("[" * 1500, r"nested too deeply"),
        ("a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
            f"{y}: &{y} [{','.join([f'*{x}'] * 8)}]\n" for x, y in zip("abcdefg", "bcdefgh", strict=True)
        ), r"more than 10000 values"),
        ("\0", r"not valid YAML"),
        ("", r"a recipe is a mapping"),
        ("just words", r"a recipe is a mapping"),
    ],
)  # fmt: skip
def test_yaml_that_is_not_plain_data_is_refused(load, text, expected):
    assert re.search(expected, refusal(load, text))


def test_numbers_are_read_as_in_yaml_1_2(load):
    prune = load(RECIPE.replace("2:4", "2:4, dampening_frac: 1e-3")).drafters["sparse8"].prune
    assert prune is not None
    assert (prune.mask_structure, prune.dampening_frac) == ("2:4", 0.001)


SECTIONS = {
    "dampening_frac": (
        "drafters.sparse8.prune.{}=0.25",
        lambda r: r.drafters["sparse8"].prune.dampening_frac,
        0.25,
    ),
    "block_size": ("drafters.sparse8.prune.{}=64", lambda r: r.drafters["sparse8"].prune.block_size, 64),
    "ignore": ("drafters.sparse8.prune.{}=[x]", lambda r: r.drafters["sparse8"].prune.ignore, ["x"]),
    "smoothing_strength": (
        "drafters.int8.quantize.{}=0.25",
        lambda r: r.drafters["int8"].quantize.smoothing_strength,
        0.25,
    ),
    "num_calibration_samples": ("calibration.{}=7", lambda r: r.calibration.num_calibration_samples, 7),
    "max_seq_length": ("calibration.{}=7", lambda r: r.calibration.max_seq_length, 7),
    "num_speculative_tokens": ("speculate.{}=7", lambda r: r.speculate.num_speculative_tokens, 7),
    "verify": ("speculate.{}=exact_match", lambda r: r.speculate.verify, "exact"),
    "dtype": ("model.{}=float32", lambda r: r.model.dtype, "float32"),
}


@pytest.mark.parametrize("alias", [*SECTIONS, *ALIASES])
def test_names_of_other_tools_are_understood(load, alias):
    override, read, expected = SECTIONS[ALIASES.get(alias, alias)]
    assert read(load(RECIPE, override.format(alias))) == expected


@pytest.mark.parametrize("text", ["self", "notes.txt", "dataset:org/name"])
def test_a_list_of_one_text_is_that_text(load, text):
    listed = RECIPE.replace("text: self", f'text: ["{text}"]')
    assert load(listed) == load(RECIPE, f"calibration.text={text}")
    assert load(listed).calibration.text == text
    assert load(RECIPE, "calibration.text=[a.txt, b.txt]").calibration.text == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("drafters.int9.quantize.alpha=1", r"no drafter int9; it has int8, sparse8"),
        (
            "drafters.int8.quantize.alhpa=1",
            r"drafters\.int8\.quantize\.alhpa: no such key; did you mean smoothing_",
        ),
        ("drafters.int8.quantize.alpha=one", r"smoothing_strength: found 'one'"),
        ("calibration.seed", r"write section\.field=value"),
        ("=1", r"write section\.field=value"),
        ("calibration=!!python/name:os.system", r"the tag !!python/name:os\.system is refused"),
        ("calibration={seed: 1, seed: 2}", r"the key seed is given twice"),
        ("speculate.ladder=[int8, suffix]", r"suffix verifies nothing"),
        ("speculate.ladder=[int8, recycling]", r"recycling verifies nothing"),
        ("speculate.ladder=[llma, int8]", r"llma drafts from what a call is given: name it there"),
        ("speculate.ladder=[rest, int8]", r"rest drafts from a datastore: name its file, as rest: "),
        ("speculate.ladder=[int8, suffix+recycling]", r"suffix\+recycling verifies nothing"),
        ("speculate.ladder=[suffix+int8]", r"no drafter is called int8; there are: suffix, history"),
        ("speculate.ladder=[suffix+sufix]", r"no drafter is called sufix; did you mean suffix\?"),
        ("speculate.ladder=[suffix+suffix]", r"suffix\+suffix names a drafter twice"),
        (
            "speculate.ladder=[history-tree, int8]",
            r"history-tree: history proposes chains only: call it history",
        ),
        ("speculate.num_speculative_tokens=65", r"num_speculative_tokens: found 65, wanted .* at most 64"),
        ("speculate.rest.datastore=", r"speculate\.rest\.datastore: found None, wanted a string"),
        ("speculate.ladder=[int8, int8]", r"a level is named twice"),
        ("speculate.ladder=[sufix]", r"no drafter is called sufix; did you mean suffix\?"),
        (
            "speculate.num_speculative_tokens={int8: 0}",
            r"num_speculative_tokens\.int8: found 0, wanted at least 1",
        ),
    ],
)
def test_a_mistaken_override_is_named(load, override, expected):
    message = refusal(load, RECIPE, override)
    assert message.startswith(f"override {override}")
    assert re.search(expected, message)


def test_an_override_changes_what_it_names_and_nothing_else(load):
    changed = load(RECIPE, "drafters.int8.quantize.smoothing_strength=0.7").model_dump()
    assert changed["drafters"]["int8"]["quantize"].pop("smoothing_strength") == 0.7
    original = load().model_dump()
    assert original["drafters"]["int8"]["quantize"].pop("smoothing_strength") == "auto"
    assert changed == original


def test_an_override_reaches_through_none_and_the_last_one_wins(load):
    recipe = load(RECIPE, "target.quantize.alpha=0.3", "target.quantize.smoothing_strength=0.4")
    assert recipe.target.quantize is not None
    assert recipe.target.quantize.smoothing_strength == 0.4
    assert load(RECIPE, "drafters={}").drafters == {}


def test_a_written_recipe_reads_back_as_the_same_recipe(load):
    recipe = load()
    assert load(dump_recipe(recipe)) == recipe


def test_a_file_is_looked_for_beside_the_recipe_then_in_the_working_directory(tmp_path, monkeypatch):
    beside, working = tmp_path / "beside", tmp_path / "working"
    for folder, names in ((beside, ["recipe.yaml", "both.txt"]), (working, ["both.txt", "here.txt"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(RECIPE)
    monkeypatch.chdir(working)
    loaded = load_recipe(str(beside / "recipe.yaml"))
    assert loaded.find("both.txt") == beside / "both.txt"
    assert loaded.find("here.txt") == working / "here.txt"
    assert loaded.find("nowhere.txt") is None


def test_no_drafter_of_a_recipe_has_the_name_of_one_that_is_no_model():
    from draftsmith.pipeline.recipe import RESERVED
    from draftsmith.speculate.levels import DRAFTERS

    assert DRAFTERS.keys() <= set(RESERVED)


@pytest.mark.parametrize("name", ["suffix-tree", "big-tree", "big-graph"])
def test_a_compressed_copy_is_not_called_what_its_tree_would_be(load, name):
    message = refusal(load, RECIPE.replace("sparse8", name))
    assert f"drafters.{name}: wanted a name" in message and "does not end in -tree" in message


def test_a_ladder_may_begin_with_the_tree_of_a_model(load):
    for ladder in (["sparse8-tree"], ["sparse8-graph", "int8"]):
        assert load(RECIPE, f"speculate.ladder=[{', '.join(ladder)}]").speculate.ladder == ladder
    load(RECIPE, "speculate.ladder=[int8-tree]", "speculate.num_speculative_tokens.int8-tree=16")
    assert "int8-tree verifies nothing" in refusal(load, RECIPE, "speculate.ladder=[suffix, int8-tree]")
    assert "a drafter is named twice" in refusal(load, RECIPE, "speculate.ladder=[int8-tree, int8]")
    assert "no drafter is called int9; did you mean" in refusal(load, RECIPE, "speculate.ladder=[int9-tree]")


def test_what_a_ladder_drafts_from_is_asked_for(load):
    assert not load(RECIPE).speculate.needs_table
    for override in (
        "speculate.bigram=true",
        "speculate.ladder=[history+bigram, int8]",
        "speculate.ladder=[history+bigram-tree, int8]",
    ):
        assert load(RECIPE, override).speculate.needs_table
    spec = load(RECIPE, "speculate.rest.datastore=a.rest", "speculate.ladder=[rest+history, int8]").speculate
    assert spec.rest and spec.rest.datastore == "a.rest" and spec.ladder == ["rest+history", "int8"]
