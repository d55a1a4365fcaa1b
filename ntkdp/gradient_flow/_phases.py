"""Predictions of training in phases, each phase a flow of its own from where the last one ended."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import equinox as eqx

from ntkdp._backend import progress as _progress
from ntkdp._backend.types import ArrayLike, Progress, PyTree
from ntkdp.gradient_flow._flow import Flow
from ntkdp.gradient_flow._kernel_flow import KernelFlow
from ntkdp.gradient_flow._kernel_terms import KernelLike
from ntkdp.gradient_flow._optimizer_steps import (
    OptimizerSteps,
    OutputsAtZero,
    Start,
    optimizer_steps,
)
from ntkdp.gradient_flow._solve import solve, step_and_record
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.ntk import LayerwiseKernel
from ntkdp.optimizers import Optimizer, OptimizerLike, as_optimizer, recognised
from ntkdp.trajectory import Phase, Stepping, Trajectory, check_phases, joined, steppings

#: One kernel for all phases, or one for each, as :class:`ntkdp.KernelFlow` takes them.
KernelOfPhases: TypeAlias = KernelLike | Sequence[KernelLike]


def recursion_phases(
    kernel: KernelOfPhases,
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    phases: Iterable[Phase],
    initial: PyTree,
    *,
    reduction: Reduction = "mean",
    test_kernel: KernelOfPhases | None = None,
    test_targets: ArrayLike | None = None,
    optimizer: OptimizerLike | None = None,
    outputs_at_zero: OutputsAtZero | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
) -> Trajectory:
    r"""Discrete steps in phases, each phase under the frozen kernel of the groups that it trains.

    Parameters
    ----------
    kernel, test_kernel : LayerwiseKernel or array, or a list of them
        As for :class:`ntkdp.KernelFlow`: one for all phases, or one for each, taken anew where a
        phase begins. A phase that freezes groups needs a LayerwiseKernel.
    targets, loss, reduction, test_targets
        As for :class:`ntkdp.KernelFlow`.
    phases : sequence of Phase
        Clipping rule, learning rate, steps and trainable groups of each. Noise, whose mean is zero,
        is left out: :func:`ntkdp.stochastic_flow.ensemble_phases` has it.
    initial : array or pair
        Outputs ``(n, K)``, or a (train, test) pair with a test kernel.
    optimizer, outputs_at_zero
        As for :func:`recursion`. The optimizer's state starts anew with each phase, while an
        average of the weights goes on. Weight decay needs phases that train all groups under one
        kernel.
    record_every : int
        Record each phase after every ``record_every`` steps, and its first and last state.
    outputs, progress
        As for :func:`recursion`.

    Returns
    -------
    Trajectory
        All phases, with times and steps added up. The state between two phases is recorded once,
        with the clip fraction that the later phase begins with.

    Raises
    ------
    ValueError, TypeError
        As for :func:`recursion`; no phases, a group that the kernel does not have, a list of
        kernels that is not one a phase.

    Notes
    -----
    *Derived*. Exact for a model that is linear in its parameters, with one kernel throughout.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel = ntkdp.LayerwiseKernel(("body", "head"), jnp.array([[[3.0]], [[1.0]]]))
    >>> rule = ntkdp.clipping.NoClipping()
    >>> phases = [ntkdp.Phase(1, rule, 0.1, trainable=["head"]), ntkdp.Phase(1, rule, 0.1)]
    >>> path = ntkdp.gradient_flow.recursion_phases(
    ...     kernel, jnp.zeros((1, 1)), ntkdp.losses.SquaredError(), phases, jnp.array([[1.0]]),
    ...     outputs=True)
    >>> [round(f, 4) for f in path.outputs.ravel().tolist()]
    [1.0, 0.9, 0.54]
    """
    phases = check_phases(phases)
    flows = flows_of_phases(kernel, targets, loss, phases, reduction, test_kernel, test_targets)
    steps_of = steppings(phases, record_every)
    walks = walks_of_phases(flows, phases, steps_of, kernel, optimizer, outputs_at_zero)
    start: Start = (flows[0].init(initial), None)
    paths: list[Trajectory] = []
    with _progress.listening(progress, "stepping the kernel") as listener:
        for walk, stepping in zip(walks, steps_of, strict=True):
            start, path = step_and_record(walk, start, stepping, outputs, listener)
            paths.append(path)
    return joined(paths, (phase.clipping for phase in phases))


def solve_phases(
    kernel: KernelOfPhases,
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    phases: Iterable[Phase],
    initial: PyTree,
    *,
    reduction: Reduction = "mean",
    test_kernel: KernelOfPhases | None = None,
    test_targets: ArrayLike | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
    **options: Any,
) -> Trajectory:
    r"""The flow in time, phase by phase: each lasts the running sum of its learning rate.

    Parameters
    ----------
    kernel, targets, loss, phases, initial, reduction, test_kernel, test_targets, record_every, \
    outputs, progress
        As for :func:`recursion_phases`. The flow is measured at the times of the recorded steps.
    **options
        ``solver``, ``adjoint``, ``rtol``, ``atol`` and ``max_steps`` of :func:`solve`.

    Returns
    -------
    Trajectory
        All phases, with times added up. After a phase that fails everything is NaN.

    Raises
    ------
    ValueError, TypeError
        As for :func:`recursion_phases`; a schedule that is zero between two recorded steps.

    Notes
    -----
    *Derived*: the limit of :func:`recursion_phases` as the learning rates go to zero at fixed
    lengths of the phases.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> kernel = ntkdp.LayerwiseKernel(("body", "head"), jnp.array([[[3.0]], [[1.0]]]))
    >>> rule = ntkdp.clipping.NoClipping()
    >>> phases = [ntkdp.Phase(10, rule, 0.1, trainable=["head"]), ntkdp.Phase(10, rule, 0.1)]
    >>> path = ntkdp.gradient_flow.solve_phases(
    ...     kernel, jnp.zeros((1, 1)), ntkdp.losses.SquaredError(), phases, jnp.array([[1.0]]),
    ...     record_every=10, outputs=True)
    >>> [round(f, 4) for f in path.outputs.ravel().tolist()]
    [1.0, 0.3679, 0.0067]
    """

    def advance(flow: KernelFlow, initial: PyTree, stepping: Stepping) -> Trajectory:
        return solve(
            flow, initial, stepping.times, start=0.0, outputs=True, progress=progress, **options
        )

    phases = check_phases(phases)
    if any(phase.moving is not None for phase in phases):
        raise ValueError(
            "phases must have constant clipping norms in flow time; use recursion_phases"
        )
    flows = flows_of_phases(kernel, targets, loss, phases, reduction, test_kernel, test_targets)
    return _one_after_another(flows, initial, steppings(phases, record_every), advance, outputs)


def walks_of_phases(
    flows: list[KernelFlow],
    phases: tuple[Phase, ...],
    steps_of: list[Stepping],
    kernel: PyTree,
    optimizer: OptimizerLike | None,
    outputs_at_zero: OutputsAtZero | None,
) -> list[OptimizerSteps]:
    """The optimizer's steps in each phase; all are checked before the first begins."""
    _check_decay(optimizer, phases, kernel)
    return [
        optimizer_steps(flow, optimizer, stepping.learning_rate, outputs_at_zero, phase.moving)
        for flow, phase, stepping in zip(flows, phases, steps_of, strict=True)
    ]


def _one_after_another(
    flows: list[KernelFlow],
    initial: PyTree,
    steps_of: list[Stepping],
    advance: Callable[[KernelFlow, PyTree, Stepping], Trajectory],
    outputs: bool,
) -> Trajectory:
    """Each flow from the outputs at which the one before ended."""
    paths = []
    for flow, stepping in zip(flows, steps_of, strict=True):
        path = advance(flow, initial, stepping)
        assert path.outputs is not None
        initial = path.outputs[-1]
        if path.test_outputs is not None:
            initial = (initial, path.test_outputs[-1])
        if not outputs:
            path = eqx.tree_at(
                lambda path: (path.outputs, path.test_outputs),
                path,
                (None, None),
                is_leaf=lambda leaf: leaf is None,
            )
        paths.append(path)
    return functools.reduce(Trajectory.then, paths)


def flows_of_phases(
    kernel: PyTree,
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    phases: tuple[Phase, ...],
    reduction: Reduction,
    test_kernel: PyTree,
    test_targets: ArrayLike | None,
) -> list[KernelFlow]:
    """The flow of each phase; all are checked before the first begins."""
    return [
        KernelFlow(
            own,
            targets,
            loss,
            phase.clipping,
            reduction=reduction,
            test_kernel=test,
            test_targets=test_targets,
        )
        for phase, own, test in zip(
            phases,
            one_a_phase(kernel, phases, "kernel"),
            one_a_phase(test_kernel, phases, "test_kernel"),
            strict=True,
        )
    ]


def _check_decay(
    optimizer: OptimizerLike | None, phases: tuple[Phase, ...], kernel: PyTree
) -> None:
    """Raise if weight decay acts on weights of which the outputs do not tell enough."""
    known = recognised(as_optimizer(optimizer))
    if not isinstance(known, Optimizer) or not known.decays_weights:
        return
    if isinstance(kernel, list | tuple) or any(phase.trainable is not None for phase in phases):
        raise ValueError(
            "optimizer must be without weight decay where phases freeze groups or have kernels of "
            f"their own, got {type(known).__name__}: which part of the outputs decays then is not "
            "in the kernel; use dp_sgd.run_phases"
        )


def one_a_phase(kernel: PyTree, phases: tuple[Phase, ...], name: str) -> list[PyTree]:
    """The kernel of the groups that each phase trains."""
    if not isinstance(kernel, list | tuple):
        kernel = [kernel] * len(phases)
    elif len(kernel) != len(phases):
        raise ValueError(
            f"{name} must be one kernel, or one for each of the {len(phases)} phases, got "
            f"{len(kernel)}"
        )
    return [_of_phase(own, phase, name) for own, phase in zip(kernel, phases, strict=True)]


def _of_phase(kernel: PyTree, phase: Phase, name: str) -> PyTree:
    if isinstance(kernel, Flow):
        raise TypeError(
            f"{name} must be a kernel, got a {type(kernel).__name__}: phases make flows of their "
            "own; without a kernel ensemble and recursion step a LinearisedFlow, in one phase"
        )
    if kernel is None or phase.trainable is None:
        return kernel
    if not isinstance(kernel, LayerwiseKernel):
        raise ValueError(
            f"{name} must be a LayerwiseKernel where a phase trains only {phase.trainable}, got an "
            "array without layer terms; use layerwise_ntk or layerwise_infinite_ntk"
        )
    return kernel.select(phase.trainable)
