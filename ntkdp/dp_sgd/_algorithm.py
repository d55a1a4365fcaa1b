"""One step of DP-SGD: sample, clip, add noise, update."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from ntkdp import optimizers
from ntkdp._backend import devices, validate
from ntkdp._backend.compiled import nan_unless
from ntkdp._backend.norms import of_all, wide
from ntkdp._backend.schedules import Schedule, at
from ntkdp._backend.types import (
    ApplyFn,
    Array,
    LearningRate,
    Params,
    PRNGKeyArray,
    PyTree,
    ScalarLike,
)
from ntkdp._estimators.sharpness_aware import SharpnessAware, ahead
from ntkdp._estimators.zeroth_order import ZerothOrder
from ntkdp._gradients import clipped_sum
from ntkdp._gradients import groups as _groups
from ntkdp._gradients.check_model import check_inputs
from ntkdp._results.setup import (
    Setup,
    batches_in_words,
    described,
    noise_in_words,
    noise_of,
    optimizer_of,
    rates,
)
from ntkdp.batches import Batches
from ntkdp.clipping import Adaptive, MovingNorm
from ntkdp.dp_sgd import _plain_gradients, _zeroth_order
from ntkdp.noise import Noise
from ntkdp.optimizers import OptimizerLike
from ntkdp.trajectory import HasTrainingSet, Measurement, PublicRows, Stepping, TrainingSet


class State(NamedTuple):
    """All that the next step needs: parameters, optimizer state and the number of steps done.

    ``average`` is the moving average of the parameters, in float32 at least, if the optimizer
    keeps one; :meth:`Algorithm.measured_params` returns it in the dtypes of the parameters.
    ``batch_state`` is the order of an epoch and ``noise_state`` what correlated noise carries on.
    ``clip_norm`` is the clipping norm by group ``(R,)`` if it moves; flat has one group.
    ``ascent`` is the way from the trained parameters to where a sharpness-aware step takes its
    gradients.
    """

    params: Params
    optimizer_state: PyTree
    step: Array
    average: Params | None = None
    batch_state: PyTree = None
    noise_state: PyTree = None
    clip_norm: Array | None = None
    ascent: Params | None = None


class Info(NamedTuple):
    """Diagnostics of one step, taken where its gradients are, on the batch it used.

    ``clip_fraction`` is the share of (sample, group) factors below one, ``norms`` the per-sample
    gradient norms ``(n_batch,)`` or ``(R, n_batch)``, NaN for places that Poisson sampling left
    empty, ``batch_size`` the number of samples drawn, ``dropped`` how many of them had a norm or a
    factor that is not finite, or a clipped gradient that the dtype can hold only in part, and
    ``gradient_norm`` and ``noise_norm`` the norms of the clipped sum and of its noise. Zeroth-order
    steps have sizes of slopes for norms, ``(m, n_batch)``, and directions in place of groups.

    Under ``jax_debug_nans`` the NaN of ``step`` and ``compile()`` is let through. A program of your
    own that returns it raises, since JAX looks at what programs return.
    """

    clip_fraction: Array
    norms: Array
    batch_size: Array
    dropped: Array
    gradient_norm: Array
    noise_norm: Array


class Algorithm(HasTrainingSet):
    """DP-SGD on a problem, for those who write their own loop; made by :func:`build`.

    ``init(params) -> State`` and ``step(key, state) -> (State, Info)``, both pure;
    ``compile()`` gives the step as a compiled function.
    """

    apply_fn: ApplyFn
    x: Array
    test_x: Array | None
    data: TrainingSet
    public: PublicRows | None
    learning_rate: LearningRate
    noise_multiplier: ScalarLike | Schedule
    groups: PyTree
    optimizer: OptimizerLike
    batches: Batches
    noise: Noise
    moving: MovingNorm | None
    zeroth_order: ZerothOrder | None
    sharpness_aware: SharpnessAware | None
    capacity: int = eqx.field(static=True)
    gradients: str = eqx.field(static=True)
    noise_per_group: bool = eqx.field(static=True)
    microbatch_size: int | None = eqx.field(static=True)
    noisy: bool = eqx.field(static=True)
    trainable: tuple[str, ...] | None = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    def setup(self, stepping: Stepping) -> Setup:
        """The training in plain numbers, for comparisons."""
        optimizer, options = optimizer_of(optimizers.recognised(self.optimizer))
        return Setup(
            clipping=described(self.clipping),
            loss=described(self.loss),
            reduction=self.reduction,
            learning_rate=rates(stepping.learning_rate, stepping.steps),
            steps=stepping.steps,
            **noise_of(self.noise_multiplier),
            noise_per_group=self.noise_per_group,
            sample_rate=self.sample_rate,
            batches=batches_in_words(self.batches),
            noise=noise_in_words(self.noise) if self.noisy else "",
            adaptive="" if self.moving is None else self.moving.in_words,
            public="" if self.public is None else self.public.in_words,
            zeroth_order="" if self.zeroth_order is None else self.zeroth_order.in_words,
            sharpness_aware="" if self.sharpness_aware is None else self.sharpness_aware.in_words,
            optimizer=optimizer,
            optimizer_options=options,
        )

    def init(self, params: Params) -> State:
        """The state before the first step; checks the parameters against the problem."""
        params = devices.everywhere(
            self.mesh, jax.tree.map(jnp.asarray, validate.parameters(params=params))
        )
        self._check(params)
        return self.start(params)

    def start(self, params: Params, average: Params | None = None) -> State:
        """The state before the first step, for parameters that were checked.

        An average is continued if there is one from the steps before.
        """
        trained, _ = self._split(params)
        optimizer_state = self._transformation(trained).init(trained)
        if average is None:
            average = optimizers.start_average(self.optimizer, params)
        noise_state = None
        if self.noisy:
            first = self._with_noise_of(0)
            like = jax.eval_shape(
                lambda key: first._noise(key, trained, self._resolve(params)), jax.random.key(0)
            )
            noise_state = self.noise.start(like)
        batch_state = self.batches.start(self.x.shape[0])
        step = jnp.zeros((), jnp.int32)
        clip_norm = None
        if self.moving is not None:
            clip_norm = self.moving.start(self.clipping, self._resolve(params).size)
        ascent = None
        if self.sharpness_aware is not None:
            ascent = jax.tree.map(jnp.zeros_like, trained)
        return State(
            params, optimizer_state, step, average, batch_state, noise_state, clip_norm, ascent
        )

    @property
    def sample_rate(self) -> float:
        """The expected share of the samples in a batch."""
        return self.batches.share(self.x.shape[0])

    def measured_params(self, state: State) -> Params:
        """The parameters at which a run is measured: their average if the optimizer keeps one."""
        if state.average is None:
            return state.params
        return jax.tree.map(lambda mean, w: mean.astype(w.dtype), state.average, state.params)

    def _split(self, params: Params) -> tuple[Params, Params]:
        """Trained and frozen parameters, each tree with None in place of the other."""
        if self.trainable is None:
            return eqx.partition(params, True)
        kept = _groups.resolve(params, self.groups).leaves_of(self.trainable)
        return eqx.partition(params, jax.tree.unflatten(jax.tree.structure(params), kept))

    def _transformation(self, params: Params) -> optax.GradientTransformation:
        # Made anew in each trace, so that another learning rate does not compile another program.
        if callable(self.learning_rate):
            return self.optimizer(self.learning_rate)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return self.optimizer(jnp.asarray(self.learning_rate, dtype))

    def _check(self, params: Params) -> None:
        n_groups = self._resolve(params).size
        self.clipping.check_groups(n_groups)
        if isinstance(self.moving, Adaptive):
            self.moving.sum_noise_multiplier(at(self.noise_multiplier, 0), n_groups)
        elif self.moving is not None:
            self.moving.start(self.clipping, n_groups)
        x = check_inputs(self.apply_fn, params, self.x)
        if self.test_x is not None:
            check_inputs(self.apply_fn, params, self.test_x, "test_x")
        n_outputs = jax.eval_shape(self.apply_fn, params, x).shape[1]
        self.data.check_outputs(n_outputs)
        if self.public is not None:
            check_inputs(self.apply_fn, params, self.public.x, "public.x")
            self.public.fit(self.loss, n_outputs)

    def step(self, key: PRNGKeyArray, state: State) -> tuple[State, Info]:
        """One step of clipped, noised gradient descent."""
        state, info, _, present = self.step_with_outputs(key, state)
        return state, self._marked(info, present)

    def _marked(self, info: Info, present: Array) -> Info:
        if self.batches.takes_all:
            return info
        return info._replace(norms=nan_unless(present, info.norms))

    def compile(self) -> Callable[[PRNGKeyArray, State], tuple[State, Info]]:
        """The step, compiled when it is first called.

        The data are arguments of the compiled program, not constants in it, and a call costs no
        more than one of a function that ``jax.jit`` made. With Poisson sampling, empty places are
        marked with NaN after the program, so that ``jax_debug_nans`` does not take it for an error.
        """
        arrays, rest = eqx.partition(self, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)

        @jax.jit
        def compiled(
            leaves: list[Array], key: PRNGKeyArray, state: State
        ) -> tuple[State, Info, Array]:
            whole: Algorithm = eqx.combine(jax.tree.unflatten(structure, leaves), rest)
            state, info, _, present = whole.step_with_outputs(key, state)
            return state, info, present

        def step(key: PRNGKeyArray, state: State) -> tuple[State, Info]:
            state, info, present = compiled(leaves, key, state)
            return state, self._marked(info, present)

        return step

    def _resolve(self, params: Params) -> _groups.Groups:
        """Groups of the leaves that are trained, by the names that they have in the whole."""
        if self.clipping.scope == "flat":
            return _groups.resolve(self._split(params)[0], lambda path: "all")
        return _groups.resolve(params, self.groups).select(self.trainable)

    def step_with_outputs(
        self, key: PRNGKeyArray, state: State
    ) -> tuple[State, Info, Array, Array]:
        """State, diagnostics with the norms of all places, outputs, and which places are filled."""
        now = self.at_clip_norm(state.clip_norm)._with_noise_of(state.step)
        after, info, outputs, present = now._step(key, state)
        if self.moving is not None and state.clip_norm is not None:
            seen = (jnp.atleast_2d(info.norms), present, self.sample_rate * self.x.shape[0], key)
            clip_norm = self.moving.next(state.clip_norm, *seen, after.step)
            after = after._replace(clip_norm=clip_norm)
        return after, info, outputs, present

    def _with_noise_of(self, step: Array | int) -> "Algorithm":
        return replace(self, noise_multiplier=at(self.noise_multiplier, step))

    def _step(self, key: PRNGKeyArray, state: State) -> tuple[State, Info, Array, Array]:
        """The same with the clipping norm of the rule, and as yet without the next one."""
        sampling_key, noise_key = jax.random.split(key)
        n = self.x.shape[0]
        drawn, batch_state = self.batches.draw(sampling_key, state.step, state.batch_state, n)
        trained, frozen = self._split(state.params)
        point = ahead(trained, state.ascent)
        params = eqx.combine(point, frozen)
        order = self.zeroth_order
        if order is None:
            clipped, outputs, norms, factors, present = self.clipped_sum(params, drawn)
        else:
            clipped, outputs, norms, factors, present = self._estimated_sum(
                order, params, drawn, key
            )

        groups = self._resolve(params)
        noise, noise_state = None, state.noise_state
        if self.noisy:

            def draw(noise_key: PRNGKeyArray) -> Params:
                if order is None:
                    return self._noise(noise_key, trained, groups)
                sigma = at(self.noise_multiplier, state.step)
                deviation = jnp.asarray(order.noise_deviation(self.clipping, sigma))
                return _zeroth_order.noise(order, deviation, trained, key, noise_key)

            noise, noise_state = self.noise.next(draw, noise_key, state.step, noise_state)
        total = clipped if noise is None else jax.tree.map(jnp.add, clipped, noise)
        divisor = self.sample_rate * self.data.divisor
        variance = self._noise_variance(trained, groups, divisor)
        gradient = jax.tree.map(lambda g: g / divisor, total)
        if self.public is not None:
            of_public = self._public_gradient(self.public, point, frozen)
            gradient = self.public.mixed(gradient, of_public)
        # Rounded to the precision of the parameters here, when the noise is in it.
        gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), gradient, trained)
        ascent = None
        if self.sharpness_aware is not None:
            ascent = self.sharpness_aware.ascent(gradient, of_all(gradient))
        updates, optimizer_state = optimizers.updated(
            self._transformation(trained), gradient, state.optimizer_state, trained, variance
        )
        moved = eqx.combine(optax.apply_updates(trained, updates), frozen)
        average = optimizers.next_average(self.optimizer, state.average, moved)
        carried = (batch_state, noise_state)
        new = State(moved, optimizer_state, state.step + 1, average, *carried, ascent=ascent)

        used = jnp.broadcast_to(present, factors.shape)
        clipped_share = jnp.sum((factors < 1) & used) / jnp.maximum(jnp.sum(used), 1)
        finite = jnp.atleast_2d(jnp.isfinite(norms) & jnp.isfinite(factors))
        info = Info(
            clip_fraction=clipped_share.astype(factors.dtype),
            norms=norms,
            batch_size=jnp.sum(present),
            dropped=jnp.sum(~jnp.all(finite, axis=0) & present),
            gradient_norm=optax.tree.norm(clipped),
            noise_norm=jnp.zeros(()) if noise is None else optax.tree.norm(noise),
        )
        return new, info, outputs, present

    def _public_gradient(self, public: PublicRows, trained: Params, frozen: Params) -> Params:
        """Gradient of the reduced loss of the public samples, in what is trained."""

        def apply(trained: Params) -> Array:
            return self.apply_fn(eqx.combine(trained, frozen), public.x)

        outputs, pull = jax.vjp(apply, trained)
        gradient: Params = pull(public.output_gradient(self.loss, outputs, self.reduction))[0]
        return gradient

    def _noise(self, key: PRNGKeyArray, params: Params, groups: _groups.Groups) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        dtypes = [wide(leaf).dtype for leaf in leaves]
        noise = [
            deviation.astype(dtype) * jax.random.normal(k, leaf.shape, dtype)
            for k, leaf, dtype, deviation in zip(
                keys, leaves, dtypes, self._noise_deviations(groups), strict=True
            )
        ]
        return jax.tree.unflatten(treedef, noise)

    def _noise_deviations(self, groups: _groups.Groups) -> list[Array]:
        """Standard deviation of the noise of each leaf of the summed gradient."""
        if self.noise_per_group:
            # Equal shares of the budget: sum_r (R_r / std_r)^2 is 1 / sigma^2 again.
            scales = jnp.sqrt(groups.size) * jnp.asarray(self.clipping.group_norms(groups.size))
            scale_of = [scales[group] for group in groups.leaf_to_group]
        else:
            scale = jnp.asarray(self.clipping.sensitivity(groups.size))
            scale_of = [scale] * len(groups.leaf_to_group)
        sigma = at(self.noise_multiplier, 0)  # That of a step, by now.
        if self.moving is not None:
            sigma = self.moving.of_sum(sigma, groups.size)
        return [jnp.asarray(sigma * scale) for scale in scale_of]

    def _noise_variance(self, params: Params, groups: _groups.Groups, divisor: float) -> Params:
        """Variance of the noise of each leaf of the divided gradient, for the optimizer."""
        if not self.noisy:
            return jax.tree.map(lambda leaf: jnp.zeros(()), params)
        share = 1.0 if self.public is None else self.public.private_share
        variances = [(share * std / divisor) ** 2 for std in self._noise_deviations(groups)]
        return jax.tree.unflatten(jax.tree.structure(params), variances)

    def _estimated_sum(
        self, order: ZerothOrder, params: Params, drawn: Array | None, key: PRNGKeyArray
    ) -> tuple[Params, Array, Array, Array, Array]:
        """What :meth:`clipped_sum` returns, from slopes along the directions of a step's key."""
        trained, frozen = self._split(params)
        x, targets, present = self._places(self.x, self.targets, drawn)

        def outputs_of(trained: Params) -> Array:
            return self.apply_fn(eqx.combine(trained, frozen), x)

        total, norms, factors = _zeroth_order.estimated_sum(
            order,
            self.clipping,
            lambda trained: self.loss(outputs_of(trained), targets),
            trained,
            present,
            key,
        )
        return total, outputs_of(trained), norms, factors, present

    def _places(self, x: Array, targets: Array, drawn: Array | None) -> tuple[Array, Array, Array]:
        """Samples in the places of a batch, and which places have one; None for all samples."""
        if drawn is None:
            return x, targets, jnp.ones(x.shape[0], bool)
        (index,) = jnp.nonzero(drawn, size=self.capacity, fill_value=0)
        present = jnp.arange(self.capacity) < jnp.sum(drawn)
        return x[index], targets[index], present

    def clipped_sum(
        self, params: Params, drawn: Array | None
    ) -> tuple[Params, Array, Array, Array, Array]:
        """``sum_i C_i g_i`` over the samples that are drawn, None for all of them.

        The sum is of what is trained alone. With it come outputs, norms and factors of the places
        for samples, and whether there is one.
        """
        groups_first = int(self.clipping.scope == "layerwise")

        def on_device(
            params: Params, x: Array, targets: Array, drawn: Array | None
        ) -> tuple[Params, Array, Array, Array, Array]:
            x, targets, present = self._places(x, targets, drawn)
            clipped, outputs, norms, factors = self._clipped_sum_in_batches(
                params, x, targets, present
            )
            return devices.total(self.mesh, clipped), outputs, norms, factors, present

        over_devices = devices.over_samples(
            on_device, self.mesh, (None, 0, 0, 0), (None, 0, groups_first, groups_first, 0)
        )
        return over_devices(params, self.x, self.targets, drawn)

    def _clipped_sum_in_batches(
        self, params: Params, x: Array, targets: Array, present: Array
    ) -> tuple[Params, Array, Array, Array]:
        size = self.microbatch_size
        n = x.shape[0]
        if size is None or size >= n:
            return self._clipped_sum_at_once(params, x, targets, present)
        n_blocks = -(-n // size)
        # Rows past the end are filled with the first sample and marked absent.
        index = jnp.arange(n_blocks * size)
        there = jnp.where(index < n, present[jnp.minimum(index, n - 1)], False)
        index = jnp.where(index < n, index, 0)

        def block(total: Params, rows: tuple[Array, Array]) -> tuple[Params, PyTree]:
            which, is_there = rows
            clipped, *rest = self._clipped_sum_at_once(params, x[which], targets[which], is_there)
            return jax.tree.map(jnp.add, total, clipped), rest

        zeros = jax.tree.map(lambda w: jnp.zeros_like(wide(w)), self._split(params)[0])
        rows = (index.reshape(n_blocks, size), there.reshape(n_blocks, size))
        clipped, (outputs, norms, factors) = lax.scan(block, zeros, rows)
        outputs = outputs.reshape(-1, outputs.shape[-1])[:n]
        norms, factors = (
            jnp.moveaxis(v, 0, -2).reshape(*v.shape[1:-1], -1)[..., :n] for v in (norms, factors)
        )
        return clipped, outputs, norms, factors

    def _clipped_sum_at_once(
        self, params: Params, x: Array, targets: Array, present: Array
    ) -> tuple[Params, Array, Array, Array]:
        trained, frozen = self._split(params)
        groups = self._resolve(params)

        def apply_fn(trained: Params, x: Array) -> Array:
            return self.apply_fn(eqx.combine(trained, frozen), x)

        def total(leaves: list[Array]) -> list[Array]:
            return devices.total(self.mesh, leaves)

        samples = (trained, x, targets, present, total)
        if self.gradients == "vmap":
            result = _plain_gradients.clipped_sum(
                apply_fn, self.loss, self.clipping, groups.leaf_to_group, *samples
            )
        else:
            result = clipped_sum.clipped_sum(apply_fn, self.loss, self.clipping, groups, *samples)
        leaves, outputs, norms, factors = result
        if self.clipping.scope == "flat":
            norms, factors = norms[0], factors[0]
        return jax.tree.unflatten(jax.tree.structure(trained), leaves), outputs, norms, factors

    def measure(
        self, state: State, train: Array, clip_fraction: Array, outputs: bool
    ) -> Measurement:
        """The record of a state; ``train`` and ``clip_fraction`` are of its parameters.

        With an average, losses and outputs are of it, and the clip fraction is still that of the
        parameters, whose gradients are clipped.
        """
        params = self.measured_params(state)
        if state.average is not None:
            train = self.clipped_sum(params, None)[1]
        test = None if self.test_x is None else self.apply_fn(params, self.test_x)
        measured = self.data.measure(train, test, clip_fraction, outputs)
        return measured._replace(clip_norm=state.clip_norm)
