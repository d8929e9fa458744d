"""The Python of docs/rules.md runs as it stands, one block behind the other, and says what it is said to."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"


@pytest.fixture(scope="module")
def found():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def expect_law(counts: np.ndarray, law: np.ndarray) -> None:
    """Within five standard deviations, and never what has no chance."""
    total = counts.sum()
    assert np.all(abs(counts - law * total) <= 5 * np.sqrt(law * (1 - law) * total))


def test_a_rule_by_itself_says_the_targets_law(found):
    assert found["said"].sum() == 20_000
    expect_law(found["said"], found["p"][0])


def test_a_ladder_over_a_model_of_ones_own_says_its_law(found):
    assert found["pairs"].sum() == 6_000 and found["decoder"].counters(0).drafted > 0
    for counts, law in zip(found["pairs"], found["chances"], strict=True):
        expect_law(counts, law)
