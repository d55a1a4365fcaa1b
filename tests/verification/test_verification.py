"""`ntkdp verify`: verdicts on standard output, a run folder, and the exit code."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ntkdp import claims, cli, table_one
from ntkdp.claims import _claim, _registry
from ntkdp.cli._verification import run

QUICK = ("C3", "C6")


def verify(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["verify", *arguments])


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify without workers, which would not know what was replaced here."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def a_failing_claim() -> claims.Claim:
    return claims.Claim(
        "C6", "One is two.", "none", "derived", lambda: [_claim.equal("one", 1.0, 2.0, within=0.5)]
    )


def test_named_claims_as_one_json_list() -> None:
    done = verify("C6", "C3", "--json")
    assert done.exit_code == 0
    verdicts = json.loads(done.stdout)
    assert [verdict["name"] for verdict in verdicts] == ["C6", "C3"]
    for verdict in verdicts:
        assert verdict["holds"] is True
        assert {"statement", "source", "measured", "expected", "tolerance"} <= set(verdict)
        assert all(finding["holds"] for finding in verdict["findings"])
    assert verdicts[0]["measured"] == pytest.approx(1.0)


def test_a_line_a_claim_and_nothing_written_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = verify(*QUICK)
    assert done.exit_code == 0
    assert "2 of 2 claims hold" in done.stdout
    assert [line[:2] for line in done.stdout.splitlines() if line[:1] == "C"] == list(QUICK)
    assert list(tmp_path.iterdir()) == []
    assert verify("C6", "--out", "found").exit_code == 0
    metrics = json.loads((tmp_path / "found" / "metrics.json").read_text())
    assert metrics["holds"] is True
    assert metrics["table_one"] is None
    page = (tmp_path / "found" / "report.html").read_text()
    assert claims.get("C6").statement.split(":")[0] in page
    again = verify("C6", "--out", "found")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_a_claim_that_fails_is_shown_and_sets_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    monkeypatch.setitem(_registry._CLAIMS, "C6", a_failing_claim())
    monkeypatch.chdir(tmp_path)
    done = verify(*QUICK, "--out", "found")
    assert done.exit_code == 1
    assert "C6 fails: one = 1, expected = 2 +- 0.5" in done.stdout
    assert "1 of 2 claims hold" in done.stdout
    assert json.loads((tmp_path / "found" / "metrics.json").read_text())["holds"] is False
    assert '<details class="fails">' in (tmp_path / "found" / "report.html").read_text()


def test_an_unknown_claim_names_the_nearest() -> None:
    done = verify("C99")
    assert done.exit_code == 2
    assert "unknown claim 'C99'; did you mean 'C9'?" in done.stderr
    assert done.stdout == ""


def test_a_whole_verification_has_the_table_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    cell = table_one.Cell("symmetric", False, False, "asymmetry <of> a state", 0.5, True)
    noted = table_one.Cell("monotone", None, True, "rate", -1.0, True, added="More & more.")
    broken = table_one.Cell("to zero loss", True, True, "loss", 1.0, False)
    rows = (table_one.Row("small R", "H C", (cell, noted)), table_one.Row("R", "H", (broken,)))
    monkeypatch.setattr(table_one, "compute", lambda: table_one.Table(rows))
    monkeypatch.setattr(claims, "names", lambda: QUICK)
    monkeypatch.chdir(tmp_path)
    done = verify("--out", "found")
    assert done.exit_code == 1
    assert "NOT BORNE OUT" in done.stdout
    assert "(1) More & more." in done.stdout
    found = json.loads((tmp_path / "found" / "metrics.json").read_text())["table_one"]
    assert found["holds"] is False
    assert [c["paper"] for c in found["rows"][0]["cells"]] == ["no", "not stated"]
    page = (tmp_path / "found" / "report.html").read_text()
    for text in ("asymmetry &lt;of&gt; a state", "(yes)", "More &amp; more.", "not borne out"):
        assert text in page


@pytest.mark.parametrize(
    ("finding", "holds"),
    [
        (_claim.equal("q", 1.0, 1.1, within=0.11), True),
        (_claim.equal("q", 1.0, 1.1, within=0.09), False),
        (_claim.at_most("q", 1.0, 1.0), True),
        (_claim.at_most("q", 1.1, 1.0), False),
        (_claim.at_most("q", 1.1, 1.0, slack=0.2), True),
        (_claim.at_least("q", 1.0, 1.0), True),
        (_claim.at_least("q", 0.9, 1.0), False),
        (_claim.equal("q", math.nan, 1.0, within=math.inf), False),
        (_claim.at_most("q", math.nan, 1.0), False),
        (_claim.at_most("q", -math.inf, 1.0), False),
        (_claim.at_least("q", math.inf, 1.0), False),
    ],
)
def test_a_finding_holds_where_its_relation_does(finding: claims.Finding, holds: bool) -> None:
    assert finding.holds is holds


def test_a_number_that_is_not_finite_is_text_in_json() -> None:
    finding = _claim.equal("q", math.nan, 1.0, within=0.1)
    verdict = claims.Verdict("C1", "s", "a", "derived", (finding,), 0.1)
    (read,) = json.loads(run.as_json([verdict]))
    assert read["measured"] == "nan"
    assert read["holds"] is False


def test_every_claim_says_what_it_is() -> None:
    numbers = range(1, 50)
    assert claims.names() == tuple(f"C{number}" for number in numbers)
    for name in claims.names():
        claim = claims.get(name)
        assert claim.name == name
        assert min(len(claim.statement), len(claim.assumptions), len(claim.source)) > 3
