"""Results of a comparison by subgroup, against the whole and against what runs record."""

import json
from pathlib import Path

import numpy as np
import pytest

from ntkdp import experiment, privacy
from ntkdp.experiment._of_outputs import by_group as _by_group
from ntkdp.experiment._reporting.report import write_report


def config(**training: object) -> experiment.Config:
    return experiment.config(
        predictions=["recursion"],
        data={"n_train": 24, "n_test": 12, "groups": "class"},
        model={"widths": [16]},
        training={
            "steps": 4,
            "noise_multiplier": 4.0,
            "n_predicted": 4,
            "record_every": 1,
            **training,
        },
        clipping=[{"clip_norm": 1.5}],
    )


def test_subgroups_add_up_to_the_whole(tmp_path: Path) -> None:
    results = experiment.run(config(), folder=tmp_path / "run")
    (case,) = results.cases
    found = case.by_group
    assert found is not None
    assert sum(found["counts"]) == 24
    assert sum(found["test_counts"]) == 12
    assert found["delta"] == pytest.approx(1 / 24)
    shares = np.array(found["counts"]) / 24
    tested = np.array(found["test_counts"]) / 12
    prediction = case.predictions["recursion"].trajectory
    for part, path in ((found["run"], case.run), (found["predictions"]["recursion"], prediction)):
        for name, weights in (("loss", shares), ("test_loss", tested), ("accuracy", shares)):
            whole = np.asarray(getattr(path, name)).reshape(-1, 5).mean(axis=0)
            own = np.nan_to_num(part[name])  # type: ignore[literal-required]
            np.testing.assert_allclose(own @ weights, whole, rtol=1e-9)
        # No step comes after the last state.
        clipped = np.asarray(path.clip_fraction).reshape(-1, 5).mean(axis=0)[:4].mean()
        assert 0 < clipped < 1
        assert part["clipped"] is not None
        np.testing.assert_allclose(np.nan_to_num(part["clipped"]) @ shares, clipped, rtol=1e-9)
        assert part["epsilon"] is not None
        promised = privacy.epsilon(4.0, 1.0, 4, 1 / 24)
        assert 0 < np.nanmax(part["epsilon"]) <= promised * (1 + 1e-9)
    write_report(results, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "By subgroup" in page
    entries = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"][0]["subgroups"]
    assert [entry["name"] for entry in entries] == found["names"]
    again = experiment.run(config(), folder=tmp_path / "run", resume=True)
    read = again.cases[0].by_group
    assert read is not None
    np.testing.assert_array_equal(read["run"]["loss"], found["run"]["loss"])
    _by_group.check(found, ["recursion"], 5)
    with pytest.raises(ValueError, match="loss by subgroup must be numbers of shape"):
        _by_group.check(found, ["recursion"], 4)
    with pytest.raises(ValueError, match="other predictions"):
        _by_group.check(found, ["exact"], 5)


@pytest.mark.slow
def test_what_cannot_be_said_one_by_one_is_left_out() -> None:
    results = experiment.run(config(batches={"kind": "cyclic", "n_batches": 2}))
    found = results.cases[0].by_group
    assert found is not None
    assert found["run"]["epsilon"] is None
    assert found["run"]["clipped"] is None
    (row, *_) = _by_group.rows("rule", {"recursion": "recursion"}, found)
    assert row[-4:] == ("", "", "", "")


def test_regression_has_no_classes() -> None:
    made = experiment.config(
        data={"name": "diabetes", "groups": "class"}, loss="squared_error", clipping=[{}]
    )
    with pytest.raises(experiment.ConfigError, match=r"data\.groups"):
        experiment.problem_of(made)
