r"""Table 1 of the paper, rebuilt from computed evidence.

For each kind of clipping the paper says whether the matrix that drives the outputs is symmetric,
has a positive quadratic form and positive eigenvalues, and whether the training loss converges,
falls monotonically and reaches zero, given a kernel that stays positive definite (Bu, Wang, Dai,
Long, TMLR 2023, Table 1; the rows of the global rule are from the third version of the preprint).
Here every "yes" comes with the worst case over thousands of random instances and trajectories, and
every "no" with an explicit small instance. If more is known than the paper says, the cell says
both; the addition is *derived* for this library.

Two of these additions carry proofs. **A frozen kernel and flat clipping always converge**: for
convex losses whose minima :math:`f^*` are attained together,
:math:`V = \tfrac12 (f - f^*)^\top H^{-1} (f - f^*)` falls,
:math:`\dot V = -\sum_i C_i (f_i - f_i^*)^\top a_i \le -\sum_i C_i (\ell_i(f_i) - \ell_i(f_i^*))`,
whatever the number of outputs. **A moving kernel need not**: a network of four weights, three
samples and a kernel that stays positive definite circles for ever.
"""

from ntkdp.table_one._compute import compute
from ntkdp.table_one._table import COLUMNS, Cell, Row, State, Table

__all__ = [
    "COLUMNS",
    "Cell",
    "Row",
    "State",
    "Table",
    "compute",
]
