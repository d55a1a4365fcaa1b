r"""What twice the data would give, from predictions on parts of the data that there are.

Twice the data halve the noise of the mean gradient, which is exact: predictions take the noise and
the sampling of 2 n samples. What more samples teach is extrapolated. On the first n/4, n/2 and n
samples, all with the noise of 2 n, the objective is E(n/4), E(n/2) and E(n). A power law
:math:`E(m) = E_\infty + c\, m^{-\alpha}` changes by a constant factor from one doubling to the
next, so that

.. math:: E(2n) = E(n) + \rho\, [E(n) - E(n/2)], \qquad
    \rho = \frac{E(n) - E(n/2)}{E(n/2) - E(n/4)},

with :math:`\rho` kept between 0 and 1, since noise of the differences may put it anywhere.
"""

from typing import NamedTuple

import numpy as np

from ntkdp._backend.types import Array, Key
from ntkdp.advisor._planning.cells import Cell
from ntkdp.advisor._planning.prediction import Setting, predict
from ntkdp.comparison import HIGHER_IS_BETTER, value_of

#: Less noise asks for a longer horizon: learning rates that are tried, over the cell's own.
_FASTER = (1.0, 1.5, 2.0)
#: Runs of a cell.
_RUNS = 4
#: The least samples of a part.
_LEAST_ROWS = 4


class MoreData(NamedTuple):
    """The objective at ``n_samples``: in all, and from less noise alone; and the learning rate."""

    n_samples: int
    value: float
    from_noise_alone: float
    learning_rate: float


def with_twice_the_data(setting: Setting, cell: Cell, keys: Key[Array, " S"]) -> MoreData:
    """The best of a cell and of faster ones at the same q and number of steps, with 2 n samples."""

    def values(cells: list[Cell], rows: int) -> np.ndarray:
        ends = predict(setting, cells, keys[:_RUNS], n_samples=2 * setting.n_samples, rows=rows)
        return value_of(ends.metrics, setting.objective)

    rows = setting.rows
    cells = [cell._replace(learning_rate=cell.learning_rate * faster) for faster in _FASTER]
    wholes = values(cells, rows)
    sign = 1 if HIGHER_IS_BETTER[setting.objective] else -1
    best = int(np.nanargmax(sign * wholes))
    whole = float(wholes[best])
    quarter, half = (
        float(values([cells[best]], max(_LEAST_ROWS, rows // part))[0]) for part in (4, 2)
    )
    most = np.inf if setting.objective.endswith("loss") else 1.0
    return MoreData(
        2 * setting.n_samples,
        float(np.clip(extrapolated(quarter, half, whole), 0.0, most)),
        whole,
        cells[best].learning_rate,
    )


def extrapolated(quarter: float, half: float, whole: float) -> float:
    """A quantity at twice the samples, from a quarter, half and all of them, by a power law."""
    earlier, later = half - quarter, whole - half
    ratio = later / earlier if earlier != 0 else 0.0
    return whole + float(np.clip(ratio, 0.0, 1.0)) * later
