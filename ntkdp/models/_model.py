"""The class of all models, and the check that their outputs are matrices."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias, final, runtime_checkable

import jax

from ntkdp._backend import compiled, memory, validate
from ntkdp._backend.types import ApplyFn, Array, Float, Outputs, Params, PRNGKeyArray, is_traced
from ntkdp.models._stax_types import KernelFn

InitFn: TypeAlias = Callable[[PRNGKeyArray, Array], Params]
#: ``features(x) -> (n, D)``, of which the outputs of a linear model are linear functions.
Features: TypeAlias = Callable[[Array], Array]
#: ``layer_kernel_fn(x1, x2=None) -> {group name: (n1, n2)}``, in the order of the groups.
LayerKernelFn: TypeAlias = Callable[..., dict[str, Array]]


class WeightLaw(NamedTuple):
    r"""Covariances of a layer's weights between times t and s; a pytree.

    ``first``, ``between`` and ``second`` are the covariances :math:`V_{tt}, V_{ts}, V_{ss}` of the
    noise on each weight, ``kept_first`` and ``kept_second`` the shares :math:`a_t, a_s` of the
    initial weights that are left.
    """

    first: Float[Array, ""] | float
    between: Float[Array, ""] | float
    second: Float[Array, ""] | float
    kept_first: Float[Array, ""] | float = 1.0
    kept_second: Float[Array, ""] | float = 1.0


#: The laws of all layers with parameters, by name.
LayerLaws: TypeAlias = Mapping[str, WeightLaw]
#: ``kernel(x1, x2, laws)``: covariance of the outputs, and terms of the tangent kernel.
TwoTimeKernelFn: TypeAlias = Callable[[Array, Array, LayerLaws], tuple[Array, dict[str, Array]]]


class TwoTimeRule(NamedTuple):
    """Infinite-width kernels between times at which noise has been added to the weights.

    ``check(x)`` raises unless the layers have such kernels, and returns the names of the layers
    with parameters. ``kernel(x1, x2, laws)`` returns the covariance of the outputs ``(n1, n2)`` and
    the terms ``{name: (n1, n2)}`` of the tangent kernel, for the laws of the weights of each layer.
    ``own_variances(x)`` are the variances of the initial weights of each layer, of a layer that is
    made of others the least.
    """

    check: Callable[[Array], tuple[str, ...]]
    kernel: TwoTimeKernelFn
    own_variances: Callable[[Array], dict[str, float]]


@runtime_checkable
class HasKernel(Protocol):
    """A model of any class that has an infinite-width kernel."""

    @property
    def kernel_fn(self) -> Callable[..., Array] | None:
        """``kernel_fn(x1, x2, "ntk") -> (n1, n2)``, as that of `Model`."""
        ...


@runtime_checkable
class HasLayerKernels(Protocol):
    """A model of any class whose infinite-width kernel is known by layer."""

    @property
    def init(self) -> InitFn:
        """As that of `Model`."""
        ...

    @property
    def layer_kernel_fn(self) -> LayerKernelFn | None:
        """As that of `Model`."""
        ...


@final
@dataclasses.dataclass(frozen=True)
class Model:
    """A network as pure functions of its parameters.

    Attributes
    ----------
    init
        ``init(key, x) -> params``; only the shape of the example batch ``x`` (n, ...) is used.
    apply
        ``apply(params, x) -> outputs``, (n, K). It is hashable, so it can be a static argument of
        ``jit``.
    kernel_fn
        ``kernel_fn(x1, x2, get)`` is the infinite-width kernel in neural-tangents' sense: (n1, n2),
        which means Theta (x) I_K. None for a model without one.
    layer_kernel_fn
        ``layer_kernel_fn(x1, x2) -> {name: term}`` is the infinite-width neural tangent kernel as a
        sum over the layers that have parameters. Each term is (n1, n2), and the names are those of
        the default groups of the parameters. None for a model whose layers are not known.
    two_time
        Kernels between times under noise, or None for a model whose layers are not known.
    features
        ``features(x) -> (n, D)``, for a model whose tangent kernel is
        ``features(x1) features(x2)^T (x) I_K`` at all parameters: a linear head. None for others.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from ntkdp.models import mlp
    >>> model = mlp([32, 32], 3)
    >>> x = jnp.ones((5, 8))
    >>> params = model.init(jax.random.key(0), x)
    >>> model.apply(params, x).shape
    (5, 3)
    >>> model.kernel_fn(x, None, "ntk").shape
    (5, 5)
    >>> list(model.layer_kernel_fn(x))
    ['0', '2', '4']
    """

    init: InitFn
    apply: ApplyFn
    kernel_fn: KernelFn | None = None
    layer_kernel_fn: LayerKernelFn | None = None
    two_time: TwoTimeRule | None = None
    features: Features | None = None


def checked_model(
    init: InitFn,
    apply: ApplyFn,
    kernel_fn: KernelFn | None = None,
    layer_kernel_fn: LayerKernelFn | None = None,
    two_time: TwoTimeRule | None = None,
) -> Model:
    """A `Model` whose outputs are checked to be (n, K), for the first time in ``init``."""

    def checked_apply(params: Params, x: Array) -> Outputs:
        outputs = apply(params, x)
        shape = outputs.shape if isinstance(outputs, jax.Array) else type(outputs)
        if shape == (x.shape[0],):
            return outputs[:, None]
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != x.shape[0]:
            raise ValueError(
                f"the outputs of a model must be of shape (n, K) or (n,) with n = {x.shape[0]} "
                f"samples, got {shape} for inputs of shape {x.shape}"
            )
        return outputs

    def checked_init(key: PRNGKeyArray, x: Array) -> Params:
        if len(shape := getattr(x, "shape", ())) < 2:
            raise ValueError(f"x must be a batch of shape (n, ...), got shape {shape}")
        key = validate.key(key=key)
        if not is_traced((key, x)):
            _require_room(_sizes(init, key, x))
        params = init(key, x)
        jax.eval_shape(checked_apply, params, x)
        return params

    return Model(checked_init, checked_apply, kernel_fn, layer_kernel_fn, two_time)


def _sizes(init: InitFn, key: PRNGKeyArray, x: Array) -> Params:
    """Shapes and dtypes of the parameters, or None if JAX cannot follow how they are made."""
    try:
        return jax.eval_shape(init, key, x)
    except Exception:  # any error of the model: it is raised again when the model is called
        return None


def _require_room(params: Params) -> None:
    """Raise unless parameters fit, and the random numbers that the largest is made from."""
    leaves = jax.tree.leaves(params)
    largest = max(map(compiled.bytes_of, leaves), default=0)
    memory.require(
        compiled.bytes_of(params) + largest,
        f"a network of {sum(leaf.size for leaf in leaves):,} parameters",
        "use smaller widths or float32",
    )
