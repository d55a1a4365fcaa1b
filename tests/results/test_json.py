"""Numbers that are not finite: one spelling in every file and output, and every reader takes it."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkdp import claims, table_one
from ntkdp._results import plain_json
from ntkdp.claims import _claim
from ntkdp.cli._verification import run

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
TREES = st.recursive(
    NUMBERS | st.none() | st.booleans() | st.integers(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=10,
)


def _strictly(text: str) -> Any:
    """As a reader that knows the standard alone."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


@given(NUMBERS)
def test_no_number_is_lost(value: float) -> None:
    read = _strictly(plain_json.as_text({"value": value, "other": np.float64(value)}))
    for entry in read.values():
        np.testing.assert_equal(float(entry), value)


@given(TREES)
def test_any_tree_is_valid_json_and_finite_ones_stay_as_they_are(tree: Any) -> None:
    read = _strictly(plain_json.as_text(tree))
    if "nan" not in str(tree) and "inf" not in str(tree):
        assert read == tree


@pytest.mark.parametrize(
    ("value", "text"), [(math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"), (None, None)]
)
def test_claims_and_table_one_spell_as_all_do(value: Any, text: Any) -> None:
    assert plain_json.as_json(value) == text
    if value is None:
        return
    finding = _claim.equal("q", value, 1.0, within=0.1)
    verdict = claims.Verdict("C1", "s", "a", "derived", (finding,), 0.1)
    (read,) = _strictly(run.as_json([verdict]))
    assert read["measured"] == read["findings"][0]["measured"] == text
    cell = table_one.Cell("symmetric", False, False, "evidence", value, True)
    assert _strictly(json.dumps(cell.as_dict()))["value"] == text
