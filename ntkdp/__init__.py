"""Predict how a neural network trains under differential privacy, and check the prediction.

The public face is lazy: a name's module is imported when the name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Lets neural-tangents be imported on this JAX, by users too; it imports nothing itself.
from ntkdp._backend import neural_tangents as neural_tangents

if TYPE_CHECKING:
    from ntkdp import (
        clipping as clipping,
    )
    from ntkdp import (
        datasets as datasets,
    )
    from ntkdp import (
        losses as losses,
    )
    from ntkdp import (
        models as models,
    )
    from ntkdp import (
        ntk as ntk,
    )
    from ntkdp._plan import plan as plan
    from ntkdp.gradient_flow import HeavyBallFlow as HeavyBallFlow
    from ntkdp.gradient_flow import KernelFlow as KernelFlow
    from ntkdp.gradient_flow import LinearisedFlow as LinearisedFlow
    from ntkdp.gradient_flow import ModifiedFlow as ModifiedFlow
    from ntkdp.gradient_flow import WeightFlow as WeightFlow
    from ntkdp.gradient_flow import recursion as recursion
    from ntkdp.gradient_flow import solve as solve
    from ntkdp.ntk import LayerwiseKernel as LayerwiseKernel
    from ntkdp.ntk import empirical_ntk as empirical_ntk
    from ntkdp.ntk import infinite_ntk as infinite_ntk
    from ntkdp.ntk import layerwise_infinite_ntk as layerwise_infinite_ntk
    from ntkdp.ntk import layerwise_ntk as layerwise_ntk
    from ntkdp.ntk import per_sample_gradient_norms as per_sample_gradient_norms
    from ntkdp.ntk import two_time_kernel as two_time_kernel
    from ntkdp.trajectory import Phase as Phase
    from ntkdp.trajectory import Trajectory as Trajectory

_MODULES = (
    "advisor",
    "calibration",
    "certificates",
    "claims",
    "clipping",
    "comparison",
    "counterexamples",
    "datasets",
    "dp_sgd",
    "experiment",
    "gradient_flow",
    "high_dimensional_sgd",
    "losses",
    "models",
    "ntk",
    "plotting",
    "privacy",
    "spectrum",
    "stochastic_flow",
    "sweep",
    "table_one",
    "trajectory",
)
_HOMES = {
    "Comparison": "comparison",
    "HeavyBallFlow": "gradient_flow",
    "KernelFlow": "gradient_flow",
    "LayerwiseKernel": "ntk",
    "LinearisedFlow": "gradient_flow",
    "ModifiedFlow": "gradient_flow",
    "Phase": "trajectory",
    "Trajectory": "trajectory",
    "WeightFlow": "gradient_flow",
    "compare": "comparison",
    "empirical_ntk": "ntk",
    "infinite_ntk": "ntk",
    "layerwise_infinite_ntk": "ntk",
    "layerwise_ntk": "ntk",
    "per_sample_gradient_norms": "ntk",
    "plan": "_plan",
    "recursion": "gradient_flow",
    "solve": "gradient_flow",
    "two_time_kernel": "ntk",
}

__version__ = "0.1.0"
__all__ = sorted([*_MODULES, *_HOMES, "enable_x64"])


def enable_x64() -> None:
    """Make float64 JAX's default, for the whole process; call it before making arrays.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.enable_x64()
    """
    import jax

    jax.config.update("jax_enable_x64", True)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ntkdp.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"ntkdp.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ntkdp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
