"""What the artists hold, spectra against NumPy and SciPy, global state untouched, whole files."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from helpers import known
from matplotlib.axes import Axes
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.legend import Legend

import ntkdp
from ntkdp import plotting

TIMES = np.linspace(0.0, 5.0, 11)


def trajectory(rate: float = 1.0, times: np.ndarray = TIMES, **fields: Any) -> ntkdp.Trajectory:
    loss = 2.0 * np.exp(-rate * times)
    given: dict[str, Any] = {
        "loss": loss,
        "clip_fraction": np.exp(-times),
        "accuracy": 1 - np.exp(-rate * times),
    }
    given |= fields
    given = {k: None if v is None else jnp.asarray(v) for k, v in given.items()}
    return ntkdp.Trajectory(jnp.asarray(times), **given)


RUN = trajectory()
PREDICTIONS = {
    "exact flow": trajectory(1.01),
    "frozen kernel": trajectory(1.05),
    "infinite width": trajectory(1.1),
    "recursion": trajectory(0.95),
}
PANELS = {
    (scope, f"R = {R}"): (RUN, PREDICTIONS)
    for scope in ("flat clipping", "layerwise clipping")
    for R in (0.1, 100.0)
}


def seeds() -> ntkdp.Trajectory:
    losses = np.abs(np.random.default_rng(0).normal(1.0, 0.1, (5, len(TIMES))))
    return trajectory(loss=losses, accuracy=losses / 2, clip_fraction=losses / 3)


def texts(legend: Legend | None) -> list[str]:
    return [text.get_text() for text in known(legend).get_texts()]


def figure_of(ax: Axes) -> Figure:
    return known(ax.get_figure(root=True))


def dashes(line: Any) -> str:
    return str(line._dash_pattern)


def curves(ax: Axes) -> dict[Any, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}


@pytest.fixture(autouse=True)
def _global_state_untouched() -> Iterator[None]:
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


# --- curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "field", "label"),
    [
        (plotting.loss_curves, "loss", "training loss"),
        (plotting.accuracy, "accuracy", "training accuracy"),
        (plotting.clip_fraction, "clip_fraction", "clip fraction"),
    ],
)
def test_curves_hold_the_data(draw: Any, field: str, label: str) -> None:
    ax = draw(PREDICTIONS, RUN)
    assert list(curves(ax)) == ["observed", *PREDICTIONS] == texts(ax.get_legend())
    for name, drawn in curves(ax).items():
        source = RUN if name == "observed" else PREDICTIONS[name]
        np.testing.assert_array_equal(drawn, getattr(source, field))
    for line in ax.lines:
        np.testing.assert_array_equal(line.get_xdata(), TIMES)
    assert ax.get_ylabel() == label
    assert ax.get_xlabel() == "time $t$ = learning rate × step"
    assert ax.get_yscale() == ("log" if field == "loss" else "linear")


@pytest.mark.parametrize("draw", [plotting.loss_curves, plotting.accuracy, plotting.relative_error])
def test_test_set(draw: Any) -> None:
    run = trajectory(test_loss=np.arange(1.0, 12.0), test_accuracy=np.arange(11.0) / 11)
    prediction = trajectory(test_loss=np.arange(2.0, 13.0), test_accuracy=np.arange(11.0) / 22)
    ax = draw(prediction, run, test=True)
    drawn = np.asarray(ax.lines[-1].get_ydata())
    expected = {
        plotting.loss_curves: np.arange(2.0, 13.0),
        plotting.accuracy: np.arange(11.0) / 22,
        plotting.relative_error: 100 / np.arange(2.0, 12.0),
    }[draw]
    np.testing.assert_allclose(drawn, expected, rtol=1e-14)
    assert "test" in ax.get_ylabel()


def test_band_and_mean_of_seeds() -> None:
    run = seeds()
    ax = plotting.loss_curves(PREDICTIONS["recursion"], run)
    (shaded,) = ax.collections
    corners = np.asarray(shaded.get_paths()[0].vertices)
    low, high = np.quantile(run.loss, [0.05, 0.95], axis=0)
    for t, bottom, top in zip(TIMES, low, high, strict=True):
        at_t = corners[corners[:, 0] == t, 1]
        assert (at_t.min(), at_t.max()) == pytest.approx((bottom, top), rel=1e-14)
    np.testing.assert_allclose(curves(ax)["observed, mean of 5"], run.loss.mean(axis=0), rtol=1e-14)
    assert texts(ax.get_legend()) == ["5 to 95% of runs", "observed, mean of 5", "predicted"]


def test_a_diverged_seed_does_not_stop_the_drawing() -> None:
    losses = np.array(seeds().loss)
    losses[0, 8:] = np.inf
    ax = plotting.loss_curves(PREDICTIONS, trajectory(loss=losses))
    figure_of(ax).draw_without_rendering()
    observed = curves(ax)["observed, mean of 5"]
    np.testing.assert_allclose(observed[:8], losses[:, :8].mean(axis=0), rtol=1e-14)
    assert np.all(np.isnan(observed[8:]))


def extent(shaded: Any, t: float) -> tuple[float, float]:
    corners = shaded.get_paths()[0].vertices
    at_t = corners[corners[:, 0] == t, 1]
    return at_t.min(), at_t.max()


@pytest.mark.parametrize(
    ("draw", "field"),
    [(plotting.loss_curves, "loss"), (plotting.accuracy, "accuracy"),
     (plotting.clip_fraction, "clip_fraction")],
)  # fmt: skip
def test_ensembles_are_drawn_as_mean_and_band(draw: Any, field: str) -> None:
    prediction = seeds()
    values = np.asarray(getattr(prediction, field))
    ax = draw({"flow": RUN, "ensemble": prediction}, seeds())
    np.testing.assert_allclose(curves(ax)["ensemble"], values.mean(axis=0), rtol=1e-14)
    of_run, of_ensemble = ax.collections
    for t, low, high in zip(TIMES, *np.quantile(values, [0.05, 0.95], axis=0), strict=True):
        assert extent(of_ensemble, t) == pytest.approx((low, high), rel=1e-14)
    assert texts(ax.get_legend()) == [
        "5 to 95% of runs", "observed, mean of 5", "flow", "ensemble", "ensemble, 5 to 95% of 5",
    ]  # fmt: skip
    line = {line.get_label(): line for line in ax.lines}["ensemble"]
    assert to_rgb(of_ensemble.get_edgecolor()[0]) == pytest.approx(to_rgb(line.get_color()))
    assert rgb_to_hsv(to_rgb(of_run.get_facecolor()[0]))[1] == 0


def test_bands_differ_without_colour() -> None:
    """By the dashes of their edges, which are those of their means; each lets others through."""
    ensembles = {str(i): seeds() for i in range(6)}
    bands = plotting.loss_curves(ensembles).collections
    assert len({str(band.get_linestyle()) for band in bands}) == 6
    assert all(np.asarray(band.get_facecolor())[0, 3] < 0.2 for band in bands)


def test_an_ensemble_of_one_has_no_band() -> None:
    ax = plotting.loss_curves(trajectory(loss=np.asarray(RUN.loss)[None]))
    assert not ax.collections
    np.testing.assert_array_equal(curves(ax)["predicted"], RUN.loss)


def test_bands_are_inside_the_axis() -> None:
    """That of the ensemble reaches a fifth of its mean, and five times it."""
    losses = np.asarray(RUN.loss) * np.array([0.2, 1.0, 5.0])[:, None]
    low, high = plotting.loss_curves(trajectory(loss=losses), RUN).get_ylim()
    quantiles = np.quantile(losses, [0.05, 0.95], axis=0)
    assert low < quantiles.min() < quantiles.max() < high


def test_grid_names_the_bands_of_ensembles() -> None:
    figure = plotting.comparison_grid({("flat", "R = 1"): (RUN, {"ensemble": seeds()})})
    (shared,) = figure.legends
    assert texts(shared) == ["observed", "ensemble, 5 to 95% of 5", "ensemble"]


def test_given_axes_are_used() -> None:
    ax = Figure().subplots()
    assert plotting.loss_curves(RUN, ax=ax, log=False) is ax
    assert ax.get_yscale() == "linear"
    assert plotting.accuracy(RUN, ax=ax) is ax
    assert plotting.clip_fraction(RUN, ax=ax) is ax
    assert plotting.kernel_spectrum(jnp.eye(2), ax=ax) is ax


def test_a_failed_prediction_leaves_the_run_visible() -> None:
    """It stops where it is not finite, the legend says when, and the axis stays with the run."""
    loss = np.where(TIMES < 3, 2.0 * np.exp(40 * TIMES), np.nan)
    ax = plotting.loss_curves({"recursion": trajectory(loss=loss), "flow": RUN}, RUN)
    assert texts(ax.get_legend())[1] == "recursion (not finite at t = 3)"
    low, high = ax.get_ylim()
    assert low < float(RUN.loss.min()) < float(RUN.loss.max()) < high < 10 * 2.0 * 2


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_curves_without_a_point_can_be_drawn(value: float) -> None:
    """Nothing is finite, or nothing is positive on a logarithmic axis; an exact prediction too."""
    nothing = trajectory(loss=np.full(11, value))
    for ax in (
        plotting.loss_curves(nothing, nothing),
        plotting.relative_error(nothing, nothing),
        plotting.kernel_spectrum(np.zeros((2, 2))),
        plotting.comparison_grid({("flat", "R = 1"): (nothing, {"flow": nothing})}).axes[0],
    ):
        figure_of(ax).draw_without_rendering()
        assert np.all(np.isnan(ax.lines[-1].get_ydata()))


@pytest.mark.parametrize("rate", [1e-3, 0.2, 0.5, 1.0, 3.0])
def test_loss_axis_has_legible_ticks(rate: float) -> None:
    """At least two labelled ticks in view, even where the range holds no power of ten."""
    ax = plotting.loss_curves(trajectory(rate), trajectory(rate))
    figure_of(ax).draw_without_rendering()
    low, high = ax.get_ylim()
    labelled = [tick for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
                if low <= tick <= high and label.get_text()]  # fmt: skip
    assert 2 <= len(labelled) <= 10


# --- errors --------------------------------------------------------------------------------------


def test_relative_error_in_percent() -> None:
    """A constant factor of 1.5 is an error of 50% at every time after the start."""
    near = trajectory(loss=1.5 * np.asarray(RUN.loss))
    failed = trajectory(loss=np.where(TIMES < 2.5, 3.0 * np.asarray(RUN.loss), np.nan))
    ax = plotting.relative_error({"near": near, "failed": failed}, RUN)
    near_line, failed_line = ax.lines
    np.testing.assert_allclose(np.asarray(near_line.get_ydata()), 50.0, rtol=1e-13)
    np.testing.assert_array_equal(near_line.get_xdata(), TIMES[1:])
    failed_errors = np.asarray(failed_line.get_ydata())
    np.testing.assert_allclose(failed_errors[:4], 200.0, rtol=1e-13)
    assert np.all(np.isnan(failed_errors[4:]))
    assert texts(ax.get_legend()) == ["near: at most 50%", "failed: at most infinite"]


def test_grid_shows_every_panel_with_its_errors() -> None:
    figure = plotting.comparison_grid(PANELS, title="Digits")
    assert [ax.get_title() for ax in figure.axes] == [
        "flat clipping, R = 0.1", "flat clipping, R = 100.0",
        "layerwise clipping, R = 0.1", "layerwise clipping, R = 100.0",
    ]  # fmt: skip
    expected = []
    for prediction in PREDICTIONS.values():
        error = np.max(np.abs(prediction.loss - RUN.loss)[1:] / RUN.loss[1:])
        expected.append(f"{100 * error:.2g}%")
    for ax in figure.axes:
        assert texts(ax.get_legend()) == expected
        for name, drawn in curves(ax).items():
            source = RUN if name == "observed" else PREDICTIONS[name]
            np.testing.assert_array_equal(drawn, source.loss)
    (shared,) = figure.legends
    assert texts(shared) == ["observed", *PREDICTIONS]
    assert figure.get_suptitle() == "Digits"


def test_grid_overlaps_nothing() -> None:
    figure = plotting.comparison_grid(PANELS, title="Digits")
    figure.draw_without_rendering()
    (shared,) = figure.legends
    boxes = [ax.get_tightbbox() for ax in figure.axes] + [shared.get_window_extent()]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= known(box).x0 < known(box).x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= known(box).y0 < known(box).y1 <= figure.bbox.y1
        assert not any(known(box).overlaps(known(other)) for other in boxes[i + 1 :])
    for ax in figure.axes:
        key = known(ax.get_legend()).get_window_extent()
        for line in ax.lines:
            assert not key.count_contains(line.get_transform().transform(line.get_xydata()))


def test_grid_keeps_styles_across_panels_and_leaves_gaps() -> None:
    some = {name: PREDICTIONS[name] for name in ("recursion", "exact flow")}
    figure = plotting.comparison_grid(
        {("flat", "small"): (RUN, some), ("layerwise", "large"): (seeds(), PREDICTIONS)}
    )
    assert [ax.get_title() for ax in figure.axes] == ["flat, small", "layerwise, large"]
    colours = [{line.get_label(): line.get_color() for line in ax.lines} for ax in figure.axes]
    for name in some:
        assert colours[0][name] == colours[1][name]
    assert len({colours[1][name] for name in PREDICTIONS}) == len(PREDICTIONS)
    for ax in figure.axes:
        assert ax.get_xlabel()
        assert ax.get_ylabel() == "training loss"
    (shared,) = figure.legends
    assert texts(shared)[:3] == ["observed", "5 to 95% of runs", "observed, mean of 5"]


# --- the look ------------------------------------------------------------------------------------


def test_lines_differ_without_colour() -> None:
    """Okabe and Ito's palette, and no two predictions share dashes or a marker."""
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}  # fmt: skip  # noqa: E501
    ax = plotting.loss_curves({str(i): trajectory(1 + i / 10) for i in range(6)}, RUN)
    observed, *predicted = ax.lines
    assert {line.get_color() for line in predicted} < okabe_ito
    assert len({line.get_marker() for line in predicted}) == 6
    assert len({dashes(line) for line in predicted}) == 6
    assert rgb_to_hsv(to_rgb(observed.get_color()))[1] == 0
    assert observed.get_linewidth() > 2 * max(line.get_linewidth() for line in predicted)


def test_text_is_legible() -> None:
    ax = plotting.loss_curves(PREDICTIONS, RUN)
    figure_of(ax).draw_without_rendering()
    legible = [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()]
    legible += known(ax.get_legend()).get_texts()
    assert min(float(text.get_fontsize()) for text in legible) >= 9


# --- spectra -------------------------------------------------------------------------------------


def gram(*shape: int, seed: int = 0) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(*shape, 3 * np.prod(shape)))
    return np.tensordot(factor, factor, axes=(-1, -1))


def test_spectrum_of_a_matrix_against_scipy() -> None:
    kernel = gram(6)
    (line,) = plotting.kernel_spectrum(kernel, label="frozen").lines
    expected = scipy.linalg.eigh(kernel, eigvals_only=True)[::-1]
    np.testing.assert_allclose(np.asarray(line.get_ydata()), expected, rtol=1e-12)
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 7))
    assert line.get_label() == "frozen"
    assert (known(line.axes).get_xscale(), known(line.axes).get_yscale()) == ("log", "log")


def test_spectrum_of_full_outputs_is_that_of_the_nk_by_nk_matrix() -> None:
    """``gram(4, 3)[i, k, j, l]`` is the product of gradients of outputs k at i and l at j."""
    whole = gram(4, 3)
    (line,) = plotting.kernel_spectrum(jnp.asarray(whole.transpose(0, 2, 1, 3))).lines
    expected = np.linalg.svd(whole.reshape(12, 12), compute_uv=False)
    np.testing.assert_allclose(np.asarray(line.get_ydata()), expected, rtol=1e-11)


@pytest.mark.parametrize("n_outputs", [None, 2])
def test_spectrum_of_layers_and_their_total(n_outputs: int | None) -> None:
    shape = (4,) if n_outputs is None else (4, n_outputs)
    terms = [gram(*shape, seed=seed) for seed in range(2)]
    axes = (0, 1) if n_outputs is None else (0, 2, 1, 3)
    kernel = ntkdp.LayerwiseKernel(("a", "b"), jnp.stack([t.transpose(axes) for t in terms]))
    ax = plotting.kernel_spectrum(kernel)
    size = int(np.prod(shape))
    for name, term in {
        "total": terms[0] + terms[1],
        "group a": terms[0],
        "group b": terms[1],
    }.items():
        expected = np.linalg.eigvalsh(term.reshape(size, size))[::-1]
        np.testing.assert_allclose(curves(ax)[name], expected, rtol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spectrum_leaves_rounding_out(dtype: Any) -> None:
    """Rank 3 of 8: the other eigenvalues are rounding of either sign, and not drawn."""
    factor = np.random.default_rng(2).normal(size=(8, 3)).astype(dtype)
    (line,) = plotting.kernel_spectrum(factor @ factor.T).lines
    assert line.get_label() == "kernel (rank 3 of 8)"
    expected = np.linalg.svd(factor.astype(np.float64), compute_uv=False) ** 2
    np.testing.assert_allclose(
        np.asarray(line.get_ydata()), expected, rtol=100 * np.finfo(dtype).eps
    )


def test_spectrum_of_eigenvalues() -> None:
    (line,) = plotting.kernel_spectrum([1.0, 3.0, 2.0]).lines
    np.testing.assert_array_equal(line.get_ydata(), [3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.ones((2, 3)), r"kernel must have shape .*\(n, n\).*got \(2, 3\)"),
        (np.ones((2, 2, 2)), r"got \(2, 2, 2\)"),
        (np.ones((2, 2, 3, 1)), r"got \(2, 2, 3, 1\)"),
        (np.ones((0, 0)), r"not empty, got \(0, 0\)"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "kernel must be finite"),
        (np.array([[1.0, 0.5], [0.25, 1.0]]), "kernel must be symmetric, got .* differ by 0.25"),
    ],
)
def test_wrong_kernels(kernel: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plotting.kernel_spectrum(kernel)


# --- clipping norms ------------------------------------------------------------------------------

NORMS = np.array([0.1, 1.0, 10.0, 100.0])


def test_clipping_norm_curve_marks_the_least() -> None:
    predicted = {"quiet": [4.0, 2.0, 1.0, 3.0], "noisy": [4.0, 2.5, 3.0, 9.0]}
    ax = plotting.clipping_norm_curve(NORMS, predicted, ylabel="risk", xlabel="norm")
    quiet, star, noisy, other_star = ax.lines
    np.testing.assert_array_equal(quiet.get_xydata(), np.stack([NORMS, [4, 2, 1, 3]], axis=1))
    np.testing.assert_array_equal(star.get_xydata(), [[10.0, 1.0]])
    np.testing.assert_array_equal(other_star.get_xydata(), [[1.0, 2.5]])
    assert texts(ax.get_legend()) == ["quiet, least at 10", "noisy, least at 1"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("norm", "risk")
    assert dashes(quiet) != dashes(noisy)


def test_clipping_norm_curve_shows_runs_with_their_errors() -> None:
    runs = np.random.default_rng(8).gamma(4.0, size=(6, 2))
    at = np.array([0.5, 5.0])
    predicted = {"a": np.ones(4), "b": np.full(4, 2.0)}
    ax = plotting.clipping_norm_curve(NORMS, predicted, {"b": runs}, observed_clip_norms=at)
    points: Any
    points, legend_entry = ax.containers
    data, _, (bars,) = points.lines
    np.testing.assert_allclose(data.get_xydata(), np.stack([at, runs.mean(axis=0)], axis=1))
    for bar, column in zip(bars.get_segments(), runs.T, strict=True):
        reach = 2 * scipy.stats.sem(column) * np.array([-1, 1])
        np.testing.assert_allclose(bar[:, 1], column.mean() + reach, rtol=1e-12)
    assert legend_entry.get_label() == "6 runs, ± 2 std. errors"
    colour_of_b = next(
        line for line in ax.lines if str(line.get_label()).startswith("b")
    ).get_color()
    assert data.get_color() == colour_of_b
    figure_of(ax).draw_without_rendering()


def test_clipping_norm_curve_says_what_is_not_inside_or_not_finite() -> None:
    ax = plotting.clipping_norm_curve(
        NORMS, {"a": [np.nan, 2.0, 3.0, 4.0], "b": [1.0, 2.0, 3.0, 4.0], "c": np.full(4, np.nan)},
        {"a": np.array([1.0, 0.0, np.nan, 2.0])},
    )  # fmt: skip
    assert texts(ax.get_legend()) == [
        "a, least at 1", "b, least at 0.1, an end", "c, not finite", "observed",
    ]  # fmt: skip
    figure_of(ax).draw_without_rendering()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((NORMS[::-1], np.ones(4)), {}, ValueError, "clip_norms must be strictly increasing"),
        ((NORMS - 0.1, np.ones(4)), {}, ValueError, "clip_norms must be positive"),
        (([1.0], [1.0]), {}, ValueError, "clip_norms must be a one-dimensional array of two"),
        ((NORMS, np.ones(3)), {}, ValueError, r"predicted must have shape \(m,\), m = 4.*\(3,\)"),
        ((NORMS, {}), {}, ValueError, "predicted must hold at least one array"),
        ((NORMS, {"a": np.ones((2, 4))}), {}, ValueError, r"predicted\['a'\] must have shape"),
        ((NORMS, np.ones(4), np.ones((5, 3))), {}, ValueError, r"\(m,\) or \(S, m\).*\(5, 3\)"),
        ((NORMS, np.ones(4), np.ones((0, 4))), {}, ValueError, "observed must have shape"),
        ((NORMS, np.ones(4), {"b": np.ones(4)}), {}, ValueError, "predicted; got 'b'"),
        ((NORMS, np.ones(4), np.ones(4)), {"observed_clip_norms": NORMS[:2]}, ValueError, "m = 2"),
        ((NORMS, np.ones(4)), {"ax": 1}, TypeError, "ax must be a matplotlib Axes"),
        ((NORMS, "loss"), {}, (ValueError, TypeError), "predicted|could not convert"),
    ],
)
def test_wrong_clipping_norm_curves(
    arguments: Any, options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        inspect.unwrap(plotting.clipping_norm_curve)(*arguments, **options)


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([RUN], RUN), TypeError, "predictions must be a Trajectory or a mapping.*list"),
        (lambda f: f({}, RUN), ValueError, "predictions must hold at least one"),
        (
            lambda f: f({"a": 1.0}, RUN),
            TypeError,
            r"predictions\['a'\] must be a Trajectory.*float",
        ),
        (lambda f: f(RUN, "run"), TypeError, "run must be a Trajectory, got str"),
        (lambda f: f(RUN, RUN, ax=1), TypeError, "ax must be a matplotlib Axes, got int"),
        (lambda f: f(RUN, RUN, test=True), ValueError, "run records no test loss; pass test data"),
    ],
)
def test_wrong_curves(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    # Tests check annotations at run time, which users do not: look beneath.
    with pytest.raises(error, match=message):
        call(_beneath(plotting.loss_curves))


def _beneath(function: Any) -> Any:
    unwrapped = inspect.unwrap(function)
    bare = {name: inspect.unwrap(value) if inspect.isfunction(value) else value
            for name, value in unwrapped.__globals__.items()}  # fmt: skip
    copied = type(unwrapped)(unwrapped.__code__, bare, unwrapped.__name__, unwrapped.__defaults__)
    copied.__kwdefaults__ = unwrapped.__kwdefaults__
    return copied


def test_what_was_not_recorded_is_named() -> None:
    bare = trajectory(accuracy=None)
    with pytest.raises(ValueError, match=r"predictions\['flow'\] records no accuracy"):
        plotting.accuracy({"flow": bare}, RUN)
    with pytest.raises(ValueError, match="run records no test loss; pass test data"):
        plotting.relative_error(trajectory(test_loss=np.ones(11)), RUN, test=True)


@pytest.mark.parametrize(
    ("panels", "error", "message"),
    [
        ({}, ValueError, "panels must hold at least one panel"),
        ([RUN], TypeError, "panels must be a mapping.*got list"),
        ({"flat": (RUN, PREDICTIONS)}, TypeError, r"pairs \(row, column\), got 'flat'"),
        ({("flat", "R"): RUN}, TypeError, r"panels\[\('flat', 'R'\)\] must be a pair"),
        ({("flat", "R"): ("run", PREDICTIONS)}, TypeError, r"the run of panels.*got str"),
        ({("flat", "R"): (RUN, {})}, ValueError, "predictions must hold at least one"),
    ],
)
def test_wrong_panels(panels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inspect.unwrap(plotting.comparison_grid)(panels)


def test_a_panel_whose_times_do_not_meet() -> None:
    other = trajectory(times=TIMES + 0.1)
    with pytest.raises(ValueError, match="share no time after the start"):
        plotting.comparison_grid({("flat", "R = 1"): (RUN, {"flow": other})})


# --- files ---------------------------------------------------------------------------------------


def test_png_has_the_size_asked_for(tmp_path: Path) -> None:
    ax = plotting.loss_curves(PREDICTIONS, RUN)
    path = tmp_path / "loss.png"
    plotting.save(ax, path, dpi=150)
    width, height = figure_of(ax).get_size_inches()
    assert imread(path).shape[:2] == (round(150 * height), round(150 * width))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_same_figure_gives_the_same_file(tmp_path: Path, suffix: str) -> None:
    figure = plotting.comparison_grid(dict(list(PANELS.items())[:1]))
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix.upper()}"
    plotting.save(figure, first)
    plotting.save(figure, str(second))
    content = first.read_bytes()
    assert content == second.read_bytes()
    magic = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert content.startswith(magic)
    if suffix == "svg":
        assert ElementTree.fromstring(content).tag.endswith("svg")


def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")
    figure = figure_of(plotting.loss_curves(RUN))

    def write_half(target: Path, **options: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", write_half)
    with pytest.raises(OSError, match="disk full"):
        plotting.save(figure, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_left_as_it_was(tmp_path: Path) -> None:
    figure = figure_of(plotting.loss_curves(RUN))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "missing"))):
        plotting.save(figure, tmp_path / "missing" / "loss.png")
    occupied = tmp_path / "occupied.png"
    occupied.mkdir()
    with pytest.raises(OSError, match="occupied"):
        plotting.save(figure, occupied)
    assert list(tmp_path.iterdir()) == [occupied]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loss.jpeg", {}, r"path must end in one of .png, .pdf, .svg, got '.*loss.jpeg'"),
        ("loss", {}, "path must end in one of"),
        ("loss.png", {"dpi": 0.0}, "dpi must be positive and finite, got 0.0"),
    ],
)
def test_wrong_saves(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plotting.save(plotting.loss_curves(RUN), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_only_figures_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="figure must be a Figure or an Axes, got str"):
        inspect.unwrap(plotting.save)("figure", tmp_path / "a.png")


def test_a_style_of_the_user_survives() -> None:
    with mpl.rc_context({"font.size": 20.0, "lines.linewidth": 7.0}):
        plotting.comparison_grid(PANELS)
        assert mpl.rcParams["font.size"] == 20.0
        assert mpl.rcParams["lines.linewidth"] == 7.0
