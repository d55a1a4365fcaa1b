"""DP training of any network, described by what noise and gradients do to its outputs."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from ntkdp import clipping as _clipping
from ntkdp._backend import norms, validate
from ntkdp._backend.types import ApplyFn, Array, ArrayLike, Float, Params, PyTree, common_dtype
from ntkdp._gradients import groups as _groups
from ntkdp._gradients.check_model import check_inputs, check_model
from ntkdp._results.setup import Setup
from ntkdp.clipping import ClippingRule
from ntkdp.gradient_flow import setup_of
from ntkdp.losses import Loss, Reduction, SampleLoss
from ntkdp.trajectory import HasTrainingSet, Measurement, TrainingSet


class ResponseFlow(HasTrainingSet):
    r"""Clipped training of a given network under noise, of any architecture and width.

    The weights are split into a run without noise, the noise alone, and the rest:

    .. math:: w_k = \bar w_k + B_k + \delta_k .

    Here :math:`\bar w + B` descends under noise with the output gradients
    :math:`\bar C \bar a` of the run without it, through its own Jacobian J. To first order in
    :math:`\delta`, which is how the output gradients respond to noise, the outputs are

    .. math::
        f_k = f(\bar w_k + B_k) + \sum_{j < k} h_{kj}\, \Theta(k, j)
              \big[ C_j a_j - \bar C_j \bar a_j \big], \qquad
        \Theta(k, j) = J(\bar w_k + B_k) J(\bar w_j + B_j)^\top,

    with h the response of the optimizer to a gradient, :math:`-\eta / (q n)` for plain steps.
    Nothing is assumed about the architecture, its parameterisation or its width, or about how far
    training moves the kernel along :math:`\bar w`.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, x) -> (n, K)``, one sample independent of another.
    params : pytree
        The initial parameters.
    x, targets : array
        Training inputs ``(n, ...)`` and targets as the loss wants them.
    loss : Loss or callable
        One of :mod:`ntkdp.losses`, or a function of one sample's outputs and target.
    clipping : ClippingRule
        One of :mod:`ntkdp.clipping` except `Batch`, which couples samples.
    groups : pytree prefix of labels, or callable from key path to label, optional
        Groups of layerwise clipping; by default the layers.
    reduction : {"mean", "sum"}
        Loss and drift are averaged over samples, or summed.
    test_x, test_targets : array, optional
        Measured along the way.

    Raises
    ------
    ValueError, TypeError
        As for :func:`ntkdp.dp_sgd.run`; if the rule couples samples.

    Notes
    -----
    *Derived*. Draw runs with :func:`ntkdp.stochastic_flow.response_ensemble`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> flow = ntkdp.stochastic_flow.ResponseFlow(
    ...     lambda w, x: x @ w**2, jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1)),
    ...     ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0))
    >>> flow.n_samples, flow.n_outputs
    (2, 1)
    """

    apply_fn: ApplyFn
    params: Params
    x: Array
    test_x: Array | None
    data: TrainingSet
    groups: PyTree

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
    ) -> None:
        self.apply_fn, self.groups = apply_fn, groups
        self.params = params = jax.tree.map(jnp.asarray, validate.parameters(params=params))
        data = TrainingSet(targets, loss, clipping, reduction, test_targets)
        if clipping.needs_total_norm:
            raise ValueError(
                f"clipping must treat each sample by itself, got {clipping!r}; it has no noise to "
                "respond to, and WeightFlow follows it"
            )
        self.x, outputs = check_model(apply_fn, params, x)
        self.test_x = None
        if test_x is not None:
            self.test_x = check_inputs(apply_fn, params, test_x, "test_x")
        n_test = None if self.test_x is None else self.test_x.shape[0]
        data = data.fit(self.x.shape[0], n_test, outputs.shape[1])
        self.data = data.in_precision(common_dtype(outputs.dtype, jnp.float32))
        clipping.check_groups(self.weight_groups().size)

    def setup(self) -> Setup:
        """What training it predicts, for comparisons; noise and sampling are those of its runs."""
        return replace(setup_of(self.clipping, self.loss, self.reduction), neglects=())

    @property
    def n_samples(self) -> int:
        """Training samples n."""
        return self.x.shape[0]

    @property
    def n_outputs(self) -> int:
        """Outputs K of the network."""
        n_outputs: int = self._seen_outputs.shape[1]
        return n_outputs

    @property
    def _seen_outputs(self) -> jax.ShapeDtypeStruct:
        outputs: jax.ShapeDtypeStruct = jax.eval_shape(self.apply_fn, self.params, self.x)
        return outputs

    @property
    def output_dtype(self) -> jnp.dtype:
        """Precision of the network's outputs."""
        dtype: jnp.dtype = self._seen_outputs.dtype
        return dtype

    @property
    def dtype(self) -> jnp.dtype:
        """Precision of predicted outputs and kernels: that of the network, and single at least."""
        return common_dtype(self.output_dtype, jnp.float32)

    @property
    def points(self) -> Array:
        """Training inputs, and test inputs after them."""
        return self.x if self.test_x is None else jnp.concatenate([self.x, self.test_x])

    def weight_groups(self) -> _groups.Groups:
        """Groups that are clipped apart; flat, all weights are one."""
        if self.clipping.scope == "flat":
            return _groups.resolve(self.params, lambda path: "all")
        return _groups.resolve(self.params, self.groups)

    def outputs(self, params: Params, x: Array) -> Float[Array, "n K"]:
        """Outputs at parameters, in single precision at least."""
        return self.apply_fn(params, x).astype(self.dtype)

    def clipped(
        self,
        outputs: Float[Array, "n K S"],
        blocks: Float[Array, "T n K K"],
        corrections: Float[Array, "T n S"],
    ) -> tuple[Float[Array, "T n K S"], Float[Array, "T n S"]]:
        """Clipped output gradients of S runs, over the divisor of the reduction; and the factors.

        Norms are those of the kernel's blocks of the samples with themselves, times a correction.
        The runs stay the last axis, since to move it takes longer than the work.
        """
        a = jax.vmap(lambda f: self.loss.output_gradient(f, self.targets), -1, -1)(outputs)
        lengths = norms.through_blocks(blocks, a) * corrections
        factors = jax.vmap(self.clipping.by_group, -1, -1)(lengths)
        return factors[:, :, None] * a[None] / self.data.divisor, factors

    def measure(
        self, outputs: Float[Array, "N K S"], factors: Float[Array, "T n S"], keep_outputs: bool
    ) -> Measurement:
        """Losses, accuracies and clip fraction of S runs at their outputs of all points."""
        n = self.n_samples

        def of_run(outputs: Array, factors: Array) -> Measurement:
            test = None if self.test_x is None else outputs[n:]
            clip_fraction = _clipping.clip_fraction(factors)
            return self.data.measure(outputs[:n], test, clip_fraction, keep_outputs)

        measured: Measurement = jax.vmap(of_run, -1)(outputs, factors)
        return measured


def check_response_flow(flow: object) -> ResponseFlow:
    """``flow`` if it is a ResponseFlow."""
    if not isinstance(flow, ResponseFlow):
        raise TypeError(f"flow must be a ResponseFlow, got {type(flow).__name__}; see ensemble")
    return flow
