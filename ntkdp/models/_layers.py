"""Networks of `neural_tangents.stax` layers, with their kernels at infinite width."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import cast

from ntkdp._backend.types import Array, Float, Params, PRNGKeyArray
from ntkdp.models import _noisy_layers, _stax_kernels
from ntkdp.models._model import LayerLaws, Model, TwoTimeRule, checked_model
from ntkdp.models._stax_types import (
    Get,
    KernelFn,
    NamedKernels,
    StaxApplyFn,
    StaxInitFn,
    StaxKernel,
    StaxLayer,
    stax,
)


def serial(*layers: StaxLayer) -> Model:
    """A model of `neural_tangents.stax` layers in a row, with a kernel term for each.

    Parameters
    ----------
    *layers
        Layers ``(init_fn, apply_fn, kernel_fn)``; a block built with `stax.serial` or
        `stax.parallel` counts as one layer and has one term.

    Returns
    -------
    Model
        Its parameters are a list with one entry per layer, as those of `stax.serial`; the groups
        are the entries that hold parameters, named by position: "0", "2", ... .

    Raises
    ------
    TypeError
        If a layer is not a triple of functions.
    ValueError
        If there are no layers. When the layer terms are evaluated, if a single block holds all
        parameters: pass its layers instead.

    Notes
    -----
    The term of layer r is Theta_{>=r} - Theta_{>=r+1}, where Theta_{>=r} is the kernel whose neural
    tangent part is set to zero below layer r: the recursion is linear in that part (*derived* from
    the layer rules of Jacot et al. 2018).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> from neural_tangents import stax
    >>> model = serial(stax.Dense(16), stax.LayerNorm(), stax.Relu(), stax.Dense(2))
    >>> list(model.layer_kernel_fn(jnp.eye(3)))
    ['0', '3']
    """
    if not layers:
        raise ValueError("layers must not be empty, got ()")
    for position, layer in enumerate(layers):
        if not (isinstance(layer, tuple) and len(layer) == 3 and all(map(callable, layer))):
            raise TypeError(
                f"layers[{position}] must be a stax layer (init_fn, apply_fn, kernel_fn), "
                f"got {layer!r}"
            )
    return from_layers(layers)


def from_stax(
    init_fn: StaxInitFn,
    apply_fn: StaxApplyFn,
    kernel_fn: KernelFn | None = None,
) -> Model:
    """A model from the triple of a `neural_tangents.stax` network.

    The layers inside cannot be told apart, so the model has no layer terms: build it with `serial`
    for those.

    Parameters
    ----------
    init_fn
        ``init_fn(key, input_shape) -> (output_shape, params)``.
    apply_fn
        ``apply_fn(params, x)`` returns outputs (n, K) or (n,); random layers (dropout) must be in
        test mode.
    kernel_fn
        The infinite-width kernel, or None.

    Returns
    -------
    Model
        It has ``init`` and ``apply``, and the kernel if there is one.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> from neural_tangents import stax
    >>> model = from_stax(*stax.serial(stax.Dense(16), stax.Relu(), stax.Dense(2)))
    >>> model.kernel_fn(jnp.eye(3), None, "nngp").shape
    (3, 3)
    """
    for name, given in (("init_fn", init_fn), ("apply_fn", apply_fn), ("kernel_fn", kernel_fn)):
        if not callable(given) and not (name == "kernel_fn" and given is None):
            raise TypeError(f"{name} must be a function of a stax network, got {given!r}")
    return checked_model(lambda key, x: init_fn(key, x.shape)[1], apply_fn, kernel_fn)


def from_layers(
    layers: Sequence[StaxLayer], prepare: Callable[[Array], Array] = lambda x: x
) -> Model:
    """`stax.serial(*layers)` on ``prepare(x)``, with layer terms and kernels between times."""
    init_fn, apply_fn, kernel_fn = stax().serial(*layers)
    any_kernel: Callable[..., Array | NamedKernels | StaxKernel] = kernel_fn
    quietly = _warnings_of(layers)

    def pair(x1: Array, x2: Array | None) -> tuple[Array, Array | None]:
        return prepare(x1), None if x2 is None else prepare(x2)

    def init(key: PRNGKeyArray, x: Array) -> Params:
        return init_fn(key, prepare(x).shape)[1]

    def apply(params: Params, x: Array) -> Array:
        return apply_fn(params, prepare(x))

    def kernel(
        x1: Array, x2: Array | None = None, get: Get = None, **options: object
    ) -> Array | NamedKernels | StaxKernel:
        with quietly():
            return any_kernel(*pair(x1, x2), get, **options)

    def positions_of(x: Array) -> list[int]:
        return _stax_kernels.layers_with_parameters(init_fn, prepare(x).shape)

    def layer_kernel(x1: Array, x2: Array | None = None) -> dict[str, Float[Array, "n1 n2"]]:
        with quietly():
            return _stax_kernels.layer_terms(layers, positions_of(x1), *pair(x1, x2))

    def check_two_time(x: Array) -> tuple[str, ...]:
        with quietly():
            _noisy_layers.check(layers, prepare(x).shape)
        return tuple(map(str, positions_of(x)))

    def two_time_kernel(x1: Array, x2: Array, laws: LayerLaws) -> tuple[Array, dict[str, Array]]:
        x1, x2 = prepare(x1), prepare(x2)
        with quietly():
            return _stax_kernels.two_time_terms(layers, positions_of(x1), x1, x2, laws)

    def own_variances(x: Array) -> dict[str, float]:
        with quietly():
            return _noisy_layers.own_variances(layers, positions_of(x), prepare(x).shape)

    two_time = TwoTimeRule(check_two_time, two_time_kernel, own_variances)
    return checked_model(init, apply, cast(KernelFn, kernel), layer_kernel, two_time)


def _warnings_of(layers: Sequence[StaxLayer]) -> Callable[[], AbstractContextManager[None]]:
    """Where kernels are computed: neural-tangents' request to check branches is kept if it is due.

    It asks that parallel branches be independent, which is known of layers that are known.
    """
    independent = all(map(_noisy_layers.branches_are_independent, layers))

    @contextmanager
    def quietly() -> Iterator[None]:
        with warnings.catch_warnings():
            if independent:
                warnings.filterwarnings("ignore", "`FanIn` layers assume independent", UserWarning)
            yield

    return quietly
