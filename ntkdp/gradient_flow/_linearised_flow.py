"""The flow of the linearised model by products with its Jacobian: no kernel is formed."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ntkdp import clipping as _clipping
from ntkdp._backend import devices, memory, validate
from ntkdp._backend.norms import of_all, wide
from ntkdp._backend.types import (
    ApplyFn,
    Array,
    ArrayLike,
    Float,
    Params,
    PyTree,
    ScalarLike,
)
from ntkdp._gradients import clipped_sum
from ntkdp._gradients import groups as _groups
from ntkdp._gradients import per_sample as per_sample
from ntkdp._gradients.check_model import check_inputs, check_model
from ntkdp._results.setup import Setup
from ntkdp.clipping import ClippingRule
from ntkdp.gradient_flow._flow import LinearModelFlow, setup_of
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.trajectory import Measurement, PublicRows, TrainingSet, check_public


class LinearisedFlow(LinearModelFlow):
    r"""Flow of a network linearised at given parameters, without its kernel.

    The model is :math:`f_{\mathrm{lin}}(w) = f(w_0) + J(w_0)(w - w_0)`, its clipped gradients are
    :math:`g_i = J_i(w_0)^\top a_i` with :math:`a_i` taken at the linearised outputs, and
    :math:`\dot w = -\tfrac1n \sum_i C_i g_i`. In the outputs this is :class:`KernelFlow` with the
    empirical kernel at :math:`w_0`, whose :math:`(nK)^2` entries are never needed: outputs are
    Jacobian-vector products and gradients are clipped in factored form, a batch of samples at a
    time. With P parameters a velocity takes O(nP) operations, and O(P) memory besides that for one
    batch.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, x) -> (n, K)``.
    params : pytree
        :math:`w_0`, where the model is linearised.
    x, targets : array
        Training inputs ``(n, ...)`` and targets as the loss wants them.
    loss, clipping, reduction
        As for :class:`KernelFlow`. A rule that needs the norm of the summed gradient passes through
        the samples twice.
    groups : pytree prefix of labels, or callable from key path to label, optional
        Groups of layerwise clipping; by default the layers.
    test_x, test_targets : array, optional
        Measured along the way.
    public : PublicRows, optional
        Public samples, as for ``dp_sgd.run``. They pass through at once.
    batch_size : int, optional
        The most samples that pass through at once; batches have equal sizes. By default their
        per-sample gradients take 64 MiB in factored form. Results do not depend on it.
    mesh : jax.sharding.Mesh, optional
        Devices over which the training samples are spread; their number must divide over them.
        Each device then has batches of its own.

    Raises
    ------
    ValueError, TypeError
        As for :class:`WeightFlow`, but when the flow is made; a batch size below 1.

    Notes
    -----
    ``initial`` of :func:`ntkdp.solve`, :func:`ntkdp.recursion` and
    :func:`ntkdp.stochastic_flow.ensemble` are parameters, as for :class:`WeightFlow`: mostly
    :math:`w_0` itself. The state is the displacement :math:`w - w_0`, so the solver's tolerances
    are in units of the parameters.

    *Derived*: the chain rule on both sides of the frozen kernel, :math:`H = J J^\top`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> w = jnp.array([[3.0]])
    >>> flow = ntkdp.LinearisedFlow(lambda w, x: x @ w**2, w, jnp.ones((1, 1)), jnp.zeros((1, 1)),
    ...                             ntkdp.losses.SquaredError(), ntkdp.clipping.NoClipping())
    >>> path = ntkdp.recursion(flow, w, learning_rate=0.01, steps=1, outputs=True)
    >>> [round(f, 4) for f in path.outputs[:, 0, 0].tolist()]  # f falls by 0.01 J J f = 0.36 f
    [9.0, 5.76]
    """

    apply_fn: ApplyFn
    params: Params
    x: Array
    data: TrainingSet
    groups: PyTree
    test_x: Array | None
    public: PublicRows | None
    batch_size: int = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    def __init__(
        self,
        apply_fn: ApplyFn,
        params: Params,
        x: ArrayLike,
        targets: ArrayLike,
        loss: Loss | SampleLoss,
        clipping: ClippingRule,
        *,
        groups: PyTree = None,
        reduction: Reduction = "mean",
        test_x: ArrayLike | None = None,
        test_targets: ArrayLike | None = None,
        public: PublicRows | None = None,
        batch_size: int | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.apply_fn = apply_fn
        self.mesh = mesh = devices.as_mesh(mesh)
        params = jax.tree.map(jnp.asarray, validate.parameters(params=params))
        self.params = devices.everywhere(mesh, params)
        self.data = data = TrainingSet(targets, loss, clipping, reduction, test_targets)
        self.groups = groups
        clipping.check_groups(self.weight_groups().size)
        x, outputs = check_model(apply_fn, params, x)
        n, n_outputs = outputs.shape
        devices.check_divides(mesh, x=n)
        if batch_size is None:
            batch_size = _samples_within_budget(apply_fn, params, x, n_outputs)
        self.batch_size = validate.count(batch_size=batch_size)
        self.x = devices.spread(mesh, x)
        if test_x is not None:
            test_x = check_inputs(apply_fn, params, test_x, "test_x")
        self.test_x = devices.everywhere(mesh, test_x)
        data = data.fit(n, None if test_x is None else test_x.shape[0], n_outputs)
        self.data = data.place(mesh, spread=True)
        public = check_public(public)
        if public is not None:
            check_inputs(apply_fn, params, public.x, "public.x")
            public = public.fit(data.loss, n_outputs) if public.counts else None
        self.public = devices.everywhere(mesh, public)

    def setup(self) -> Setup:
        """The training that it predicts, for comparisons."""
        return setup_of(self.clipping, self.loss, self.reduction, public=self.public)

    def init(self, initial: Params) -> Params:
        """The state at initial parameters: their distance from where the model is linearised."""
        expected: object = jax.tree.structure(self.params)
        given: object = jax.tree.structure(initial)
        if given != expected:
            raise ValueError(
                f"initial must have the structure of params, {expected}, got {given}; "
                "start from params itself to predict the network as it is"
            )
        initial = validate.finite(
            initial=jax.tree.map(jnp.asarray, validate.parameters(initial=initial))
        )
        for (path, leaf), start in zip(
            jax.tree_util.tree_leaves_with_path(self.params), jax.tree.leaves(initial), strict=True
        ):
            if start.shape != leaf.shape:
                name = "initial" + jax.tree_util.keystr(path)
                raise ValueError(f"{name} must have shape {leaf.shape}, got {start.shape}")
        initial = devices.everywhere(self.mesh, initial)
        return jax.tree.map(lambda w, w0: (w - w0).astype(w0.dtype), initial, self.params)

    def at_zero_weights(self) -> Params:
        """The state at which all weights are zero."""
        return jax.tree.map(jnp.negative, self.params)

    def weight_groups(self) -> _groups.Groups:
        """Groups that are clipped apart; flat, all weights are one."""
        if self.clipping.scope == "flat":
            return _groups.resolve(self.params, lambda path: "all")
        return _groups.resolve(self.params, self.groups)

    def _push(self, params: Params, x: Array, displacement: Params) -> tuple[Array, Array]:
        """Outputs at ``params``, and how far the displacement moves them."""
        # A solver may carry the state in another precision than the network has.
        direction = jax.tree.map(lambda d, w0: d.astype(w0.dtype), displacement, params)

        def push(x_i: Array) -> tuple[Array, Array]:
            f, moved = jax.jvp(lambda p: self.apply_fn(p, x_i[None]), (params,), (direction,))
            return f[0], moved[0]

        # Sample by sample, as per-sample gradients are traced: the compiler can see that both need
        # the same forward pass, and saves one of the two.
        pushed: tuple[Array, Array] = jax.vmap(push)(x)
        return pushed

    def _clip(
        self, displacement: Params, weights: Array | None = None
    ) -> tuple[Params, Array, Array, Array]:
        """Weighted sum of clipped gradients, outputs, and factors and norms (flat: one row)."""
        over_devices = devices.over_samples(
            self._of_device, self.mesh, (None, None, 0, 0, 0), (None, 0, 1, 1)
        )
        return over_devices(displacement, self.params, self.x, self.targets, weights)

    def _of_device(
        self,
        displacement: Params,
        params: Params,
        x: Array,
        targets: Array,
        weights: Array | None,
    ) -> tuple[Params, Array, Array, Array]:
        groups = self.weight_groups()
        if weights is None:
            weights = jnp.ones(x.shape[0])
        total: Array | None = None

        def factors(norms: Array) -> Array:
            return self.clipping.by_group(norms, total)

        samples = (displacement, params, x, targets)
        if self.clipping.needs_total_norm:
            summed, *_ = self._pass(*samples, weights > 0, groups, jnp.ones_like)
            leaves = jax.tree.leaves(devices.total(self.mesh, summed))
            total = clipped_sum.norms_of_sum(leaves, groups)
        clipped, *of_samples = self._pass(*samples, weights, groups, factors)
        return devices.total(self.mesh, clipped), *of_samples

    def _pass(
        self,
        displacement: Params,
        params: Params,
        x: Array,
        targets: Array,
        weights: Array,
        groups: _groups.Groups,
        rule: Callable[[Array], Array],
    ) -> tuple[Params, Array, Array, Array]:
        """Weighted sum of all gradients, outputs ``(n, K)``, factors and norms ``(R, n)``.

        A gradient counts with the weight of its sample times the factor that ``rule`` makes of its
        norm. Flat, R = 1.
        """
        n = x.shape[0]
        leaves, treedef = jax.tree.flatten(params)

        def gradient(f: Array, moved: Array, y: Array) -> Array:
            # Targets in a wider precision than the network's would widen the gradient.
            return self.loss.output_gradient(f + moved, y).astype(f.dtype)

        def batch(sums: list[Array], index: Array) -> tuple[list[Array], tuple[Array, ...]]:
            rows = jnp.minimum(index, n - 1)
            _, moved = self._push(params, x[rows], displacement)
            f, gradients = clipped_sum.gradients(
                self.apply_fn, params, x[rows], gradient, moved, targets[rows]
            )
            norms = per_sample.grouped_norms(
                gradients, groups.leaf_to_group, groups.size, len(rows)
            )
            factors = rule(norms)
            # Samples that fill up the last batch are not counted again.
            counted = jnp.where(index < n, weights[rows], 0).astype(factors.dtype)
            used = factors * counted[None]
            more = clipped_sum.weighted_sums(gradients, used, groups, leaves)
            sums = [total + one for total, one in zip(sums, more, strict=True)]
            return sums, (f + moved, factors, norms)

        zeros = [jnp.zeros_like(wide(leaf)) for leaf in leaves]
        sums, (outputs, *by_group) = lax.scan(batch, zeros, _batches(n, self.batch_size))
        factors, norms = (jnp.moveaxis(v, 1, 0).reshape(groups.size, -1)[:, :n] for v in by_group)
        return (
            jax.tree.unflatten(treedef, sums),
            outputs.reshape(-1, outputs.shape[-1])[:n],
            factors,
            norms,
        )

    def velocity(self, state: Params, weights: Array | None = None) -> Params:
        """Time derivative of the parameters; for a batch if samples have ``weights``."""
        return self.velocity_and_norms(state, weights)[0]

    def velocity_and_norms(
        self, state: Params, weights: Array | None = None
    ) -> tuple[Params, Float[Array, "R n"]]:
        """The same, and the norms of all samples' gradients by group (flat: R = 1)."""
        clipped, _, _, norms = self._clip(state, weights)
        scale = -1.0 / self.data.divisor
        velocity = jax.tree.map(lambda g, d: (scale * g).astype(d.dtype), clipped, state)
        if self.public is not None:
            velocity = self.public.mixed(velocity, self._public_velocity(self.public, state))
        return velocity, norms

    def _public_velocity(self, public: PublicRows, displacement: Params) -> Params:
        """Minus the gradient of the reduced loss of the public samples."""
        f, moved = self._push(self.params, public.x, displacement)
        _, pull = jax.vjp(lambda params: self.apply_fn(params, public.x), self.params)
        a = public.output_gradient(self.loss, f + moved, self.reduction)
        velocity: Params = pull((-a).astype(f.dtype))[0]
        return velocity

    def gradient_norm(
        self,
        state: Params,
        weights: Float[Array, " n"] | None,
        drift: Params,
        noise: Params | None = None,
        noise_square: ScalarLike = 0.0,
    ) -> Float[Array, ""]:
        """Norm of the gradient with its noise, which the velocity is but for its sign."""
        return of_all(drift if noise is None else jax.tree.map(jnp.add, drift, noise))

    def losses_along(self, state: Params, direction: Params) -> Callable[[Array], Array]:
        """Losses of the training samples ``(n,)`` as a function of the way along a direction."""
        outputs = self._outputs(self.x, state)
        _, change = self._moved(self.x, direction)
        return lambda way: self.loss(outputs + way * change, self.targets)

    @property
    def n_terms(self) -> int:
        """Groups that clipping tells apart: 1 flat, R layerwise."""
        return self.weight_groups().size

    def measure(self, state: Params, outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction of the linearised model at a displacement."""
        _, train, factors, _ = self._clip(state)
        test = None if self.test_x is None else self._outputs(self.test_x, state)
        return self.data.measure(train, test, _clipping.clip_fraction(factors), outputs)

    def _outputs(self, x: Array, displacement: Params) -> Array:
        f, moved = self._moved(x, displacement)
        return f + moved

    def _moved(self, x: Array, displacement: Params) -> tuple[Array, Array]:
        """Outputs where the model is linearised, and how far a displacement moves them."""

        def batch(index: Array) -> tuple[Array, Array]:
            rows = jnp.minimum(index, x.shape[0] - 1)
            return self._push(self.params, x[rows], displacement)

        f, moved = lax.map(batch, _batches(x.shape[0], self.batch_size))
        k = f.shape[-1]
        return f.reshape(-1, k)[: x.shape[0]], moved.reshape(-1, k)[: x.shape[0]]


def _batches(n: int, batch_size: int) -> Array:
    """Numbers of the samples in batches of one size; those from n on fill up the last."""
    n_batches = -(-n // batch_size)
    size = -(-n // n_batches)
    return jnp.arange(n_batches * size).reshape(n_batches, size)


def _samples_within_budget(apply_fn: ApplyFn, params: Params, x: Array, n_outputs: int) -> int:
    def factors(x: Array, a: Array) -> list[per_sample.Factor]:
        return clipped_sum.gradients(apply_fn, params, x, lambda f, a: a.astype(f.dtype), a)[1]

    dtype = jnp.result_type(*jax.tree.leaves(params))
    sample = jax.eval_shape(factors, x[:1], jax.ShapeDtypeStruct((1, n_outputs), dtype))
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(sample))
    return memory.samples_at_once(size)
