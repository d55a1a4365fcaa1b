"""An algorithm from what a run is told, all of it checked."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import optax
from jax.sharding import Mesh

from ntkdp import privacy
from ntkdp._backend import devices, validate
from ntkdp._backend.types import ApplyFn, as_constant, is_traced
from ntkdp.clipping import ClippingRule
from ntkdp.dp_sgd._algorithm import Algorithm
from ntkdp.trajectory import TrainingSet, as_samples, as_trainable


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
    x = as_samples(x=x)
    test_x = None if test_x is None else as_samples(test_x=test_x)
    data = TrainingSet(targets, loss, clipping, reduction, test_targets)
    data = data.fit(x.shape[0], None if test_x is None else test_x.shape[0], None)
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
    mesh = devices.as_mesh(mesh)
    devices.check_divides(mesh, x=x.shape[0])
    n_devices = 1 if mesh is None else mesh.size
    spread_test = test_x is not None and test_x.shape[0] % n_devices == 0
    place_test = devices.spread if spread_test else devices.everywhere
    return Algorithm(
        apply_fn=apply_fn,
        x=devices.spread(mesh, x),
        test_x=place_test(mesh, test_x),
        data=data.place(mesh, spread=True, spread_test=spread_test),
        learning_rate=learning_rate,
        noise_multiplier=noise_multiplier,
        groups=groups,
        optimizer=optax.sgd if optimizer is None else optimizer,
        sample_rate=sample_rate,
        capacity=_capacity(x.shape[0] // n_devices, sample_rate, n_devices),
        gradients=gradients,
        noise_per_group=noise_per_group,
        microbatch_size=microbatch_size,
        noisy=noisy,
        trainable=as_trainable(trainable),
        mesh=mesh,
    )


def _capacity(n: int, sample_rate: float, n_devices: int) -> int:
    """Places for the batch of a device that has n samples."""
    if sample_rate >= 1:
        return n
    from scipy.stats import binom

    return max(1, min(n, int(binom.isf(_OVERFLOW_PROBABILITY / n_devices, n, sample_rate))))


#: Chance per step that a Poisson batch outgrows the memory planned for it.
_OVERFLOW_PROBABILITY = 1e-12
