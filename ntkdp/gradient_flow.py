r"""Predictions: clipped gradient flow in weight space and in function space.

Weight space, exact: :math:`\dot w = -\tfrac1n \sum_i C_i g_i`. Function space with a frozen kernel:
:math:`\dot f = -\tfrac1n \sum_r H_r C_r a`, closed in the outputs because
:math:`\|g_{ir}\|^2 = a_i^\top H_{r,ii} a_i`. With ``reduction="sum"`` the factor 1/n is absent.
Time is the running sum of the learning rate, t = learning_rate * step. Noise of mean zero does not
enter these flows. Training in phases, groups frozen and released, rules that change:
:func:`recursion_phases`, :func:`solve_phases`.
"""

from ntkdp._flow import Flow as Flow
from ntkdp._heavy_ball_flow import HeavyBallFlow as HeavyBallFlow
from ntkdp._kernel_flow import KernelFlow as KernelFlow
from ntkdp._linearised_flow import LinearisedFlow as LinearisedFlow
from ntkdp._modified_flow import ModifiedFlow as ModifiedFlow
from ntkdp._phased_flow import recursion_phases as recursion_phases
from ntkdp._phased_flow import solve_phases as solve_phases
from ntkdp._solve import recursion as recursion
from ntkdp._solve import solve as solve
from ntkdp._weight_flow import WeightFlow as WeightFlow
