r"""Observation: discrete DP-SGD with per-sample clipping and the exact noise scale.

One step: :math:`w^+ = w - \eta\,U\big[\tfrac1B(\sum_{i \in batch} C_i g_i + \sigma S z)\big]` with
:math:`z \sim N(0, I)`, S the sensitivity of the clipping rule, B the expected batch size q n
(``reduction="mean"``), and U the optimizer; with ``reduction="sum"`` the sum is divided by q.
Noise of the *sum* has standard deviation ``noise_multiplier * sensitivity`` on every weight.

A sample whose gradient norm is not finite contributes nothing, so that it cannot break the bound.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ntkdp import _groups, _progress, _validate, clipping, losses
from ntkdp import _per_sample_gradients as per_sample
from ntkdp._check_model import check_inputs
from ntkdp._types import ApplyFn, Array, Key, Params, PRNGKeyArray
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss
from ntkdp.ntk import grouped_squared_norms
from ntkdp.trajectory import (
    Measurement,
    Trajectory,
    check_learning_rate,
    from_measurements,
    recorded_steps,
    times_of_steps,
)

#: Chance per step that a Poisson batch outgrows the memory planned for it.
_OVERFLOW_PROBABILITY = 1e-12


class State(NamedTuple):
    """What the next step needs: parameters, optimizer state and the number of steps done."""

    params: Params
    optimizer_state: Any
    step: Array


class Info(NamedTuple):
    """Diagnostics of one step, taken at the parameters before it, on the batch it used.

    ``clip_fraction`` is the share of (sample, group) factors below one, ``norms`` the per-sample
    gradient norms ``(n_batch,)`` or ``(R, n_batch)``, NaN for places that Poisson sampling left
    empty, ``batch_size`` the number of samples drawn, ``dropped`` how many of them had a norm that
    is not finite, and ``gradient_norm`` and ``noise_norm`` the norms of the clipped sum and of its
    noise.
    """

    clip_fraction: Array
    norms: Array
    batch_size: Array
    dropped: Array
    gradient_norm: Array
    noise_norm: Array


class Algorithm(eqx.Module):
    """DP-SGD on a problem, for those who write their own loop; made by :func:`build`.

    ``init(params) -> State`` and ``step(key, state) -> (State, Info)``, both pure.
    """

    apply_fn: ApplyFn
    x: Array
    targets: Array
    test_x: Array | None
    test_targets: Array | None
    loss: Loss
    clipping: ClippingRule
    learning_rate: Any
    noise_multiplier: Any
    groups: Any
    optimizer: Callable[[Any], optax.GradientTransformation]
    sample_rate: float = eqx.field(static=True)
    capacity: int = eqx.field(static=True)
    reduction: str = eqx.field(static=True)
    gradients: str = eqx.field(static=True)
    noise_per_group: bool = eqx.field(static=True)
    microbatch_size: int | None = eqx.field(static=True)
    noisy: bool = eqx.field(static=True)

    def init(self, params: Params) -> State:
        """The state before the first step; checks the parameters against the problem."""
        params = jax.tree.map(jnp.asarray, params)
        self._check(params)
        transformation = self._transformation(params)
        return State(params, transformation.init(params), jnp.zeros((), jnp.int32))

    def _transformation(self, params: Params) -> optax.GradientTransformation:
        # Made anew in each trace, so that another learning rate does not compile another program.
        if callable(self.learning_rate):
            return self.optimizer(self.learning_rate)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return self.optimizer(jnp.asarray(self.learning_rate, dtype))

    def _check(self, params: Params) -> None:
        self.clipping.check_groups(self._resolve(params).size)
        x = check_inputs(self.apply_fn, params, self.x)
        n_outputs = jax.eval_shape(self.apply_fn, params, x).shape[1]
        self.loss.check(self.targets, x.shape[0], n_outputs)
        if self.test_x is not None:
            check_inputs(self.apply_fn, params, self.test_x, "test_x")
            if self.test_targets is not None:
                m = self.test_x.shape[0]
                self.loss.check(self.test_targets, m, n_outputs, "test_targets")

    def step(self, key: PRNGKeyArray, state: State) -> tuple[State, Info]:
        """One step of clipped, noised gradient descent."""
        state, info, _ = self._step(key, state)
        return state, info

    def _resolve(self, params: Params) -> _groups.Groups:
        if self.clipping.scope == "flat":
            return _groups.resolve(params, lambda path: "all")
        return _groups.resolve(params, self.groups)

    def _step(self, key: PRNGKeyArray, state: State) -> tuple[State, Info, Array]:
        sampling_key, noise_key = jax.random.split(key)
        params, n = state.params, self.x.shape[0]
        if self.sample_rate < 1:
            drawn = jax.random.bernoulli(sampling_key, self.sample_rate, (n,))
            (index,) = jnp.nonzero(drawn, size=self.capacity, fill_value=0)
            present = jnp.arange(self.capacity) < jnp.sum(drawn)
            x, targets = self.x[index], self.targets[index]
        else:
            present = jnp.ones(n, bool)
            x, targets = self.x, self.targets
        clipped, outputs, norms, factors = self._clipped_sum(params, x, targets, present)

        groups = self._resolve(params)
        noise = self._noise(noise_key, params, groups) if self.noisy else None
        total = clipped if noise is None else jax.tree.map(jnp.add, clipped, noise)
        divisor = self.sample_rate * (n if self.reduction == "mean" else 1)
        gradient = jax.tree.map(lambda g: g / divisor, total)
        updates, optimizer_state = self._transformation(params).update(
            gradient, state.optimizer_state, params
        )
        new = State(optax.apply_updates(params, updates), optimizer_state, state.step + 1)

        shown = jnp.where(present, norms, jnp.nan)
        used = jnp.broadcast_to(present, factors.shape)
        clipped_share = jnp.sum((factors < 1) & used) / jnp.maximum(jnp.sum(used), 1)
        info = Info(
            clip_fraction=clipped_share.astype(factors.dtype),
            norms=shown,
            batch_size=jnp.sum(present),
            dropped=jnp.sum(~jnp.all(jnp.isfinite(jnp.atleast_2d(norms)), axis=0) & present),
            gradient_norm=optax.tree.norm(clipped),
            noise_norm=jnp.zeros(()) if noise is None else optax.tree.norm(noise),
        )
        return new, info, outputs

    def _noise(self, key: PRNGKeyArray, params: Params, groups: _groups.Groups) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        if self.noise_per_group:
            # Equal shares of the budget: sum_r (R_r / std_r)^2 is 1 / sigma^2 again.
            scales = jnp.sqrt(groups.size) * jnp.asarray(self.clipping.group_norms(groups.size))
            scale_of = [scales[group] for group in groups.leaf_to_group]
        else:
            scale_of = [jnp.asarray(self.clipping.sensitivity(groups.size))] * len(leaves)
        keys = jax.random.split(key, len(leaves))
        noise = [
            (self.noise_multiplier * scale).astype(leaf.dtype)
            * jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf, scale in zip(keys, leaves, scale_of, strict=True)
        ]
        return jax.tree.unflatten(treedef, noise)

    def _clipped_sum(
        self, params: Params, x: Array, targets: Array, present: Array
    ) -> tuple[Params, Array, Array, Array]:
        """``sum_i C_i g_i`` over the samples that are present, outputs, norms and factors."""
        size = self.microbatch_size
        n = x.shape[0]
        if size is None or size >= n:
            return self._clipped_sum_at_once(params, x, targets, present)
        n_blocks = -(-n // size)
        # Rows past the end are filled with the first sample and marked absent.
        index = jnp.arange(n_blocks * size)
        there = jnp.where(index < n, present[jnp.minimum(index, n - 1)], False)
        index = jnp.where(index < n, index, 0)

        def block(total: Params, rows: tuple[Array, Array]) -> tuple[Params, Any]:
            which, is_there = rows
            clipped, *rest = self._clipped_sum_at_once(params, x[which], targets[which], is_there)
            return jax.tree.map(jnp.add, total, clipped), rest

        zeros = jax.tree.map(jnp.zeros_like, params)
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
        leaves, treedef = jax.tree.flatten(params)
        groups = self._resolve(params)
        n = x.shape[0]
        if self.gradients == "vmap":
            outputs, gradients = self._plain_gradients(params, x, targets)
        else:
            structure = per_sample.trace(self.apply_fn, params, x)
            outputs, gradients = per_sample.factored(
                structure,
                params,
                x,
                lambda f, y: self.loss.output_gradient(f[None], y[None]),
                targets,
            )
        squares = grouped_squared_norms(gradients, groups, n)
        usable = present & jnp.all(jnp.isfinite(squares), axis=0)
        # Zero times NaN is NaN: what is dropped must be zero before it is weighted.
        gradients = [per_sample.keep(gradient, usable) for gradient in gradients]
        norms = clipping.norms_from_squares(squares)

        def weighted(factors: Array) -> list[Array]:
            return [
                per_sample.weighted_sum(gradient, factors[group], leaf)
                for gradient, group, leaf in zip(
                    gradients, groups.leaf_to_group, leaves, strict=True
                )
            ]

        total = None
        if self.clipping.needs_total_norm:
            sums = [jnp.sum(leaf**2) for leaf in weighted(jnp.ones_like(norms))]
            of_group = jnp.asarray(groups.leaf_to_group)
            total = clipping.norms_from_squares(
                jax.ops.segment_sum(jnp.stack(sums), of_group, groups.size)
            )
        finite_norms = jnp.where(usable, norms, 0.0)
        if self.clipping.scope == "flat":
            factors = self.clipping.factors(finite_norms[0], None if total is None else total[0])
            by_group = factors[None]
            norms = norms[0]
        else:
            factors = by_group = self.clipping.factors(finite_norms, total)
        clipped = weighted(jnp.where(usable, by_group, 0.0))
        return jax.tree.unflatten(treedef, clipped), outputs, norms, factors

    def _plain_gradients(
        self, params: Params, x: Array, targets: Array
    ) -> tuple[Array, list[per_sample.Factor]]:
        """The same by mapping ``grad`` over the samples, without the structure of the model."""

        def loss_of(params: Params, x_i: Array, y_i: Array) -> tuple[Array, Array]:
            f = self.apply_fn(params, x_i[None])
            return self.loss(f, y_i[None])[0], f[0]

        gradient = jax.grad(loss_of, has_aux=True)
        gradients, outputs = jax.vmap(gradient, in_axes=(None, 0, 0))(params, x, targets)
        return outputs, [per_sample.Dense(leaf[:, None]) for leaf in jax.tree.leaves(gradients)]

    def measure(self, params: Params, train: Array, clip_fraction: Array, outputs: bool) -> Any:
        """What a run records at parameters whose training outputs are known."""
        loss, accuracy = losses.mean_or_sum(self.loss, train, self.targets, self.reduction)
        test = test_loss = test_accuracy = None
        if self.test_x is not None:
            test = self.apply_fn(params, self.test_x)
            if self.test_targets is not None:
                test_loss, test_accuracy = losses.mean_or_sum(
                    self.loss, test, self.test_targets, self.reduction
                )
        return Measurement(
            loss=loss,
            clip_fraction=clip_fraction,
            accuracy=accuracy,
            outputs=train if outputs else None,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            test_outputs=test if outputs else None,
        )


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
) -> Algorithm:
    r"""DP-SGD on a problem, as ``init`` and ``step`` for a loop of your own.

    Parameters
    ----------
    apply_fn, x, targets, loss, clipping, learning_rate, noise_multiplier, sample_rate, optimizer, \
    groups, reduction, test_x, test_targets, gradients, noise_per_group, microbatch_size
        As for :func:`run`.

    Returns
    -------
    Algorithm
        ``init(params) -> State``, ``step(key, state) -> (State, Info)``.

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
    x, loss = jnp.asarray(x), losses.as_loss(loss)
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must have shape (n, ...) with n >= 1, got {x.shape}")
    if not isinstance(clipping, ClippingRule):
        raise TypeError(
            f"clipping must be a rule of ntkdp.clipping, e.g. Abadi(1.0), got {clipping!r}"
        )
    _validate.choice(("mean", "sum"), reduction=reduction)
    _validate.choice(("structured", "vmap"), gradients=gradients)
    sample_rate = float(_validate.fraction(sample_rate=sample_rate))
    noise_multiplier = _validate.non_negative(noise_multiplier=noise_multiplier)
    noisy = bool(np.any(np.asarray(noise_multiplier) > 0))
    if noisy and not clipping.bounds_each_sample:
        raise ValueError(
            f"noise_multiplier must be 0 with {type(clipping).__name__}, whose sensitivity is "
            f"unbounded, got {noise_multiplier}; clip each sample, e.g. with Abadi"
        )
    if noise_per_group and clipping.scope == "flat":
        raise ValueError("noise_per_group=True needs clipping with scope='layerwise', got 'flat'")
    if microbatch_size is not None:
        microbatch_size = _validate.count(microbatch_size=microbatch_size)
        if clipping.needs_total_norm:
            raise ValueError(
                f"microbatch_size must be None with {type(clipping).__name__}, which needs the "
                f"norm of the whole sum, got {microbatch_size}"
            )
    if not callable(learning_rate):
        learning_rate = np.asarray(_validate.positive(learning_rate=learning_rate), np.float64)
    if test_x is None and test_targets is not None:
        raise ValueError("test_targets need test_x, got test_x=None")
    if test_x is not None:
        test_x = jnp.asarray(test_x)
        if test_targets is not None:
            test_targets = _as_targets(loss, test_targets, test_x.shape[0], "test_targets")
    return Algorithm(
        apply_fn=apply_fn,
        x=x,
        targets=_as_targets(loss, targets, x.shape[0], "targets"),
        test_x=test_x,
        test_targets=test_targets,
        loss=loss,
        clipping=clipping,
        learning_rate=learning_rate,
        noise_multiplier=np.asarray(noise_multiplier, np.float64),
        groups=groups,
        optimizer=optax.sgd if optimizer is None else optimizer,
        sample_rate=sample_rate,
        capacity=_capacity(x.shape[0], sample_rate),
        reduction=reduction,
        gradients=gradients,
        noise_per_group=noise_per_group,
        microbatch_size=microbatch_size,
        noisy=noisy,
    )


def _as_targets(loss: Loss, targets: Any, n: int, name: str) -> Array:
    targets = jnp.asarray(targets)
    if targets.ndim == 0 or targets.shape[0] != n:
        raise ValueError(f"{name} must have one row a sample, {n}, got shape {targets.shape}")
    known = loss.n_outputs(targets)
    return targets if known is None else loss.check(targets, n, known, name)


def _capacity(n: int, sample_rate: float) -> int:
    if sample_rate >= 1:
        return n
    from scipy.stats import binom

    return max(1, min(n, int(binom.isf(_OVERFLOW_PROBABILITY, n, sample_rate))))


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
    noise_multiplier : float
        :math:`\sigma`: the noise of the summed gradient has standard deviation
        :math:`\sigma S` on every weight, S the sensitivity (R flat,
        :math:`\sqrt{\sum_r R_r^2}` layerwise).
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
        Samples whose gradients are held at once; it changes the memory, not the result.
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
    )
    steps = _validate.count(steps=steps)
    record_every = _validate.count(record_every=record_every)
    check_learning_rate(learning_rate, steps)
    keys = _as_keys(key)
    state = algorithm.init(params)
    with _progress.listening(progress, "training with DP-SGD") as shown:
        measured = _run(algorithm, state, keys, steps, record_every, outputs, shown)
        recorded = recorded_steps(steps, record_every)
        times = times_of_steps(learning_rate, recorded)
        return from_measurements(times, measured, steps=jnp.asarray(recorded))


def _as_keys(key: Any) -> Key[Array, "*seeds"]:
    """New-style keys, ``()`` or ``(S,)``."""
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim == 0:
            raise TypeError(f"key must be a JAX PRNG key, e.g. jax.random.key(0), got {key!r}")
        key = jax.random.wrap_key_data(key)
    if key.ndim > 1 or key.size == 0:
        raise ValueError(f"key must be one key or an array (S,) of keys, got shape {key.shape}")
    return key


@eqx.filter_jit
def _run(
    algorithm: Algorithm,
    state: State,
    keys: Key[Array, "*seeds"],
    steps: int,
    record_every: int,
    outputs: bool,
    shown: bool,
) -> Measurement:
    full_batch = algorithm.sample_rate >= 1

    def observe(params: Params) -> tuple[Array, Array]:
        everyone = jnp.ones(algorithm.x.shape[0], bool)
        _, train, _, factors = algorithm._clipped_sum(
            params, algorithm.x, algorithm.targets, everyone
        )
        return train, clipping.clip_fraction(factors)

    def one_run(key: PRNGKeyArray) -> Measurement:
        def step(k: Any, state: State) -> State:
            return algorithm.step(jax.random.fold_in(key, k), state)[0]

        def record(state: State, start: Array) -> tuple[State, Measurement]:
            if shown:
                due = start % max(record_every, steps // 100) < record_every
                lax.cond(due, lambda: _progress.report(start / steps), lambda: None)
            params = state.params
            end = jnp.minimum(start + record_every, steps)
            if full_batch:
                # The step computes the outputs of all samples anyway.
                state, info, train = algorithm._step(jax.random.fold_in(key, start), state)
                clip_fraction = info.clip_fraction
                start = start + 1
            else:
                train, clip_fraction = observe(params)
            measured = algorithm.measure(params, train, clip_fraction, outputs)
            return lax.fori_loop(start, end, step, state), measured

        last, measured = lax.scan(record, state, jnp.arange(0, steps, record_every))
        final = algorithm.measure(last.params, *observe(last.params), outputs)
        return jax.tree.map(lambda path, end: jnp.append(path, end[None], axis=0), measured, final)

    return one_run(keys) if keys.ndim == 0 else jax.vmap(one_run)(keys)
