"""neural-tangents: the whole kernel, by its structured derivatives and by its other modes."""

try:
    import neural_tangents
except ImportError:  # today's JAX, where only ntkdp's changes let it in
    from ntkdp._backend import neural_tangents as neural_tangents
from collections.abc import Callable
from functools import partial

import jax
import problems
from contenders.jax_models import kernel_problem

_MODES = {"jacobian contraction": 1, "NTK-vector products": 2, "structured derivatives": 3}


def kernel(case: str, mode: int) -> Callable[[], jax.Array]:
    """``empirical_ntk_fn`` with all outputs."""
    apply_fn, params, x = kernel_problem(case)
    compute = neural_tangents.empirical_ntk_fn(
        lambda params, x: apply_fn(params, x),
        trace_axes=(),
        diagonal_axes=(),
        vmap_axes=0,
        implementation=mode,
    )
    # The parameters are an argument: as constants they make its structured mode 100 times slower.
    compiled = jax.jit(lambda params, x: compute(x, None, params))
    return lambda: compiled(params, x).block_until_ready()


CASES = {
    f"{case}, {name}": partial(kernel, case, mode)
    for case in (*problems.MLP_WIDTHS, problems.KERNEL_CNN)
    for name, mode in _MODES.items()
}
