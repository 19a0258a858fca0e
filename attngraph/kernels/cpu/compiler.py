"""How Numba compiles the kernels, and where their code is kept."""

from __future__ import annotations

import warnings

from numba import config, njit

if config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set, and kernels have to be compiled: unset it")


def _probe() -> int:
    return 0


def _is_writable() -> bool:
    """Whether Numba finds a folder for compiled code: beside these files, in the user's home, or NUMBA_CACHE_DIR."""
    try:
        njit(cache=True)(_probe)
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"no place to keep compiled kernels ({error}): every process compiles them anew, which takes seconds; "
            f"let NUMBA_CACHE_DIR name a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


CACHE = _is_writable()
