"""Outputs at the end of training, of many learning rates and clipping norms in one product."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from ntkdp._backend import devices, program_memory, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, Float, Key, PRNGKeyArray
from ntkdp.clipping import NoClipping
from ntkdp.gradient_flow import KernelFlow, check_kernel_flow
from ntkdp.stochastic_flow import _sharded_points
from ntkdp.stochastic_flow._output_noise import (
    eigh,
    noise_covariance,
    sampling,
    square_root,
    symmetric,
)
from ntkdp.trajectory import check_steps

#: Eigenvalues of a covariance below this many roundings of the largest count as zero.
_ROUNDINGS = 100


class FinalOutputs(NamedTuple):
    """Outputs after the last step, a cell a row; a pytree.

    ``train`` ``(C, n, K)`` and ``test`` ``(C, m, K)``, None without a test kernel; with several
    keys the second axis is the seed.

    Made by :func:`final_outputs`.
    """

    train: Array
    test: Array | None


class _Noise(NamedTuple):
    """Noise of unit scale: of the training outputs by a root, of the test outputs given it."""

    root: Float[Array, "N N"]
    test_given_train: Float[Array, "M N"] | None
    test_root: Float[Array, "M M"] | None


def final_outputs(
    flow: Any,
    initial: Any,
    *,
    learning_rates: Any,
    clip_norms: Any,
    steps: int,
    noise_multipliers: Any = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: Any = None,
    noise_per_group: bool = False,
    progress: Any = False,
    key: Any = None,
) -> FinalOutputs:
    r"""Outputs that training ends with, for many learning rates and clipping norms at once.

    The steps of :func:`ntkdp.recursion`, with noise or sampling those of :func:`ensemble`, for all
    cells in one product, without a record on the way. The test outputs follow from the sum of
    the training steps, so they cost one product in all.

    Parameters
    ----------
    flow : KernelFlow
        Kernel, targets, loss and clipping, whose R the ``clip_norms`` replace.
    initial : array or pair
        Outputs ``(n, K)``, or a (train, test) pair if the flow has a test kernel.
    learning_rates, clip_norms, noise_multipliers : float or array
        ``(C,)``, or one number for all cells: :math:`\eta`, R (in every group, layerwise) and
        :math:`\sigma`, the deviation of the summed gradient's noise over the sensitivity.
    steps : int
        At least 1.
    sample_rate, noise_kernel, noise_per_group, progress
        As for :func:`ensemble`.
    key : PRNG key
        One, or an array of S keys; needed with noise or sampling. All cells draw the same numbers.

    Returns
    -------
    FinalOutputs

    Raises
    ------
    ValueError, TypeError
        Sizes that differ, numbers out of range, a rule without a clipping norm, noise without a
        key, and what :func:`ensemble` raises.

    Notes
    -----
    *Derived*; in law, with noise, equal to :func:`ensemble`. Where every sample stays clipped the
    result depends on :math:`\eta R` alone (claim C11).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(4.0 * jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(1.0), reduction="sum")
    >>> found = ntkdp.stochastic_flow.final_outputs(
    ...     flow, jnp.array([[5.0]]), learning_rates=[0.1, 0.2], clip_norms=[2.0, 1.0], steps=10)
    >>> [round(f, 4) for f in found.train[:, 0, 0].tolist()]
    [1.0, 1.0]
    """
    flow = check_kernel_flow(flow)
    if isinstance(flow.clipping, NoClipping):
        raise ValueError(
            "flow must have a rule with a clipping norm, got NoClipping; for none take Abadi and a "
            "large clip_norm"
        )
    steps = check_steps(steps)
    state, test = flow.init(initial)
    cells = _cells(state.dtype, learning_rates, clip_norms, noise_multipliers)
    sample_rate, divisor = sampling(flow, sample_rate)
    noisy = bool(np.any(np.asarray(cells[2]) > 0))
    if noisy and not flow.clipping.bounds_each_sample:
        raise ValueError(
            f"noise_multipliers must be 0 with {type(flow.clipping).__name__}, whose sensitivity "
            "is unbounded"
        )
    if key is None and (noisy or sample_rate < 1):
        raise ValueError("key must be given with noise or sampling, got None")
    keys = validate.keys(key=jax.random.key(0) if key is None else key)
    keys, cells = devices.everywhere(flow.mesh, (keys, cells))
    noise = _unit_noise(flow, noise_kernel, noise_per_group) if noisy else None
    with _progress.listening(progress, "predicting the cells") as listener:
        found = program_memory.call(
            _final, flow, noise, (state, test), cells, keys, steps, sample_rate, divisor, listener,
            what=f"predicting {len(cells[0]):,} cells with {keys.size:,} keys",
            ways_out="predict fewer cells at once, use fewer keys or samples, or float32",
            results=program_memory.bytes_of((state, test)), n_runs=len(cells[0]) * keys.size,
        )  # fmt: skip
        return FinalOutputs(*devices.whole(found))


def _cells(
    dtype: Any, learning_rates: Any, clip_norms: Any, noise_multipliers: Any
) -> tuple[Array, Array, Array]:
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


def _unit_noise(flow: KernelFlow, noise_kernel: Any, per_group: bool) -> _Noise:
    """Noise with sigma and R of one: others scale it."""
    unit = eqx.tree_at(lambda flow: flow.clipping.R, flow, np.asarray(1.0))
    whole = noise_covariance(unit, 1.0, noise_kernel, per_group)
    assert whole is not None
    if flow.test_drive is None:
        return _Noise(square_root(whole, flow.mesh), None, None)
    train, across, test = _blocks(_sharded_points.of_flow(flow), whole)
    values, vectors = eigh(train, flow.mesh)
    usable = values > _ROUNDINGS * jnp.finfo(values.dtype).eps * values[-1]
    inverse = usable / (values * usable + ~usable) ** 0.5
    root = symmetric(values.clip(min=0) ** 0.5, vectors, flow.mesh)
    given, left = _given_train(across, symmetric(inverse, vectors, flow.mesh), test, flow.mesh)
    of_left, basis = eigh(left, flow.mesh)
    return _Noise(root, given, symmetric(of_left.clip(min=0) ** 0.5, basis, flow.mesh))


@partial(jax.jit, static_argnums=0)
def _blocks(points: _sharded_points.FollowedPoints, covariance: Array) -> Any:
    return points.blocks(covariance)


@partial(jax.jit, static_argnums=3)
def _given_train(
    across: Array, inverse_root: Array, test: Array, mesh: Mesh | None
) -> tuple[Array, Array]:
    """Regression of test noise on white numbers of the training noise; the covariance left."""

    def rows(across: Array, inverse_root: Array, test: Array) -> tuple[Array, Array]:
        given = devices.product(mesh, across, inverse_root)
        return given, test - devices.outer(mesh, given, given)

    found: tuple[Array, Array] = devices.over_samples(rows, mesh, (0, 0, 0), (0, 0))(
        across, inverse_root, test
    )
    return found


@eqx.filter_jit
def _final(
    flow: KernelFlow,
    noise: _Noise | None,
    initial: tuple[Array, Array | None],
    cells: tuple[Array, Array, Array],
    keys: Key[Array, "*seeds"],
    steps: int,
    sample_rate: float,
    divisor: float,
    listener: Listener,
) -> tuple[Array, Array | None]:
    start, test = initial
    n, n_outputs = start.shape
    columns = flow.drive.columns(n_outputs)

    def white(key: PRNGKeyArray, rows: int) -> Array:
        return jax.random.normal(key, (rows, columns), start.dtype)

    def one(rate: Array, clip_norm: Array, sigma: Array, key: PRNGKeyArray) -> Any:
        ruled = eqx.tree_at(lambda flow: flow.clipping.R, flow, clip_norm)
        scale = rate * sigma * clip_norm / divisor

        def step(k: Any, carry: tuple[Array, Array, Array | None]) -> Any:
            f, charges, gathered = carry
            # The keys are those of every cell: only the seed tells two runs apart.
            of_batch, of_noise = jax.random.split(jax.random.fold_in(key, k))
            weights = None
            if sample_rate < 1:
                drawn = jax.random.bernoulli(of_batch, sample_rate, (n,))
                weights = drawn.astype(f.dtype) / sample_rate
            clipped = rate * ruled.clipped_gradients(f, weights)
            f = f - ruled.through(ruled.drive, clipped)
            if noise is not None and gathered is not None:
                z = white(of_noise, noise.root.shape[1])
                f = f + scale * (noise.root @ z).reshape(f.shape)
                gathered = gathered + z
            return f, charges + clipped, gathered

        charges = jnp.zeros((flow.n_terms, n, n_outputs), start.dtype)
        gathered = None if noise is None else jnp.zeros((noise.root.shape[1], columns), start.dtype)

        def tell_and_step(k: Any, carry: Any) -> Any:
            if listener is not None:
                due = k % max(1, steps // 100) == 0
                lax.cond(due, lambda: _progress.report(listener, k / steps), lambda: None)
            return step(k, carry)

        f, charges, gathered = lax.fori_loop(0, steps, tell_and_step, (start, charges, gathered))
        if test is None or flow.test_drive is None:
            return f, None
        final = test - ruled.through(flow.test_drive, charges)
        if noise is not None and noise.test_given_train is not None:
            assert noise.test_root is not None
            own = white(jax.random.fold_in(key, steps), noise.test_given_train.shape[0])
            drawn = noise.test_given_train @ gathered
            drawn = drawn + jnp.sqrt(steps) * (noise.test_root @ own)
            final = final + scale * drawn.reshape(final.shape)
        return f, final

    over_keys = one if keys.ndim == 0 else jax.vmap(one, in_axes=(None, None, None, 0))
    found: tuple[Array, Array | None] = jax.vmap(over_keys, in_axes=(0, 0, 0, None))(*cells, keys)
    return found
