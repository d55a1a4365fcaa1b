r"""Predictions: clipped gradient flow in weight space and in function space.

Weight space, exact: :math:`\dot w = -\tfrac1n \sum_i C_i g_i`. Function space with a frozen kernel:
:math:`\dot f = -\tfrac1n \sum_r H_r C_r a`, closed in the outputs because
:math:`\|g_{ir}\|^2 = a_i^\top H_{r,ii} a_i`. With ``reduction="sum"`` the factor 1/n is absent.
Time is the running sum of the learning rate, t = learning_rate * step. Noise of mean zero does not
enter these flows. Training in phases, groups frozen and released, rules that change:
:func:`recursion_phases`, :func:`solve_phases`.
"""

from ntkdp.gradient_flow._adaptive_flow import AdaptiveFlow as AdaptiveFlow
from ntkdp.gradient_flow._flow import Flow as Flow
from ntkdp.gradient_flow._flow import LinearModelFlow as LinearModelFlow
from ntkdp.gradient_flow._flow import check_linear_model_flow as check_linear_model_flow
from ntkdp.gradient_flow._flow import setup_of as setup_of
from ntkdp.gradient_flow._flow import with_steps as with_steps
from ntkdp.gradient_flow._head_flow import HeadFlow as HeadFlow
from ntkdp.gradient_flow._kernel_flow import KernelFlow as KernelFlow
from ntkdp.gradient_flow._kernel_flow import check_kernel_flow as check_kernel_flow
from ntkdp.gradient_flow._kernel_matrix import BlockKernel as BlockKernel
from ntkdp.gradient_flow._kernel_matrix import Features as Features
from ntkdp.gradient_flow._kernel_matrix import KernelMatrix as KernelMatrix
from ntkdp.gradient_flow._kernel_terms import KernelLike as KernelLike
from ntkdp.gradient_flow._linearised_flow import LinearisedFlow as LinearisedFlow
from ntkdp.gradient_flow._optimizer_steps import OptimizerSteps as OptimizerSteps
from ntkdp.gradient_flow._optimizer_steps import OutputsAtZero as OutputsAtZero
from ntkdp.gradient_flow._optimizer_steps import Start as Start
from ntkdp.gradient_flow._optimizer_steps import Walked as Walked
from ntkdp.gradient_flow._optimizer_steps import optimizer_steps as optimizer_steps
from ntkdp.gradient_flow._phases import flows_of_phases as flows_of_phases
from ntkdp.gradient_flow._phases import one_a_phase as one_a_phase
from ntkdp.gradient_flow._phases import recursion_phases as recursion_phases
from ntkdp.gradient_flow._phases import solve_phases as solve_phases
from ntkdp.gradient_flow._phases import walks_of_phases as walks_of_phases
from ntkdp.gradient_flow._solve import recursion as recursion
from ntkdp.gradient_flow._solve import solve as solve
from ntkdp.gradient_flow._weight_flow import WeightFlow as WeightFlow
from ntkdp.gradient_flow._wrapped_flows import HeavyBallFlow as HeavyBallFlow
from ntkdp.gradient_flow._wrapped_flows import ModifiedFlow as ModifiedFlow

__all__ = [
    "AdaptiveFlow",
    "Flow",
    "HeavyBallFlow",
    "KernelFlow",
    "LinearisedFlow",
    "ModifiedFlow",
    "WeightFlow",
    "recursion",
    "recursion_phases",
    "solve",
    "solve_phases",
]
