"""Noisy runs of the linearised model, drawn from its kernel or without one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp import privacy
from ntkdp._backend import devices, program_memory, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, Float, Key, PRNGKeyArray
from ntkdp.gradient_flow import (
    KernelFlow,
    LinearisedFlow,
    LinearModelFlow,
    check_kernel_flow,
    check_linear_model_flow,
    with_steps,
)
from ntkdp.stochastic_flow._output_noise import noise_covariance, sampling, square_root
from ntkdp.stochastic_flow._weight_noise import deviations
from ntkdp.trajectory import Measurement, Stepping, Trajectory, from_measurements


class _OutputNoise(eqx.Module):
    """Noise of the outputs, through a factor of its covariance."""

    factor: Float[Array, "N N"]
    divisor: Any

    def draw(self, flow: KernelFlow, drift: Any, key: PRNGKeyArray) -> Any:
        """What a step adds to the velocity of train and test outputs."""
        train, test = drift
        n, n_outputs = train.shape
        columns = flow.drive.columns(n_outputs)
        z = jax.random.normal(key, (self.factor.shape[0], columns), train.dtype)
        moved: Array = devices.everywhere(flow.mesh, self.factor @ z)
        noise = moved.reshape(-1, n_outputs) / self.divisor
        return noise[:n], None if test is None else noise[n:]


class _WeightNoise(eqx.Module):
    """Noise of the weights, of its own deviation in each leaf."""

    deviations: list[Array]

    def draw(self, flow: Any, drift: Any, key: PRNGKeyArray) -> Any:
        """What a step adds to the velocity of the weights."""
        leaves, treedef = jax.tree.flatten(drift)
        # Noise of a gradient that is descended, with a key a leaf: what a run would draw.
        noise = [
            -deviation.astype(leaf.dtype) * jax.random.normal(own, leaf.shape, leaf.dtype)
            for deviation, leaf, own in zip(
                self.deviations, leaves, jax.random.split(key, len(leaves)), strict=True
            )
        ]
        return jax.tree.unflatten(treedef, noise)


class _Noise(eqx.Module):
    """What a step draws: the batch, and noise of what moves."""

    added: _OutputNoise | _WeightNoise | None
    sample_rate: float = eqx.field(static=True)

    def velocity(self, flow: Any, state: Any, key: PRNGKeyArray) -> Any:
        """The step over the learning rate."""
        of_batch, of_noise = jax.random.split(key)
        weights = None
        if self.sample_rate < 1:
            drawn = jax.random.bernoulli(of_batch, self.sample_rate, flow.targets.shape[:1])
            dtype = jnp.result_type(*jax.tree.leaves(state))
            weights = drawn.astype(dtype) / self.sample_rate
        drift = flow.velocity(state, weights)
        if self.added is None:
            return drift
        return jax.tree.map(jnp.add, drift, self.added.draw(flow, drift, of_noise))


def ensemble(
    flow: Any,
    initial: Any,
    *,
    learning_rate: Any,
    steps: int,
    noise_multiplier: Any = 0.0,
    sample_rate: float = 1.0,
    noise_kernel: Any = None,
    noise_per_group: bool = False,
    record_every: int = 1,
    outputs: bool = False,
    progress: Any = False,
    key: Any,
) -> Trajectory:
    r"""Draw noisy runs, from a kernel or without one: the law of DP-SGD on the linearised model.

    Parameters
    ----------
    flow : KernelFlow or LinearisedFlow
        Kernel or linearised model, targets, loss and clipping; without a preconditioner.
    initial : array, pair or pytree
        Outputs ``(n, K)``, or a (train, test) pair if the flow has a test kernel; parameters for a
        LinearisedFlow.
    learning_rate : float or optax schedule
        Step size of the reduced loss's gradient.
    steps : int
        At least 1.
    noise_multiplier : float or privacy.Budget
        :math:`\sigma`: the noise of the summed gradient has standard deviation :math:`\sigma S` on
        every weight, S the sensitivity (R flat, :math:`\sqrt{\sum_r R_r^2}` layerwise). A budget is
        spent on all the steps.
    sample_rate : float
        q in (0, 1]: 1 for full batches, below it Poisson sampling.
    noise_kernel : array or LayerwiseKernel, optional
        The kernel of all points with each other, train before test, ``(n + m, n + m, ...)``: needed
        with noise if the flow has a test kernel, since the same noise moves both. None with a
        LinearisedFlow, whose weights the noise moves.
    noise_per_group : bool
        Layerwise only: noise of group r in proportion to its own R_r, as in ``dp_sgd.run``.
    record_every : int
        Record every so many steps, and the last.
    outputs : bool
        Record the outputs too.
    progress : bool or callable
        True for a bar on a terminal; a function is called with the fraction done.
    key : PRNG key
        One, or an array of S keys: S runs, a leading seed axis.

    Returns
    -------
    Trajectory
        Times are the running sum of the learning rate.

    Raises
    ------
    ValueError, TypeError
        As for ``dp_sgd.run``; a preconditioned flow; a noise kernel that does not fit.

    Notes
    -----
    *Derived* from the step of DP-SGD; exact in law for a model that is linear in its parameters, at
    any step size. A KernelFlow draws hundreds in one batched product, with the full covariance:
    memory and, once, time of the eigenvalues of an ``(n K, n K)`` matrix, or ``(n, n)`` if the
    kernel means ``(x) I_K``. A LinearisedFlow takes for each run the memory of its weights and a
    batch, and a velocity over all samples a step, with Poisson sampling too; with the same key it
    is, but for rounding, the run that ``dp_sgd.run`` makes of the linearised model.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
    ...                         ntkdp.clipping.Abadi(10.0), reduction="sum")
    >>> runs = ntkdp.stochastic_flow.ensemble(
    ...     flow, jnp.array([[1.0]]), learning_rate=0.5, steps=3, noise_multiplier=0.1,
    ...     key=jax.random.split(jax.random.key(0), 100))
    >>> runs.loss.shape
    (100, 4)
    """
    flow = check_linear_model_flow(flow)
    stepping = Stepping(learning_rate, steps, record_every)
    noise_multiplier = privacy.as_noise_multiplier(noise_multiplier, stepping.steps, sample_rate)
    noise = noise_of_step(flow, noise_multiplier, sample_rate, noise_kernel, noise_per_group)
    state = flow.init(initial)
    keys = devices.everywhere(flow.mesh, validate.keys(key=key))
    with _progress.listening(progress, "drawing runs") as listener:
        _, measured = draw_within_memory(
            flow, noise, state, False, stepping, keys, outputs, listener
        )
        return from_measurements(
            stepping.times,
            measured,
            steps=jnp.asarray(stepping.recorded),
            setup=with_steps(
                flow.setup(), stepping, noise_multiplier, sample_rate, noise_per_group
            ),
        )


def noise_of_step(
    flow: LinearModelFlow,
    noise_multiplier: Any,
    sample_rate: Any,
    noise_kernel: Any,
    per_group: bool,
) -> _Noise:
    """What a step draws, checked against the flow."""
    sample_rate, divisor = sampling(flow, sample_rate)
    added: _OutputNoise | _WeightNoise | None = None
    if isinstance(flow, LinearisedFlow):
        if noise_kernel is not None:
            raise ValueError(
                "noise_kernel must be None with a LinearisedFlow, whose noise is that of the "
                f"weights and moves the outputs with them, got {type(noise_kernel).__name__}"
            )
        groups = flow.weight_groups()
        stds = deviations(flow.clipping, noise_multiplier, groups.size, per_group)
        if bool(jnp.any(stds > 0)):
            added = _WeightNoise([stds[group] / divisor for group in groups.leaf_to_group])
    else:
        flow = check_kernel_flow(flow)
        covariance = noise_covariance(flow, noise_multiplier, noise_kernel, per_group)
        if covariance is not None:
            factor = square_root(covariance, flow.mesh)
            added = _OutputNoise(factor, divisor)
    return _Noise(added, sample_rate)


def draw_within_memory(
    flow: LinearModelFlow,
    noise: _Noise,
    state: Any,
    per_seed: bool,
    stepping: Stepping,
    keys: Key[Array, "*seeds"],
    outputs: bool,
    listener: Listener,
) -> tuple[Any, Measurement]:
    """The same as :func:`draw`, if there is room for it."""
    of_one = jax.tree.map(lambda leaf: leaf[0], state) if per_seed else state
    found: tuple[Any, Measurement] = program_memory.call(
        draw, flow, noise, state, per_seed, stepping, keys, outputs, listener,
        what=f"drawing {keys.size:,} runs of {stepping.steps:,} steps",
        ways_out="draw fewer runs at a time (keys), record fewer steps or without outputs, or use "
        "float32",
        results=stepping.bytes_of_record(flow.measure, of_one, outputs),
        work=program_memory.bytes_of(of_one), n_runs=keys.size,
    )  # fmt: skip
    return found


@eqx.filter_jit
def draw(
    flow: LinearModelFlow,
    noise: _Noise,
    state: Any,
    per_seed: bool,
    stepping: Stepping,
    keys: Key[Array, "*seeds"],
    outputs: bool,
    listener: Listener,
) -> tuple[Any, Measurement]:
    """State at the end and what was measured, from one state for all seeds or one for each."""

    def one_run(key: PRNGKeyArray, state: Any) -> tuple[Any, Measurement]:
        def step(k: Any, state: Any) -> Any:
            rate = stepping.rate(k)
            velocity = noise.velocity(flow, state, jax.random.fold_in(key, stepping.number(k)))
            return jax.tree.map(lambda f, v: f + jnp.asarray(rate, f.dtype) * v, state, velocity)

        return stepping.walk_to_end(
            step, lambda state: flow.measure(state, outputs), state, listener
        )

    if keys.ndim == 0:
        return one_run(keys, state)
    return jax.vmap(one_run, in_axes=(0, 0 if per_seed else None))(keys, state)
