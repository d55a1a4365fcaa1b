"""Runs of DP-SGD, of one phase or several, for one seed or many."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import UInt32

from ntkdp import privacy
from ntkdp._backend import devices, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.schedules import Schedule
from ntkdp._backend.types import (
    ApplyFn,
    Array,
    ArrayLike,
    Key,
    LearningRate,
    Params,
    Progress,
    PyTree,
    ScalarLike,
)
from ntkdp._estimators.sharpness_aware import SharpnessAware
from ntkdp._estimators.zeroth_order import ZerothOrder
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import Adaptive, ClippingRule
from ntkdp.dp_sgd._algorithm import Algorithm
from ntkdp.dp_sgd._build import Mechanism, Method, Problem, algorithm_of
from ntkdp.dp_sgd._individual import check_individual
from ntkdp.dp_sgd._seeds import Start, trained
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.noise import Independent, Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import OptimizerLike
from ntkdp.trajectory import (
    Phase,
    PublicRows,
    Stepping,
    Trajectory,
    as_samples,
    check_phases,
    from_measurements,
    joined,
    steppings,
)


def run(
    apply_fn: ApplyFn,
    params: Params,
    x: ArrayLike,
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    clipping: ClippingRule,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: ScalarLike | Schedule | privacy.Budget = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    clip_norm: Schedule | None = None,
    adaptive: Adaptive | None = None,
    public: PublicRows | None = None,
    zeroth_order: ZerothOrder | None = None,
    sharpness_aware: SharpnessAware | None = None,
    optimizer: OptimizerLike | None = None,
    groups: PyTree = None,
    trainable: Iterable[str] | None = None,
    reduction: Reduction = "mean",
    test_x: ArrayLike | None = None,
    test_targets: ArrayLike | None = None,
    record_every: int = 1,
    outputs: bool = False,
    keep_params: bool = False,
    gradients: Literal["structured", "vmap"] = "structured",
    noise_per_group: bool = False,
    individual: bool = False,
    microbatch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Progress = False,
    key: Key[Array, "*seeds"] | UInt32[Array, "*seeds words"],
) -> Trajectory:
    r"""Train with DP-SGD and record what happens.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, x) -> (n, K)``, one sample independent of another.
    params : pytree
        Initial parameters.
    x, targets : array
        Training inputs ``(n, ...)`` and targets as the loss wants them.
    loss : Loss or callable
        One of :mod:`ntkdp.losses`, or a function of one sample's outputs and target.
    clipping : ClippingRule
        One of :mod:`ntkdp.clipping`.
    learning_rate : float or optax schedule
        Step size of the reduced loss's gradient; a schedule maps the step number to it.
    steps : int
        At least 1.
    noise_multiplier : float, privacy.Budget, callable or array
        :math:`\sigma`: the noise of the summed gradient has standard deviation
        :math:`\sigma S` on every weight, S the sensitivity (R flat,
        :math:`\sqrt{\sum_r R_r^2}` layerwise). A budget is spent on all the steps. A function of
        the step, or ``(steps,)``, has a :math:`\sigma` for each step, with independent noise;
        ``budget.noise_multiplier(steps, relative=...)`` finds its scale.
    sample_rate : float
        q in (0, 1]: 1 for full batches, below it Poisson sampling.
    batches : batches.Batches, optional
        One of :mod:`ntkdp.batches`, in place of a sampling rate.
    noise : noise.Noise, optional
        One of :mod:`ntkdp.noise`; by default independent. Correlated noise is :math:`\sigma S`
        times the rows of :math:`C^{-1} Z`, from a buffer of a few noise vectors.
    clip_norm : callable or array, optional
        Clipping norm of each step in place of the rule's, a function of the step, ``(steps,)``, or
        ``(steps, R)`` by group: the factors become :math:`w(s R_0/R_k)`, and the noise of the step
        is in proportion to its sensitivity. It costs no privacy. It needs independent noise and a
        rule that bounds each sample.
    adaptive : clipping.Adaptive, optional
        How the clipping norm moves, from that of the rule; by default it is constant. The noise
        multiplier is then that of the summed gradient and the count together. It needs independent
        noise and a rule that bounds each sample.
    public : PublicRows, optional
        Public samples, whose gradient is mixed with the private one.
    zeroth_order : ZerothOrder, optional
        Steps along random directions, by clipped slopes of the losses; by default steps are those
        of gradients.
    sharpness_aware : SharpnessAware, optional
        Gradients are taken a little way up the last noisy gradient; by default at the weights.
    optimizer : optimizers.Optimizer or callable, optional
        One of :mod:`ntkdp.optimizers`, or another function from learning rate to optax
        transformation, e.g. ``optax.lion``; by default plain SGD. If it averages the weights,
        losses and outputs are those of the average, and the clip fraction is of the weights.
    groups : pytree prefix of labels, or callable from key path to label, optional
        Groups of layerwise clipping; by default the layers.
    trainable : sequence of str, optional
        Names of the groups that train, as in ``LayerwiseKernel.names``; by default all. The others
        have no part in norms, noise and sensitivity.
    reduction : {"mean", "sum"}
        The noisy sum is divided by q n (mean) or by q (sum); the recorded loss likewise.
    test_x, test_targets : array, optional
        Measured along the way.
    record_every : int
        Record every ``record_every`` steps, and the last.
    outputs : bool
        Record the outputs too.
    keep_params : bool
        Keep the parameters at the end, as ``params`` of the trajectory: the average if the
        optimizer keeps one, at which losses are measured.
    gradients : {"structured", "vmap"}
        Per-sample norms and clipped sums from layer inputs and cotangents, or from plain
        per-sample gradients, which is slower and shares nothing with the predictions.
    noise_per_group : bool
        Layerwise only: noise of group r in proportion to its own R_r,
        :math:`\sigma \sqrt{n_{groups}} R_r`, at the same privacy.
    individual : bool
        Record what each sample adds to the steps, for :func:`ntkdp.privacy.individual`: with full
        batches and Poisson sampling alone. With sampling every step then looks at all samples.
    microbatch_size : int, optional
        Samples whose gradients are held at once on a device; it changes the memory, not the result.
    mesh : jax.sharding.Mesh, optional
        Devices over which the training samples are spread; their number must divide over them. Test
        samples are spread too if theirs divides.
    progress : bool or callable
        True for a bar on a terminal; a function is called with the fraction done.
    key : PRNG key
        One, or an array of S keys: repeated runs in parallel, a leading seed axis.

    Returns
    -------
    Trajectory
        Times are the running sum of the learning rate. Losses and clip fractions are of the whole
        training set at the parameters of that time.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, numbers are NaN or infinite, sigma is negative or given with a rule of
        unbounded sensitivity, the sampling rate is outside (0, 1], the learning rate or clipping
        norm is not positive, there are no steps, or the model couples the samples of a batch; if
        the count of adaptive clipping has too little noise; if a schedule has another number of
        steps, or meets correlated noise.

    Notes
    -----
    Abadi et al. (2016). The Poisson batch is held in a buffer that a draw outgrows with probability
    1e-12 a step; the samples beyond it are left out then.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> run = ntkdp.dp_sgd.run(
    ...     lambda w, x: x @ w, jnp.array([[3.0]]), jnp.ones((1, 1)), jnp.zeros((1, 1)),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0), learning_rate=0.5, steps=2,
    ...     key=jax.random.key(0))
    >>> run.times.tolist(), run.loss.tolist()
    ([0.0, 0.5, 1.0], [4.5, 3.125, 2.0])
    """
    keys = validate.keys(key=key)
    stepping = Stepping(learning_rate, steps, record_every)
    drawn, added = resolve_batches(batches, sample_rate), resolve_noise(noise)
    x = as_samples(x=x)
    sigma = privacy.as_noise_multiplier(
        noise_multiplier,
        stepping.steps,
        batches=drawn,
        noise=added,
        n_samples=x.shape[0],
        schedules=True,
    )
    problem = Problem(apply_fn, x, targets, loss, reduction, test_x, test_targets, mesh, public)
    method = Method(
        drawn,
        added,
        optimizer,
        groups,
        gradients,
        noise_per_group,
        microbatch_size,
        zeroth_order,
        sharpness_aware,
    )
    mechanism = Mechanism(
        clipping,
        learning_rate,
        sigma,
        trainable,
        adaptive=adaptive,
        clip_norm=clip_norm,
        steps=stepping.steps,
    )
    algorithm = algorithm_of(problem, method, mechanism)
    if validate.flag(individual=individual):
        check_individual(algorithm)
    kept = validate.flag(keep_params=keep_params)
    path, end = _recorded([(algorithm, stepping)], params, keys, outputs, progress, individual)
    return replace(path, params=end) if kept else path


def run_phases(
    apply_fn: ApplyFn,
    params: Params,
    x: ArrayLike,
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    phases: Iterable[Phase],
    *,
    sample_rate: float = 1.0,
    public: PublicRows | None = None,
    optimizer: OptimizerLike | None = None,
    groups: PyTree = None,
    reduction: Reduction = "mean",
    test_x: ArrayLike | None = None,
    test_targets: ArrayLike | None = None,
    record_every: int = 1,
    outputs: bool = False,
    gradients: Literal["structured", "vmap"] = "structured",
    noise_per_group: bool = False,
    microbatch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Progress = False,
    key: Key[Array, "*seeds"] | UInt32[Array, "*seeds words"],
) -> Trajectory:
    r"""Train with DP-SGD phase by phase, each from the parameters that the one before left.

    Parameters
    ----------
    phases : sequence of Phase
        Clipping rule, learning rate, noise, steps and trainable groups of each. The optimizer's
        state starts anew with each phase, while an average of the weights goes on.
    groups : pytree prefix of labels, or callable from key path to label, optional
        Groups of layerwise clipping, and those that a phase may freeze; by default the layers.
    record_every : int
        Record each phase after every ``record_every`` steps, and its first and last state.
    apply_fn, params, x, targets, loss, sample_rate, public, optimizer, reduction, test_x, \
    test_targets, outputs, gradients, noise_per_group, microbatch_size, mesh, progress, key
        As for :func:`run`. Steps draw their noise and batches by their number in the whole: a
        single phase is :func:`run`, to the last bit.

    Returns
    -------
    Trajectory
        All phases, with times and steps added up. The state between two phases is recorded once,
        with the clip fraction that the later phase begins with.

    Raises
    ------
    ValueError, TypeError
        As for :func:`run`, for any of the phases before the first begins; no phases, an unknown
        group.

    Notes
    -----
    A phase's noise is in proportion to its own sensitivity: layerwise, to
    :math:`\sqrt{\sum_r R_r^2}` over the groups that train. What all phases spend together:
    :func:`ntkdp.privacy.composed_epsilon`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> rule = ntkdp.clipping.Abadi(1.0)
    >>> run = ntkdp.dp_sgd.run_phases(
    ...     lambda w, x: x @ (w["body"] + w["head"]),
    ...     {"body": jnp.array([[3.0]]), "head": jnp.array([[0.0]])},
    ...     jnp.ones((1, 1)), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...     [ntkdp.Phase(2, rule, learning_rate=0.5, trainable=["head"]),
    ...      ntkdp.Phase(1, rule, learning_rate=0.5)],
    ...     outputs=True, key=jax.random.key(0))
    >>> run.times.tolist(), [round(f, 3) for f in run.outputs.ravel().tolist()]
    ([0.0, 0.5, 1.0, 1.5], [3.0, 2.5, 2.0, 1.293])
    """
    keys = validate.keys(key=key)
    phases = check_phases(phases)
    problem = Problem(apply_fn, x, targets, loss, reduction, test_x, test_targets, mesh, public)
    method = Method(
        resolve_batches(None, sample_rate),
        Independent(),
        optimizer,
        groups,
        gradients,
        noise_per_group,
        microbatch_size,
    )
    algorithms = [
        algorithm_of(
            problem,
            method,
            Mechanism(
                phase.clipping,
                phase.learning_rate,
                phase.mechanism(sample_rate)[0],
                phase.trainable,
                phase.adaptive,
                phase.clip_norm,
                phase.steps,
            ),
        )
        for phase in phases
    ]
    parts = list(zip(algorithms, steppings(phases, record_every), strict=True))
    return _recorded(parts, params, keys, outputs, progress)[0]


def _recorded(
    phases: list[tuple[Algorithm, Stepping]],
    params: Params,
    keys: Key[Array, "*seeds"],
    outputs: bool,
    progress: Progress,
    individual: bool = False,
) -> tuple[Trajectory, Params]:
    """Train phase by phase, each from where the one before ended, and record it.

    The parameters are those at the end, at which the last losses are measured.
    """
    keys = devices.everywhere(phases[0][0].mesh, keys)
    # All phases are checked before the first begins.
    params, *_ = [algorithm.init(params).params for algorithm, _ in phases]
    start: Start = (params, None)
    paths: list[Trajectory] = []
    with _progress.listening(progress, "training with DP-SGD") as listener:
        for algorithm, stepping in phases:
            per_seed = bool(paths) and keys.ndim > 0
            start, measured, record = trained(
                algorithm, start, per_seed, keys, stepping, outputs, individual, listener
            )
            recorded, setup = jnp.asarray(stepping.recorded), algorithm.setup(stepping)
            path = from_measurements(stepping.times, measured, steps=recorded, setup=setup)
            paths.append(replace(path, sensitivities=record))
        path = joined(paths, (algorithm.clipping for algorithm, _ in phases))
    end, average = start
    if average is not None:
        end = jax.tree.map(lambda mean, w: mean.astype(w.dtype), average, end)
    return path, end
