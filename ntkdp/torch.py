"""Kernels and gradient norms of PyTorch modules, computed by PyTorch and handed on as JAX arrays.

A module is used as it is, through ``torch.func``; nothing is converted. What comes out goes into
:class:`ntkdp.KernelFlow` and all predictions that take one. PyTorch is installed by
``pip install 'ntkdp[torch]'``.
"""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from ntkdp._backend import memory, validate
from ntkdp._backend.types import Array, ArrayLike, Float
from ntkdp.ntk import LayerwiseKernel

if TYPE_CHECKING:
    import torch

#: The group of a parameter by its name, e.g. ``"conv1.weight"``.
Groups: TypeAlias = Callable[[str], str]

#: Bytes that the Jacobians of a batch take unless a batch size is given.
_JACOBIAN_BYTES = 2**28


def outputs(
    module: "torch.nn.Module", x: ArrayLike, *, batch_size: int | None = None
) -> Float[Array, "n K"]:
    """Outputs of a module, the initial state of a prediction.

    Parameters
    ----------
    module, x, batch_size
        As for :func:`empirical_ntk`.

    Returns
    -------
    array
        ``(n, K)``.

    Raises
    ------
    ImportError, TypeError, ValueError
        As for :func:`empirical_ntk`.

    Examples
    --------
    >>> import torch, ntkdp
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(module.weight)
    >>> ntkdp.torch.outputs(module, torch.tensor([[1.0, 2.0]])).tolist()
    [[3.0]]
    """
    network = _network(module)
    samples = network.samples("x", x)
    size = len(samples) if batch_size is None else validate.count(batch_size=batch_size)
    with network.torch.no_grad():
        found = [network.apply(network.params, part) for part in samples.split(size)]
    return jnp.asarray(network.torch.cat(found).cpu().numpy())


def empirical_ntk(
    module: "torch.nn.Module",
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    batch_size: int | None = None,
) -> Float[Array, "n1 n2 K K"]:
    r"""Tangent kernel :math:`H(x_1, x_2) = J(x_1) J(x_2)^\top` of a module at its parameters.

    Only parameters that require gradients count, so that frozen layers, and adapters such as LoRA,
    are what they are in training.

    Parameters
    ----------
    module : torch.nn.Module
        Maps ``(n, ...)`` to outputs ``(n, K)``, or to ``(n,)``, which means K = 1.
    x1 : tensor or array
        ``(n1, ...)``.
    x2 : tensor or array, optional
        ``(n2, ...)``; by default ``x1``.
    batch_size : int, optional
        Samples whose Jacobians are in memory at a time, twice; by default as many as take 256 MiB.

    Returns
    -------
    array
        ``(n1, n2, K, K)``, in the dtype of the parameters if JAX has it switched on.

    Raises
    ------
    ImportError
        If PyTorch is not installed.
    TypeError
        If the first argument is no module.
    ValueError
        If the module has nothing to train, its outputs have another shape or are not finite, or
        the outputs of a sample depend on its batch or on chance: batch normalisation and dropout in
        training mode.
    MemoryError
        If the kernel does not fit into memory.

    Notes
    -----
    Jacot et al. (2018). Jacobians of a batch are formed, n K P numbers for P parameters.

    Examples
    --------
    >>> import torch, ntkdp
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> ntkdp.torch.empirical_ntk(torch.nn.Linear(2, 1), x)[:, :, 0, 0].tolist()
    [[6.0, 12.0], [12.0, 26.0]]
    """
    return _kernel(module, x1, x2, lambda name: "all", batch_size).total


def layerwise_ntk(
    module: "torch.nn.Module",
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    groups: Groups | None = None,
    batch_size: int | None = None,
) -> LayerwiseKernel:
    r"""Tangent kernel by layer, :math:`H_r = J_r(x_1) J_r(x_2)^\top`, for layerwise clipping.

    Parameters
    ----------
    module, x1, x2, batch_size
        As for :func:`empirical_ntk`.
    groups : callable, optional
        From the name of a parameter to that of its group; by default the submodule that holds it,
        e.g. ``"conv1"`` for ``"conv1.weight"``. With ``lambda name: name`` each tensor is a group,
        which opacus calls per layer.

    Returns
    -------
    LayerwiseKernel
        Values ``(R, n1, n2, K, K)``; ``total`` is :func:`empirical_ntk`.

    Raises
    ------
    ImportError, TypeError, ValueError, MemoryError
        As for :func:`empirical_ntk`.

    Examples
    --------
    >>> import torch, ntkdp
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> kernel = ntkdp.torch.layerwise_ntk(torch.nn.Linear(2, 1), x, groups=lambda name: name)
    >>> kernel.names, kernel.values[:, 0, 0, 0, 0].tolist()
    (('weight', 'bias'), [5.0, 1.0])
    """
    return _kernel(module, x1, x2, groups or _owner, batch_size)


def per_sample_gradient_norms(
    module: "torch.nn.Module",
    x: ArrayLike,
    output_gradient: ArrayLike,
    *,
    groups: Groups | None = None,
    batch_size: int | None = None,
) -> Float[Array, "*groups n"]:
    r"""Norms of the per-sample gradients :math:`g_i = J_i^\top a_i`, which are clipped.

    Parameters
    ----------
    module, x, batch_size
        As for :func:`empirical_ntk`; per-sample gradients of a batch are in memory.
    output_gradient : tensor or array
        :math:`a_i`, ``(n, K)``: the gradient of each sample's own loss in its outputs, never
        divided by n.
    groups : callable, optional
        As for :func:`layerwise_ntk`. With it, one norm for each group; without it, one over all
        parameters.

    Returns
    -------
    array
        ``(n,)``, or ``(R, n)`` with ``groups``.

    Raises
    ------
    ImportError, TypeError, ValueError
        As for :func:`empirical_ntk`; also if the output gradient is not ``(n, K)``.

    Examples
    --------
    >>> import torch, ntkdp
    >>> module, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
    >>> ntkdp.torch.per_sample_gradient_norms(module, x, torch.tensor([[2.0]])).tolist()
    [10.0]
    """
    network = _network(module)
    samples = network.samples("x", x)
    cotangents = network.samples("output_gradient", output_gradient)
    expected = (len(samples), network.n_outputs(samples))
    if tuple(cotangents.shape) != expected:
        raise ValueError(
            f"output_gradient must have the shape of the outputs, {expected}, "
            f"got {tuple(cotangents.shape)}"
        )
    names, places = network.grouped((lambda name: "all") if groups is None else groups)
    size = network.batch_size(batch_size, outputs=1)

    def along(
        params: dict[str, "torch.Tensor"], sample: "torch.Tensor", a: "torch.Tensor"
    ) -> "torch.Tensor":
        along_a: torch.Tensor = (network.apply(params, sample[None])[0] * a).sum()
        return along_a

    gradient = network.torch.func.vmap(network.torch.func.grad(along), (None, 0, 0))
    parts = []
    for x_part, a_part in zip(samples.split(size), cotangents.split(size), strict=True):
        squares = np.zeros((len(names), len(x_part)))
        for name, found in gradient(network.params, x_part, a_part).items():
            squares[places[name]] += found.flatten(1).double().square().sum(1).cpu().numpy()
        parts.append(np.sqrt(squares))
    norms = jnp.asarray(np.concatenate(parts, axis=1).astype(network.dtype))
    return norms[0] if groups is None else norms


class _Network(NamedTuple):
    """A module that was checked, its parameters to train and all other tensors."""

    module: "torch.nn.Module"
    params: dict[str, "torch.Tensor"]
    fixed: dict[str, "torch.Tensor"]

    @property
    def torch(self) -> ModuleType:
        """PyTorch."""
        return _torch()

    @property
    def dtype(self) -> np.dtype:
        """The widest dtype of the parameters, in NumPy."""
        widest = max((param.dtype for param in self.params.values()), key=lambda one: one.itemsize)
        return np.dtype(str(widest).removeprefix("torch."))

    def apply(self, params: dict[str, "torch.Tensor"], x: "torch.Tensor") -> "torch.Tensor":
        """Outputs ``(n, K)``."""
        found = self.torch.func.functional_call(self.module, {**self.fixed, **params}, (x,))
        return found[:, None] if found.ndim == 1 else found

    def samples(self, name: str, x: ArrayLike) -> "torch.Tensor":
        """ArrayLike as a tensor where the parameters are, and in their precision if real."""
        reference = next(iter(self.params.values()))
        tensor = self.torch.as_tensor(x if isinstance(x, self.torch.Tensor) else np.array(x))
        if tensor.ndim == 0 or len(tensor) == 0:
            raise ValueError(f"{name} must hold at least one sample, got {tuple(tensor.shape)}")
        dtype = reference.dtype if tensor.is_floating_point() else tensor.dtype
        moved: torch.Tensor = tensor.detach().to(reference.device, dtype)
        return moved

    def n_outputs(self, x: "torch.Tensor") -> int:
        """K, of outputs that are finite and have the shape that predictions need."""
        with self.torch.no_grad():
            found = self.module(x[:1])
        if not isinstance(found, self.torch.Tensor) or found.ndim not in (1, 2) or len(found) != 1:
            shape = tuple(found.shape) if isinstance(found, self.torch.Tensor) else type(found)
            raise ValueError(
                f"module must map one sample to outputs of shape (1, K) or (1,), got {shape}; "
                "wrap it in a module that does"
            )
        if not bool(found.isfinite().all()):
            raise ValueError("module must have finite outputs, got NaN or infinity")
        return int(found.numel())

    def grouped(self, groups: Groups) -> tuple[tuple[str, ...], dict[str, int]]:
        """Names of the groups in order, and the place of each parameter's group."""
        labels = {name: groups(name) for name in self.params}
        names = tuple(dict.fromkeys(labels.values()))
        return names, {name: names.index(label) for name, label in labels.items()}

    def batch_size(self, given: int | None, outputs: int) -> int:
        """The batch size that was given, or one whose Jacobians take little memory."""
        if given is not None:
            return validate.count(batch_size=given)
        one = sum(param.numel() * param.element_size() for param in self.params.values())
        return int(max(1, _JACOBIAN_BYTES // max(1, one * outputs)))

    def jacobians(self, x: "torch.Tensor") -> dict[str, "torch.Tensor"]:
        """Jacobian of each parameter, ``(n K, P)``."""

        def of_one(params: dict[str, "torch.Tensor"], sample: "torch.Tensor") -> "torch.Tensor":
            outputs: torch.Tensor = self.apply(params, sample[None])[0]
            return outputs

        func = self.torch.func
        found = func.vmap(func.jacrev(of_one), (None, 0))(self.params, x)
        return {name: part.flatten(2).flatten(0, 1) for name, part in found.items()}


def _kernel(
    module: "torch.nn.Module",
    x1: ArrayLike,
    x2: ArrayLike | None,
    groups: Groups,
    given: int | None,
) -> LayerwiseKernel:
    network = _network(module)
    rows = network.samples("x1", x1)
    columns = rows if x2 is None else network.samples("x2", x2)
    K = network.n_outputs(rows)
    names, places = network.grouped(groups)
    n1, n2 = len(rows), len(columns)
    memory.require(
        2 * len(names) * n1 * n2 * K * K * network.dtype.itemsize,
        f"a kernel of {n1:,} x {n2:,} samples, {K} outputs and {len(names)} groups, twice,",
        "take fewer samples or groups",
    )
    values = np.zeros((len(names), n1, K, n2, K), network.dtype)
    size = network.batch_size(given, outputs=K)
    for at, part in _batches(rows, size):
        left = network.jacobians(part)
        # A kernel of one set of samples is symmetric: blocks below its diagonal are transposed.
        for other, block in _batches(columns, size, at if x2 is None else 0):
            right = left if x2 is None and other == at else network.jacobians(block)
            for name, jacobian in left.items():
                product = (jacobian @ right[name].T).cpu().numpy()
                shape = (len(part), K, len(block), K)
                values[places[name], at : at + size, :, other : other + size] += product.reshape(
                    shape
                )
            if x2 is None and other != at:
                upper = values[:, at : at + size, :, other : other + size]
                values[:, other : other + size, :, at : at + size] = upper.transpose(0, 3, 4, 1, 2)
    return LayerwiseKernel(names, jnp.asarray(values.transpose(0, 1, 3, 2, 4)))


def _batches(x: "torch.Tensor", size: int, start: int = 0) -> "Iterator[tuple[int, torch.Tensor]]":
    return ((at, x[at : at + size]) for at in range(start, len(x), size))


def _owner(name: str) -> str:
    """The submodule that holds a parameter."""
    return name.rpartition(".")[0] or name


def _network(module: "torch.nn.Module") -> _Network:
    """The module, if the outputs of a sample depend on that sample alone."""
    nn = _torch().nn
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, part in module.named_modules():
        # Its running statistics serve in evaluation mode, if it keeps any.
        batch_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (part.training or not part.track_running_stats):
            raise ValueError(
                f"module must treat samples apart, but {name or 'it'!r} normalises over the batch; "
                "use GroupNorm, as private training needs, or call module.eval()"
            )
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(
                f"module must not be random, but {name or 'it'!r} drops outputs; "
                "call module.eval() first"
            )
    params = {name: one.detach() for name, one in module.named_parameters() if one.requires_grad}
    if not params:
        raise ValueError("module must have parameters that require gradients, got none")
    fixed = {name: one.detach() for name, one in module.named_parameters() if name not in params}
    return _Network(module, params, {**fixed, **dict(module.named_buffers())})


def _torch() -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ImportError("ntkdp.torch needs PyTorch: pip install 'ntkdp[torch]'") from error
