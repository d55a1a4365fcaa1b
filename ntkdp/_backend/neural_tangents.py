"""neural-tangents 0.6.5 on today's JAX, without TensorFlow.

Importing this module is cheap: it only installs a finder for the name ``neural_tangents``, so that
``import neural_tangents`` works afterwards, for users too. JAX and SciPy are left as they are. Each
module of neural-tangents runs with an ``__import__`` of its own, which returns views of those few
of their modules in which names have moved, and otherwise the real module. Its
``experimental`` package, the only part that needs TensorFlow, is replaced by an explanation.
Layers that are made of others keep them: `composition`.

Use it as ``neural_tangents.stax``: the first attribute access imports neural-tangents.
"""

import builtins
import functools
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_loader
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import numpy as np

Result = TypeVar("Result")

_PACKAGE = "neural_tangents"
_EXPERIMENTAL = "neural_tangents.experimental"
_COMBINATORS = "neural_tangents._src.stax.combinators"
#: The attribute of a kernel function that has the layers which it is made of.
_COMPOSITION = "ntkdp_composition"


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PACKAGE), name)


class _View(ModuleType):
    """A view of a module: some names are replaced, and the others are looked up in its homes."""

    def __init__(
        self, name: str, replaced: Mapping[str, object], homes: Sequence[ModuleType] = ()
    ) -> None:
        super().__init__(name)
        self.__dict__.update(replaced)
        self.__dict__["_homes"] = tuple(homes)

    def __getattr__(self, name: str) -> object:
        for home in self.__dict__["_homes"]:
            try:
                return getattr(home, name)
            except AttributeError:
                continue
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _safe_zip(*iterables: Iterable[object]) -> list[tuple[object, ...]]:
    return list(zip(*iterables, strict=True))


def _safe_map(function: Callable[..., Result], *iterables: Iterable[object]) -> list[Result]:
    return [function(*arguments) for arguments in _safe_zip(*iterables)]


@functools.cache
def _views() -> dict[str, ModuleType]:
    """JAX and SciPy modules as neural-tangents expects them, by name."""
    import jax
    import jax.extend.core
    import jax.interpreters.ad
    import jax.numpy
    import scipy.linalg

    def eigvalsh(matrix: "np.ndarray", eigvals: tuple[int, int]) -> "np.ndarray":
        eigenvalues: np.ndarray = scipy.linalg.eigvalsh(matrix, subset_by_index=eigvals)
        return eigenvalues

    def size(array: jax.Array | jax.ShapeDtypeStruct, axis: int | None = None) -> int:
        if isinstance(array, jax.ShapeDtypeStruct):
            return math.prod(array.shape)
        return jax.numpy.size(array, axis)

    numpy = _View("jax.numpy", {"size": size}, [jax.numpy])
    util = _View("jax.util", {"safe_map": _safe_map, "safe_zip": _safe_zip})
    # Evaluate now unless an operand is traced: what `eval_context` meant up to JAX 0.4.35.
    evaluation = {"eval_context": jax.ensure_compile_time_eval}
    core = _View("jax.core", evaluation, [jax.extend.core, jax.core])
    # Only a key to file a rule under: newer JAX no longer emits this primitive.
    zeros_like = {"zeros_like_p": jax.extend.core.Primitive("zeros_like")}
    ad = _View("jax.interpreters.ad", zeros_like, [jax.interpreters.ad])
    interpreters = _View("jax.interpreters", {"ad": ad}, [jax.interpreters])
    replaced = {"core": core, "interpreters": interpreters, "numpy": numpy, "util": util}
    top = _View("jax", replaced, [jax])
    linalg = _View("scipy.linalg", {"eigvalsh": eigvalsh}, [scipy.linalg])
    scipy_top = _View("scipy", {"linalg": linalg}, [scipy])
    views = (top, core, numpy, util, interpreters, ad, linalg, scipy_top)
    return {view.__name__: view for view in views}


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """``__import__`` with views in place of their modules."""
    top = name.partition(".")[0]
    if level == 0 and top in ("jax", "scipy"):
        view = _views().get(name if fromlist else top)
        if view is not None:
            if name not in _views():
                importlib.import_module(name)
            return view
    return builtins.__import__(name, globals, locals, fromlist or (), level)


def composition(kernel_fn: Callable[..., Any]) -> tuple[str, tuple[Any, ...]] | None:
    """How a layer with this ``kernel_fn`` is made of others, or None if it is not.

    The name of the function, "serial", "parallel" or "repeat", and its arguments.
    """
    found: tuple[str, tuple[Any, ...]] | None = getattr(kernel_fn, _COMPOSITION, None)
    return found


def _recorded(combine: Callable[..., Any]) -> Callable[..., Any]:
    """A function that combines layers and leaves them where `composition` finds them."""

    signature = inspect.signature(combine)

    @functools.wraps(combine)
    def combined(*arguments: Any, **named: Any) -> Any:
        made = combine(*arguments, **named)
        parts = signature.bind(*arguments, **named).args
        setattr(made[2], _COMPOSITION, (combine.__name__, parts))
        return made

    return combined


class _PatchedLoader(SourceFileLoader):
    """Runs a module of neural-tangents with the changed ``__import__``."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", SyntaxWarning)
            super().exec_module(module)
        if module.__name__ == _COMBINATORS:
            for name in ("serial", "parallel", "repeat"):
                setattr(module, name, _recorded(getattr(module, name)))


class _Unavailable:
    """Stands in for ``neural_tangents.experimental``, so that TensorFlow is never imported."""

    # No class of importlib.abc, which is slow to import: every import of ntkdp passes here.
    def create_module(self, spec: ModuleSpec) -> None:
        """The usual kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        def explain(name: str) -> NoReturn:
            if name.startswith("__"):
                raise AttributeError(f"module {_EXPERIMENTAL!r} has no attribute {name!r}")
            raise ImportError(
                f"{_EXPERIMENTAL}.{name} is not available: it converts TensorFlow models, and "
                "ntkdp loads neural-tangents without TensorFlow. Use a JAX model, for instance "
                "ntkdp.models.from_flax, or import neural_tangents in a process without ntkdp"
            )

        module.__dict__["__getattr__"] = explain


class _Finder:
    """Finds neural-tangents as usual, and has it loaded by the loaders above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != _PACKAGE:
            return None
        if fullname == _EXPERIMENTAL:
            return spec_from_loader(fullname, _Unavailable())  # type: ignore[arg-type]
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _PatchedLoader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder())
