"""Memory that a whole comparison or sweep takes, asked before its kernels are made."""

from collections.abc import Iterable

from ntkdp._backend import memory, program_memory
from ntkdp._gradients import groups
from ntkdp.experiment._problem import Problem

#: Copies of its parameters that a run holds, those of the exact flow, and copies of its outputs
#: that a drawn run holds.
_OF_A_RUN = 7
_OF_THE_EXACT_FLOW = 14
_OF_A_DRAW = 8
#: Matrices that are alive while the root of a noise covariance is found.
_OF_A_ROOT = 4
#: Bytes for each step of a run: times, and what noise has added to the weights by then.
_OF_A_STEP = 64
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

    ``kinds`` are those of the kernels that are kept, ``whole`` says that they are of training and
    test points with each other, and ``noisy`` that noise is drawn from them.

    Raises
    ------
    MemoryError
        With the bytes needed, the bytes available and the ways out.
    """
    n, n_outputs = problem.outputs.shape
    n_points = n + len(problem.test_x)
    itemsize = problem.outputs.dtype.itemsize
    n_terms = groups.resolve(problem.params).size if by_layer else 1
    kept = as_matrices = of_root = 0
    for kind in kinds:
        block = n_outputs**2 if kind == "empirical" else 1
        driving = n_terms * block * n * n_points
        kept += driving + (n_terms * block * n_points**2 if whole else 0)
        as_matrices = max(as_matrices, driving)
        if noisy:
            rows = n_points if whole else n
            of_root = max(of_root, _OF_A_ROOT * block * rows**2)
    params = program_memory.bytes_of(problem.params)
    outputs = problem.outputs.nbytes + problem.test_outputs.nbytes
    work = max(
        (as_matrices + of_root) * itemsize + n_drawn * _OF_A_DRAW * outputs,
        n_seeds * _OF_A_RUN * params,
        _OF_THE_EXACT_FLOW * params if exact else 0,
    )
    memory.require(kept * itemsize + work + _OF_A_STEP * steps, "all of the work", _WAYS_OUT)
