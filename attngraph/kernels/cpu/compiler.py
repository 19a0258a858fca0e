"""How Numba compiles the kernels, and where their code is kept: until a source that any of them is made of changes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

if config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set, and kernels have to be compiled: unset it")


def _digest() -> str:
    """Of all sources from which compiled functions take code or constants."""
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), here.parent / "dropout.py"]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources if path.is_file())).hexdigest()


_SOURCES = _digest()


class _KeptCode(FunctionCache):
    """Numba's cache of a function, which knows its own file alone, stamped with all sources.

    Numba's version, and the CPU with its features, are in Numba's own keys.
    """

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, _SOURCES)

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        return sig, codegen.magic_tuple(), _name(self._py_func)


def _name(function: Callable[..., Any]) -> tuple:
    """What tells a function from others of the same sources: with what it encloses, compiled functions by their names.

    Numba's own key has a number for each of those, drawn anew in each process.
    """
    enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
    return function.__qualname__, *(_name(each.py_func) if isinstance(each, Dispatcher) else each for each in enclosed)


def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name that no other of these sources has, whatever both enclose.

    The symbols of compiled code are made of it, and of a number that each process draws anew: kept code of one name
    and number would be taken for that of another function.
    """
    if function.__closure__:
        digest = hashlib.sha256(repr(_name(function)).encode()).hexdigest()[:16]
        function.__qualname__ = f"{function.__qualname__}_{digest}"
    return function


def _probe() -> int:
    return 0


def _is_writable() -> bool:
    """Whether Numba finds a folder for compiled code: beside these files, in the user's home, or NUMBA_CACHE_DIR."""
    try:
        _KeptCode(_probe)
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"no place to keep compiled kernels ({error}): every process compiles them anew, which takes seconds; "
            f"let NUMBA_CACHE_DIR name a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


_KEEPS = _is_writable()


def compiled_with(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function compiled by Numba with these options, without the GIL; its code is kept."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True, **options)(renamed(function))
        if _KEEPS:
            dispatcher._cache = _KeptCode(function)
        return dispatcher

    return decorate
