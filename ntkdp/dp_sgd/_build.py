"""An algorithm from the arguments of a run, all of them checked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from ntkdp import optimizers, privacy
from ntkdp._backend import devices, validate
from ntkdp._backend.schedules import Schedule, is_schedule, multiplier
from ntkdp._backend.types import (
    ApplyFn,
    ArrayLike,
    LearningRate,
    PyTree,
    ScalarLike,
    as_constant,
    is_traced,
)
from ntkdp._estimators.sharpness_aware import SharpnessAware, check_sharpness_aware
from ntkdp._estimators.zeroth_order import ZerothOrder, check_zeroth_order
from ntkdp.batches import OVERFLOW_PROBABILITY, Batches, Poisson
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import Adaptive, ClippingRule, moving_norm
from ntkdp.dp_sgd._algorithm import Algorithm
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.noise import Independent, Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import OptimizerLike
from ntkdp.trajectory import (
    PublicRows,
    TrainingSet,
    as_samples,
    as_trainable,
    check_noise_moves,
    check_public,
)


@dataclass(frozen=True)
class Problem:
    """Model, data and loss of a run; not yet checked."""

    apply_fn: ApplyFn
    x: ArrayLike
    targets: ArrayLike
    loss: Loss | SampleLoss
    reduction: Reduction
    test_x: ArrayLike | None
    test_targets: ArrayLike | None
    mesh: Mesh | None
    public: PublicRows | None = None


@dataclass(frozen=True)
class Method:
    """How a run draws, takes and applies gradients, alike in all phases; not yet checked."""

    batches: Batches
    noise: Noise
    optimizer: OptimizerLike | None
    groups: PyTree
    gradients: Literal["structured", "vmap"]
    noise_per_group: bool
    microbatch_size: int | None
    zeroth_order: ZerothOrder | None = None
    sharpness_aware: SharpnessAware | None = None


@dataclass(frozen=True)
class Mechanism:
    """Rule, learning rate, noise and trained groups of a phase; not yet checked."""

    clipping: ClippingRule
    learning_rate: LearningRate
    noise_multiplier: ScalarLike | Schedule | privacy.Budget
    trainable: Iterable[str] | None = None
    adaptive: Adaptive | None = None
    clip_norm: Schedule | None = None
    steps: int | None = None


def build(
    apply_fn: ApplyFn,
    x: ArrayLike,
    targets: ArrayLike,
    loss: Loss | SampleLoss,
    clipping: ClippingRule,
    *,
    learning_rate: LearningRate,
    noise_multiplier: ScalarLike | Schedule = 0.0,
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
    reduction: Reduction = "mean",
    test_x: ArrayLike | None = None,
    test_targets: ArrayLike | None = None,
    gradients: Literal["structured", "vmap"] = "structured",
    noise_per_group: bool = False,
    microbatch_size: int | None = None,
    trainable: Iterable[str] | None = None,
    mesh: Mesh | None = None,
) -> Algorithm:
    r"""DP-SGD on a problem, as ``init`` and ``step`` for a loop of your own.

    Parameters
    ----------
    apply_fn, x, targets, loss, clipping, learning_rate, noise_multiplier, sample_rate, batches, \
    noise, clip_norm, adaptive, public, zeroth_order, sharpness_aware, optimizer, groups, \
    reduction, test_x, test_targets, gradients, noise_per_group, microbatch_size, mesh
        As for :func:`run`, except that ``noise_multiplier`` cannot be a budget, because the number
        of steps is not known here: give ``budget.noise_multiplier(steps, sample_rate)``. Past the
        end of an array of noise multipliers or clipping norms its last number holds.
    trainable : sequence of str, optional
        Names of the groups that train, the others being frozen, as for :class:`ntkdp.Phase`.

    Returns
    -------
    Algorithm
        ``init(params) -> State``, ``step(key, state) -> (State, Info)``, and ``compile()``, the
        step as a compiled function. ``measured_params(state)`` returns the average of the
        parameters if the optimizer keeps one.

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
    problem = Problem(apply_fn, x, targets, loss, reduction, test_x, test_targets, mesh, public)
    method = Method(
        resolve_batches(batches, sample_rate),
        resolve_noise(noise),
        optimizer,
        groups,
        gradients,
        noise_per_group,
        microbatch_size,
        zeroth_order,
        sharpness_aware,
    )
    mechanism = Mechanism(clipping, learning_rate, noise_multiplier, trainable, adaptive, clip_norm)
    return algorithm_of(problem, method, mechanism)


def algorithm_of(problem: Problem, method: Method, mechanism: Mechanism) -> Algorithm:
    """The algorithm of a phase, from parts that are checked here."""
    x = as_samples(x=problem.x)
    test_x = None if problem.test_x is None else as_samples(test_x=problem.test_x)
    rule = mechanism.clipping
    data = TrainingSet(
        problem.targets, problem.loss, rule, problem.reduction, problem.test_targets
    ).fit(x.shape[0], None if test_x is None else test_x.shape[0], None)
    public = check_public(problem.public)
    # Without a weight they stay out of the program, which is then compiled as without them.
    public = public.fit(data.loss, None) if public is not None and public.counts else None
    validate.choice(("structured", "vmap"), gradients=method.gradients)
    method.batches.check(x.shape[0])
    optimizer = optimizers.as_optimizer(method.optimizer)
    noise_multiplier = _noise_multiplier(mechanism)
    noisy = _is_noisy(noise_multiplier)
    if noisy and not rule.bounds_each_sample:
        raise ValueError(
            f"noise_multiplier must be 0 with {type(rule).__name__}, whose sensitivity is "
            f"unbounded, got {noise_multiplier}; clip each sample, e.g. with Abadi"
        )
    if method.noise_per_group and rule.scope == "flat":
        raise ValueError("noise_per_group=True needs clipping with scope='layerwise', got 'flat'")
    if getattr(optimizer, "correct_noise", False) and not isinstance(method.noise, Independent):
        raise ValueError(
            "noise must be independent with correct_noise=True, which subtracts the variance of a "
            f"step, got {type(method.noise).__name__}; take Adam(correct_noise=False)"
        )
    moving = moving_norm(mechanism.adaptive, mechanism.clip_norm, rule, mechanism.steps)
    check_noise_moves(moving, noise_multiplier, method.noise)
    _check_order(method, problem, mechanism, optimizer)
    mesh = devices.as_mesh(problem.mesh)
    devices.check_divides(mesh, x=x.shape[0])
    n_devices = 1 if mesh is None else mesh.size
    spread_test = test_x is not None and test_x.shape[0] % n_devices == 0
    place_test = devices.spread if spread_test else devices.everywhere
    return Algorithm(
        apply_fn=problem.apply_fn,
        x=devices.spread(mesh, x),
        test_x=None if test_x is None else place_test(mesh, test_x),
        data=data.place(mesh, spread=True, spread_test=spread_test),
        public=devices.everywhere(mesh, public),
        learning_rate=_learning_rate(mechanism.learning_rate),
        noise_multiplier=noise_multiplier,
        groups=method.groups,
        optimizer=optimizer,
        batches=method.batches,
        noise=method.noise,
        moving=moving,
        zeroth_order=method.zeroth_order,
        sharpness_aware=check_sharpness_aware(method.sharpness_aware),
        capacity=_capacity(x.shape[0], method.batches, n_devices),
        gradients=method.gradients,
        noise_per_group=method.noise_per_group,
        microbatch_size=_microbatch_size(method.microbatch_size, rule),
        noisy=noisy,
        trainable=as_trainable(mechanism.trainable),
        mesh=mesh,
    )


def _check_order(
    method: Method, problem: Problem, mechanism: Mechanism, optimizer: OptimizerLike
) -> None:
    """Raise unless zeroth-order steps, if they are asked for, fit the rest."""
    order = check_zeroth_order(
        method.zeroth_order,
        mechanism.clipping,
        method.noise,
        mechanism.adaptive,
        mechanism.clip_norm,
        problem.public,
        method.sharpness_aware,
    )
    if order is None:
        return
    for name, given in (("mesh", problem.mesh), ("microbatch_size", method.microbatch_size)):
        if given is not None:
            raise ValueError(
                f"{name} must be None with zeroth_order, whose steps keep no gradients of single "
                f"samples, got {given}"
            )
    if getattr(optimizer, "correct_noise", False):
        raise ValueError(
            "optimizer must have correct_noise=False with zeroth_order, whose noise lies along its "
            "directions alone, got Adam(correct_noise=True)"
        )


def _is_noisy(noise_multiplier: ScalarLike | Schedule) -> bool:
    if callable(noise_multiplier) or is_traced(noise_multiplier):
        return True
    return bool(np.any(np.asarray(noise_multiplier) > 0))


def _noise_multiplier(mechanism: Mechanism) -> ScalarLike | Schedule:
    given = privacy.as_noise_multiplier(mechanism.noise_multiplier, steps=None, schedules=True)
    sigma: Any = multiplier(mechanism.steps, given)
    if is_schedule(sigma):
        return sigma
    sigma = validate.non_negative(noise_multiplier=sigma)
    constant: ScalarLike = as_constant(validate.scalar(noise_multiplier=sigma))
    return constant


def _learning_rate(learning_rate: LearningRate) -> LearningRate:
    if callable(learning_rate):
        return learning_rate
    rate = validate.positive(learning_rate=learning_rate)
    constant: ScalarLike = as_constant(validate.scalar(learning_rate=rate))
    return constant


def _microbatch_size(microbatch_size: int | None, rule: ClippingRule) -> int | None:
    if microbatch_size is None:
        return None
    size = validate.count(microbatch_size=microbatch_size)
    if rule.needs_total_norm:
        raise ValueError(
            f"microbatch_size must be None with {type(rule).__name__}, which needs the norm of "
            f"the whole sum, got {size}"
        )
    return size


def _capacity(n: int, batches: Batches, n_devices: int) -> int:
    """Places for the part of a batch that falls on one of the devices."""
    own = n // n_devices
    if isinstance(batches, Poisson):
        return batches.largest(own, OVERFLOW_PROBABILITY / n_devices)
    return min(own, batches.largest(n))
