"""How the work behind a trajectory ended, and what to do about it."""

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from ntkdp._backend.types import ArrayLike


class Outcome(IntEnum):
    """How the work ended; every value but the first comes with advice.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.trajectory.Outcome(0).name
    'SUCCESS'
    """

    SUCCESS = 0
    MAX_STEPS = 1
    STEP_TOO_SMALL = 2
    NON_FINITE = 3
    SOLVER_FAILED = 4


ADVICE = {
    Outcome.MAX_STEPS: (
        "the solver reached max_steps before the last time; raise max_steps, loosen rtol and atol, "
        "shorten the horizon, or for a stiff kernel pass an implicit solver such as "
        "diffrax.Kvaerno5()"
    ),
    Outcome.STEP_TOO_SMALL: (
        "the solver's step size shrank to rounding; the flow may blow up near there, or the "
        "tolerances are below what this dtype resolves: loosen rtol and atol, or use float64"
    ),
    Outcome.NON_FINITE: (
        "the trajectory became infinite or NaN: it diverges (lower the learning rate) or an input "
        "overflows (rescale it)"
    ),
    Outcome.SOLVER_FAILED: (
        "the solver gave up for a reason of its own (for an implicit one, its nonlinear solve "
        "did not converge); try tighter tolerances or solver=diffrax.Tsit5()"
    ),
}


def succeeded(outcome: ArrayLike) -> bool:
    """Whether the work ended well, for every seed."""
    return bool(np.all(np.asarray(outcome) == Outcome.SUCCESS))


def message(outcome: ArrayLike, advice: Mapping[Outcome, str]) -> str:
    """What went wrong and what to do about it, or ``"success"``."""
    codes = sorted({int(code) for code in np.atleast_1d(np.asarray(outcome))} - {0})
    return "; ".join(advice[Outcome(code)] for code in codes) or "success"
