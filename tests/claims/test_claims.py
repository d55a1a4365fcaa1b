"""Every claim holds; the longer ones as slow tests, `ntkdp verify` being part of integration."""

import pytest

from ntkdp import claims

QUICK = {"C3", "C10"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in claims.names()
    ],
)
def test_claim_holds(name: str) -> None:
    verdict = claims.verify(name)
    assert verdict.holds, "\n".join(str(found) for found in verdict.findings if not found.holds)
