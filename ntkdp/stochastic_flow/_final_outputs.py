"""Outputs that training ends with, for many learning rates and clipping norms at once.

The steps of all cells are made together, as one batched product, and nothing is recorded on the
way: the test outputs follow at the end from the sum of the training steps.
"""

from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ntkdp._backend import compiled, devices, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    Float,
    Key,
    KeyLike,
    PRNGKeyArray,
    Progress,
    PyTree,
)
from ntkdp.batches import Batches
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import NoClipping
from ntkdp.gradient_flow import KernelFlow, KernelLike, check_kernel_flow
from ntkdp.noise import Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.optimizers import SGD
from ntkdp.stochastic_flow._ensemble.step_noise import checked_divisor
from ntkdp.stochastic_flow._linear_filter import linear_filter, mixed
from ntkdp.stochastic_flow._matrix_root import eigh, square_root, symmetric
from ntkdp.stochastic_flow._noise_covariance import covariance_of_weights, factor_of_features
from ntkdp.stochastic_flow._sharded_points import ShardedPoints, points_of
from ntkdp.stochastic_flow._weight_noise import deviations
from ntkdp.trajectory import Stepping, check_steps

#: How often progress is told.
_TOLD = 100
#: Eigenvalues of a covariance below this many roundings of the largest count as zero.
_ROUNDINGS = 100


class FinalOutputs(NamedTuple):
    """Outputs after the last step, a row for each cell; a pytree.

    ``train`` is ``(C, n, K)`` and ``test`` ``(C, m, K)``, or None without a test kernel; with
    several keys the second axis is the seed.

    Made by :func:`final_outputs`.
    """

    train: Array
    test: Array | None


#: Learning rates, clipping norms and noise multipliers of the cells, each ``(C,)``.
_Cells: TypeAlias = tuple[Array, Array, Array]
#: Outputs of the training points, clipped gradients and noise that were added up, and what batches
#: and noise carry on.
_Carry: TypeAlias = tuple[Array, Array, Array | None, tuple[PyTree, PyTree]]


class _UnitNoise(NamedTuple):
    """Noise for sigma and R of one: of the training outputs, and of the test outputs given it.

    ``of_sum`` is the deviation of what all steps add up to, if that of a step's is one. With
    features the noise is that of weights, which says all of the test outputs.
    """

    root: Float[Array, "N columns"]
    test_given_train: Float[Array, "M columns"] | None
    test_root: Float[Array, "M M"] | None
    of_sum: Float[Array, ""]


def final_outputs(
    flow: KernelFlow,
    initial: PyTree,
    *,
    learning_rates: ArrayLike,
    clip_norms: ArrayLike,
    steps: int,
    noise_multipliers: ArrayLike = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    noise_kernel: KernelLike | None = None,
    noise_per_group: bool = False,
    progress: Progress = False,
    key: KeyLike | None = None,
) -> FinalOutputs:
    r"""Outputs that training ends with, for many learning rates and clipping norms at once.

    The steps are those of :func:`ntkdp.recursion`, or of :func:`ensemble` with noise or sampling,
    for all cells in one product, without a record on the way. The test outputs follow from the sum
    of the training steps, so they cost one product in all.

    Parameters
    ----------
    flow : KernelFlow
        Kernel, targets, loss and clipping; ``clip_norms`` replace the R of its clipping rule.
    initial : array or pair
        Outputs ``(n, K)``, or a (train, test) pair if the flow has a test kernel.
    learning_rates, clip_norms, noise_multipliers : float or array
        ``(C,)``, or one number for all cells: :math:`\eta`, R (of every group, if layerwise) and
        :math:`\sigma`, the standard deviation of the summed gradient's noise over the sensitivity.
    steps : int
        At least 1.
    sample_rate, batches, noise, noise_kernel, noise_per_group, progress
        As for :func:`ensemble`.
    key : PRNG key
        One key, or an array of S keys; needed with noise or sampling. All cells draw the same
        numbers.

    Returns
    -------
    FinalOutputs

    Raises
    ------
    ValueError, TypeError
        As for :func:`ensemble`; if sizes differ, numbers are out of range, the rule has no clipping
        norm, or there is noise without a key.

    Notes
    -----
    *Derived*; with noise, equal in law to :func:`ensemble`. If every sample stays clipped the
    result depends on :math:`\eta R` alone (claim C11).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(1.0), reduction="sum")
    >>> final = ntkdp.stochastic_flow.final_outputs(
    ...     flow, jnp.array([[5.0]]), learning_rates=[0.1, 0.2], clip_norms=[2.0, 1.0], steps=10)
    >>> [round(f, 4) for f in final.train[:, 0, 0].tolist()]
    [1.0, 1.0]
    """
    flow = check_kernel_flow(flow)
    if isinstance(flow.clipping, NoClipping):
        raise ValueError(
            "flow must have a rule with a clipping norm, got NoClipping; for no clipping take "
            "Abadi and a large clip_norm"
        )
    # Each cell has a learning rate of its own; nothing is recorded, but progress is told.
    steps = check_steps(steps)
    stepping = Stepping(1.0, steps, max(1, steps // _TOLD))
    state, test = flow.init(initial)
    cells = cells_of(state.dtype, learning_rates, clip_norms, noise_multipliers)
    drawn, added = resolve_batches(batches, sample_rate), resolve_noise(noise)
    divisor = checked_divisor(flow, drawn, noise_kernel)
    noisy = bool(np.any(np.asarray(cells[2]) > 0))
    if noisy and not flow.clipping.bounds_each_sample:
        raise ValueError(
            f"noise_multipliers must be 0 with {type(flow.clipping).__name__}, whose sensitivity "
            "is unbounded"
        )
    if key is None and (noisy or drawn.is_random):
        raise ValueError("key must be given with noise or sampling, got None")
    keys = validate.keys(key=jax.random.key(0) if key is None else key)
    keys, cells = devices.everywhere(flow.mesh, (keys, cells))
    unit = None
    if noisy:
        path = mixed(linear_filter(SGD(), 1.0, steps), added.recursion(steps))
        of_sum = path.added_covariance(0, steps)[0, 0] ** 0.5
        # An array, so that strategies of one shape share a program.
        unit = _unit_noise(flow, noise_kernel, noise_per_group, jnp.asarray(of_sum, state.dtype))
    with _progress.listening(progress, "predicting the cells") as listener:
        final: FinalOutputs = compiled.call(
            _final, flow, unit, (state, test), cells, keys, stepping, (drawn, added), divisor,
            listener,
            what=f"predicting {len(cells[0]):,} cells with {keys.size:,} keys",
            ways_out="predict fewer cells at once, use fewer keys or samples, or float32",
            results=compiled.bytes_of((state, test)), n_runs=len(cells[0]) * keys.size,
        )  # fmt: skip
        return devices.whole(final)


def cells_of(
    dtype: DTypeLike, learning_rates: ArrayLike, clip_norms: ArrayLike, noise_multipliers: ArrayLike
) -> _Cells:
    """Learning rates, clipping norms and noise multipliers of all cells, checked."""
    parts = {
        "learning_rates": validate.positive(learning_rates=learning_rates),
        "clip_norms": validate.positive(clip_norms=clip_norms),
        "noise_multipliers": validate.non_negative(noise_multipliers=noise_multipliers),
    }
    shapes = {name: np.shape(part) for name, part in parts.items()}
    sizes = {shape for shape in shapes.values() if shape}
    if len(sizes) > 1 or any(len(shape) > 1 for shape in sizes) or (0,) in sizes:
        raise ValueError(
            "learning_rates, clip_norms and noise_multipliers must be numbers or have one shape "
            f"(C,), got {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
        )
    count = max((shape[0] for shape in sizes), default=1)
    rates, norms, sigmas = (
        jnp.broadcast_to(jnp.asarray(part, dtype), (count,)) for part in parts.values()
    )
    return rates, norms, sigmas


def _unit_noise(
    flow: KernelFlow,
    noise_kernel: KernelLike | None,
    per_group: bool,
    of_sum: Float[Array, ""],
) -> _UnitNoise:
    unit = eqx.tree_at(lambda flow: flow.clipping.R, flow, np.asarray(1.0))
    stds = deviations(unit.clipping, 1.0, unit.n_terms, per_group)
    features = factor_of_features(unit, stds, noise_kernel)
    if features is not None:
        parts = [
            devices.spread(flow.mesh, part)
            for part in jnp.split(features, [flow.targets.shape[0]])
            if len(part)
        ]
        return _UnitNoise(parts[0], parts[1] if len(parts) > 1 else None, None, of_sum)
    whole = covariance_of_weights(unit, stds, noise_kernel)
    if flow.test_drive is None:
        return _UnitNoise(square_root(whole, flow.mesh), None, None, of_sum)
    train, across, test = _blocks(points_of(flow), whole)
    values, vectors = eigh(train, flow.mesh)
    usable = values > _ROUNDINGS * jnp.finfo(values.dtype).eps * values[-1]
    inverse = usable / (values * usable + ~usable) ** 0.5
    root = symmetric(values.clip(min=0) ** 0.5, vectors, flow.mesh)
    inverse_root = symmetric(inverse, vectors, flow.mesh)
    coefficients, left = _regressed_on_train(across, inverse_root, test, flow.mesh)
    left_values, left_vectors = eigh(left, flow.mesh)
    left_root = symmetric(left_values.clip(min=0) ** 0.5, left_vectors, flow.mesh)
    return _UnitNoise(root, coefficients, left_root, of_sum)


@compiled.jit(static_argnums=0)
def _blocks(points: ShardedPoints, covariance: Array) -> tuple[Array, Array, Array]:
    return points.blocks(covariance)


@compiled.jit(static_argnums=3)
def _regressed_on_train(
    across: Array, inverse_root: Array, test: Array, mesh: Mesh | None
) -> tuple[Array, Array]:
    """Coefficients of the test noise on the white noise of training, and the covariance left."""

    def rows(across: Array, inverse_root: Array, test: Array) -> tuple[Array, Array]:
        coefficients = devices.product(mesh, across, inverse_root)
        return coefficients, test - devices.outer(mesh, coefficients, coefficients)

    over_devices = devices.over_samples(rows, mesh, (0, 0, 0), (0, 0))
    return over_devices(across, inverse_root, test)


@eqx.filter_jit
def _final(
    flow: KernelFlow,
    unit: _UnitNoise | None,
    initial: tuple[Array, Array | None],
    cells: _Cells,
    keys: Key[Array, "*seeds"],
    stepping: Stepping,
    mechanism: tuple[Batches, Noise],
    divisor: float,
    listener: Listener,
) -> FinalOutputs:
    start, test = initial
    batches, noise = mechanism
    n, n_outputs = start.shape
    columns = flow.drive.columns(n_outputs)

    def white(key: PRNGKeyArray, rows: int) -> Array:
        return jax.random.normal(key, (rows, columns), start.dtype)

    def final(rate: Array, clip_norm: Array, sigma: Array, key: PRNGKeyArray) -> FinalOutputs:
        ruled = eqx.tree_at(lambda flow: flow.clipping.R, flow, clip_norm)
        scale = rate * sigma * clip_norm / divisor

        def step(k: Array, carry: _Carry) -> _Carry:
            f, charges, summed_noise, (of_batches, of_noise) = carry
            # All cells use the same keys: only the seed tells two runs apart.
            batch_key, noise_key = jax.random.split(jax.random.fold_in(key, k))
            drawn, of_batches = batches.draw(batch_key, k, of_batches, n)
            weights = None if drawn is None else batches.weights(drawn, f.dtype)
            clipped = rate * ruled.clipped_gradients(f, weights)
            f = f - ruled.through(ruled.drive, clipped)
            if unit is not None and summed_noise is not None:
                z, of_noise = noise.next(
                    lambda key: white(key, unit.root.shape[1]), noise_key, k, of_noise
                )
                f = f + scale * (unit.root @ z).reshape(f.shape)
                summed_noise = summed_noise + z
            return f, charges + clipped, summed_noise, (of_batches, of_noise)

        charges = jnp.zeros((flow.n_terms, n, n_outputs), start.dtype)
        summed_noise = of_noise = None
        if unit is not None:
            summed_noise = jnp.zeros((unit.root.shape[1], columns), start.dtype)
            of_noise = noise.start(summed_noise)

        carried = batches.start(n), of_noise
        (f, charges, summed_noise, _), _ = stepping.walk_to_end(
            step, lambda _: None, (start, charges, summed_noise, carried), listener
        )
        if test is None or flow.test_drive is None:
            return FinalOutputs(f, None)
        f_test = test - ruled.through(flow.test_drive, charges)
        if unit is not None and unit.test_given_train is not None:
            drawn = unit.test_given_train @ summed_noise
            if unit.test_root is not None:
                own = white(jax.random.fold_in(key, stepping.steps), len(unit.test_root))
                drawn = drawn + unit.of_sum * (unit.test_root @ own)
            f_test = f_test + scale * drawn.reshape(f_test.shape)
        return FinalOutputs(f, f_test)

    over_keys = final if keys.ndim == 0 else jax.vmap(final, in_axes=(None, None, None, 0))
    return jax.vmap(over_keys, in_axes=(0, 0, 0, None))(*cells, keys)
