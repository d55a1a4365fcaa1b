"""Infinite-width kernels between two times at which noise has moved the weights."""

from typing import NamedTuple, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkdp._backend import devices, validate
from ntkdp._backend.types import Array, ArrayLike, Float, ScalarLike, is_traced
from ntkdp.models import Model, TwoTimeKernelFn, TwoTimeRule, WeightLaw
from ntkdp.ntk._infinite import by_blocks, check_infinite_inputs, check_range, place_inputs
from ntkdp.ntk._layerwise_kernel import LayerwiseKernel


class TwoTimeKernel(NamedTuple):
    r"""Kernels between inputs at one time and inputs at another; a pytree.

    ``ntk`` holds the terms of :math:`\Theta(t, s) = J(w_t) J(w_s)^\top`, values ``(R, n1, n2)``
    meaning :math:`\otimes I_K`, and ``nngp`` ``(n1, n2)`` the covariance :math:`\Sigma(t, s)` of
    the outputs of a network whose weights are its random initial ones plus noise.

    Made by :func:`two_time_kernel`.
    """

    ntk: LayerwiseKernel
    nngp: Float[Array, "n1 n2"]


def two_time_kernel(
    model: Model,
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    variance1: ArrayLike,
    variance2: ArrayLike,
    covariance: ArrayLike | None = None,
    kept1: ScalarLike = 1.0,
    kept2: ScalarLike = 1.0,
    mesh: Mesh | None = None,
) -> TwoTimeKernel:
    r"""Kernels at infinite width between two times of training under noise.

    Noise of covariance :math:`V_{ts}` between times on every weight leaves the weights of a network
    Gaussian. Relative to the own variance :math:`\tau^2` of a layer's initial weights, their
    covariance is

    .. math:: c_{ts} = a_t a_s + V_{ts} / \tau^2,

    with :math:`a_t` the share of the initial weights that weight decay leaves. In NTK
    parameterisation :math:`\tau = 1`. From :math:`\Sigma_{ts} = c_{ts} (W^2 x \cdot x'/d + b^2)`
    and :math:`\Theta_{ts} = W^2 x \cdot x'/d + b^2` the layers give

    .. math::
        \Sigma'_{ts} &= c_{ts} (W^2 E[\phi(u) \phi(v)] + b^2), \\
        \Theta'_{ts} &= W^2 E[\phi(u) \phi(v)] + b^2
                        + W^2 c_{ts} E[\phi'(u) \phi'(v)] \Theta_{ts},

    with (u, v) Gaussian of covariances :math:`\Sigma_{tt}, \Sigma_{ts}, \Sigma_{ss}`. In standard
    parameterisation, :math:`\tau^2 = W^2 / N` for the weights of a layer with N inputs and
    :math:`b^2` for its biases: noise of variance v counts N v / W^2 there, and

    .. math::
        \Sigma'_{ts} &= (W^2 a_t a_s + N V_{ts})\, E[\phi(u) \phi(v)] + b^2 a_t a_s + V_{ts}, \\
        \Theta'_{ts} &= N\, E[\phi(u) \phi(v)] + 1
                        + (W^2 a_t a_s + N V_{ts})\, E[\phi'(u) \phi'(v)] \Theta_{ts}.

    Parameters
    ----------
    model : Model
        A model that knows its layers: :func:`ntkdp.models.mlp`, ``cnn`` or ``serial``. Dense and
        convolutional layers, in NTK or standard parameterisation, one after the other or in
        parallel, with any layers without parameters: activations, LayerNorm, pooling, sums.
    x1, x2 : array
        Inputs ``(n1, ...)`` at the first time and ``(n2, ...)`` at the second; without ``x2``, x1
        at both.
    variance1, variance2 : float or array
        :math:`V_{tt}` and :math:`V_{ss}`, variances of the noise that each weight has gathered, at
        least 0: one number, or one for each layer with parameters ``(R,)``.
    covariance : float or array, optional
        :math:`V_{ts}`, in absolute value at most the root of the variances' product. The default is
        the smaller of the two variances, that of noise which is added and stays: plain SGD.
    kept1, kept2 : float
        :math:`a_t` and :math:`a_s`, 1 without weight decay.
    mesh : jax.sharding.Mesh, optional
        Devices that compute the kernels, each its share of the rows; n1 must divide over them.

    Returns
    -------
    TwoTimeKernel
        The names of its ``ntk`` are those of the model's parameter groups.

    Raises
    ------
    ValueError
        If the model has no such kernels, where the message names the layer; if a variance is
        negative, the covariance is too large, inputs are empty or not finite, n1 does not divide
        over the mesh, or entries are beyond the range of the dtype.
    MemoryError
        If the kernels do not fit.

    Notes
    -----
    *Derived*; for unclipped Langevin training compare the neural dynamical kernel of Avidan, Li
    and Sompolinsky (2023). Lazy drift adds nothing to either kernel at infinite width, which in
    standard parameterisation is the limit of learning rates in proportion to 1/N and of noise with
    N v kept (Sohl-Dickstein et al. 2020 for the kernel without noise). The precision is as in
    :func:`infinite_ntk`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> model = ntkdp.models.mlp([16], 1, activation="erf")
    >>> kernel = ntkdp.two_time_kernel(model, jnp.eye(3), variance1=0.5, variance2=0.0)
    >>> kernel.ntk.names, kernel.nngp.shape
    (('0', '2'), (3, 3))
    """
    x1, x2 = check_infinite_inputs(x1, x2)
    names, rule = check_two_time(model, x1), _rule_of(model)
    v1, v2 = (
        _by_layer(validate.non_negative(**{name: value}), len(names), name)
        for name, value in (("variance1", variance1), ("variance2", variance2))
    )
    between = jnp.minimum(v1, v2)
    if covariance is not None:
        between = _covariance(_by_layer(covariance, len(names), "covariance"), v1, v2)
    kept = tuple(
        jnp.asarray(validate.scalar(**{name: validate.non_negative(**{name: value})}))
        for name, value in (("kept1", kept1), ("kept2", kept2))
    )
    x1, x2, mesh = place_inputs(len(names) + 1, x1, x2, mesh)
    laws = devices.everywhere(mesh, WeightLaw(v1, between, v2, *kept))
    x2 = x1 if x2 is None else x2
    return check_range(_compiled(rule.kernel, names, x1, x2, laws, mesh))


def _covariance(covariance: Array, v1: Array, v2: Array) -> Array:
    """The covariance between times, if there can be such with these variances."""
    too_large = covariance**2 > v1 * v2 * (1 + 1e-6)
    if not is_traced((covariance, v1, v2)):
        if bool(jnp.any(too_large)):
            raise ValueError(
                "covariance must be at most the root of variance1 times variance2, got "
                f"{covariance.tolist()} with {v1.tolist()} and {v2.tolist()}"
            )
        return covariance
    checked: Array = eqx.error_if(
        covariance, too_large, "covariance must be at most the root of variance1 times variance2"
    )
    return checked


def check_two_time(model: Model, x: ArrayLike) -> tuple[str, ...]:
    """Names of the layers with parameters of a ``model`` that takes ``x``.

    An error is raised if the model has no kernels between times.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.ntk.check_two_time(ntkdp.models.mlp([8], 1), jnp.eye(3))
    ('0', '2')
    """
    return _rule_of(model).check(jnp.asarray(x))


def _rule_of(model: Model) -> TwoTimeRule:
    if not isinstance(model, Model) or model.two_time is None:
        raise ValueError(
            f"model must have layers that are known, for kernels between times, got "
            f"{type(model).__name__} without; build it with ntkdp.models.mlp, cnn or serial"
        )
    return model.two_time


def between_times(
    kernel: TwoTimeKernelFn,
    names: tuple[str, ...],
    x1: Array,
    x2: Array,
    v1: Array,
    v2: Array,
    mesh: Mesh | None = None,
) -> TwoTimeKernel:
    """The kernels between ``x1`` and ``x2`` at weight noise ``v1`` and ``v2``, ``(R,)`` by layer.

    ``kernel`` is the one of a model's two-time rule, ``names`` are the names of its layers, and the
    rows are spread over ``mesh``. The noise stays once it is added, as under plain SGD.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> model, x = ntkdp.models.mlp([8], 1), jnp.eye(3)
    >>> names = ntkdp.ntk.check_two_time(model, x)
    >>> v = jnp.full(len(names), 0.1)
    >>> ntkdp.ntk.between_times(model.two_time.kernel, names, x, x, v, v).nngp.shape
    (3, 3)
    """
    return under_laws(kernel, names, x1, x2, WeightLaw(v1, jnp.minimum(v1, v2), v2), mesh)


def under_laws(
    kernel: TwoTimeKernelFn,
    names: tuple[str, ...],
    x1: Array,
    x2: Array,
    laws: WeightLaw,
    mesh: Mesh | None = None,
) -> TwoTimeKernel:
    """The kernels between ``x1`` and ``x2`` under covariances ``(R,)`` of the layers' weights."""
    dtype = jnp.asarray(laws.first).dtype
    by_layer = jnp.stack([jnp.broadcast_to(jnp.asarray(v, dtype), (len(names),)) for v in laws])

    def block(x1: Array, x2: Array, by_layer: Array) -> tuple[Array, dict[str, Array]]:
        return kernel(x1, x2, {name: WeightLaw(*by_layer[:, r]) for r, name in enumerate(names)})

    def rows(x1: Array, x2: Array, by_layer: Array) -> tuple[Array, Array]:
        nngp, terms = by_blocks(block, x1, x2, by_layer)
        return jnp.stack([terms[name] for name in names]), nngp

    over_devices = devices.over_samples(rows, mesh, (0, None, None), (1, 0))
    values, nngp = over_devices(x1, x2, by_layer)
    return TwoTimeKernel(LayerwiseKernel(names, values), nngp)


_compiled = eqx.filter_jit(under_laws)


def _by_layer(variance: ArrayLike, n_layers: int, name: str) -> Array:
    shape = np.shape(cast(Array, variance))
    if shape not in ((), (n_layers,)):
        raise ValueError(
            f"{name} must be one number, or one for each of the {n_layers} layers with "
            f"parameters, got shape {shape}"
        )
    return jnp.broadcast_to(jnp.asarray(variance, jnp.result_type(float)), (n_layers,))
