"""What compiling costs the tests beyond the compiler itself, made less."""

from typing import Any

from jax._src.interpreters import mlir
from jaxlib.mlir import ir

_make_context = mlir.make_ir_context
#: Constants of programs stay in a context, so that it is not kept for ever.
_PROGRAMS_PER_CONTEXT = 100


class _SharedContext:
    def __init__(self) -> None:
        self.uses_left = 0
        self.context: Any = None

    def __call__(self) -> Any:
        if ir.Context.current is not None:  # amid another program, which is not to be touched
            return _make_context()
        if self.uses_left == 0:
            self.context, self.uses_left = _make_context(), _PROGRAMS_PER_CONTEXT
        self.uses_left -= 1
        return self.context


def share_contexts() -> None:
    """One context of MLIR serves many programs.

    JAX makes a new one for each, which takes longer than all the rest for a program of one
    operation that was compiled before. The tests have tens of thousands of these.
    """
    vars(mlir)["make_ir_context"] = _SharedContext()
