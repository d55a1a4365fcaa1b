"""Noisy runs of the linearised model, drawn from its kernel or without one."""

from dataclasses import replace
from functools import partial
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkdp import privacy
from ntkdp._backend import devices, program_memory, validate
from ntkdp._backend import progress as _progress
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    Float,
    Key,
    KeyLike,
    LearningRate,
    PRNGKeyArray,
    Progress,
    PyTree,
    ScalarLike,
)
from ntkdp._setup import batches_in_words, noise_in_words
from ntkdp.batches import Batches, Drawn
from ntkdp.batches import resolve as resolve_batches
from ntkdp.clipping import Adaptive, ClippingRule, rescaled
from ntkdp.gradient_flow import (
    KernelFlow,
    LinearisedFlow,
    LinearModelFlow,
    OptimizerSteps,
    OutputsAtZero,
    Start,
    Walked,
    check_linear_model_flow,
    optimizer_steps,
    with_steps,
)
from ntkdp.noise import Independent, Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.ntk import LayerwiseKernel
from ntkdp.optimizers import OptimizerLike
from ntkdp.stochastic_flow._matrix_root import square_root
from ntkdp.stochastic_flow._noise_covariance import noise_covariance
from ntkdp.stochastic_flow._weight_noise import NoiseMultiplier, deviations
from ntkdp.trajectory import Measurement, Stepping, Trajectory, from_measurements

#: Outputs of training points, and of test points if there are any.
_Outputs: TypeAlias = tuple[Array, Array | None]


class _OutputNoise(eqx.Module):
    """Noise of the outputs, through a factor of its covariance."""

    factor: Float[Array, "N N"]
    divisor: ScalarLike

    def draw(self, mesh: Mesh | None, drift: _Outputs, key: PRNGKeyArray) -> _Outputs:
        """Draw what noise adds to the velocity of train and test outputs."""
        train, test = drift
        n, n_outputs = train.shape
        n_rows = self.factor.shape[0]
        # One column, or one for each output if the outputs share the factor.
        columns = (train.size + (0 if test is None else test.size)) // n_rows
        z = jax.random.normal(key, (n_rows, columns), train.dtype)
        noise = devices.everywhere(mesh, self.factor @ z)
        noise = noise.reshape(-1, n_outputs) / self.divisor
        return noise[:n], None if test is None else noise[n:]

    def times(self, scales: Float[Array, " R"]) -> "_OutputNoise":
        """The same, that many times as large, all groups alike."""
        return _OutputNoise(self.factor, self.divisor / scales[0].astype(self.factor.dtype))


class _WeightNoise(eqx.Module):
    """Noise of the weights, with a standard deviation for each group of leaves."""

    deviations: Float[Array, " R"]
    leaf_to_group: tuple[int, ...] = eqx.field(static=True)

    def draw(self, mesh: Mesh | None, drift: PyTree, key: PRNGKeyArray) -> PyTree:
        """Draw what noise adds to the velocity of the weights."""
        leaves, treedef = jax.tree.flatten(drift)
        # As in a run: a key for each leaf, and noise of the gradient, which is descended.
        noise = [
            -self.deviations[group].astype(leaf.dtype)
            * jax.random.normal(own, leaf.shape, leaf.dtype)
            for group, leaf, own in zip(
                self.leaf_to_group, leaves, jax.random.split(key, len(leaves)), strict=True
            )
        ]
        return jax.tree.unflatten(treedef, noise)

    def times(self, scales: Float[Array, " R"]) -> "_WeightNoise":
        """The same, that many times as large, by group."""
        return _WeightNoise(self.deviations * scales, self.leaf_to_group)


#: What batches and noise carry on from step to step.
_Carried: TypeAlias = tuple[PyTree, PyTree]
#: Norms of all samples' gradients by group, and which samples were drawn.
_Seen: TypeAlias = tuple[Array, Drawn]


class StepNoise(eqx.Module):
    """The randomness of steps: batches, and the noise of the outputs or of the weights."""

    added: _OutputNoise | _WeightNoise | None
    batches: Batches
    noise: Noise
    per_group: bool = eqx.field(static=True)

    def at_clip_norm(self, clip_norm: Array | None, rule: ClippingRule) -> "StepNoise":
        """The same for a rule at the clipping norms of its groups, in proportion to them."""
        if clip_norm is None or self.added is None:
            return self
        n_groups, moved = clip_norm.size, rescaled(rule, clip_norm)
        now: ScalarLike
        before: ScalarLike
        if self.per_group:
            now, before = clip_norm, rule.group_norms(n_groups)
        else:
            now, before = moved.sensitivity(n_groups), rule.sensitivity(n_groups)
        ratio = jnp.asarray(now, clip_norm.dtype) / jnp.asarray(before, clip_norm.dtype)
        scales = jnp.broadcast_to(ratio, (n_groups,))
        return replace(self, added=self.added.times(scales))

    def start(self, flow: LinearModelFlow, state: PyTree) -> _Carried:
        """What is carried before the first step."""
        batches = self.batches.start(flow.targets.shape[0])
        if self.added is None:
            return batches, None
        like = jax.eval_shape(partial(self.added.draw, flow.mesh, state), jax.random.key(0))
        return batches, self.noise.start(like)

    def velocity(
        self,
        flow: LinearModelFlow,
        state: PyTree,
        key: PRNGKeyArray,
        number: Array,
        carried: _Carried,
    ) -> tuple[PyTree, _Seen, _Carried]:
        """A random step, divided by the learning rate, what it saw, and what is carried on."""
        batch_key, noise_key = jax.random.split(key)
        of_batches, of_noise = carried
        drawn, of_batches = self.batches.draw(batch_key, number, of_batches, flow.targets.shape[0])
        dtype = jnp.result_type(*jax.tree.leaves(state))
        weights = None if drawn is None else self.batches.weights(drawn, dtype)
        drift, norms = flow.velocity_and_norms(state, weights)
        if self.added is None:
            return drift, (norms, drawn), (of_batches, of_noise)
        draw = partial(self.added.draw, flow.mesh, drift)
        noise, of_noise = self.noise.next(draw, noise_key, number, of_noise)
        return jax.tree.map(jnp.add, drift, noise), (norms, drawn), (of_batches, of_noise)

    def variance(self, velocity: PyTree) -> PyTree:
        """Variance of the noise of each weight's velocity; of outputs, which nobody asks for, 0."""
        if not isinstance(self.added, _WeightNoise):
            return 0.0
        variances = [self.added.deviations[group] ** 2 for group in self.added.leaf_to_group]
        return jax.tree.unflatten(jax.tree.structure(velocity), variances)


def ensemble(
    flow: KernelFlow | LinearisedFlow,
    initial: PyTree,
    *,
    learning_rate: LearningRate,
    steps: int,
    noise_multiplier: NoiseMultiplier = 0.0,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    noise: Noise | None = None,
    adaptive: Adaptive | None = None,
    noise_kernel: ArrayLike | LayerwiseKernel | None = None,
    noise_per_group: bool = False,
    optimizer: OptimizerLike | None = None,
    outputs_at_zero: OutputsAtZero | None = None,
    record_every: int = 1,
    outputs: bool = False,
    progress: Progress = False,
    key: KeyLike,
) -> Trajectory:
    r"""Draw noisy runs, from a kernel or without one: the law of DP-SGD on the linearised model.

    Parameters
    ----------
    flow : KernelFlow or LinearisedFlow
        Kernel or linearised model, with targets, loss and clipping, but no preconditioner.
    initial : array, pair or pytree
        As for :func:`ntkdp.recursion`.
    learning_rate : float or optax schedule
        Step size of the reduced loss's gradient.
    steps : int
        At least 1.
    noise_multiplier : float or privacy.Budget
        :math:`\sigma`: the noise of the summed gradient has standard deviation :math:`\sigma S` on
        every weight, with S the sensitivity (R flat, :math:`\sqrt{\sum_r R_r^2}` layerwise). A
        budget is spent on all the steps.
    sample_rate : float
        q in (0, 1]: 1 for full batches, less for Poisson sampling.
    batches, noise, adaptive
        Other batches, correlated noise and a clipping norm that moves, as for ``dp_sgd.run``.
    noise_kernel : array or LayerwiseKernel, optional
        The kernel of all points with each other, train before test, ``(n + m, n + m, ...)``: needed
        with noise if the flow has a test kernel, since the same noise moves both. Public samples
        come between the two, and need it too. It must be None with a LinearisedFlow, where the
        noise moves the weights.
    noise_per_group : bool
        For layerwise clipping: the noise of group r is in proportion to its own R_r, as in
        ``dp_sgd.run``.
    optimizer, outputs_at_zero
        As for :func:`ntkdp.recursion`; the noise passes through the optimizer as in a run.
    record_every : int
        Record every so many steps, and the last one.
    outputs : bool
        Record the outputs too.
    progress : bool or callable
        True shows a bar on a terminal; a function is called with the fraction done.
    key : PRNG key
        One key, or an array of S keys for S runs, which get a leading seed axis.

    Returns
    -------
    Trajectory
        Its times are the running sum of the learning rate.

    Raises
    ------
    ValueError, TypeError
        As for ``dp_sgd.run``; if the flow is preconditioned, or the noise kernel does not fit it.

    Notes
    -----
    *Derived* from the step of DP-SGD; exact in law for a model that is linear in its parameters, at
    any step size. A KernelFlow draws hundreds of runs in one batched product, with the full
    covariance. It takes the memory and, once, the time of the eigenvalues of an ``(n K, n K)``
    matrix, or ``(n, n)`` if the kernel means ``(x) I_K``. A LinearisedFlow takes, for each run, the
    memory of its weights and of a batch, and, for each step, a velocity over all samples, also with
    Poisson sampling. With the same key its run is, up to rounding, the run that ``dp_sgd.run``
    makes of the linearised model.

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
    check_linear_model_flow(flow)
    stepping = Stepping(learning_rate, steps, record_every)
    drawn, correlated = resolve_batches(batches, sample_rate), resolve_noise(noise)
    sigma = privacy.as_noise_multiplier(
        noise_multiplier, stepping.steps, batches=drawn, noise=correlated
    )
    walk = optimizer_steps(flow, optimizer, stepping.learning_rate, outputs_at_zero, adaptive)
    of_sum = sigma
    if adaptive is not None:
        _check_noise_adapts(flow, correlated, noise_per_group)
        of_sum = adaptive.sum_noise_multiplier(sigma, flow.n_terms)
    random = noise_of_step(flow, of_sum, drawn, noise_kernel, noise_per_group, correlated)
    start: Start = (flow.init(initial), None)
    keys = devices.everywhere(flow.mesh, validate.keys(key=key))
    with _progress.listening(progress, "drawing runs") as listener:
        _, measured = draw_within_memory(
            walk, random, start, False, stepping, keys, outputs, listener
        )
        setup = with_steps(
            flow.setup(),
            stepping,
            sigma,
            drawn.share(flow.targets.shape[0]),
            noise_per_group,
            walk.optimizer,
            adaptive,
        )
        return from_measurements(
            stepping.times,
            measured,
            steps=jnp.asarray(stepping.recorded),
            setup=replace(
                setup,
                batches=batches_in_words(drawn),
                noise=noise_in_words(correlated) if random.added is not None else "",
            ),
        )


def _check_noise_adapts(flow: LinearModelFlow, noise: Noise, per_group: bool) -> None:
    """Raise unless the noise can follow a clipping norm that moves."""
    if not isinstance(noise, Independent):
        raise ValueError(
            "noise must be independent with adaptive clipping, since later steps take back noise "
            f"in proportion to another clipping norm, got {type(noise).__name__}"
        )
    if per_group and not isinstance(flow, LinearisedFlow):
        raise ValueError(
            "noise_per_group must be False with adaptive clipping and a KernelFlow, whose noise "
            "has one covariance for all steps; use a LinearisedFlow"
        )


def noise_of_step(
    flow: LinearModelFlow,
    noise_multiplier: ScalarLike,
    batches: Batches,
    noise_kernel: ArrayLike | LayerwiseKernel | None,
    per_group: bool,
    noise: Noise,
) -> StepNoise:
    """The randomness of steps, checked against the flow."""
    n = flow.targets.shape[0]
    batches.check(n)
    divisor = batches.share(n) * flow.data.divisor
    if flow.public is not None:
        sigma = validate.non_negative(noise_multiplier=noise_multiplier)
        noise_multiplier = sigma * flow.public.private_share
    if not isinstance(flow, LinearisedFlow):
        assert isinstance(flow, KernelFlow)
        covariance = noise_covariance(flow, noise_multiplier, noise_kernel, per_group)
        if covariance is None:
            return StepNoise(None, batches, noise, per_group)
        factor = square_root(covariance, flow.mesh)
        return StepNoise(_OutputNoise(factor, divisor), batches, noise, per_group)
    if noise_kernel is not None:
        raise ValueError(
            "noise_kernel must be None with a LinearisedFlow, where the noise of the weights moves "
            f"the outputs too, got {type(noise_kernel).__name__}"
        )
    groups = flow.weight_groups()
    stds = deviations(flow.clipping, noise_multiplier, groups.size, per_group)
    if not bool(jnp.any(stds > 0)):
        return StepNoise(None, batches, noise, per_group)
    of_weights = _WeightNoise(stds / divisor, groups.leaf_to_group)
    return StepNoise(of_weights, batches, noise, per_group)


def draw_within_memory(
    walk: OptimizerSteps,
    noise: StepNoise,
    start: Start,
    per_seed: bool,
    stepping: Stepping,
    keys: Key[Array, "*seeds"],
    outputs: bool,
    listener: Listener,
) -> tuple[Start, Measurement]:
    """:func:`draw`, if there is memory for it."""
    single = jax.tree.map(lambda leaf: leaf[0], start) if per_seed else start
    walked = jax.eval_shape(walk.start, *single)
    end, measured = program_memory.call(
        draw, walk, noise, start, per_seed, stepping, keys, outputs, listener,
        what=f"drawing {keys.size:,} runs of {stepping.steps:,} steps",
        ways_out="draw fewer runs at a time (keys), record fewer steps or without outputs, or use "
        "float32",
        results=stepping.bytes_of_record(walk.measure, walked, outputs),
        work=program_memory.bytes_of(walked), n_runs=keys.size,
    )  # fmt: skip
    return end, measured


@eqx.filter_jit
def draw(
    walk: OptimizerSteps,
    noise: StepNoise,
    start: Start,
    per_seed: bool,
    stepping: Stepping,
    keys: Key[Array, "*seeds"],
    outputs: bool,
    listener: Listener,
) -> tuple[Start, Measurement]:
    """Where runs end and what was measured, from one start or from one for each seed."""

    n, rule = walk.flow.targets.shape[0], walk.flow.clipping
    batch_size = noise.batches.share(n) * n

    def one_run(key: PRNGKeyArray, start: Start) -> tuple[Start, Measurement]:
        def step(k: Array, state: tuple[Walked, _Carried]) -> tuple[Walked, _Carried]:
            walked, carried = state
            number = jnp.asarray(stepping.number(k))
            own = jax.random.fold_in(key, number)
            flow, added = walk.flow_at(walked), noise.at_clip_norm(walked.clip_norm, rule)
            velocity, (norms, drawn), carried = added.velocity(
                flow, walked.position, own, number, carried
            )
            after = walk.step(walked, velocity, added.variance(velocity))
            return walk.adapt(after, norms, drawn, batch_size, own), carried

        walked = walk.start(*start)
        (end, _), measured = stepping.walk_to_end(
            step,
            lambda state: walk.measure(state[0], outputs),
            (walked, noise.start(walk.flow, walked.position)),
            listener,
        )
        return (end.position, end.average), measured

    if keys.ndim == 0:
        return one_run(keys, start)
    return jax.vmap(one_run, in_axes=(0, 0 if per_seed else None))(keys, start)
