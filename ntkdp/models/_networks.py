"""Fully connected and convolutional networks, and stax networks of layers of their own."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

from ntkdp._backend.types import Array, Float, Params, PRNGKeyArray
from ntkdp._backend.validate import choice, count, non_negative, positive
from ntkdp.models import _stax_kernels
from ntkdp.models._model import Covariances, Model, TwoTimeRule, checked_model
from ntkdp.models._stax_types import (
    Get,
    KernelFn,
    NamedKernels,
    Parameterization,
    Scales,
    StaxApplyFn,
    StaxInitFn,
    StaxKernel,
    StaxLayer,
    stax,
)

#: Weight scale that keeps the second moment 1 through the activation: W_std^2 E[phi(z)^2] = 1.
_UNIT_GAIN = {
    "relu": math.sqrt(2.0),
    "gelu": (1 / 3 + 1 / (2 * math.sqrt(3) * math.pi)) ** -0.5,
    "erf": (2 / math.pi * math.asin(2 / 3)) ** -0.5,
    "sin": ((1 - math.exp(-2)) / 2) ** -0.5,
    "identity": 1.0,
}


def _activation(name: str) -> StaxLayer:
    nonlinear = stax()
    layers = {
        "relu": nonlinear.Relu,
        "gelu": nonlinear.Gelu,
        "erf": nonlinear.Erf,
        "sin": nonlinear.Sin,
        "identity": nonlinear.Identity,
    }
    return layers[name]()


def _scales(
    activation: str,
    W_std: float | None,
    b_std: float | None,
    output_W_std: float,
    parameterization: Parameterization,
) -> tuple[Scales, Scales]:
    """Checked keyword arguments of the hidden layers and of the last one."""
    choice(_UNIT_GAIN, activation=activation)
    choice(("ntk", "standard"), parameterization=parameterization)
    hidden = Scales(
        W_std=_UNIT_GAIN[activation] if W_std is None else positive(W_std=W_std),
        b_std=None if b_std is None else non_negative(b_std=b_std),
        parameterization=parameterization,
    )
    return hidden, {**hidden, "W_std": positive(output_W_std=output_W_std)}


def mlp(
    widths: Sequence[int],
    n_outputs: int,
    *,
    activation: str = "relu",
    W_std: float | None = None,
    b_std: float | None = 0.1,
    output_W_std: float = 1.0,
    parameterization: Parameterization = "ntk",
) -> Model:
    r"""A fully connected network, ``Dense, activation, ..., Dense``; inputs are flattened.

    With ``parameterization="ntk"`` a layer with N inputs is

    .. math::
        z = \frac{\sigma_W}{\sqrt{N}} W x + \sigma_b b, \quad W_{ij}, b_i \sim \mathcal N(0, 1),

    and its kernel has a limit as the widths grow. With ``"standard"`` it is :math:`z = W x + b`,
    :math:`W_{ij} \sim \mathcal N(0, \sigma_W^2 / N)`, :math:`b_i \sim \mathcal N(0, \sigma_b^2)`:
    the same function at the start, but its kernel **grows with the widths**. The term of a layer's
    weights is :math:`N / \sigma_W^2` times the one in NTK parameterisation, that of its biases
    :math:`1 / \sigma_b^2` times. Stable learning rates shrink accordingly, as 1/N.

    Parameters
    ----------
    widths
        Units of each hidden layer; an empty sequence is the linear model.
    n_outputs
        K, outputs of the network.
    activation
        "relu", "gelu", "erf", "sin" or "identity"; for another, build the layers and use `serial`.
    W_std
        :math:`\sigma_W` of the hidden layers. By default, the one that keeps the second moment of
        the activations at 1: sqrt(2) for "relu".
    b_std
        :math:`\sigma_b` of every layer; None means no biases.
    output_W_std
        :math:`\sigma_W` of the last layer.
    parameterization
        "ntk" or "standard".

    Returns
    -------
    Model
        With parameters as in `serial`: groups "0", "2", "4", ... for the dense layers.

    Raises
    ------
    ValueError
        Unknown activation or parameterization, a width or scale that is not positive.

    References
    ----------
    Jacot, Gabriel, Hongler, *Neural Tangent Kernel*, 2018 (NTK parameterisation); Sohl-Dickstein et
    al., *On the infinite width limit of neural networks with a standard parameterization*, 2020.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> model = mlp([64, 64], 10, activation="gelu")
    >>> x = jnp.ones((4, 8, 8))
    >>> model.apply(model.init(jax.random.key(0), x), x).shape
    (4, 10)
    """
    _check_sizes(widths=widths)
    count(n_outputs=n_outputs)
    hidden, output = _scales(activation, W_std, b_std, output_W_std, parameterization)
    dense = stax().Dense
    layers: list[StaxLayer] = []
    for width in widths:
        layers += [dense(width, **hidden), _activation(activation)]
    layers.append(dense(n_outputs, **output))
    return _from_layers(layers, _flatten)


def cnn(
    channels: Sequence[int],
    n_outputs: int,
    *,
    kernel_size: int | tuple[int, int] = 3,
    strides: int | tuple[int, int] = 1,
    padding: Literal["SAME", "VALID", "CIRCULAR"] = "SAME",
    pooling: Literal["none", "average", "global"] = "none",
    activation: str = "relu",
    W_std: float | None = None,
    b_std: float | None = 0.1,
    output_W_std: float = 1.0,
    parameterization: Parameterization = "ntk",
) -> Model:
    """A convolutional network, ``Conv, activation, ..., Dense``, on images (n, height, width, C).

    Scales and parameterisations are those of `mlp`, with N = kernel height x kernel width x input
    channels.

    Parameters
    ----------
    channels
        Channels of each convolution, at least one.
    n_outputs
        K, outputs of the network.
    kernel_size, strides
        Of every convolution: one number or (height, width).
    padding
        "SAME", "VALID" or "CIRCULAR", of every convolution.
    pooling
        "none": flatten before the last layer. "average": also a 2 x 2 average pooling after every
        activation. "global": average over all positions instead of flattening. With pooling the
        infinite-width kernel needs all pairs of positions: memory n^2 (height width)^2.
    activation, W_std, b_std, output_W_std, parameterization
        As in `mlp`.

    Returns
    -------
    Model
        With the infinite-width kernel.

    Raises
    ------
    ValueError
        Unknown names, sizes or scales that are not positive, images that are not of rank 4.

    References
    ----------
    Novak et al., *Bayesian deep convolutional networks with many channels are Gaussian processes*,
    2019; Garriga-Alonso et al. 2019; Arora et al., *On exact computation with an infinitely wide
    neural net*, 2019.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> model = cnn([8, 8], 10, pooling="global")
    >>> x = jnp.ones((4, 8, 8, 1))
    >>> model.apply(model.init(jax.random.key(0), x), x).shape
    (4, 10)
    """
    _check_sizes(channels=channels)
    if not channels:
        raise ValueError(f"channels must name at least one convolution, got {channels!r}; see mlp")
    count(n_outputs=n_outputs)
    choice(("none", "average", "global"), pooling=pooling)
    choice(("SAME", "VALID", "CIRCULAR"), padding=padding)
    window = _pair(kernel_size=kernel_size)
    step = _pair(strides=strides)
    hidden, output = _scales(activation, W_std, b_std, output_W_std, parameterization)
    linear = stax()
    layers: list[StaxLayer] = []
    for n_channels in channels:
        layers.append(linear.Conv(n_channels, window, step, padding, **hidden))
        layers.append(_activation(activation))
        if pooling == "average":
            layers.append(linear.AvgPool((2, 2), strides=(2, 2)))
    layers.append(linear.GlobalAvgPool() if pooling == "global" else linear.Flatten())
    layers.append(linear.Dense(n_outputs, **output))

    def images(x: Array) -> Array:
        if x.ndim != 4:
            raise ValueError(
                f"x must be images of shape (n, height, width, channels), got shape {x.shape}"
            )
        size = x.shape[1:3]
        for _ in channels:
            if padding == "VALID":
                size = tuple(s - w + 1 for s, w in zip(size, window, strict=True))
            size = tuple(-(-s // by) for s, by in zip(size, step, strict=True))
            if pooling == "average":
                size = tuple(s // 2 for s in size)
            if min(size) < 1:
                raise ValueError(
                    f"x must be larger images, got shape {x.shape}: with {padding=}, {pooling=} "
                    f"and strides {step}, {len(channels)} convolutions leave no position"
                )
        return x

    return _from_layers(layers, images)


def serial(*layers: StaxLayer) -> Model:
    """Layers of `neural_tangents.stax` one after the other, with a kernel term for each.

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
        If there are no layers. On evaluating the layer terms: if a single block holds all
        parameters (pass its layers instead).

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
    return _from_layers(layers)


def from_stax(
    init_fn: StaxInitFn,
    apply_fn: StaxApplyFn,
    kernel_fn: KernelFn | None = None,
) -> Model:
    """The triple of a `neural_tangents.stax` network.

    The layers inside cannot be told apart, so the model has no layer terms: build it with `serial`
    for those.

    Parameters
    ----------
    init_fn
        ``init_fn(key, input_shape) -> (output_shape, params)``.
    apply_fn
        ``apply_fn(params, x)``, (n, K) or (n,); random layers (dropout) must be in test mode.
    kernel_fn
        The infinite-width kernel, or None.

    Returns
    -------
    Model
        With ``init`` and ``apply``, and the kernel if there is one.

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


def _check_sizes(**named: Sequence[int]) -> None:
    ((name, sizes),) = named.items()
    if isinstance(sizes, str) or not hasattr(sizes, "__len__"):
        raise TypeError(f"{name} must be a sequence of whole numbers, got {sizes!r}")
    for position, size in enumerate(sizes):
        count(**{f"{name}[{position}]": size})


def _from_layers(
    layers: Sequence[StaxLayer], prepare: Callable[[Array], Array] = lambda x: x
) -> Model:
    """`stax.serial(*layers)` on ``prepare(x)``, with layer terms and kernels between times."""
    init_fn, apply_fn, kernel_fn = stax().serial(*layers)
    any_kernel: Callable[..., Array | NamedKernels | StaxKernel] = kernel_fn

    def pair(x1: Array, x2: Array | None) -> tuple[Array, Array | None]:
        return prepare(x1), None if x2 is None else prepare(x2)

    def init(key: PRNGKeyArray, x: Array) -> Params:
        return init_fn(key, prepare(x).shape)[1]

    def apply(params: Params, x: Array) -> Array:
        return apply_fn(params, prepare(x))

    def kernel(
        x1: Array, x2: Array | None = None, get: Get = None, **options: object
    ) -> Array | NamedKernels | StaxKernel:
        return any_kernel(*pair(x1, x2), get, **options)

    def positions_of(x: Array) -> list[int]:
        return _stax_kernels.layers_with_parameters(init_fn, prepare(x).shape)

    def layer_kernel(x1: Array, x2: Array | None = None) -> dict[str, Float[Array, "n1 n2"]]:
        return _stax_kernels.layer_terms(layers, positions_of(x1), *pair(x1, x2))

    def check_two_time(x: Array) -> tuple[str, ...]:
        positions = positions_of(x)
        _stax_kernels.check_two_time(layers, positions, prepare(x).shape)
        return tuple(map(str, positions))

    def two_time_kernel(
        x1: Array, x2: Array, covariances: Covariances
    ) -> tuple[Array, dict[str, Array]]:
        x1, x2 = prepare(x1), prepare(x2)
        return _stax_kernels.two_time_terms(layers, positions_of(x1), x1, x2, covariances)

    two_time = TwoTimeRule(check_two_time, two_time_kernel)
    return checked_model(init, apply, cast(KernelFn, kernel), layer_kernel, two_time)


def _flatten(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _pair(**named: int | tuple[int, int]) -> tuple[int, int]:
    ((name, value),) = named.items()
    sizes = value if isinstance(value, tuple) else (value, value)
    if len(sizes) != 2:
        raise ValueError(f"{name} must be one number or (height, width), got {value!r}")
    return count(**{name: sizes[0]}), count(**{name: sizes[1]})
