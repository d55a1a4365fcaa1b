"""DP training of an infinitely wide network, whose kernel noise moves."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkdp import clipping as _clipping
from ntkdp._backend import devices, memory, norms, validate
from ntkdp._backend.types import Array, ArrayLike, Float, PyTree, common_dtype
from ntkdp._results.setup import Setup
from ntkdp.clipping import ClippingRule
from ntkdp.gradient_flow import setup_of
from ntkdp.losses import Loss, Reduction
from ntkdp.models import Model, WeightLaw
from ntkdp.ntk import TwoTimeKernel, check_two_time, under_laws
from ntkdp.trajectory import HasTrainingSet, Measurement, TrainingSet

#: The covariance of outputs and the terms of the tangent kernel between two times, of a model.
_KernelBetween: TypeAlias = Callable[..., tuple[Array, dict[str, Array]]]


class TwoTimeFlow(HasTrainingSet):
    r"""Clipped training of an infinitely wide network under noise.

    .. math::
        f_t = g_t - \frac1n \int_0^t \sum_r \Theta_r(t, s)\, C_{ir}(s)\, a(s)\, ds,
        \qquad g \sim GP(0, \Sigma(t, s) \otimes I_K),

    with the kernels between times of :func:`ntkdp.two_time_kernel`. Noise on every weight moves
    the kernel however wide the network is; the drift of the weights does not.

    Parameters
    ----------
    model : Model
        A model whose layers are known: :func:`ntkdp.models.mlp`, ``cnn`` or ``serial``. See
        :func:`ntkdp.two_time_kernel` for the layers that there are.
    x : array
        Training inputs ``(n, ...)``.
    targets : array
        Targets as the loss takes them.
    loss : Loss or callable
        One of :mod:`ntkdp.losses`, or a function of one sample's outputs and target.
    clipping : ClippingRule
        One of :mod:`ntkdp.clipping` except `Batch`; with ``scope="layerwise"`` a group is a layer.
    reduction : {"mean", "sum"}
        Loss and drift are averaged over samples, or summed (the paper's form).
    test_x : array, optional
        Test inputs ``(m, ...)``.
    test_targets : array, optional
        Targets of the test inputs, needed for a test loss.
    frozen : bool
        Keep the kernels of the start, :math:`\Theta(0, 0)` and
        :math:`\Sigma(0, 0) + \min(v_t, v_s) \Theta(0, 0)`: the first order in the variance, for
        comparison.
    mesh : jax.sharding.Mesh, optional
        Devices that share the rows of all kernels and covariances; n and m must divide over them.

    Raises
    ------
    ValueError, TypeError
        If the model has no kernels between times, shapes do not fit, the rule couples samples, or
        the numbers of samples do not divide over the mesh.

    Notes
    -----
    *Derived*; see :func:`ntkdp.two_time_kernel`. Draw runs with
    :func:`ntkdp.stochastic_flow.two_time_ensemble`, or in the limit of small steps with
    :func:`ntkdp.stochastic_flow.two_time_flow`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> model = ntkdp.models.mlp([16], 1)
    >>> flow = ntkdp.stochastic_flow.TwoTimeFlow(
    ...     model, jnp.eye(3), jnp.zeros(3), ntkdp.losses.SquaredError(),
    ...     ntkdp.clipping.Abadi(1.0))
    >>> flow.names
    ('0', '2')
    """

    points: Array
    data: TrainingSet
    #: The kernels of the start between all points, if they are kept.
    start: TwoTimeKernel | None
    model: Model = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    n_outputs: int = eqx.field(static=True)
    frozen: bool = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    def __init__(
        self,
        model: Model,
        x: ArrayLike,
        targets: ArrayLike,
        loss: Loss | Callable[[Array, Array], Array],
        clipping: ClippingRule,
        *,
        reduction: Reduction = "mean",
        test_x: ArrayLike | None = None,
        test_targets: ArrayLike | None = None,
        frozen: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        self.mesh = mesh = devices.as_mesh(mesh)
        data = TrainingSet(targets, loss, clipping, reduction, test_targets)
        if clipping.needs_total_norm:
            raise ValueError(
                f"clipping must treat each sample by itself, got {clipping!r}; without noise, "
                "recursion on a KernelFlow of infinite_ntk follows it"
            )
        x = _inputs(x, None, "x")
        devices.check_divides(mesh, x=x.shape[0])
        self.model, self.frozen = model, bool(frozen)
        self.names = check_two_time(model, x)
        clipping.check_groups(len(self.names))
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        self.n_outputs = jax.eval_shape(model.apply, params, x).shape[1]
        points, n_test = x, None
        if test_x is not None:
            test_x = _inputs(test_x, x, "test_x")
            devices.check_divides(mesh, test_x=test_x.shape[0])
            points, n_test = jnp.concatenate([x, test_x]), test_x.shape[0]
        self.points = devices.everywhere(mesh, points)
        data = data.fit(x.shape[0], n_test, self.n_outputs).in_precision(points.dtype)
        self.data = data.place(mesh, spread=False)
        self.start = None
        if self.frozen:
            shape = (len(self.names) + 1, *2 * self.points.shape[:1])
            memory.require(
                devices.bytes_on_host(mesh, math.prod(shape) * self.points.dtype.itemsize),
                f"the kernels of the start of shape {shape}",
                "use fewer samples or float32",
            )
            none = jnp.zeros((), self.points.dtype)
            law = devices.everywhere(mesh, WeightLaw(none, none, none))
            points = self.points
            self.start = _compiled(self._kernel, self.names, points, points, law, mesh)

    def setup(self) -> Setup:
        """What training it predicts, for comparisons; noise and sampling are those of its runs."""
        return replace(setup_of(self.clipping, self.loss, self.reduction), neglects=())

    @property
    def n_samples(self) -> int:
        """Training samples n."""
        return self.data.n_samples

    @property
    def n_terms(self) -> int:
        """Terms of the kernel that clipping tells apart: 1 flat, R layerwise."""
        return 1 if self.clipping.scope == "flat" else len(self.names)

    def initial(self, initial: PyTree) -> Float[Array, "N K"] | None:
        """Initial outputs of all points, checked; None stands for random ones."""
        if initial is None:
            return None
        pair = isinstance(initial, tuple | list)
        n, n_points = self.n_samples, self.points.shape[0]
        if pair != (n_points > n):
            raise ValueError(
                "initial must be a (train, test) pair of outputs with test_x, one array (n, K) "
                f"without, or None for random ones, got {'a pair' if pair else 'one array'}"
            )
        parts = [jnp.asarray(part) for part in (initial if pair else (initial,))]
        for part, rows in zip(parts, (n, n_points - n), strict=False):
            if part.shape != (rows, self.n_outputs):
                raise ValueError(
                    f"initial must have outputs of shape {(rows, self.n_outputs)}, got {part.shape}"
                )
        outputs = jnp.concatenate(parts)
        finite: Array = validate.finite(initial=outputs.astype(self.points.dtype))
        return devices.everywhere(self.mesh, finite)

    @property
    def _kernel(self) -> _KernelBetween:
        assert self.model.two_time is not None
        return self.model.two_time.kernel

    def _under(self, x: Array, law: WeightLaw) -> TwoTimeKernel:
        return _in_precision(self._kernel, self.names, self.points, x, law, self.mesh)

    def covariance(self, law: WeightLaw) -> Float[Array, "N N"]:
        """Covariance of the undriven outputs of all points, for laws ``(R,)`` of the weights."""
        if self.start is None:
            return self._under(self.points, law).nngp
        start = self.start
        return start.nngp + jnp.tensordot(law.between, start.ntk.values, axes=1)

    def response(self, law: WeightLaw, scales: Float[Array, " R"]) -> Float[Array, "N N"]:
        """Covariance of the first order of the outputs in a change of the weights.

        The change has the variances ``scales`` by layer.
        """
        whole = self._under(self.points, law) if self.start is None else self.start
        return jnp.tensordot(scales, whole.ntk.values, axes=1)

    def drive(self, law: WeightLaw) -> Float[Array, "T N n"]:
        """Tangent kernel of all points with the training points, by the terms of clipping."""
        n = self.n_samples
        if self.start is None:
            terms = self._under(self.points[:n], law).ntk.values
        else:
            terms = self.start.ntk.values[:, :, :n]
        return jnp.sum(terms, 0, keepdims=True) if self.clipping.scope == "flat" else terms

    def clipped(
        self, outputs: Float[Array, "n K"], diagonal: Float[Array, "T n"]
    ) -> tuple[Float[Array, "T n K"], Array]:
        """Clipped output gradients by term, over the divisor of the reduction; and the factors."""
        a = self.loss.output_gradient(outputs, self.targets)
        factors = self.clipping.by_group(norms.through_kernel(diagonal, a))
        weighted = factors[:, :, None] * a[None]
        return weighted / self.data.divisor, factors

    def measure(
        self, outputs: Float[Array, "N K"], factors: Array, keep_outputs: bool
    ) -> Measurement:
        """Losses, accuracies and clip fraction at outputs of all points."""
        n = self.n_samples
        test = outputs[n:] if self.points.shape[0] > n else None
        clip_fraction = _clipping.clip_fraction(factors)
        return self.data.measure(outputs[:n], test, clip_fraction, keep_outputs)


def _in_precision(
    kernel: _KernelBetween,
    names: tuple[str, ...],
    points: Array,
    x: Array,
    law: WeightLaw,
    mesh: Mesh | None,
) -> TwoTimeKernel:
    """Kernels between times, from neural-tangents' highest precision to that of the points."""
    highest = under_laws(kernel, names, points, x, law, mesh)
    kernels: TwoTimeKernel = jax.tree.map(lambda leaf: leaf.astype(points.dtype), highest)
    return kernels


_compiled = eqx.filter_jit(_in_precision)


def _inputs(x: ArrayLike, like: Array | None, name: str) -> Array:
    x = jnp.asarray(x)
    x = x.astype(common_dtype(x, np.float32))
    if x.ndim < 2 or x.shape[0] == 0 or (like is not None and x.shape[1:] != like.shape[1:]):
        samples = "(n, ...)" if like is None else f"(m, {', '.join(map(str, like.shape[1:]))})"
        raise ValueError(f"{name} must have shape {samples} and not be empty, got {x.shape}")
    finite: Array = validate.finite(**{name: x})
    return finite
