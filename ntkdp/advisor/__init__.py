r"""Choosing learning rate and clipping norm from a prediction, before a budget is spent on runs.

:func:`gradient_norms` says where clipping sets in, :func:`largest_stable_learning_rate` how far
the learning rate may go, :func:`predict` what every cell of a grid of learning rates and clipping
norms ends with, and :func:`advise` picks one. :func:`allocate_clip_norms` shares out a sensitivity
over the groups of layerwise clipping. :func:`ntkdp.comparison.agreement` and :func:`regret`
compare that with runs of the same cells. :func:`decompose` says what limits a step: curvature, the
noise of sampling, or that of privacy. :func:`plan_budget` chooses the number of steps, the sampling
rate and the budget too. :func:`membership_advantage` says what an attack on a sample would find.

.. warning::
   Looking at private data in order to choose costs privacy, and nothing here adds noise for it.
   The prediction looks too: the kernel, the outputs at the start, the targets and the gradient
   norms are functions of the data, even at initialisation, and so are the advice and the
   stable rates. There are three ways out:

   - predict from public data that are like the private ones, and train on the private ones at the
     chosen cell; the advice is then a constant, and free;
   - choose among private runs by private selection: a random number of runs, of which only the
     best is shown, costs a few times the epsilon of one (Liu and Talwar 2019, 1811.07971), and
     less by Rényi DP (Papernot and Steinke 2022, 2110.03620);
   - compose: if k runs are looked at, k runs are paid for.
"""

from ntkdp.advisor._advise import Advice, advise
from ntkdp.advisor._allocation import Allocation, allocate_clip_norms
from ntkdp.advisor._budget_plan import BudgetPlan, PlannedCells, Recommendation
from ntkdp.advisor._decompose import Decomposition, StepTerms, decompose
from ntkdp.advisor._gradient_norms import GradientNorms, gradient_norms
from ntkdp.advisor._grid import MOVING_FROM as MOVING_FROM
from ntkdp.advisor._grid import Grid, predict
from ntkdp.advisor._grid import KernelChoice as KernelChoice
from ntkdp.advisor._membership import membership_advantage
from ntkdp.advisor._memory_plan import MethodCost as MethodCost
from ntkdp.advisor._memory_plan import plan as plan
from ntkdp.advisor._plan_budget import plan_budget
from ntkdp.advisor._stability import largest_stable_learning_rate
from ntkdp.comparison import CellMetrics, pareto_front, regret

__all__ = [
    "Advice",
    "Allocation",
    "BudgetPlan",
    "CellMetrics",
    "Decomposition",
    "GradientNorms",
    "Grid",
    "PlannedCells",
    "Recommendation",
    "StepTerms",
    "advise",
    "allocate_clip_norms",
    "decompose",
    "gradient_norms",
    "largest_stable_learning_rate",
    "membership_advantage",
    "pareto_front",
    "plan_budget",
    "predict",
    "regret",
]
