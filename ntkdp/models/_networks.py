"""Fully connected and convolutional networks, and stax networks of layers of their own."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp

from ntkdp._backend.types import Array
from ntkdp._backend.validate import choice, count, non_negative, positive
from ntkdp.models._activations import Activation, layer_of, unit_gain
from ntkdp.models._layers import from_layers
from ntkdp.models._model import Model
from ntkdp.models._stax_types import Parameterization, Scales, StaxLayer, stax

Padding: TypeAlias = Literal["SAME", "VALID", "CIRCULAR"]
Pooling: TypeAlias = Literal["none", "average", "sum", "global", "global_sum"]


def _scales(
    activation: Activation,
    W_std: float | None,
    b_std: float | None,
    output_W_std: float,
    parameterization: Parameterization,
) -> tuple[Scales, Scales]:
    """Checked keyword arguments of the hidden layers and of the last one."""
    gain = unit_gain(activation)
    choice(("ntk", "standard"), parameterization=parameterization)
    hidden = Scales(
        W_std=gain if W_std is None else positive(W_std=W_std),
        b_std=None if b_std is None else non_negative(b_std=b_std),
        parameterization=parameterization,
    )
    return hidden, {**hidden, "W_std": positive(output_W_std=output_W_std)}


def _stack(
    weights: Sequence[StaxLayer],
    activation: Activation,
    layer_norm: bool,
    residual: bool,
    pool: Sequence[StaxLayer] = (),
) -> list[StaxLayer]:
    """The hidden layers, from the first weights to the activation before the last ones."""
    if not weights:
        return []
    combine = stax()
    between = [*([combine.LayerNorm()] if layer_norm else []), layer_of(activation)]
    if not residual:
        return [layer for own in weights for layer in (own, *between, *pool)]
    layers = [weights[0], *pool]
    for own in weights[1:]:
        branches = combine.parallel(combine.serial(*between, own), combine.Identity())
        layers += [combine.serial(combine.FanOut(2), branches, combine.FanInSum()), *pool]
    return layers + between


def mlp(
    widths: Sequence[int],
    n_outputs: int,
    *,
    activation: Activation = "relu",
    layer_norm: bool = False,
    residual: bool = False,
    W_std: float | None = None,
    b_std: float | None = 0.1,
    output_W_std: float = 1.0,
    parameterization: Parameterization = "ntk",
) -> Model:
    r"""A fully connected network, ``Dense, activation, ..., Dense``; inputs are flattened.

    With ``layer_norm`` each activation acts on normalised numbers, ``Dense, LayerNorm, activation,
    ..., Dense``. With ``residual`` each hidden layer but the first is added to its input,
    :math:`h^{l+1} = h^l + \mathrm{Dense}(\varphi(\mathrm{norm}(h^l)))`, and the last layer reads
    :math:`\varphi(\mathrm{norm}(h^L))`.

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
        Units of each hidden layer; an empty sequence is the linear model, see `linear`.
    n_outputs
        K, outputs of the network.
    activation
        "relu", "leaky_relu", "abs", "gelu", "erf", "sin", "cos" or "identity", whose kernels have
        closed forms; "tanh", "sigmoid", "silu", "softplus" or "elu"; or a function of one number,
        such as ``jnp.arctan``, which JAX can differentiate. See the notes for their precision.
    layer_norm
        Whether hidden numbers are normalised before each activation, to mean 0 and variance 1 over
        the units; without parameters of its own.
    residual
        Whether each hidden layer but the first is added to its input; the widths must be equal.
    W_std
        :math:`\sigma_W` of the hidden layers. By default it keeps the second moment of the
        activations at 1: it is sqrt(2) for "relu".
    b_std
        :math:`\sigma_b` of every layer; None means no biases.
    output_W_std
        :math:`\sigma_W` of the last layer.
    parameterization
        "ntk" or "standard".

    Returns
    -------
    Model
        Its parameters are as in `serial`: groups "0", "2", "4", ... for the dense layers, or with
        ``residual`` "0", "1", ... for those of the blocks.

    Raises
    ------
    ValueError, TypeError
        If the activation or parameterization is unknown, a width or scale is not positive, or
        widths are unequal with ``residual``.

    Notes
    -----
    Kernels of activations without a closed form are sums of 128 terms of a series in the
    correlation of two inputs (Mehler's formula; *derived*). For tanh at variance 2 they are right
    to :math:`10^{-9}` up to a correlation of 0.95 and :math:`10^{-7}` at 1 - 1/100; the smoother
    the activation and the smaller the variance, the more digits. A function with a kink, such as
    ``hard_tanh``, keeps three or four.

    References
    ----------
    Jacot, Gabriel, Hongler, *Neural Tangent Kernel*, 2018 (NTK parameterisation); Sohl-Dickstein et
    al., *On the infinite width limit of neural networks with a standard parameterization*, 2020;
    He et al., *Identity mappings in deep residual networks*, 2016.

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
    if residual and len(set(widths)) > 1:
        raise ValueError(
            f"widths must be equal with residual=True, whose layers are added, got {widths!r}"
        )
    weights = [dense(width, **hidden) for width in widths]
    layers = _stack(weights, activation, layer_norm, residual)
    model = from_layers([*layers, dense(n_outputs, **output)], _flatten)
    return model if widths else replace(model, features=partial(_features, output))


def linear(
    n_outputs: int,
    *,
    W_std: float = 1.0,
    b_std: float | None = 0.1,
    parameterization: Parameterization = "standard",
) -> Model:
    r"""A linear head on fixed features, :math:`f = x W + b`; inputs are flattened.

    Its tangent kernel is :math:`H = \phi(x) \phi(x)^\top \otimes I_K` at all weights, so that a
    frozen kernel predicts its training exactly. :func:`ntkdp.linear_ntk` returns it in factored
    form. A gradient has the norm :math:`\|g_i\| = \|\phi(x_i)\| \|a_i\|`. With
    ``parameterization="standard"`` the features are :math:`\phi(x) = (x, 1)`, with ``"ntk"``
    :math:`(\sigma_W x / \sqrt d, \sigma_b)`.

    It is `mlp` without hidden layers, in the parameterisation of most libraries.

    Parameters
    ----------
    n_outputs
        K, outputs of the head.
    W_std, b_std, parameterization
        As in `mlp`; without biases, ``b_std=None``, the features are x alone.

    Returns
    -------
    Model
        Its parameters are ``[(W, b)]``, or ``[(W,)]`` without biases.

    Raises
    ------
    ValueError, TypeError
        As for `mlp`.

    Notes
    -----
    Weights start at random. Zero is a start as good as any, since the loss is convex in them:
    ``jax.tree.map(jnp.zeros_like, params)``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> model = linear(10)
    >>> x = jnp.ones((4, 8))
    >>> params = model.init(jax.random.key(0), x)
    >>> model.apply(params, x).shape, model.features(x).shape
    ((4, 10), (4, 9))
    """
    return mlp([], n_outputs, b_std=b_std, output_W_std=W_std, parameterization=parameterization)


def _features(scales: Scales, x: Array) -> Array:
    """What the weights of a last layer with these scales are multiplied by."""
    x = _flatten(x)
    is_scaled = scales["parameterization"] == "ntk"
    rows = x * (scales["W_std"] / x.shape[1] ** 0.5) if is_scaled else x
    b_std = scales["b_std"]
    if b_std is None:
        return rows
    bias = jnp.full_like(rows[:, :1], b_std if is_scaled else 1.0)
    return jnp.concatenate([rows, bias], axis=1)


def cnn(
    channels: Sequence[int],
    n_outputs: int,
    *,
    kernel_size: int | tuple[int, int] = 3,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    pooling: Pooling = "none",
    activation: Activation = "relu",
    layer_norm: bool = False,
    residual: bool = False,
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
        Those of every convolution: one number or (height, width).
    padding
        That of every convolution: "SAME", "VALID" or "CIRCULAR".
    pooling
        "none": flatten before the last layer. "average" or "sum": also a 2 x 2 pooling after every
        activation, or with ``residual`` after every convolution. "global" or "global_sum": average
        or sum over all positions instead of flattening. With pooling the infinite-width kernel
        needs all pairs of positions: memory n^2 (height width)^2.
    activation, layer_norm, residual, W_std, b_std, output_W_std, parameterization
        As in `mlp`; each position is normalised by itself, over its channels, and with ``residual``
        images must keep their size: strides of 1, padding "SAME" or "CIRCULAR".

    Returns
    -------
    Model
        It has the infinite-width kernel.

    Raises
    ------
    ValueError
        If a name is unknown, a size or scale is not positive, or images are not of rank 4.

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
    choice(get_args(Pooling), pooling=pooling)
    choice(get_args(Padding), padding=padding)
    window = _pair(kernel_size=kernel_size)
    step = _pair(strides=strides)
    if residual and (len(set(channels)) > 1 or step != (1, 1) or padding == "VALID"):
        raise ValueError(
            "residual=True adds images of one size: channels must be equal, strides 1 and padding "
            f"'SAME' or 'CIRCULAR', got {channels=}, {strides=}, {padding=}"
        )
    hidden, output = _scales(activation, W_std, b_std, output_W_std, parameterization)
    linear = stax()
    weights = [linear.Conv(number, window, step, padding, **hidden) for number in channels]
    pools = {"average": linear.AvgPool, "sum": linear.SumPool}
    after = [pools[pooling]((2, 2), strides=(2, 2))] if pooling in pools else []
    layers = _stack(weights, activation, layer_norm, residual, after)
    ends = {"global": linear.GlobalAvgPool, "global_sum": linear.GlobalSumPool}
    layers += [ends.get(pooling, linear.Flatten)(), linear.Dense(n_outputs, **output)]

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
            if pooling in pools:
                size = tuple(s // 2 for s in size)
            if min(size) < 1:
                raise ValueError(
                    f"x must be larger images, got shape {x.shape}: with {padding=}, {pooling=} "
                    f"and strides {step}, {len(channels)} convolutions leave no position"
                )
        return x

    return from_layers(layers, images)


def _check_sizes(**named: Sequence[int]) -> None:
    ((name, sizes),) = named.items()
    if isinstance(sizes, str) or not hasattr(sizes, "__len__"):
        raise TypeError(f"{name} must be a sequence of whole numbers, got {sizes!r}")
    for position, size in enumerate(sizes):
        count(**{f"{name}[{position}]": size})


def _flatten(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _pair(**named: int | tuple[int, int]) -> tuple[int, int]:
    ((name, value),) = named.items()
    sizes = value if isinstance(value, tuple) else (value, value)
    if len(sizes) != 2:
        raise ValueError(f"{name} must be one number or (height, width), got {value!r}")
    return count(**{name: sizes[0]}), count(**{name: sizes[1]})
