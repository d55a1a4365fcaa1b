r"""Observation: discrete DP-SGD with per-sample clipping and the exact noise scale.

One step: :math:`w^+ = w - \eta\,U\big[\tfrac1B(\sum_{i \in batch} C_i g_i + \sigma S z)\big]` with
:math:`z \sim N(0, I)`, S the sensitivity of the clipping rule, B the expected batch size q n
(``reduction="mean"``), and U the optimizer; with ``reduction="sum"`` the sum is divided by q.
Noise of the *sum* has standard deviation ``noise_multiplier * sensitivity`` on every weight.

A sample whose gradient norm or clipping factor is not finite contributes nothing, so that it cannot
break the bound; without a bound (`NoClipping`, `Batch`) it is used as it is, so that divergence is
seen. One sample adds at most S to the sum, up to rounding: 1e-9 S in float64, 1e-4 S in float32 and
1e-2 S in half precision. Sums and noise are formed in float32 at least, and are cast once to the
dtype of the parameters, when the noise is in them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ntkdp import losses, privacy
from ntkdp._backend import devices, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.types import ApplyFn, Array, Params, as_constant, is_traced
from ntkdp._dp_run import trained
from ntkdp._dp_step import Algorithm
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss
from ntkdp.trajectory import (
    Measurement,
    Phase,
    Stepping,
    Trajectory,
    as_trainable,
    check_phases,
    from_measurements,
    steppings,
)

#: Chance per step that a Poisson batch outgrows the memory planned for it.
_OVERFLOW_PROBABILITY = 1e-12


def build(
    apply_fn: ApplyFn,
    x: Any,
    targets: Any,
    loss: Any,
    clipping: ClippingRule,
    *,
    learning_rate: Any,
    noise_multiplier: Any = 0.0,
    sample_rate: float = 1.0,
    optimizer: Callable[[Any], optax.GradientTransformation] | None = None,
    groups: Any = None,
    reduction: Literal["mean", "sum"] = "mean",
    test_x: Any = None,
    test_targets: Any = None,
    gradients: Literal["structured", "vmap"] = "structured",
    noise_per_group: bool = False,
    microbatch_size: int | None = None,
    trainable: Iterable[str] | None = None,
    mesh: Mesh | None = None,
) -> Algorithm:
    r"""DP-SGD on a problem, as ``init`` and ``step`` for a loop of your own.

    Parameters
    ----------
    apply_fn, x, targets, loss, clipping, learning_rate, noise_multiplier, sample_rate, optimizer, \
    groups, reduction, test_x, test_targets, gradients, noise_per_group, microbatch_size, mesh
        As for :func:`run`, but for a budget in place of ``noise_multiplier``: the number of steps
        is not known here, so give ``budget.noise_multiplier(steps, sample_rate)``.
    trainable : sequence of str, optional
        Names of the groups that train, the others being frozen, as for :class:`ntkdp.Phase`.

    Returns
    -------
    Algorithm
        ``init(params) -> State``, ``step(key, state) -> (State, Info)``, and ``compile()``, the
        step as a compiled function.

    Raises
    ------
    ValueError, TypeError
        As for :func:`run`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> algorithm = ntkdp.dp_sgd.build(
    ...     lambda w, x: x @ w, jnp.ones((1, 1)), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...     ntkdp.clipping.Abadi(1.0), learning_rate=0.5)
    >>> state, info = algorithm.step(jax.random.key(0), algorithm.init(jnp.array([[3.0]])))
    >>> state.params.item(), info.clip_fraction.item()
    (2.5, 1.0)
    """
    x, loss = validate.array(x=x), losses.as_loss(loss)
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must have shape (n, ...) with n >= 1, got {x.shape}")
    if not isinstance(clipping, ClippingRule):
        raise TypeError(
            f"clipping must be a rule of ntkdp.clipping, e.g. Abadi(1.0), got {clipping!r}"
        )
    validate.choice(("mean", "sum"), reduction=reduction)
    validate.choice(("structured", "vmap"), gradients=gradients)
    sample_rate = float(validate.scalar(sample_rate=validate.fraction(sample_rate=sample_rate)))
    noise_multiplier = privacy.as_noise_multiplier(noise_multiplier, steps=None)
    noise_multiplier = validate.non_negative(noise_multiplier=noise_multiplier)
    noise_multiplier = as_constant(validate.scalar(noise_multiplier=noise_multiplier))
    noisy = is_traced(noise_multiplier) or bool(noise_multiplier > 0)
    if noisy and not clipping.bounds_each_sample:
        raise ValueError(
            f"noise_multiplier must be 0 with {type(clipping).__name__}, whose sensitivity is "
            f"unbounded, got {noise_multiplier}; clip each sample, e.g. with Abadi"
        )
    if optimizer is not None and not callable(optimizer):
        raise TypeError(
            "optimizer must be a function of the learning rate, e.g. optax.adam, "
            f"got {type(optimizer).__name__}"
        )
    if noise_per_group and clipping.scope == "flat":
        raise ValueError("noise_per_group=True needs clipping with scope='layerwise', got 'flat'")
    if microbatch_size is not None:
        microbatch_size = validate.count(microbatch_size=microbatch_size)
        if clipping.needs_total_norm:
            raise ValueError(
                f"microbatch_size must be None with {type(clipping).__name__}, which needs the "
                f"norm of the whole sum, got {microbatch_size}"
            )
    if not callable(learning_rate):
        learning_rate = validate.positive(learning_rate=learning_rate)
        learning_rate = as_constant(validate.scalar(learning_rate=learning_rate))
    if test_x is None and test_targets is not None:
        raise ValueError("test_targets need test_x, got test_x=None")
    if test_x is not None:
        test_x = validate.array(test_x=test_x)
        if test_x.ndim < 2 or test_x.shape[0] == 0:
            raise ValueError(f"test_x must have shape (n, ...) with n >= 1, got {test_x.shape}")
        if test_targets is not None:
            test_targets = _as_targets(loss, test_targets, test_x.shape[0], "test_targets")
    mesh = devices.as_mesh(mesh)
    devices.check_divides(mesh, x=x.shape[0])
    targets = _as_targets(loss, targets, x.shape[0], "targets")
    n_devices = 1 if mesh is None else mesh.size
    if mesh is not None:
        apart = test_x is not None and test_x.shape[0] % n_devices == 0
        place_test = devices.spread if apart else devices.everywhere
        test_x, test_targets = (
            None if test is None else place_test(mesh, test) for test in (test_x, test_targets)
        )
    return Algorithm(
        apply_fn=apply_fn,
        x=devices.spread(mesh, x),
        targets=devices.spread(mesh, targets),
        test_x=test_x,
        test_targets=test_targets,
        loss=loss,
        clipping=clipping,
        learning_rate=learning_rate,
        noise_multiplier=noise_multiplier,
        groups=groups,
        optimizer=optax.sgd if optimizer is None else optimizer,
        sample_rate=sample_rate,
        capacity=_capacity(x.shape[0] // n_devices, sample_rate, n_devices),
        reduction=reduction,
        gradients=gradients,
        noise_per_group=noise_per_group,
        microbatch_size=microbatch_size,
        noisy=noisy,
        trainable=as_trainable(trainable),
        mesh=mesh,
    )


def _as_targets(loss: Loss, targets: Any, n: int, name: str) -> Array:
    targets = validate.array(**{name: targets})
    if targets.ndim == 0 or targets.shape[0] != n:
        raise ValueError(f"{name} must have one row a sample, {n}, got shape {targets.shape}")
    known = loss.n_outputs(targets)
    return targets if known is None else loss.check(targets, n, known, name)


def _capacity(n: int, sample_rate: float, n_devices: int) -> int:
    """Places for the batch of a device that has n samples."""
    if sample_rate >= 1:
        return n
    from scipy.stats import binom

    return max(1, min(n, int(binom.isf(_OVERFLOW_PROBABILITY / n_devices, n, sample_rate))))


def run(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    targets: Any,
    loss: Any,
    clipping: ClippingRule,
    *,
    learning_rate: Any,
    steps: int,
    noise_multiplier: Any = 0.0,
    sample_rate: float = 1.0,
    optimizer: Callable[[Any], optax.GradientTransformation] | None = None,
    groups: Any = None,
    reduction: Literal["mean", "sum"] = "mean",
    test_x: Any = None,
    test_targets: Any = None,
    record_every: int = 1,
    outputs: bool = False,
    gradients: Literal["structured", "vmap"] = "structured",
    noise_per_group: bool = False,
    microbatch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Any = False,
    key: Any,
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
    noise_multiplier : float or privacy.Budget
        :math:`\sigma`: the noise of the summed gradient has standard deviation
        :math:`\sigma S` on every weight, S the sensitivity (R flat,
        :math:`\sqrt{\sum_r R_r^2}` layerwise). A budget is spent on all the steps.
    sample_rate : float
        q in (0, 1]: 1 for full batches, below it Poisson sampling.
    optimizer : callable, optional
        Learning rate to optax transformation, e.g. ``optax.adam``; by default ``optax.sgd``.
    groups : pytree prefix of labels, or callable from key path to label, optional
        Groups of layerwise clipping; by default the layers.
    reduction : {"mean", "sum"}
        The noisy sum is divided by q n (mean) or by q (sum); the recorded loss likewise.
    test_x, test_targets : array, optional
        Measured along the way.
    record_every : int
        Record every so many steps, and the last.
    outputs : bool
        Record the outputs too.
    gradients : {"structured", "vmap"}
        Per-sample norms and clipped sums from layer inputs and cotangents, or from plain
        per-sample gradients, which is slower and shares nothing with the predictions.
    noise_per_group : bool
        Layerwise only: noise of group r in proportion to its own R_r,
        :math:`\sigma \sqrt{n_{groups}} R_r`, at the same privacy.
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
        Shapes that do not fit, NaN or infinities, sigma < 0 or with a rule of unbounded
        sensitivity, a sampling rate outside (0, 1], a learning rate or clipping norm not
        positive, steps < 1, a model that couples the samples of a batch.

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
    stepping = Stepping(learning_rate, steps, record_every)
    noise_multiplier = privacy.as_noise_multiplier(noise_multiplier, stepping.steps, sample_rate)
    algorithm = build(
        apply_fn,
        x,
        targets,
        loss,
        clipping,
        learning_rate=learning_rate,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        optimizer=optimizer,
        groups=groups,
        reduction=reduction,
        test_x=test_x,
        test_targets=test_targets,
        gradients=gradients,
        noise_per_group=noise_per_group,
        microbatch_size=microbatch_size,
        mesh=mesh,
    )
    keys = devices.everywhere(algorithm.mesh, validate.keys(key=key))
    start = algorithm.init(params).params
    with _progress.listening(progress, "training with DP-SGD") as listener:
        _, measured = trained(algorithm, start, False, keys, stepping, outputs, listener)
        return _trajectory(algorithm, stepping, measured)


def run_phases(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    targets: Any,
    loss: Any,
    phases: Iterable[Phase],
    *,
    sample_rate: float = 1.0,
    optimizer: Callable[[Any], optax.GradientTransformation] | None = None,
    groups: Any = None,
    reduction: Literal["mean", "sum"] = "mean",
    test_x: Any = None,
    test_targets: Any = None,
    record_every: int = 1,
    outputs: bool = False,
    gradients: Literal["structured", "vmap"] = "structured",
    noise_per_group: bool = False,
    microbatch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Any = False,
    key: Any,
) -> Trajectory:
    r"""Train with DP-SGD phase by phase, each from the parameters that the one before left.

    Parameters
    ----------
    phases : sequence of Phase
        Clipping rule, learning rate, noise, steps and trainable groups of each. The optimizer's
        state starts anew with each phase.
    groups : pytree prefix of labels, or callable from key path to label, optional
        Groups of layerwise clipping, and those that a phase may freeze; by default the layers.
    record_every : int
        Record every so many steps of each phase, its first state and its last.
    apply_fn, params, x, targets, loss, sample_rate, optimizer, reduction, test_x, test_targets, \
    outputs, gradients, noise_per_group, microbatch_size, mesh, progress, key
        As for :func:`run`. Steps draw their noise and batches by their number in the whole: a
        single phase is :func:`run`, to the last bit.

    Returns
    -------
    Trajectory
        Of all phases, times and steps added up. The state between two phases is recorded once, with
        the clip fraction that the later phase begins with.

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
    phases = check_phases(phases)
    keys = validate.keys(key=key)
    algorithms = [
        build(
            apply_fn,
            x,
            targets,
            loss,
            phase.clipping,
            learning_rate=phase.learning_rate,
            noise_multiplier=phase.mechanism(sample_rate)[0],
            sample_rate=sample_rate,
            optimizer=optimizer,
            groups=groups,
            reduction=reduction,
            test_x=test_x,
            test_targets=test_targets,
            gradients=gradients,
            noise_per_group=noise_per_group,
            microbatch_size=microbatch_size,
            trainable=phase.trainable,
            mesh=mesh,
        )
        for phase in phases
    ]
    keys = devices.everywhere(algorithms[0].mesh, keys)
    # All are checked before the first begins.
    params, *_ = [algorithm.init(params).params for algorithm in algorithms]
    paths: list[Trajectory] = []
    with _progress.listening(progress, "training with DP-SGD") as listener:
        for algorithm, stepping in zip(algorithms, steppings(phases, record_every), strict=True):
            per_seed = bool(paths) and keys.ndim > 0
            params, measured = trained(
                algorithm, params, per_seed, keys, stepping, outputs, listener
            )
            paths.append(_trajectory(algorithm, stepping, measured))
        return functools.reduce(Trajectory.then, paths)


def _trajectory(algorithm: Algorithm, stepping: Stepping, measured: Measurement) -> Trajectory:
    recorded, setup = jnp.asarray(stepping.recorded), algorithm.setup(stepping)
    return from_measurements(stepping.times, measured, steps=recorded, setup=setup)
