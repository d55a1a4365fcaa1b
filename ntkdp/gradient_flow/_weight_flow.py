"""The exact flow of the weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkdp import clipping as _clipping
from ntkdp._backend import devices, validate
from ntkdp._backend.types import ApplyFn, Array, ArrayLike, Float, Params, PyTree
from ntkdp._gradients import clipped_sum
from ntkdp._gradients import groups as _groups
from ntkdp._gradients.check_model import check_inputs, check_preconditioner
from ntkdp._results.setup import Setup
from ntkdp.clipping import ClippingRule
from ntkdp.gradient_flow._flow import TrainingFlow, setup_of
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.trajectory import Measurement, PublicRows, TrainingSet, as_samples, check_public


class WeightFlow(TrainingFlow):
    r"""Exact clipped gradient flow in weight space, :math:`\dot w = -\tfrac1n \sum_i C_i g_i`.

    With a preconditioner M (its diagonal), :math:`\dot w = -\tfrac1n M^{-1} \sum_i C_i g_i`.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, x) -> (n, K)``.
    x, targets : array
        Training inputs ``(n, ...)`` and targets as the loss wants them.
    loss, clipping, reduction
        As for :class:`KernelFlow`.
    groups : pytree prefix of labels, or callable from key path to label, optional
        Groups of layerwise clipping; by default the layers.
    test_x, test_targets : array, optional
        Measured along the way.
    public : PublicRows, optional
        Public samples, as for ``dp_sgd.run``.
    preconditioner : pytree, optional
        Diagonal of M in the shape of the parameters, positive.
    mesh : jax.sharding.Mesh, optional
        Devices over which the training samples are spread; their number must divide over them.

    Raises
    ------
    ValueError
        As for :class:`KernelFlow`; a model that couples the samples of a batch.

    Notes
    -----
    Bu et al. (2023).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.WeightFlow(lambda w, x: x @ w, jnp.ones((1, 1)), jnp.zeros((1, 1)),
    ...                         ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0))
    >>> flow.velocity(flow.init(jnp.array([[3.0]]))).tolist()
    [[-1.0]]
    """

    apply_fn: ApplyFn
    x: Array
    data: TrainingSet
    groups: PyTree
    test_x: Array | None
    public: PublicRows | None
    preconditioner: Params | None
    mesh: Mesh | None = eqx.field(static=True)

    def __init__(
        self,
        apply_fn: ApplyFn,
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
        preconditioner: Params | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.apply_fn = apply_fn
        x = as_samples(x=x)
        self.mesh = mesh = devices.as_mesh(mesh)
        devices.check_divides(mesh, x=x.shape[0])
        self.x = devices.spread(mesh, x)
        test_x = None if test_x is None else as_samples(test_x=test_x)
        self.test_x = devices.everywhere(mesh, test_x)
        data = TrainingSet(targets, loss, clipping, reduction, test_targets)
        data = data.fit(x.shape[0], None if test_x is None else test_x.shape[0], None)
        self.data = data.place(mesh, spread=True)
        public = check_public(public)
        public = public.fit(data.loss, None) if public is not None and public.counts else None
        self.public = devices.everywhere(mesh, public)
        self.groups = groups
        self.preconditioner = devices.everywhere(mesh, preconditioner)

    def setup(self) -> Setup:
        """The training that it predicts, for comparisons."""
        optimizer = "sgd" if self.preconditioner is None else "preconditioned"
        return setup_of(self.clipping, self.loss, self.reduction, optimizer, self.public)

    def init(self, initial: Params) -> Params:
        """The state at initial parameters."""
        initial = validate.parameters(initial=initial)
        params = devices.everywhere(self.mesh, jax.tree.map(jnp.asarray, initial))
        self.clipping.check_groups(self._resolve(params).size)
        x = check_inputs(self.apply_fn, params, self.x)
        if self.test_x is not None:
            check_inputs(self.apply_fn, params, self.test_x, "test_x")
        n_outputs = jax.eval_shape(self.apply_fn, params, x).shape[1]
        self.data.check_outputs(n_outputs)
        if self.public is not None:
            check_inputs(self.apply_fn, params, self.public.x, "public.x")
            self.public.fit(self.loss, n_outputs)
        if self.preconditioner is not None:
            check_preconditioner(params, self.preconditioner)
        return params

    def _resolve(self, params: Params) -> _groups.Groups:
        if self.clipping.scope == "flat":
            return _groups.resolve(params, lambda path: "all")
        return _groups.resolve(params, self.groups)

    def _clipped_sum(self, params: Params) -> tuple[Params, Array, Array, Array]:
        """``sum_i C_i g_i``, outputs, and factors and norms ``(R, n)`` (flat: R = 1)."""
        over_devices = devices.over_samples(
            self._of_device, self.mesh, (None, 0, 0), (None, 0, 1, 1)
        )
        return over_devices(params, self.x, self.targets)

    def _of_device(
        self, params: Params, x: Array, targets: Array
    ) -> tuple[Params, Array, Array, Array]:
        clipped = clipped_sum.clipped_sum(
            self.apply_fn,
            self.loss,
            self.clipping,
            self._resolve(params),
            params,
            x,
            targets,
            None,
            lambda leaves: devices.total(self.mesh, leaves),
        )
        summed = devices.total(self.mesh, clipped.leaves)
        total = jax.tree.unflatten(jax.tree.structure(params), summed)
        return total, clipped.outputs, clipped.factors, clipped.norms

    def velocity(self, state: Params) -> Params:
        """Time derivative of the parameters."""
        return self.velocity_and_norms(state)[0]

    def velocity_and_norms(self, state: Params) -> tuple[Params, Float[Array, "R n"]]:
        """The same, and the norms of the gradients by group (flat: R = 1)."""
        clipped, _, _, norms = self._clipped_sum(state)
        scale = -1.0 / self.data.divisor
        drift = jax.tree.map(lambda g: scale * g, clipped)
        if self.public is not None:
            drift = self.public.mixed(drift, self._public_velocity(self.public, state))
        if self.preconditioner is None:
            return jax.tree.map(lambda v, w: v.astype(w.dtype), drift, state), norms
        velocity = jax.tree.map(
            lambda v, m, w: (v / m).astype(w.dtype), drift, self.preconditioner, state
        )
        return velocity, norms

    def _public_velocity(self, public: PublicRows, params: Params) -> Params:
        """Minus the gradient of the reduced loss of the public samples."""
        outputs, pull = jax.vjp(lambda params: self.apply_fn(params, public.x), params)
        velocity: Params = pull(-public.output_gradient(self.loss, outputs, self.reduction))[0]
        return velocity

    def measure(self, state: Params, outputs: bool) -> Measurement:
        """Losses, accuracies and clip fraction at parameters."""
        _, train, factors, _ = self._clipped_sum(state)
        test = None if self.test_x is None else self.apply_fn(state, self.test_x)
        return self.data.measure(train, test, _clipping.clip_fraction(factors), outputs)
