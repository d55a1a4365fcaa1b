"""Examples of the README and of pages run as printed, and say what they claim."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_predict_the_run_and_the_noise(capsys: Any) -> None:
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), names)
    assert re.fullmatch(r"\d+\.\d%\n", capsys.readouterr().out)
    assert names["comparison"].sup_relative_error < 0.05
    assert names["run"].loss[-1] < 0.7 * names["run"].loss[0]
    exec(compile(second, "README.md", "exec"), names)
    assert "90% of runs between" in capsys.readouterr().out
    assert names["low"] < names["middle"] < names["high"]
    assert names["low"] > names["prediction"].loss[-1]


def examples_on_choosing() -> list[str]:
    page = README.parent / "docs" / "choosing.md"
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_page_on_choosing_chooses(capsys: Any) -> None:
    names: dict[str, Any] = {}
    exec(compile(examples_on_choosing()[0], "choosing.md", "exec"), names)
    rate, norm, accuracy = map(float, capsys.readouterr().out.split())
    assert (rate, norm) in {(a, b) for a in (1.0, 10.0, 100.0) for b in (0.01, 0.1, 1.0)}
    metrics = names["grid"].metrics
    assert accuracy == metrics.test_accuracy[~metrics.diverged].max() > 0.3


@pytest.mark.slow
def test_the_page_on_choosing_shares_out_the_norms(capsys: Any) -> None:
    names: dict[str, Any] = {}
    exec(compile(examples_on_choosing()[1], "choosing.md", "exec"), names)
    assert "instead of" in capsys.readouterr().out
    assert names["found"].loss < names["found"].equal_loss


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
