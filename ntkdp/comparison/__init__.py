r"""How far a prediction is from a run: relative errors at the times that both recorded.

The error of a prediction is :math:`\sup_t |L_{pred}(t) - L_{obs}(t)| / L_{obs}(t)` over the
recorded times after the start. Step k of a run is at the time t = learning_rate * k of a flow.
If the prediction is an ensemble of runs, its distribution is compared too: its band, how often
runs are inside, and its CRPS. :func:`by_group` has losses and accuracies of subgroups.
"""

from ntkdp.comparison._agreement import agreement
from ntkdp.comparison._agreement import candidates as candidates
from ntkdp.comparison._agreement import check_cells as check_cells
from ntkdp.comparison._agreement import known as known
from ntkdp.comparison._agreement import levels as levels
from ntkdp.comparison._agreement import pareto_front as pareto_front
from ntkdp.comparison._agreement import prefix_of as prefix_of
from ntkdp.comparison._agreement import regret as regret
from ntkdp.comparison._agreement import value_of as value_of
from ntkdp.comparison._by_group import GroupMetrics, by_group
from ntkdp.comparison._cells import HIGHER_IS_BETTER as HIGHER_IS_BETTER
from ntkdp.comparison._cells import CellMetrics as CellMetrics
from ntkdp.comparison._cells import Number as Number
from ntkdp.comparison._cells import check_cell as check_cell
from ntkdp.comparison._cells import labels_of as labels_of
from ntkdp.comparison._cells import measure as measure
from ntkdp.comparison._cells import probabilities as probabilities
from ntkdp.comparison._compare import compare
from ntkdp.comparison._comparison import QUANTITIES, SHARES, Comparison, Errors
from ntkdp.comparison._scores import Coverage, band_coverage, crps, standardised_error
from ntkdp.trajectory import Band, band, last_value

__all__ = [
    "QUANTITIES",
    "SHARES",
    "Band",
    "Comparison",
    "Coverage",
    "Errors",
    "GroupMetrics",
    "agreement",
    "band",
    "band_coverage",
    "by_group",
    "compare",
    "crps",
    "last_value",
    "standardised_error",
]
