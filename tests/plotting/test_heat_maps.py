"""What maps and trade-offs draw is what was given, and can be read."""

import inspect
import sys
from typing import Any

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from helpers import METRICS, cells
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ntkdp import plotting
from ntkdp.advisor import CellMetrics, pareto_front

RATES, NORMS = [1.0, 0.1, 0.01], [0.1, 1.0, 10.0, 100.0]
SHOWN = ("test_accuracy", "test_ece", "test_mce", "test_loss")


@pytest.fixture(autouse=True)
def _global_state_untouched() -> Any:
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def sweep(seed: int, lost: Any = ()) -> CellMetrics:
    """Random cells of the grid, some of which diverged, the first of those without a number."""
    rng = np.random.default_rng(seed)
    diverged = np.isin(np.arange(12), lost)
    values = {name: rng.uniform(0.05, 0.95, 12) for name in METRICS}
    for name, array in values.items():
        array[diverged] = 40.0 if name.endswith("loss") else 0.5
        array[list(lost)[:1]] = np.nan
    return cells(diverged, **values)


PREDICTED, OBSERVED = sweep(0, lost=[3, 2]), sweep(1, lost=[3, 2, 7])


def panels(figure: Figure) -> dict[str, Any]:
    return {ax.get_title(): ax for ax in figure.axes if ax.get_title()}


def mesh_of(ax: Any) -> QuadMesh:
    (mesh,) = (found for found in ax.collections if isinstance(found, QuadMesh))
    return mesh


def numbers(ax: Any) -> np.ndarray:
    """Texts of the cells, by increasing learning rate and norm."""
    found = np.full((len(RATES), len(NORMS)), "", object)
    for text in ax.texts:
        x, y = text.get_position()
        found[int(y), int(x)] = text.get_text()
    return found


def by_rate(values: Any) -> np.ndarray:
    """Cells of the sweep, whose rates fall, by increasing rate."""
    return np.asarray(values).reshape(len(RATES), len(NORMS))[::-1]


def test_every_panel_draws_what_was_given() -> None:
    figure = plotting.heat_maps(PREDICTED, OBSERVED, RATES, NORMS, title="a sweep")
    found = panels(figure)
    words = {"accuracy": "accuracy (%)", "ece": "ECE (%)", "mce": "MCE (%)", "loss": "loss"}
    assert list(found) == [
        f"test {words[name.removeprefix('test_')]}, {side}"
        for name in SHOWN
        for side in ("predicted", "observed")
    ]
    for name, (left, right) in zip(
        SHOWN, np.reshape(list(found.values()), (4, 2)).tolist(), strict=True
    ):
        for ax, metrics in ((left, PREDICTED), (right, OBSERVED)):
            factor = 1 if name == "test_loss" else 100
            expected, lost = by_rate(factor * getattr(metrics, name)), by_rate(metrics.diverged)
            drawn = np.ma.masked_array(mesh_of(ax).get_array()).reshape(expected.shape)
            np.testing.assert_array_equal(np.ma.getmaskarray(drawn), lost)
            np.testing.assert_allclose(drawn[~lost], expected[~lost], rtol=1e-14)
            for text, value, gone in zip(numbers(ax).flat, expected.flat, lost.flat, strict=True):
                if gone:
                    assert text.splitlines()[0] == "div."
                    shown = text.splitlines()[1:]
                    assert bool(shown) == np.isfinite(value)
                    assert all(float(number) == pytest.approx(value) for number in shown)
                else:
                    error = 0.0501 if factor == 100 else 0.0051 * value
                    assert abs(float(text) - value) < error
    assert figure.get_suptitle() == "a sweep"


@pytest.mark.parametrize("chosen", [0, 5, len(RATES) * len(NORMS) - 1])
def test_a_chosen_cell_has_a_star_in_every_panel(chosen: int) -> None:
    figure = plotting.heat_maps(PREDICTED, OBSERVED, RATES, NORMS, chosen=chosen)
    row, column = np.argwhere(by_rate(np.arange(len(RATES) * len(NORMS))) == chosen)[0]
    for ax in panels(figure).values():
        (star,) = ax.lines
        (x,), (y,) = star.get_data()
        assert (int(x), int(y)) == (column, row)


@pytest.mark.parametrize("chosen", [-1, len(RATES) * len(NORMS)])
def test_a_chosen_cell_is_one_of_the_cells(chosen: int) -> None:
    with pytest.raises(ValueError, match=f"chosen must be in 0 .. 11 or None, got {chosen}"):
        plotting.heat_maps(PREDICTED, OBSERVED, RATES, NORMS, chosen=chosen)


def test_diverged_cells_are_hatched_and_grey() -> None:
    figure = plotting.heat_maps(PREDICTED, OBSERVED, RATES, NORMS)
    for title, ax in panels(figure).items():
        lost = by_rate((PREDICTED if "predicted" in title else OBSERVED).diverged)
        boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        places = {(int(box.get_y()), int(box.get_x())) for box in boxes}
        assert places == {(row, column) for row, column in np.argwhere(lost)}
        for box in boxes:
            assert box.get_hatch()
            assert len(set(box.get_facecolor()[:3])) == 1
            assert (box.get_width(), box.get_height()) == (1, 1)
    (legend,) = figure.legends
    assert [text.get_text()[:13] for text in legend.get_texts()] == ["div.: diverge"]
    unharmed = plotting.heat_maps(sweep(0), None, RATES, NORMS)
    assert [text.get_text() for text in unharmed.legends[0].get_texts()] == []


def test_axes_have_plain_numbers_and_the_largest_rate_on_top() -> None:
    figure = plotting.heat_maps(PREDICTED, OBSERVED, RATES, NORMS)
    figure.draw_without_rendering()
    axes = list(panels(figure).values())
    for ax in axes:
        low, high = ax.get_ylim()
        assert low < high
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == ["0.01", "0.1", "1"]
    assert axes[0].get_yticks().tolist() == [0.5, 1.5, 2.5]
    assert [label.get_text() for label in axes[-1].get_xticklabels()] == ["0.1", "1", "10", "100"]
    assert {ax.get_ylabel() for ax in axes[::2]} == {"learning rate"}
    assert {ax.get_xlabel() for ax in axes[-2:]} == {"clipping norm $R$"}
    figure = plotting.heat_maps(
        cells(loss=np.ones(8)), None, [2.0**-7, 4096.0], [1e-6, 3e7, 1 / 3, 1e-4], names=["loss"]
    )
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.007812", "4096"]
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["1e-06", "0.0001", "0.3333", "3e+07"]


def test_one_scale_a_pair_over_what_converges() -> None:
    figure = plotting.heat_maps(PREDICTED, OBSERVED, RATES, NORMS)
    axes = list(panels(figure).values())
    for name, left, right in zip(SHOWN, axes[::2], axes[1::2], strict=True):
        scale: Any = mesh_of(left).norm
        assert id(scale) == id(mesh_of(right).norm)
        kept = np.concatenate(
            [getattr(side, name)[~side.diverged] for side in (PREDICTED, OBSERVED)]
        )
        factor = 1 if name == "test_loss" else 100
        np.testing.assert_allclose(
            [float(scale.vmin), float(scale.vmax)],
            [factor * kept.min(), factor * kept.max()],
            rtol=1e-14,
        )
        assert isinstance(scale, LogNorm) == (name == "test_loss")
    # One colour bar a row next to its two panels.
    assert len(figure.axes) == 3 * len(SHOWN)


def luminance(colour: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_the_better_the_brighter_and_every_number_is_readable() -> None:
    figure = plotting.heat_maps(PREDICTED, OBSERVED, RATES, NORMS)
    figure.draw_without_rendering()
    for title, ax in panels(figure).items():
        mesh = mesh_of(ax)
        values = np.ma.masked_array(mesh.get_array()).ravel()
        faces = np.array([luminance(face[:3]) for face in np.asarray(mesh.get_facecolor())])
        kept = ~np.ma.getmaskarray(values)
        order = np.argsort(values.data[kept])
        steps = np.diff(faces[kept][order])
        assert np.all(steps >= 0 if "accuracy" in title else steps <= 0), title
        for text, face, clear in zip(ax.texts, faces, kept, strict=True):
            ground = face if clear else luminance(ax.patches[0].get_facecolor()[:3])
            light, dark = sorted((ground, luminance(text.get_color())))[::-1]
            # WCAG asks 4.5 of small text.
            assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_numbers_stay_inside_their_cells() -> None:
    long = cells(
        np.arange(12) >= 8,
        test_accuracy=np.linspace(0, 1, 12),
        test_loss=np.r_[1.23456e-7, 0.012345, 123.456, 12345.6, 0.0, np.full(7, 1.2345e31)],
    )
    figure = plotting.heat_maps(long, long, RATES, NORMS)
    figure.draw_without_rendering()
    for ax in panels(figure).values():
        for text in ax.texts:
            column, row = (int(part) for part in text.get_position())
            cell = ax.transData.transform([[column, row], [column + 1, row + 1]])
            box = text.get_window_extent()
            assert box.x0 > cell[0, 0]
            assert box.x1 < cell[1, 0]
            assert box.y0 > cell[0, 1]
            assert box.y1 < cell[1, 1]
    written = {text.get_text() for text in panels(figure)["test loss, predicted"].texts}
    assert {"1.2e-7", "0.0123", "123", "12346", "0.00", "div.\n1.2e31"} <= written


def test_the_prediction_alone_and_metrics_that_are_missing() -> None:
    alone = plotting.heat_maps(PREDICTED, None, RATES, NORMS, names=("loss", "test_loss"))
    assert list(panels(alone)) == ["training loss, predicted", "test loss, predicted"]
    regression = cells(test_loss=np.arange(1.0, 13.0))
    assert list(panels(plotting.heat_maps(regression, None, RATES, NORMS))) == [
        "test loss, predicted"
    ]


@pytest.mark.parametrize(
    "metrics",
    [
        cells([True] * 12, test_loss=np.full(12, np.inf), test_ece=np.full(12, np.nan)),
        cells(test_loss=np.full(12, 0.5), test_ece=np.full(12, 0.5)),
        cells(test_loss=np.zeros(12), test_ece=np.zeros(12)),
    ],
    ids=["all diverged", "all equal", "all zero"],
)
def test_degenerate_sweeps_can_be_drawn(metrics: CellMetrics, tmp_path: Any) -> None:
    figure = plotting.heat_maps(metrics, metrics, RATES, NORMS)
    plotting.save(figure, tmp_path / "maps.png", dpi=40)
    assert len(panels(figure)) == 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rates": [1.0]}, ValueError, "predicted must have a cell for each of 1 learn"),
        ({"observed": cells(loss=[1.0])}, ValueError, "observed must have a cell for each of 3"),
        ({"learning_rates": [1.0, 1.0, 2.0]}, ValueError, "learning_rates must be an array of dif"),
        ({"clip_norms": [1.0, -1.0]}, ValueError, "clip_norms must be positive"),
        ({"clip_norms": 1.0}, ValueError, "clip_norms must be an array of different numbers"),
        ({"names": ["test_accurcy"]}, ValueError, "did you mean 'test_accuracy'"),
        ({"names": []}, ValueError, "names must hold a metric that was measured"),
        ({"names": "loss"}, TypeError, "put it in a list"),
        ({"predicted": None}, TypeError, "predicted"),
    ],
)
def test_bad_input_of_the_maps(change: dict[str, Any], error: Any, message: str) -> None:
    options: dict[str, Any] = {"predicted": PREDICTED, "observed": None}
    options |= {"learning_rates": RATES, "clip_norms": NORMS}
    with pytest.raises(error, match=message):
        plotting.heat_maps(**(options | change))


# --- accuracy against calibration ----------------------------------------------------------------


def curves(ax: Any) -> dict[str, np.ndarray]:
    return {line.get_label(): np.transpose(line.get_data()) for line in ax.lines}


@pytest.mark.parametrize("test", [True, False])
def test_trade_off_draws_cells_fronts_and_choice(test: bool) -> None:
    ax = plotting.trade_off(PREDICTED, OBSERVED, chosen=5, test=test)
    found = curves(ax)
    prefix = "test_" if test else ""
    for side, metrics in (("predicted", PREDICTED), ("observed", OBSERVED)):
        points = 100 * np.stack(
            [getattr(metrics, prefix + "accuracy"), getattr(metrics, prefix + "ece")], axis=1
        )
        np.testing.assert_allclose(found[side], points[~metrics.diverged], rtol=1e-14)
        crossed = metrics.diverged & np.isfinite(points[:, 0])
        np.testing.assert_allclose(found[f"{side}, diverged"], points[crossed], rtol=1e-14)
        front = pareto_front(metrics, test=test)[1]
        np.testing.assert_allclose(found[f"{side}, best trade-offs"], 100 * front, rtol=1e-14)
        assert points[5].tolist() in found["chosen cell"].tolist()
    where = "test" if test else "training"
    assert (ax.get_xlabel(), ax.get_ylabel()) == (f"{where} accuracy (%)", f"{where} ECE (%)")
    assert ax.get_yscale() == "log"
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(found)
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 5


def test_a_perfect_cell_stays_on_the_axis() -> None:
    metrics = cells(test_accuracy=[1.0, 0.5], test_ece=[0.0, 0.2])
    ax = plotting.trade_off(metrics)
    assert list(curves(ax)) == ["predicted", "predicted, best trade-offs"]
    np.testing.assert_allclose(curves(ax)["predicted"][0], [100.0, 0.01])
    given = Figure().subplots()
    assert plotting.trade_off(metrics, ax=given) is given


def test_bad_input_of_the_trade_off() -> None:
    with pytest.raises(ValueError, match="metrics must have test_accuracy and test_ece, got no"):
        plotting.trade_off(cells(loss=[1.0]))
    with pytest.raises(ValueError, match="observed must have the cells of predicted, 12, got 1"):
        plotting.trade_off(PREDICTED, cells(accuracy=[0.5], ece=[0.1]))
    with pytest.raises(ValueError, match=r"chosen must be in 0 \.\. 11 or None, got 12"):
        plotting.trade_off(PREDICTED, chosen=12)


def test_both_are_public_and_take_jax_arrays() -> None:
    rates, norms = jnp.asarray(RATES), jnp.asarray(NORMS)
    figure = plotting.heat_maps(PREDICTED, None, rates, norms, names=["loss"])
    assert isinstance(figure, Figure)
    for function in (plotting.heat_maps, plotting.trade_off):
        assert inspect.getdoc(function)
