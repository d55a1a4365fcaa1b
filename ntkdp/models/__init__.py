"""Networks as pure functions: stax models with infinite-width kernels, and adapters for others."""

from ntkdp.models._adapters import from_equinox, from_flax, from_function
from ntkdp.models._layers import from_stax, serial
from ntkdp.models._model import HasKernel as HasKernel
from ntkdp.models._model import HasLayerKernels as HasLayerKernels
from ntkdp.models._model import Model
from ntkdp.models._model import TwoTimeKernelFn as TwoTimeKernelFn
from ntkdp.models._model import TwoTimeRule as TwoTimeRule
from ntkdp.models._model import WeightLaw as WeightLaw
from ntkdp.models._networks import cnn, linear, mlp

__all__ = [
    "Model",
    "cnn",
    "from_equinox",
    "from_flax",
    "from_function",
    "from_stax",
    "linear",
    "mlp",
    "serial",
]
