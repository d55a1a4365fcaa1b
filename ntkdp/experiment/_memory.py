"""The memory that a whole comparison or sweep needs, checked before its kernels are made."""

from collections.abc import Iterable

import jax

from ntkdp._backend import compiled, memory
from ntkdp._gradients import groups
from ntkdp.experiment._problem import Problem

#: Copies of the parameters that a run holds.
_RUN_COPIES = 7
#: Copies of the parameters that the exact flow holds.
_FLOW_COPIES = 14
#: Copies of the outputs that a drawn run holds.
_DRAW_COPIES = 8
#: Matrices that are alive during the computation of the root of a noise covariance.
_ROOT_MATRICES = 4
#: Bytes for each step of a run: its time, and the variance that noise has added to the weights.
_STEP_BYTES = 64
_WAYS_OUT = (
    "use fewer samples (data.n_train, data.n_test), predictions, runs (training.n_seeds, "
    "training.n_predicted) or steps, or dtype = 'float32'"
)


def require_memory(
    problem: Problem,
    kinds: Iterable[str],
    *,
    by_layer: bool,
    whole: bool,
    noisy: bool,
    exact: bool,
    n_seeds: int,
    n_drawn: int,
    steps: int,
) -> None:
    """Raise unless there is room for all kernels at once, with the largest piece of work on them.

    ``kinds`` names the kernels that are kept; those of a linear head are features. ``whole`` means
    that each is a kernel of training and
    test points with each other, and ``noisy`` that noise is drawn from it.

    Raises
    ------
    MemoryError
        With the bytes needed, the bytes available and the ways out.
    """
    n, n_outputs = problem.outputs.shape
    n_points = n + problem.n_public + len(problem.test_x)
    itemsize = problem.outputs.dtype.itemsize
    n_terms = groups.resolve(problem.params).size if by_layer else 1
    kept = matrix_entries = root_entries = 0
    if problem.model.features is not None and problem.public is None:
        features = jax.eval_shape(problem.model.features, problem.x)
        kept, kinds = 2 * n_points * features.shape[1], ()
    for kind in kinds:
        block = n_outputs**2 if kind == "empirical" else 1
        driving = n_terms * block * (n + problem.n_public) * n_points
        kept += driving + (n_terms * block * n_points**2 if whole else 0)
        matrix_entries = max(matrix_entries, driving)
        if noisy:
            rows = n_points if whole else n
            root_entries = max(root_entries, _ROOT_MATRICES * block * rows**2)
    params = compiled.bytes_of(problem.params)
    outputs = problem.outputs.nbytes + problem.test_outputs.nbytes
    work = max(
        (matrix_entries + root_entries) * itemsize + n_drawn * _DRAW_COPIES * outputs,
        n_seeds * _RUN_COPIES * params,
        _FLOW_COPIES * params if exact else 0,
    )
    memory.require(kept * itemsize + work + _STEP_BYTES * steps, "all of the work", _WAYS_OUT)
