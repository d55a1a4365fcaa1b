"""Neural tangent kernels at infinite width, whole and by layer."""

import math
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ntkdp._backend import compiled, devices, memory, validate
from ntkdp._backend.precision import in_double
from ntkdp._backend.types import Array, ArrayLike, Float, Real, common_dtype, is_traced
from ntkdp._gradients import groups
from ntkdp.models import HasKernel, HasLayerKernels
from ntkdp.ntk._layerwise_kernel import LayerwiseKernel

#: A kernel, or a pytree of kernels.
Kernels = TypeVar("Kernels")

#: Bytes of a block of rows, between all positions of its samples.
_BLOCK_BYTES = 2**24
#: Least rows of a block: each computes the variances of all columns anew, as much work as one row.
_LEAST_ROWS = 8

_WAYS_OUT = "use fewer samples or float32"


def infinite_ntk(
    model: HasKernel,
    x1: Real[Array, "n1 ..."],
    x2: Real[Array, "n2 ..."] | None = None,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "n1 n2"]:
    r"""Infinite-width neural tangent kernel :math:`\Theta`, meaning :math:`\Theta \otimes I_K`.

    Parameters
    ----------
    model : Model
        A model with a ``kernel_fn``, for instance from :func:`ntkdp.models.mlp`. An object of
        another class will do if it has a ``kernel_fn(x1, x2, "ntk")``.
    x1, x2 : array
        Inputs ``(n1, ...)`` and ``(n2, ...)``; without ``x2``, x1 against itself.
    mesh : jax.sharding.Mesh, optional
        Devices that compute the kernel, each its share of the rows; n1 must divide over them.

    Returns
    -------
    array
        ``(n1, n2)``.

    Raises
    ------
    ValueError
        If the model has no infinite-width kernel, if inputs are empty or not finite, or if entries
        are beyond the range of the dtype. Inside ``jit`` such entries stay infinite.
    MemoryError
        If the kernel, or the work for it, does not fit.

    Notes
    -----
    Jacot et al. (2018); computed by neural-tangents.

    The kernel is computed in float64 and rounded once to the dtype of the inputs, because its rules
    subtract numbers that are nearly equal. For float32 inputs the entries are right to a few units
    in the last place, even if JAX's 64-bit mode is off. Such a kernel has derivatives in reverse
    mode only (``grad``, ``jacrev``).

    Between a sample and itself, the kernel of a relu network has half the digits of float64 (about
    1e-8): its rule has the arc cosine of 1, where the slope is infinite. The rules of erf and
    similar activations lose digits in proportion to the variance v of the activation's input: the
    relative error is about 1e-16 v, which is 1e-6 for features of size 1e5.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> model = ntkdp.models.mlp([16], 1)
    >>> ntkdp.infinite_ntk(model, jnp.eye(3)).shape
    (3, 3)
    """
    if not isinstance(model, HasKernel) or model.kernel_fn is None:
        raise ValueError(
            f"model must have an infinite-width kernel, got {type(model).__name__} with "
            "kernel_fn=None; use empirical_ntk, or a model built with ntkdp.models.mlp, cnn, "
            "serial or from_stax"
        )
    x1, x2 = check_infinite_inputs(x1, x2)
    x1, x2, mesh = place_inputs(1, x1, x2, mesh)
    kernel: Array = check_range(_called(model.kernel_fn, mesh, x1, x2, "ntk"))
    return kernel


def layerwise_infinite_ntk(
    model: HasLayerKernels,
    x1: Real[Array, "n1 ..."],
    x2: Real[Array, "n2 ..."] | None = None,
    *,
    mesh: Mesh | None = None,
) -> LayerwiseKernel:
    r"""Infinite-width kernel by layer, :math:`\Theta = \sum_r \Theta_r`.

    The term of layer r is the kernel of the network in which only layer r is trained.

    Parameters
    ----------
    model : Model
        A model that knows its layers: :func:`ntkdp.models.mlp`, ``cnn`` or ``serial``. An object
        of another class will do if it has ``init`` and ``layer_kernel_fn`` as a `Model` does.
    x1, x2, mesh
        As for :func:`infinite_ntk`.

    Returns
    -------
    LayerwiseKernel
        Values ``(R, n1, n2)``, named as the parameter groups of the model.

    Raises
    ------
    ValueError
        If the model has no infinite-width kernel or no layer terms.
    MemoryError
        As for :func:`infinite_ntk`.

    Notes
    -----
    The recursion of Jacot et al. (2018) with the tangent kernel started at layer r.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> model = ntkdp.models.mlp([16], 1)
    >>> ntkdp.layerwise_infinite_ntk(model, jnp.eye(3)).names
    ('0', '2')
    """
    if not isinstance(model, HasLayerKernels) or model.layer_kernel_fn is None:
        raise ValueError(
            f"model must have layer terms of its infinite-width kernel, got {type(model).__name__} "
            "without them; build it with ntkdp.models.mlp, cnn or serial, or use layerwise_ntk"
        )
    x1, x2 = check_infinite_inputs(x1, x2)
    params = jax.eval_shape(model.init, jax.random.key(0), x1)
    x1, x2, mesh = place_inputs(groups.resolve(params).size, x1, x2, mesh)
    terms = check_range(_called(model.layer_kernel_fn, mesh, x1, x2))
    return LayerwiseKernel(tuple(terms), jnp.stack(list(terms.values())))


def _called(
    kernel_fn: Callable[..., Kernels], mesh: Mesh | None, x1: Array, x2: Array | None, *get: str
) -> Kernels:
    """The kernel, if there is room for the work, which for images may be all pairs of positions."""
    shape = (x1.shape[0], (x1 if x2 is None else x2).shape[0])
    pairs = math.prod(shape) * math.prod(x1.shape[1:-1]) ** 2
    kernels: Kernels = compiled.call(
        _compiled, kernel_fn, mesh, x1, x2, *get,
        what=f"the work for a kernel of shape {shape}", ways_out=_WAYS_OUT,
        work=pairs * x1.dtype.itemsize,
    )  # fmt: skip
    return kernels


@eqx.filter_jit
def _compiled(
    kernel_fn: Callable[..., Kernels], mesh: Mesh | None, x1: Array, x2: Array | None, *get: str
) -> Kernels:
    # Without jit, neural-tangents would compile a hundred small programs, one for each operation.
    def rows(x1: Array, x2: Array | None) -> Kernels:
        return by_blocks(lambda x1, x2: kernel_fn(x1, x2, *get), x1, x2)

    kernels: Kernels = devices.over_samples(rows, mesh, (0, None), 0)(x1, x2)
    return kernels


def by_blocks(
    kernels: Callable[..., Kernels], x1: Array, x2: Array | None, *settings: Array
) -> Kernels:
    """Kernels ``(n1, n2)``, each block of rows computed in float64 and rounded at once.

    Otherwise float64 would double the memory of the work: a convolution between all positions of
    two images takes far more than its kernel.
    """
    columns = x1 if x2 is None else x2
    n, row_bytes = len(x1), 8 * len(columns) * math.prod(x1.shape[1:-1]) ** 2
    n_blocks = -(-n // max(_LEAST_ROWS, _BLOCK_BYTES // row_bytes))
    if n_blocks == 1:
        return in_double(kernels, x1, x2, *settings)
    size = -(-n // n_blocks)
    filled = jnp.concatenate([x1, x1[: n_blocks * size - n]])
    blocks = lax.map(
        lambda rows: in_double(kernels, rows, columns, *settings),
        filled.reshape(n_blocks, size, *x1.shape[1:]),
    )
    joined: Kernels = jax.tree.map(lambda block: block.reshape(n_blocks * size, -1)[:n], blocks)
    return joined


def check_range(kernel: Kernels) -> Kernels:
    """A pytree of kernels, if all entries are finite or are not known yet."""
    leaves = [leaf for leaf in jax.tree.leaves(kernel) if not is_traced(leaf)]
    bad = sum(int(jnp.sum(~jnp.isfinite(leaf))) for leaf in leaves)
    if bad:
        dtype = leaves[0].dtype
        wider = ", or call ntkdp.enable_x64()" if dtype != jnp.float64 else ""
        raise ValueError(
            f"the kernel must fit in {dtype}, got {bad} NaN or infinite of "
            f"{sum(leaf.size for leaf in leaves)} entries; rescale the inputs or the weights{wider}"
        )
    return kernel


def place_inputs(
    n_terms: int, x1: Array, x2: Array | None, mesh: Mesh | None
) -> tuple[Array, Array | None, Mesh | None]:
    """Inputs where the kernel is to be computed, if there is room for it."""
    mesh = devices.as_mesh(mesh)
    devices.check_divides(mesh, x1=x1.shape[0])
    shape = (x1.shape[0], (x1 if x2 is None else x2).shape[0])
    itemsize = common_dtype(x1.dtype, float).itemsize
    memory.require(
        devices.bytes_on_host(mesh, n_terms * shape[0] * shape[1] * itemsize),
        f"a kernel of shape {shape if n_terms == 1 else (n_terms, *shape)}",
        _WAYS_OUT,
    )
    if mesh is None:
        return x1, x2, None
    return devices.spread(mesh, x1), devices.everywhere(mesh, x1 if x2 is None else x2), mesh


def check_infinite_inputs(x1: ArrayLike, x2: ArrayLike | None) -> tuple[Array, Array | None]:
    """Inputs as arrays of samples of one shape, or an error."""
    rows = _checked_inputs(x1=x1)
    columns = None if x2 is None else _checked_inputs(x2=x2)
    if columns is not None and rows.shape[1:] != columns.shape[1:]:
        raise ValueError(
            f"x2 must have samples of the shape of x1's, {rows.shape[1:]}, got {columns.shape[1:]}"
        )
    return rows, columns


def _checked_inputs(**named: ArrayLike) -> Array:
    (name,) = named
    samples = validate.array(**named)
    if samples.ndim < 2 or samples.shape[0] == 0:
        raise ValueError(f"{name} must have shape (n, ...) with n >= 1, got {samples.shape}")
    finite: Array = validate.finite(**{name: samples})
    return finite
