"""Charts of a page: plain numbers that keep the curves, and a page that draws them by itself."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import examples
from hypothesis import given

from ntkdp._results.interactive.charts import Curve, Panel, as_plain
from ntkdp._results.page import render

TIMES = np.array([0.0, 1.0, 2.0])
RUN = Curve("observed", TIMES, np.array([4.0, 2.0, 1.0]), None)
FAR = Curve("flow", TIMES, np.array([4.0, 400.0, 4e6]), 1)


def panel(*curves: Curve, **axis: bool) -> Panel:
    return Panel("flat, R = 1", "time", "loss", curves, **axis)


def test_curves_keep_their_numbers_and_the_style_of_the_pictures() -> None:
    band = Curve("ensemble", TIMES, TIMES + 1, 0, low=TIMES, high=TIMES + 2)
    shown = as_plain(panel(RUN, band))
    ours, theirs = shown["curves"]
    assert ours["x"] == TIMES.tolist()
    assert ours["y"] == [4.0, 2.0, 1.0]
    assert ours["low"] is None
    assert (theirs["low"], theirs["high"]) == ([0.0, 1.0, 2.0], [2.0, 3.0, 4.0])
    assert theirs["colour"] != ours["colour"]
    assert as_plain(panel(RUN, band))["curves"][1]["dash"] == []
    assert as_plain(panel(RUN, FAR))["curves"][1]["dash"]


def test_a_failed_prediction_does_not_flatten_the_run() -> None:
    low, high = as_plain(panel(RUN, FAR, log=True))["limits"]
    assert low < 1.0
    assert 4.0 < high < 60.0


def test_a_loss_that_hardly_moves_has_a_plain_axis() -> None:
    still = Curve("observed", TIMES, np.array([1.0, 0.9, 0.8]), None)
    assert not as_plain(panel(still, log=True))["log"]
    assert as_plain(panel(RUN._replace(values=np.array([9.0, 3.0, 1.0])), log=True))["log"]


def test_shares_have_an_axis_from_zero_to_one() -> None:
    assert as_plain(panel(RUN, is_share=True))["limits"] == [0.0, 1.0]


def test_nothing_to_draw_has_no_limits() -> None:
    nothing = Curve("observed", TIMES, np.full(3, np.nan), None)
    shown = as_plain(panel(nothing, log=True))
    assert shown["limits"] is None
    assert shown["curves"][0]["y"] == [None, None, None]


@examples(50, 500)
@given(hnp.arrays(np.float64, 4, elements=st.floats()), st.booleans())
def test_any_numbers_become_json_and_stay_within_the_limits(values: np.ndarray, log: bool) -> None:
    shown = as_plain(panel(Curve("observed", np.arange(4.0), values, None), log=log))
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    kept = [number for number in shown["curves"][0]["y"] if number is not None]
    usable = values[(np.abs(values) < 1e100) & ((values > 1e-100) | (not log))]
    np.testing.assert_allclose(kept, usable, rtol=1e-5)
    if kept:
        low, high = shown["limits"]
        assert low <= min(kept) * (1 + 1e-5 * np.sign(min(kept)))
        assert max(kept) <= high + 1e-5 * abs(high)


def page(tmp_path: Path) -> Path:
    """A page with two charts and a table."""
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"")
    panels = [as_plain(panel(RUN, FAR, log=True)), as_plain(panel(RUN))]
    text = render(
        "experiment/_reporting/page.html",
        title="</script>", heading="<b>", summary="", facts=[("epsilon", "3")], verdict=["trust"],
        warnings=[], columns=["name", "loss"], n_words=1, rows=[["b", "10"], ["a", "9"], ["c", ""]],
        group_columns=(), group_rows=[], group_words="", config="{}",
        pictures=[(picture, "Loss & more", panels), (picture, "Spectrum", None)],
    )  # fmt: skip
    written = tmp_path / "report.html"
    written.write_text(text)
    return written


def test_a_page_holds_all_that_it_needs_and_escapes_the_rest(tmp_path: Path) -> None:
    text = page(tmp_path).read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)', text)
    assert "@import" not in text
    assert "fetch(" not in text
    assert "<b>" not in text
    assert text.count("</script>") == text.count("<script")
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data)[0]["curves"][0]["label"] == "observed"


def test_a_browser_draws_the_charts_without_complaint(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("a browser draws the page: apt-get install chromium, as .ci/run does")
    # The script of a reader: sort by the second column, and tell what is there.
    told = """<script>
    document.querySelectorAll("th button")[1].click();
    document.title = JSON.stringify({
      charts: document.querySelectorAll("canvas").length,
      curves: [...document.querySelectorAll(".u-label")].map((label) => label.textContent),
      rows: [...document.querySelectorAll("tbody:not(.u-legend tbody) tr")].filter(
        (row) => !row.closest(".u-legend")).map((row) => row.cells[0].textContent),
      shown: getComputedStyle(document.querySelector("figure.chart img")).display,
    });
    </script></body>"""
    written = page(tmp_path)
    written.write_text(written.read_text().replace("</body>", told))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", written.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(title[1])
    assert seen["charts"] == 2
    assert seen["curves"].count("observed") == 2
    assert "flow" in seen["curves"]
    assert seen["rows"] == ["a", "b", "c"]
    assert seen["shown"] == "none"
