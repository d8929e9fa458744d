"""A pattern in `targets` or `ignore` selects what it says, or is an error that names it and the nearest
names."""

import pytest
from draftsmith.model.errors import ModelError
from draftsmith.model.select import select_linears

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in KINDS] + ["lm_head"]


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["Linear"], [], NAMES),
        (["Linear"], ["lm_head"], NAMES[:-1]),
        (["model.layers.1.mlp.down_proj"], [], ["model.layers.1.mlp.down_proj"]),  # not layer 11's
        (["*.down_proj"], [], [n for n in NAMES if n.endswith("down_proj")]),
        (["*.layers.1.*"], ["*_proj"], []),
        (
            ["re:.*\\.(q|o)_proj$"],
            ["re:model\\.layers\\.\\d\\."],
            [n for n in NAMES[40:48] if "self_attn" in n],
        ),
        (["lm_head", "model.layers.0.mlp.gate_proj"], [], ["model.layers.0.mlp.gate_proj", "lm_head"]),
    ],
)
def test_patterns_select(targets, ignore, expected):
    assert select_linears(NAMES, targets, ignore) == expected


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("model.layers.12.mlp.down_proj", "model.layers.11.mlp.down_proj"),
        ("*.dwon_proj", "*.down_proj"),
        ("linear", "Linear"),
        ("lmhead", "lm_head"),
        ("down_proj", "*.down_proj"),  # a bare kind is not a full name
        ("re:mlp", "*.gate_proj"),  # an expression matches from the start
        ("", "lm_head"),
    ],
)
@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_named(key, pattern, nearest):
    lists = {"targets": ["Linear"], "ignore": []} | {key: ["lm_head", pattern]}
    with pytest.raises(ModelError) as error:
        select_linears(NAMES, **lists)
    assert key in str(error.value) and repr(pattern) in str(error.value) and nearest in str(error.value)


def test_a_broken_expression_is_an_error_of_the_user():
    with pytest.raises(ModelError, match="regular expression"):
        select_linears(NAMES, ["re:(["], [])
