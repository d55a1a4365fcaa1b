"""All claims by name, and their verdicts."""

import time

import jax

from ntkdp._backend import validate
from ntkdp.claims import (
    _algebra,
    _batch,
    _beyond_frozen_kernel,
    _calibration,
    _discretisation,
    _flat,
    _layerwise,
    _noise,
    _optimizers,
    _privacy,
    _responses,
    _two_times,
)
from ntkdp.claims._claim import Claim, Verdict

_MODULES = (
    _algebra,
    _flat,
    _layerwise,
    _batch,
    _discretisation,
    _noise,
    _calibration,
    _privacy,
    _responses,
    _beyond_frozen_kernel,
    _two_times,
    _optimizers,
)
_FOUND = [
    value for module in _MODULES for value in vars(module).values() if isinstance(value, Claim)
]
#: By name, in the order of their numbers.
_CLAIMS = {claim.name: claim for claim in sorted(_FOUND, key=lambda claim: int(claim.name[1:]))}


def names() -> tuple[str, ...]:
    """Names of all claims, in their order.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.claims.names()[:3]
    ('C1', 'C2', 'C3')
    """
    return tuple(_CLAIMS)


def get(name: str) -> Claim:
    """The claim called ``name``: its statement, assumptions and source, without running it.

    Raises
    ------
    ValueError
        For a name that is not known; the message gives the nearest one.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.claims.get("C2").source
    'paper'
    """
    return validate.lookup(_CLAIMS, claim=name)


def verify(name: str) -> Verdict:
    """Run the experiment of the claim called ``name``, in float64 whatever the process uses.

    Returns
    -------
    Verdict
        With every measured and expected number, and whether all are where the claim says.

    Raises
    ------
    ValueError
        For a name that is not known; the message gives the nearest one.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.claims.verify("C6").measured
    1.0
    """
    one = get(name)
    start = time.perf_counter()
    with jax.enable_x64(True):
        findings = tuple(one.check())
    seconds = time.perf_counter() - start
    return Verdict(one.name, one.statement, one.assumptions, one.source, findings, seconds)
