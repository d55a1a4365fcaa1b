"""Agreement of predicted and observed cells against SciPy and cells made by hand."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
from helpers import METRICS, cells
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ntkdp.advisor import CellMetrics, regret
from ntkdp.comparison import agreement


def random_cells(seed: int, size: int = 30, lost: int = 0) -> CellMetrics:
    rng = np.random.default_rng(seed)
    diverged = np.arange(size) >= size - lost
    return cells(diverged, **{name: rng.uniform(0.1, 1.0, size) for name in METRICS})


def test_every_metric_against_scipy_and_numpy() -> None:
    predicted, observed = random_cells(0), random_cells(1)
    found = agreement(predicted, observed)
    assert tuple(found.metrics) == METRICS
    for name in METRICS:
        mine, theirs = getattr(predicted, name), getattr(observed, name)
        expected = scipy.stats.spearmanr(mine, theirs).statistic
        np.testing.assert_allclose(found.metrics[name].spearman, expected, rtol=1e-12)
        difference = np.abs(mine - theirs)
        np.testing.assert_allclose(
            found.metrics[name][1:], [np.median(difference), np.max(difference)], rtol=1e-14
        )
    assert (found.divergence_called_right, found.n_cells, found.n_converged) == (1.0, 30, 30)


def test_diverged_cells_are_last_and_tied() -> None:
    """With what diverged replaced by one value that is worse than all, it is SciPy's number."""
    predicted, observed = random_cells(2, lost=5), random_cells(3, lost=9)
    found = agreement(predicted, observed)
    for name, worst in (("test_loss", 99.0), ("test_accuracy", -1.0)):
        sides = [
            np.where(side.diverged, worst, getattr(side, name)) for side in (predicted, observed)
        ]
        expected = scipy.stats.spearmanr(*sides).statistic
        np.testing.assert_allclose(found.metrics[name].spearman, expected, rtol=1e-12)
        kept = slice(0, 21)
        difference = np.abs(getattr(predicted, name) - getattr(observed, name))[kept]
        assert found.metrics[name].largest_difference == np.max(difference)
        assert found.metrics[name].median_difference == np.median(difference)
    assert found.divergence_called_right == 26 / 30
    assert found.n_converged == 21


@given(
    arrays.arrays(np.float64, (2, 12), elements=st.floats(0.01, 1.0)),
    arrays.arrays(np.bool_, (2, 12)),
    st.permutations(range(12)),
)
def test_invariances(values: Any, lost: Any, order: Any) -> None:
    """Neither the order of the cells nor the numbers of diverged ones matter; sides may swap."""
    first, second = (cells(d, loss=v) for v, d in zip(values, lost, strict=True))
    found = agreement(first, second)
    spearman = found.metrics["loss"].spearman
    assert np.isnan(spearman) or -1 <= spearman <= 1 + 1e-12
    np.testing.assert_allclose(
        agreement(second, first).metrics["loss"], found.metrics["loss"], rtol=1e-9
    )
    moved = [
        cells(d[order], loss=np.where(d, np.nan, v)[order])
        for v, d in zip(values, lost, strict=True)
    ]
    again = agreement(*moved)
    np.testing.assert_allclose(again.metrics["loss"], found.metrics["loss"], rtol=1e-9, atol=1e-12)
    assert again[1:] == found[1:]


def test_rounding_does_not_rank() -> None:
    """Cells with one product of learning rate and norm differ by rounding, either way."""
    exact = np.array([0.5, 0.5, 0.25, 0.25, 0.1])
    noise = np.array([1.0, -1.0, -1.0, 1.0, 1.0]) * 1e-12
    found = agreement(cells(loss=exact + noise), cells(loss=exact - noise))
    np.testing.assert_allclose(found.metrics["loss"].spearman, 1.0, rtol=1e-12)


def test_constant_sides_and_no_common_cell_give_nan() -> None:
    found = agreement(cells(loss=[1.0, 1.0, 1.0]), cells(loss=[1.0, 2.0, 3.0]))
    assert np.isnan(found.metrics["loss"].spearman)
    assert found.metrics["loss"].largest_difference == 2.0
    found = agreement(
        cells([True, False], loss=[1.0, 2.0]), cells([False, True], loss=[1.0, np.nan])
    )
    assert found.metrics["loss"].spearman == pytest.approx(-1.0)
    assert np.all(np.isnan(found.metrics["loss"][1:]))
    assert found[1:] == (0.0, 2, 0)


def test_metrics_of_one_side_alone_are_left_out() -> None:
    found = agreement(
        cells(loss=[1.0, 2.0], accuracy=[0.5, 0.6]), cells(loss=[1.0, 2.0], ece=[0.1, 0.2])
    )
    assert list(found.metrics) == ["loss"]


def test_a_value_that_is_not_finite_counts_as_diverged_in_its_metric() -> None:
    found = agreement(
        cells(loss=[1.0, 2.0, 3.0], test_loss=[1.0, 2.0, np.nan]),
        cells(loss=[1.0, 2.0, 3.0], test_loss=[1.5, 2.0, 9.0]),
    )
    assert found.metrics["test_loss"] == pytest.approx((1.0, 0.25, 0.5))
    assert found.n_converged == 3


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("test_loss", [0.1, 0.0, 0.4, 9.0, np.inf]),
        ("test_accuracy", [0.0, 0.01, 0.5, 0.1, np.inf]),
        # Of the cells with accuracies of at least 0.9 - 0.02 the least error is 0.08, not 0.01.
        ("test_ece", [0.02, 0.0, 0.0, 0.42, np.inf]),
    ],
)
def test_regret_by_hand(objective: str, expected: list[float]) -> None:
    observed = cells(
        [False, False, False, True, True],
        test_loss=[0.6, 0.5, 0.9, 9.5, np.nan],
        test_accuracy=[0.9, 0.89, 0.4, 0.8, np.nan],
        test_ece=[0.1, 0.08, 0.01, 0.5, np.nan],
    )
    found = [regret(observed, cell, objective) for cell in range(5)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(
    arrays.arrays(np.float64, (3, 9), elements=st.floats(0.0, 1.0)),
    arrays.arrays(np.bool_, 9),
    st.integers(0, 8),
    st.sampled_from(["loss", "accuracy", "ece"]),
)
def test_regret_is_never_negative_and_somewhere_zero(
    values: Any, lost: Any, chosen: int, objective: str
) -> None:
    lost[0] = False
    observed = cells(lost, loss=values[0], accuracy=values[1], ece=values[2])
    assert regret(observed, chosen, objective) >= 0
    assert min(regret(observed, cell, objective) for cell in range(9) if not lost[cell]) == 0


def test_regret_without_a_best() -> None:
    assert np.isnan(regret(cells([True, True], loss=[2.0, np.nan]), 0, "loss"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chosen": 2}, ValueError, r"chosen must be in 0 \.\. 1, got 2"),
        ({"chosen": -1}, ValueError, "chosen must be in"),
        ({"chosen": True}, TypeError, "chosen must be the index of a cell, got True"),
        ({"chosen": 0.5}, TypeError, "chosen"),
        ({"objective": "los"}, ValueError, "did you mean 'loss'"),
        ({"objective": "test_loss"}, ValueError, "a metric that observed has, loss, accuracy"),
        ({"slack": -0.1}, ValueError, "slack must be at least 0"),
        ({"observed": None}, TypeError, "observed"),
    ],
)
def test_bad_input_of_regret(change: dict[str, Any], error: Any, message: str) -> None:
    options: dict[str, Any] = {"chosen": 0, "objective": "loss"}
    options["observed"] = cells(loss=[1.0, 2.0], accuracy=[0.1, 0.2])
    with pytest.raises(error, match=message):
        regret(**(options | change))


def test_bad_input_of_agreement() -> None:
    one = cells(loss=[1.0, 2.0])
    with pytest.raises(TypeError, match="predicted"):
        agreement({"loss": [1.0]}, one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="observed must have the cells of predicted, 2, got 3"):
        agreement(one, cells(loss=[1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="predicted must have arrays of one shape"):
        agreement(cells([False] * 3, loss=[1.0, 2.0]), one)
    with pytest.raises(ValueError, match="C >= 1"):
        agreement(cells(np.zeros(0, bool), loss=[]), one)
