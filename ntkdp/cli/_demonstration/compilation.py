"""The seconds that JAX spends on compiling."""

from types import TracebackType

import jax

#: The parts of a compilation. Tracing is left out: its seconds are told several times, for a
#: program and for those inside it.
_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Compilation:
    """Adds up the seconds of all compilations while its body runs, over all threads."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "Compilation":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _EVENTS:
            self.seconds += duration_secs
