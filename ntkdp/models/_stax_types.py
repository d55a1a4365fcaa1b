"""What neural-tangents' layers and kernels are, as types: the library itself declares none."""

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias, TypedDict, overload, runtime_checkable

from ntkdp._backend import neural_tangents
from ntkdp._backend.types import Array, Params, PRNGKeyArray, PyTree

Shape: TypeAlias = tuple[int, ...]
Parameterization: TypeAlias = Literal["ntk", "standard"]
#: Which kernels are asked for: one by name, several by a tuple of names, None for a `StaxKernel`.
Get: TypeAlias = str | tuple[str, ...] | None


@runtime_checkable
class NamedKernels(Protocol):
    """Several kernels ``(n1, n2)``: the fields that were asked for, as of a named tuple."""

    @property
    def nngp(self) -> Array: ...

    @property
    def ntk(self) -> Array: ...


@runtime_checkable
class StaxKernel(NamedKernels, Protocol):
    """A kernel on its way through the layers, with the variances of both sets of samples."""

    @property
    def cov1(self) -> Array: ...

    @property
    def cov2(self) -> Array | None: ...

    @property
    def shape1(self) -> Shape:
        """Shape of the first set of samples at this layer."""
        ...

    @property
    def diagonal_batch(self) -> bool:
        """Whether ``cov1`` and ``cov2`` have one axis of samples rather than two."""
        ...

    def replace(self, **fields: Array | None) -> "StaxKernel":
        """The same kernel with other ``fields``."""
        ...


@runtime_checkable
class KernelFn(Protocol):
    """``kernel_fn(x1, x2=None, get=None)``, as in neural-tangents.

    ``get`` is ``"ntk"`` or ``"nngp"`` for an array ``(n1, n2)``, or a tuple of these.
    """

    @overload
    def __call__(self, x1: Array, x2: Array | None, get: str) -> Array: ...

    @overload
    def __call__(self, x1: Array, x2: Array | None, get: tuple[str, ...]) -> NamedKernels: ...

    @overload
    def __call__(self, x1: Array, x2: Array | None = None, get: None = None) -> StaxKernel: ...


#: ``init_fn(key, shape of the inputs) -> (shape of the outputs, params)``.
StaxInitFn: TypeAlias = Callable[[PRNGKeyArray, Shape], tuple[Shape, Params]]
#: ``apply_fn(params, x, **options) -> outputs``.
StaxApplyFn: TypeAlias = Callable[..., Array]
#: A layer of neural-tangents' stax: ``(init_fn, apply_fn, kernel_fn)``.
StaxLayer: TypeAlias = tuple[StaxInitFn, StaxApplyFn, KernelFn]


class Scales(TypedDict):
    """Keyword arguments of layers with parameters."""

    W_std: float
    b_std: float | None
    parameterization: Parameterization


@runtime_checkable
class Stax(Protocol):
    """The part of ``neural_tangents.stax`` that models are built of."""

    def serial(self, *layers: StaxLayer) -> StaxLayer: ...

    def parallel(self, *layers: StaxLayer) -> StaxLayer: ...

    def FanOut(self, num: int) -> StaxLayer: ...

    def FanInSum(self) -> StaxLayer: ...

    def LayerNorm(self) -> StaxLayer: ...

    def Dense(
        self, out_dim: int, W_std: float, b_std: float | None, *, parameterization: Parameterization
    ) -> StaxLayer: ...

    def Conv(
        self,
        out_chan: int,
        filter_shape: tuple[int, int],
        strides: tuple[int, int],
        padding: str,
        W_std: float,
        b_std: float | None,
        *,
        parameterization: Parameterization,
    ) -> StaxLayer: ...

    def AvgPool(self, window_shape: tuple[int, int], strides: tuple[int, int]) -> StaxLayer: ...

    def SumPool(self, window_shape: tuple[int, int], strides: tuple[int, int]) -> StaxLayer: ...

    def GlobalAvgPool(self) -> StaxLayer: ...

    def GlobalSumPool(self) -> StaxLayer: ...

    def Flatten(self) -> StaxLayer: ...

    def Identity(self) -> StaxLayer: ...

    def Elementwise(
        self,
        fn: Callable[[Array], Array],
        nngp_fn: Callable[[Array, Array, Array], Array],
        d_nngp_fn: Callable[[Array, Array, Array], Array],
    ) -> StaxLayer: ...

    def requires(self, **requirements: object) -> Callable[[Callable[..., PyTree]], KernelFn]:
        """A decorator of the kernel function of a layer, from kernels to kernels."""
        ...


def stax() -> Stax:
    """``neural_tangents.stax``, imported on first use."""
    layers: Stax = neural_tangents.stax
    return layers
