"""The randomness of a step of an ensemble: its batch, and its noise of outputs or of weights."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkdp._backend import devices, validate
from ntkdp._backend.types import Array, Float, PRNGKeyArray, PyTree, ScalarLike
from ntkdp._estimators.sharpness_aware import SharpnessAware
from ntkdp.batches import Batches, Drawn
from ntkdp.clipping import ClippingRule, rescaled
from ntkdp.gradient_flow import HeadFlow, KernelFlow, KernelLike, LinearisedFlow, LinearModelFlow
from ntkdp.noise import Independent, Noise
from ntkdp.stochastic_flow._matrix_root import eigh
from ntkdp.stochastic_flow._noise_covariance import has_features, noise_factor
from ntkdp.stochastic_flow._weight_noise import deviations

#: Eigenvalues of a root that are below this part of the largest one are rounding errors of zero.
_ROOT_OF_ZERO = 1e-2
#: Share of the samples up to which a batch is gathered, rather than the others weighted by zero.
_SMALL_BATCH = 0.5
#: Outputs of training points, and of test points if there are any.
_Outputs: TypeAlias = tuple[Array, Array | None]


class OutputNoise(eqx.Module):
    """Noise of the outputs, through a factor of its covariance, from that of the weights.

    The factor is a square root, or the features of a head, whose weights the noise is then of.

    ``deviations`` are those of the weights in the sum, by group. The number of weights is known
    where the norm of their noise is asked for, and so are the directions that the factor keeps, if
    the weights are too few for all.
    """

    factor: Float[Array, "N columns"]
    divisor: ScalarLike
    deviations: Float[Array, " R"]
    n_params: int | None = eqx.field(static=True, default=None)
    kept: Float[Array, "N r"] | None = None
    in_features: bool = eqx.field(static=True, default=False)

    def draw(self, mesh: Mesh | None, drift: _Outputs, key: PRNGKeyArray) -> _Outputs:
        """Draw what noise adds to the velocity of train and test outputs."""
        train, test = drift
        n, n_outputs = train.shape
        noise = devices.everywhere(mesh, self.factor @ self._unit(drift, key))
        noise = noise.reshape(-1, n_outputs) / self.divisor
        return noise[:n], None if test is None else noise[n:]

    def _unit(self, drift: _Outputs, key: PRNGKeyArray) -> Float[Array, "columns copies"]:
        train, test = drift
        n_rows, n_columns = self.factor.shape
        # One copy, or one for each output if the outputs share the factor.
        copies = (train.size + (0 if test is None else test.size)) // n_rows
        return jax.random.normal(key, (n_columns, copies), train.dtype)

    def square(self, drift: _Outputs, key: PRNGKeyArray) -> Array:
        """Squared norm, over all weights, of the noise that :meth:`draw` makes of a key."""
        assert self.n_params is not None
        shown = self._unit(drift, key)
        if self.kept is not None:
            shown = self.kept.T @ shown
        square, n_hidden = jnp.sum(shown**2), self.n_params - shown.size
        if n_hidden:
            own = jax.random.fold_in(key, 1)
            square += jax.random.chisquare(own, n_hidden, dtype=shown.dtype)
        return square * (self.deviations[0] / self.divisor).astype(shown.dtype) ** 2

    def of_weights(self, n_params: int, n_copies: int, mesh: Mesh | None) -> "OutputNoise":
        """The same of so many weights, whose noise makes so many copies of that of the factor."""
        rank, (n_rows, n_columns) = n_params // n_copies, self.factor.shape
        if rank >= n_columns:
            return replace(self, n_params=n_params)
        too_few = ValueError(
            "n_params must be the number of weights of the kernel, which is at least its rank, "
            f"got {n_params:,} for a rank above {rank * n_copies:,}"
        )
        if self.in_features:
            raise too_few
        roots, vectors = eigh(self.factor, mesh)
        first = n_rows - rank
        if bool(roots[first - 1] > _ROOT_OF_ZERO * roots[-1]):
            raise too_few
        kept = devices.everywhere(mesh, vectors[:, first:])
        return replace(self, n_params=n_params, kept=kept)

    def times(self, scales: Float[Array, " R"]) -> "OutputNoise":
        """The same, that many times as large, all groups alike."""
        return replace(self, divisor=self.divisor / scales[0].astype(self.factor.dtype))


class NoiseByGroup(eqx.Module):
    """Noise of the outputs from the weights of each group, whose sizes move apart."""

    groups: tuple[OutputNoise, ...]

    def draw(self, mesh: Mesh | None, drift: _Outputs, key: PRNGKeyArray) -> _Outputs:
        """Draw what noise adds to the velocity of train and test outputs."""
        keys = jax.random.split(key, len(self.groups))
        noises = [
            noise.draw(mesh, drift, own) for noise, own in zip(self.groups, keys, strict=True)
        ]
        total: _Outputs = jax.tree.map(lambda *parts: sum(parts), *noises)
        return total

    def times(self, scales: Float[Array, " R"]) -> "NoiseByGroup":
        """The same, that many times as large, by group."""
        return NoiseByGroup(
            tuple(n.times(s[None]) for n, s in zip(self.groups, scales, strict=True))
        )


class WeightNoise(eqx.Module):
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

    def times(self, scales: Float[Array, " R"]) -> "WeightNoise":
        """The same, that many times as large, by group."""
        return WeightNoise(self.deviations * scales, self.leaf_to_group)


#: What batches and noise carry on from step to step.
Carried: TypeAlias = tuple[PyTree, PyTree]


class Seen(NamedTuple):
    """What a step saw: norms of all samples' gradients by group, and which samples were drawn.

    ``gradient_norm`` is the norm of the noisy gradient over the weights, where it is asked for.
    """

    norms: Array
    drawn: Drawn
    gradient_norm: Array | None = None


class StepNoise(eqx.Module):
    """The randomness of steps: batches, and the noise of the outputs or of the weights.

    ``sizes`` are those of the noise in each step, relative to that of ``added``.
    """

    added: OutputNoise | NoiseByGroup | WeightNoise | None
    batches: Batches
    noise: Noise
    per_group: bool = eqx.field(static=True)
    finds_norm: bool = eqx.field(static=True, default=False)
    sizes: Float[Array, " T"] | None = None

    def at_step(self, k: Array | int) -> "StepNoise":
        """The same with the noise of a step, if it changes."""
        if self.sizes is None or self.added is None:
            return self
        return replace(self, added=self.added.times(self.sizes[k][None]))

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

    def start(self, flow: LinearModelFlow, state: PyTree) -> Carried:
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
        carried: Carried,
    ) -> tuple[PyTree, Seen, Carried]:
        """A random step, divided by the learning rate, what it saw, and what is carried on."""
        batch_key, noise_key = jax.random.split(key)
        of_batches, of_noise = carried
        n, dtype = flow.targets.shape[0], jnp.result_type(*jax.tree.leaves(state))
        weights: Array | None = None
        drawn: Drawn
        drift: PyTree
        if isinstance(flow, HeadFlow) and self.batches.largest(n) <= _SMALL_BATCH * n:
            places, drawn, of_batches = self.batches.draw_places(batch_key, number, of_batches, n)
            of_places = drawn.astype(dtype) / self.batches.share(n)
            drift, norms = flow.velocity_of_batch(state, places, of_places)
        else:
            drawn, of_batches = self.batches.draw(batch_key, number, of_batches, n)
            weights = None if drawn is None else self.batches.weights(drawn, dtype)
            drift, norms = flow.velocity_and_norms(state, weights)
        velocity, noise = drift, None
        if self.added is not None:
            draw = partial(self.added.draw, flow.mesh, drift)
            noise, of_noise = self.noise.next(draw, noise_key, number, of_noise)
            velocity = jax.tree.map(jnp.add, drift, noise)
        norm = None
        if self.finds_norm:
            square: ScalarLike = 0.0
            if isinstance(self.added, OutputNoise):
                square = self.added.square(drift, noise_key)
            norm = flow.gradient_norm(state, weights, drift, noise, square)
        return velocity, Seen(norms, drawn, norm), (of_batches, of_noise)

    def variance(self, velocity: PyTree) -> PyTree:
        """Variance of the noise of each weight's velocity; of outputs, which nobody asks for, 0."""
        if not isinstance(self.added, WeightNoise):
            return 0.0
        variances = [self.added.deviations[group] ** 2 for group in self.added.leaf_to_group]
        return jax.tree.unflatten(jax.tree.structure(velocity), variances)


def checked_divisor(
    flow: LinearModelFlow, batches: Batches, noise_kernel: KernelLike | None
) -> float:
    """What sums over a batch are divided by, if batches and kernel of the noise fit the flow."""
    n = flow.targets.shape[0]
    batches.check(n)
    if isinstance(flow, LinearisedFlow) and noise_kernel is not None:
        raise ValueError(
            "noise_kernel must be None with a LinearisedFlow, where the noise of the weights moves "
            f"the outputs too, got {type(noise_kernel).__name__}"
        )
    return batches.share(n) * flow.data.divisor


def noise_of_step(
    flow: LinearModelFlow,
    noise_multiplier: ScalarLike,
    batches: Batches,
    noise_kernel: KernelLike | None,
    per_group: bool,
    noise: Noise,
    *,
    norms_move: bool = False,
) -> StepNoise:
    """The randomness of steps, checked against the flow.

    If the clipping norms will move apart, so does noise by group.
    """
    divisor = checked_divisor(flow, batches, noise_kernel)
    if flow.public is not None:
        sigma = validate.non_negative(noise_multiplier=noise_multiplier)
        noise_multiplier = sigma * flow.public.private_share
    stds = deviations(flow.clipping, noise_multiplier, flow.n_terms, per_group)
    if not bool(jnp.any(stds > 0)):
        return StepNoise(None, batches, noise, per_group)
    added: OutputNoise | NoiseByGroup | WeightNoise
    if isinstance(flow, LinearisedFlow):
        added = WeightNoise(stds / divisor, flow.weight_groups().leaf_to_group)
    elif isinstance(flow, HeadFlow):
        added = WeightNoise(stds / divisor, (0,))
    else:
        assert isinstance(flow, KernelFlow)
        apart = per_group and norms_move
        noises = tuple(
            OutputNoise(
                noise_factor(flow, part, noise_kernel),
                divisor,
                part,
                in_features=has_features(flow, noise_kernel),
            )
            for part in (jnp.diag(stds) if apart else stds[None])
        )
        added = NoiseByGroup(noises) if apart else noises[0]
    return StepNoise(added, batches, noise, per_group)


def finding_norms(
    steps: StepNoise, flow: LinearModelFlow, state: PyTree, sharpness_aware: SharpnessAware
) -> StepNoise:
    """The same, which also find the norms of noisy gradients over the weights."""
    added = steps.added
    if isinstance(added, OutputNoise):
        assert isinstance(flow, KernelFlow)
        if not isinstance(steps.noise, Independent):
            raise ValueError(
                "noise must be independent with sharpness_aware and a KernelFlow, which draws the "
                f"norm of each step's noise, got {type(steps.noise).__name__}; take a "
                "LinearisedFlow"
            )
        if sharpness_aware.n_params is None:
            raise ValueError(
                "n_params of sharpness_aware must be the number of weights that train, since the "
                "kernel does not tell how long their noise is, got None; or take a LinearisedFlow"
            )
        n_copies = flow.drive.columns(state[0].shape[1])
        added = added.of_weights(sharpness_aware.n_params, n_copies, flow.mesh)
    return replace(steps, added=added, finds_norm=True)
