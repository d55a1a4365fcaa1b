"""Integrating a flow: adaptively in time, or by its own discrete steps."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import compiled, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.schedules import Schedule
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    LearningRate,
    Progress,
    PyTree,
    ScalarLike,
    as_constant,
)
from ntkdp._estimators.sharpness_aware import SharpnessAware, ahead
from ntkdp.clipping import Adaptive, moving_norm
from ntkdp.gradient_flow._flow import Flow, LinearModelFlow, check_linear_model_flow
from ntkdp.gradient_flow._optimizer_steps import (
    OptimizerSteps,
    OutputsAtZero,
    Start,
    Walked,
    optimizer_steps,
)
from ntkdp.optimizers import OptimizerLike
from ntkdp.trajectory import Measurement, Outcome, Stepping, Trajectory, from_measurements

_DEFAULT_MAX_STEPS = 100_000
_WAYS_OUT = "use fewer samples, record fewer times or without outputs, or use float32"


class _Meter(diffrax.AbstractProgressMeter[Array]):
    """Passes the solver's progress on, a hundred times in all."""

    listener: Array

    def init(self) -> Array:
        return jnp.zeros(())

    def step(self, state: Array, progress: ScalarLike) -> Array:
        due = jnp.any(progress - state >= 0.01)
        lax.cond(due, lambda: _progress.report(self.listener, jnp.max(progress)), lambda: None)
        return jnp.where(due, progress, state)

    def close(self, state: Array) -> None:
        del state


class _Velocity(eqx.Module):
    """A flow on the leaves of its state: the solver takes no containers that are empty."""

    flow: Flow
    structure: jax.tree_util.PyTreeDef = eqx.field(static=True)

    def __call__(self, t: ScalarLike, leaves: list[Array], args: object) -> list[Array]:
        return jax.tree.leaves(self.flow.velocity(self.state(leaves)))

    def state(self, leaves: list[Array]) -> PyTree:
        return jax.tree.unflatten(self.structure, leaves)


class _Updates(eqx.Module):
    """Largest of Newton's updates over its tolerance, zero where updates are rounding.

    While samples are clipped the velocity is nearly constant, so that already the second update is
    rounding. Diffrax would take it for divergence, refuse the step, and every smaller one too.
    """

    rtol: float | Array | np.ndarray

    def __call__(self, updates: PyTree) -> Array:
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(updates)]))
        rounding = jnp.maximum(1e-3, 10 * jnp.finfo(largest.dtype).eps / self.rtol)
        return jnp.where(largest < rounding, 0.0, largest)


def _with_updates(
    solver: diffrax.AbstractSolver[Any], rtol: float | Array | np.ndarray
) -> diffrax.AbstractSolver[Any]:
    """An implicit solver as diffrax makes it, which knows rounding; any other as it is."""
    finder = getattr(solver, "root_finder", None)
    if not isinstance(finder, diffrax.VeryChord) or callable(finder.norm):
        return solver
    return eqx.tree_at(lambda s: s.root_finder.norm, solver, _Updates(rtol))


def solve(
    flow: Flow,
    initial: PyTree,
    times: ArrayLike,
    *,
    start: ScalarLike = 0.0,
    solver: diffrax.AbstractSolver[Any] | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    max_steps: int = _DEFAULT_MAX_STEPS,
    outputs: bool = False,
    progress: Progress = False,
) -> Trajectory:
    """Integrate a flow from its initial state and measure it at the given times.

    Parameters
    ----------
    flow : KernelFlow, WeightFlow, LinearisedFlow, HeavyBallFlow, ModifiedFlow or AdaptiveFlow
        The flow to integrate.
    initial : pytree
        Outputs ``(n, K)`` or a (train, test) pair for a KernelFlow, parameters for a WeightFlow or
        a LinearisedFlow. A given network is predicted from its own initial outputs.
    times : array
        Increasing, none before ``start``, in units of learning rate times steps: the times of a
        run, or of a log of it that begins later.
    start : float
        Time of the initial state, 0 as in a run; it need not be among ``times``.
    solver : diffrax solver, optional
        ``diffrax.Tsit5()`` by default; for stiff kernels ``diffrax.Kvaerno5()``.
    adjoint : diffrax adjoint, optional
        How to differentiate through the solve: ``diffrax.RecursiveCheckpointAdjoint()`` by default,
        for ``jax.grad``; ``diffrax.ForwardMode()`` for ``jax.jvp``.
    rtol, atol : float
        Tolerances of the adaptive step, relative and in units of the state.
    max_steps : int
        Steps after which to give up.
    outputs : bool
        Record the outputs too.
    progress : bool or callable
        True for a bar on a terminal; a function is called with the fraction done.

    Returns
    -------
    Trajectory
        ``successful`` and ``message`` say what went wrong, if anything did; times that were not
        reached are NaN then.

    Raises
    ------
    ValueError, TypeError
        If times do not increase or begin before the start, the initial state does not fit, or
        tolerances are not positive.

    Notes
    -----
    By diffrax; a rule with kinks costs a few rejected steps where samples leave the clipped zone.
    The error is estimated too low there: of 150 random samples, each alone, outputs were up to 7e-4
    off with Tsit5 and 6e-3 with Kvaerno5, and less than 1e-5 with ``rtol=1e-8, atol=1e-11``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(1.0), reduction="sum")
    >>> path = ntkdp.solve(flow, jnp.array([[5.0]]), [0.0, 3.0], outputs=True)
    >>> round(path.outputs[-1, 0, 0].item(), 4)
    0.0249
    """
    if not isinstance(flow, Flow):
        raise TypeError(
            "flow must be a KernelFlow, WeightFlow, LinearisedFlow, HeavyBallFlow or ModifiedFlow, "
            f"got {type(flow).__name__}"
        )
    start, times = validate.times_from(start, times)
    rtol = as_constant(validate.scalar(rtol=validate.positive(rtol=rtol)))
    atol = as_constant(validate.scalar(atol=validate.positive(atol=atol)))
    max_steps = validate.count(max_steps=max_steps)
    state = flow.init(initial)
    solver = diffrax.Tsit5() if solver is None else solver
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            "solver must be a diffrax solver with an error estimate, e.g. diffrax.Tsit5(), "
            f"got {solver!r}"
        )
    if not isinstance(adjoint, diffrax.AbstractAdjoint):
        raise TypeError(
            f"adjoint must be a diffrax adjoint, e.g. diffrax.ForwardMode(), got {adjoint!r}"
        )
    with _progress.listening(progress, "solving the flow") as listener:
        measured, outcome = compiled.call(
            _integrate, flow, state, start, times, solver, adjoint, (rtol, atol), max_steps,
            outputs, listener,
            what=f"a solve of a {type(flow).__name__}", ways_out=_WAYS_OUT,
            results=compiled.bytes_of_record(len(times), flow.measure, state, outputs),
        )  # fmt: skip
        return from_measurements(times, measured, outcome=outcome, start=start, setup=flow.setup())


@eqx.filter_jit
def _integrate(
    flow: Flow,
    state: PyTree,
    start: Array,
    times: Array,
    solver: diffrax.AbstractSolver[Any],
    adjoint: diffrax.AbstractAdjoint,
    tolerances: tuple[float | Array | np.ndarray, float | Array | np.ndarray],
    max_steps: int,
    outputs: bool,
    listener: Listener,
) -> tuple[Measurement, Array]:
    rtol, atol = tolerances
    leaves, structure = jax.tree.flatten(state)
    velocity = _Velocity(flow, structure)

    def measure(t: ScalarLike, at: list[Array], args: object) -> Measurement:
        # Interpolation in double-precision times promotes a state of single precision.
        at = [value.astype(leaf.dtype) for value, leaf in zip(at, leaves, strict=True)]
        return flow.measure(velocity.state(at), outputs)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        _with_updates(solver, rtol),
        t0=start,
        t1=times[-1],
        dt0=None,
        y0=leaves,
        saveat=diffrax.SaveAt(ts=times, fn=measure),
        stepsize_controller=diffrax.PIDController(
            rtol=rtol,
            atol=atol,
            dtmin=4 * jnp.finfo(times.dtype).eps * jnp.maximum(jnp.abs(start), jnp.abs(times[-1])),
            force_dtmin=False,
        ),
        max_steps=max_steps,
        adjoint=adjoint,
        throw=False,
        progress_meter=diffrax.NoProgressMeter() if listener is None else _Meter(listener),
    )
    results = diffrax.RESULTS
    ended = solution.result
    outcome = jnp.select(
        [
            ended == results.successful,
            ended == results.max_steps_reached,
            ended == results.dt_min_reached,
        ],
        [int(Outcome.SUCCESS), int(Outcome.MAX_STEPS), int(Outcome.STEP_TOO_SMALL)],
        int(Outcome.SOLVER_FAILED),
    )
    # Times that were not reached are filled with infinity by the solver.
    measured = jax.tree.map(lambda v: jnp.where(jnp.isinf(v), jnp.nan, v), solution.ys)
    return measured, outcome


def recursion(
    flow: LinearModelFlow,
    initial: PyTree,
    *,
    learning_rate: LearningRate,
    steps: int,
    optimizer: OptimizerLike | None = None,
    outputs_at_zero: OutputsAtZero | None = None,
    clip_norm: Schedule | None = None,
    adaptive: Adaptive | None = None,
    sharpness_aware: SharpnessAware | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
) -> Trajectory:
    r"""Discrete steps of a frozen kernel, :math:`f_{k+1} = f_k - \tfrac\eta n \sum_r H_r C_r a`.

    Exact for the linearised model at any step size, divergence included. Without the kernel, the
    same steps are :math:`w_{k+1} = w_k - \tfrac\eta n \sum_i C_i g_i` of a LinearisedFlow. An
    optimizer that is linear makes in the outputs the steps that it makes in the weights.

    Parameters
    ----------
    flow : KernelFlow or LinearisedFlow
        Kernel or linearised model, targets, loss and clipping.
    initial : array, pair or pytree
        Outputs ``(n, K)``, or a (train, test) pair with a test kernel; with public samples,
        (train, public) or (train, public, test). Parameters for a LinearisedFlow.
    learning_rate : float or optax schedule
        :math:`\eta`; a schedule maps the step number to it.
    steps : int
        At least 1.
    optimizer : optimizers.Optimizer or callable, optional
        As for ``dp_sgd.run``; by default plain SGD. A KernelFlow takes linear ones, as
        :class:`ntkdp.optimizers.SGD` with all its options, and a LinearisedFlow any.
    outputs_at_zero : array or pair, optional
        Needed for weight decay of a KernelFlow: the outputs of the linear model at zero weights,
        :math:`f(w_0) - J w_0`, ``(n, K)`` or a (train, test) pair. One Jacobian-vector product
        gives :math:`J w_0`.
    clip_norm : callable or array, optional
        Clipping norm of each step in place of the rule's, as for ``dp_sgd.run``.
    adaptive : clipping.Adaptive, optional
        How the clipping norm moves, as for ``dp_sgd.run``; the noise of the count is left out.
    sharpness_aware : SharpnessAware, optional
        Gradients are taken a little way up the gradient of the step before, as for ``dp_sgd.run``.
        A KernelFlow takes it with flat clipping.
    record_every : int
        Record every ``record_every`` steps, and the last.
    outputs : bool
        Record the outputs too.
    progress : bool or callable
        As for :func:`solve`.

    Returns
    -------
    Trajectory
        Times are the running sum of the learning rate. With an average of the weights, losses and
        outputs are those of the average, and the clip fraction is that of the weights.

    Raises
    ------
    ValueError, TypeError
        If the learning rate is not positive, there are no steps, or the flow is of another kind;
        with a KernelFlow, if the optimizer is not linear, or decays weights without
        ``outputs_at_zero``; if a clipping norm moves whose rule bounds no single sample; with
        sharpness-aware steps of a KernelFlow, if it clips by layer or is preconditioned.

    Notes
    -----
    *Derived*: a clipped gradient step of a model that is linear in its parameters, and that linear
    optimizers commute with the Jacobian.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.NoClipping(), reduction="sum")
    >>> path = ntkdp.recursion(flow, jnp.array([[1.0]]), learning_rate=0.1, steps=2, outputs=True)
    >>> [round(f, 4) for f in path.outputs[:, 0, 0].tolist()]
    [1.0, 0.6, 0.36]
    """
    flow = check_linear_model_flow(flow, way_out="; use solve")
    stepping = Stepping(learning_rate, steps, record_every)
    moving = moving_norm(adaptive, clip_norm, flow.clipping, stepping.steps)
    walk = optimizer_steps(
        flow, optimizer, stepping.learning_rate, outputs_at_zero, moving, sharpness_aware
    )
    start: Start = (flow.init(initial), None)
    with _progress.listening(progress, "stepping the kernel") as listener:
        return step_and_record(walk, start, stepping, outputs, listener)[1]


def step_and_record(
    walk: OptimizerSteps, start: Start, stepping: Stepping, outputs: bool, listener: Listener
) -> tuple[Start, Trajectory]:
    """Where the steps end, and what they pass."""
    flow = walk.flow
    end, measured = compiled.call(
        _recur, walk, start, stepping, outputs, listener,
        what=f"{stepping.steps:,} steps of a {type(flow).__name__}", ways_out=_WAYS_OUT,
        results=stepping.bytes_of_record(flow.measure, start[0], outputs),
    )  # fmt: skip
    setup = walk.setup(stepping)
    steps = jnp.asarray(stepping.recorded)
    return end, from_measurements(stepping.times, measured, steps=steps, setup=setup)


@eqx.filter_jit
def _recur(
    walk: OptimizerSteps,
    start: Start,
    stepping: Stepping,
    outputs: bool,
    listener: Listener,
) -> tuple[Start, Measurement]:
    def step(k: Array | int, walked: Walked) -> Walked:
        flow, point = walk.flow_at(walked), ahead(walked.position, walked.ascent)
        velocity, norms = flow.velocity_and_norms(point)
        norm = None if walked.ascent is None else flow.gradient_norm(point, None, velocity)
        return walk.adapt(walk.step(walked, velocity, gradient_norm=norm), k + 1, norms)

    end, measured = stepping.walk_to_end(
        step, lambda walked: walk.measure(walked, outputs), walk.start(*start), listener
    )
    return (end.position, end.average), measured
