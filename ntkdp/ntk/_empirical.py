"""Kernels of a network at its parameters, whole, by layer and preconditioned."""

from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkdp._backend import compiled, devices, validate
from ntkdp._backend.types import ApplyFn, Array, ArrayLike, Float, Params, Real
from ntkdp._gradients import groups as _groups
from ntkdp._gradients import per_sample
from ntkdp._gradients.check_model import check_inputs, check_model, check_preconditioner
from ntkdp.ntk import _blocks
from ntkdp.ntk._layerwise_kernel import LayerwiseKernel
from ntkdp.trajectory import as_trainable

_WAYS_OUT = (
    "use fewer samples, float32, one output, a mesh of devices, the infinite-width kernel (n, n), "
    "or LinearisedFlow, which needs no kernel"
)


def empirical_ntk(
    apply_fn: ApplyFn,
    params: Params,
    x1: Real[Array, "n1 ..."],
    x2: Real[Array, "n2 ..."] | None = None,
    *,
    trainable: Iterable[str] | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "n1 n2 K K"]:
    r"""Empirical neural tangent kernel with full outputs, :math:`H = J(x_1) J(x_2)^\top`.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, x) -> (n, K)``, which treats each sample on its own.
    params : pytree
        Parameters: floating-point arrays.
    x1, x2 : array
        Inputs ``(n1, ...)`` and ``(n2, ...)``; without ``x2``, x1 against itself.
    trainable : sequence of str, optional
        Names of the layers that train, as in the ``names`` of :func:`layerwise_ntk`; by default
        all. The others are constants: nothing is computed for them.
    batch_size : int, optional
        Rows and columns of a block. By default a block takes about 100 MiB; peak memory is at most
        twice the result and two blocks.
    mesh : jax.sharding.Mesh, optional
        Devices that compute the kernel, each its share of the rows; n1 must divide over them. The
        result stays where it was computed.

    Returns
    -------
    array
        ``(n1, n2, K, K)``, entry ``[i, j, k, l]`` the inner product of the gradients of output k at
        x1[i] and of output l at x2[j].

    Raises
    ------
    ValueError
        If inputs are empty, do not match or hold NaN or infinities, or if the model couples
        samples.
    MemoryError
        If the result does not fit; the message gives the bytes needed and available.

    Notes
    -----
    Jacot et al. (2018), the finite-width kernel at the given parameters.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> linear = lambda w, x: x @ w
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> ntkdp.empirical_ntk(linear, jnp.ones((2, 1)), x)[:, :, 0, 0].tolist()
    [[5.0, 11.0], [11.0, 25.0]]
    """
    if trainable is not None:
        apply_fn, params, _ = _with_frozen(apply_fn, params, _groups.resolve(params), trainable)
    everything = _groups.Groups(("all",), (0,) * len(jax.tree.leaves(params)))
    return _kernel(apply_fn, params, x1, x2, everything, batch_size, mesh, whole=True)


def layerwise_ntk(
    apply_fn: ApplyFn,
    params: Params,
    x1: Real[Array, "n1 ..."],
    x2: Real[Array, "n2 ..."] | None = None,
    *,
    groups: _groups.GroupSpec = None,
    trainable: Iterable[str] | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> LayerwiseKernel:
    r"""Empirical kernel by parameter group, :math:`H_r = J_r(x_1) J_r(x_2)^\top`.

    Parameters
    ----------
    apply_fn, params, x1, x2, batch_size, mesh
        As for :func:`empirical_ntk`.
    groups : pytree prefix of labels, or callable from key path to label, optional
        The groups; by default the layers.
    trainable : sequence of str, optional
        Names of the groups that train; by default all.

    Returns
    -------
    LayerwiseKernel
        Values ``(R, n1, n2, K, K)``; ``total`` is :func:`empirical_ntk`.

    Raises
    ------
    ValueError, MemoryError
        As for :func:`empirical_ntk`; also if the groups do not fit the parameters.

    Notes
    -----
    Bu et al. (2023), section on layerwise clipping.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> affine = lambda p, x: x @ p["w"] + p["b"]
    >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros(1)}
    >>> kernel = ntkdp.layerwise_ntk(affine, params, jnp.array([[1.0, 2.0]]))
    >>> kernel.names, kernel.values[:, 0, 0, 0, 0].tolist()
    (('b', 'w'), [1.0, 5.0])
    """
    resolved = _groups.resolve(params, groups)
    if trainable is not None:
        apply_fn, params, resolved = _with_frozen(apply_fn, params, resolved, trainable)
    terms = _kernel(apply_fn, params, x1, x2, resolved, batch_size, mesh)
    return LayerwiseKernel(resolved.names, terms)


def preconditioned_ntk(
    apply_fn: ApplyFn,
    params: Params,
    preconditioner: Params,
    x1: Real[Array, "n1 ..."],
    x2: Real[Array, "n2 ..."] | None = None,
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "n1 n2 K K"]:
    r"""Kernel of a preconditioned flow, :math:`J(x_1) M^{-1} J(x_2)^\top` with diagonal M.

    It is the tangent kernel in the coordinates :math:`u = M^{1/2} w`. For Adam, M is
    :math:`\sqrt{\hat v} + \epsilon`.

    Parameters
    ----------
    apply_fn, params, x1, x2, batch_size, mesh
        As for :func:`empirical_ntk`.
    preconditioner : pytree
        The diagonal of M, positive, in the shape of the parameters.

    Returns
    -------
    array
        ``(n1, n2, K, K)``.

    Raises
    ------
    ValueError
        As for :func:`empirical_ntk`; also if the preconditioner has another structure than the
        parameters or is not positive.

    Notes
    -----
    *Derived*: a change of variables.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> w, x = jnp.ones((2, 1)), jnp.array([[1.0, 2.0]])
    >>> ntkdp.ntk.preconditioned_ntk(lambda w, x: x @ w, w, jnp.full((2, 1), 4.0), x).item()
    1.25
    """
    params = validate.parameters(params=params)
    roots = jax.tree.map(jnp.sqrt, check_preconditioner(params, preconditioner))
    rescaled = jax.tree_util.Partial(_apply_rescaled, apply_fn, roots)
    coordinates = jax.tree.map(jnp.multiply, params, roots)
    return empirical_ntk(rescaled, coordinates, x1, x2, batch_size=batch_size, mesh=mesh)


def _with_frozen(
    apply_fn: ApplyFn, params: Params, groups: _groups.Groups, trainable: Iterable[str]
) -> tuple[ApplyFn, Params, _groups.Groups]:
    """The network as a function of the groups that train, which are the only ones left."""
    names = as_trainable(trainable)
    kept = jax.tree.unflatten(jax.tree.structure(params), groups.leaves_of(names))
    trained, frozen = eqx.partition(params, kept)
    with_frozen = jax.tree_util.Partial(_apply_with_frozen, apply_fn, frozen)
    return with_frozen, trained, groups.select(names)


def _apply_with_frozen(apply_fn: ApplyFn, frozen: Params, trained: Params, x: Array) -> Array:
    return apply_fn(eqx.combine(trained, frozen), x)


def _apply_rescaled(apply_fn: ApplyFn, roots: Params, coordinates: Params, x: Array) -> Array:
    return apply_fn(jax.tree.map(jnp.divide, coordinates, roots), x)


def between_parameters(
    apply_fn: ApplyFn,
    params1: Params,
    params2: Params,
    x1: Array,
    x2: Array,
    groups: _groups.Groups,
    metric: Params | None = None,
) -> Float[Array, "R n1 n2 K K"]:
    r"""Kernel by group between two networks of one kind, :math:`J(w_1, x_1) D J(w_2, x_2)^\top`.

    Parameters
    ----------
    apply_fn : callable
        ``apply_fn(params, x) -> (n, K)``.
    params1, params2 : pytree
        Parameters of the two networks.
    x1, x2 : array
        Inputs ``(n1, ...)`` of the first and ``(n2, ...)`` of the second.
    groups : Groups
        The group of each leaf of the parameters.
    metric : pytree, optional
        The diagonal of D, positive, in the shape of the parameters; by default the identity.

    Returns
    -------
    array
        Terms ``(R, n1, n2, K, K)``.

    Notes
    -----
    *Derived*. The arguments are not checked; the function can be compiled.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> from ntkdp._gradients import groups
    >>> square = lambda w, x: x @ w**2
    >>> w1, w2, x = jnp.full((1, 1), 1.0), jnp.full((1, 1), 3.0), jnp.ones((1, 1))
    >>> ntkdp.ntk.between_parameters(square, w1, w2, x, x, groups.resolve(w1)).item()
    12.0
    """
    if metric is not None:
        roots = jax.tree.map(lambda d: 1 / jnp.sqrt(d), metric)
        apply_fn = jax.tree_util.Partial(_apply_rescaled, apply_fn, roots)
        params1, params2 = (jax.tree.map(jnp.multiply, p, roots) for p in (params1, params2))
    structure = per_sample.trace(apply_fn, params1, x1)

    def factors_at(params: Params) -> _blocks.FactorsOf:
        return lambda x: per_sample.factored_for_kernel(structure, params, x)

    return _blocks.assemble(
        factors_at(params1),
        groups.leaf_to_group,
        groups.size,
        structure.n_outputs,
        x1,
        x2,
        None,
        factors_at(params2),
    )


def _kernel(
    apply_fn: ApplyFn,
    params: Params,
    x1: ArrayLike,
    x2: ArrayLike | None,
    groups: _groups.Groups,
    batch_size: int | None,
    mesh: Mesh | None,
    whole: bool = False,
) -> Array:
    """Terms of the kernel, ``(R, n1, n2, K, K)``, or the term alone if there is a single group."""
    mesh = devices.as_mesh(mesh)
    rows, output = check_model(apply_fn, params, x1, "x1")
    columns = rows if x2 is None else check_inputs(apply_fn, params, x2, "x2")
    if rows.shape[1:] != columns.shape[1:]:
        raise ValueError(
            f"x2 must have samples of the shape of x1's, {rows.shape[1:]}, got {columns.shape[1:]}"
        )
    devices.check_divides(mesh, x1=rows.shape[0])
    if batch_size is not None:
        batch_size = validate.count(batch_size=batch_size)
    n_outputs = output.shape[1]
    shape = (groups.size, rows.shape[0], columns.shape[0], n_outputs, n_outputs)
    # The parts of several devices have no diagonal in common to mirror.
    others = None if x2 is None and mesh is None else columns
    params, others = devices.everywhere(mesh, (params, others))
    kernel: Array = compiled.call(
        _kernel_in_blocks,
        apply_fn,
        params,
        devices.spread(mesh, rows),
        others,
        groups,
        batch_size,
        n_outputs,
        whole,
        mesh,
        what=f"a kernel of shape {shape[1:] if groups.size == 1 else shape}",
        ways_out=_WAYS_OUT,
        results=devices.bytes_on_host(
            mesh, int(np.prod(shape, dtype=object)) * output.dtype.itemsize
        ),
    )
    return kernel


@eqx.filter_jit
def _kernel_in_blocks(
    apply_fn: ApplyFn,
    params: Params,
    x1: Array,
    x2: Array | None,
    groups: _groups.Groups,
    batch_size: int | None,
    n_outputs: int,
    whole: bool,
    mesh: Mesh | None,
) -> Array:
    structure = per_sample.trace(apply_fn, params, x1)

    def rows(params: Params, x1: Array, x2: Array | None) -> Array:
        def factors(x: Array) -> list[per_sample.Factor]:
            return per_sample.factored_for_kernel(structure, params, x)

        result = _blocks.assemble(
            factors, groups.leaf_to_group, groups.size, n_outputs, x1, x2, batch_size
        )
        # Here the reshape is free; outside, it would copy the kernel.
        return result.reshape(result.shape[1:]) if whole else result

    kernel: Array = devices.over_samples(rows, mesh, (None, 0, None), 0 if whole else 1)(
        params, x1, x2
    )
    return kernel
