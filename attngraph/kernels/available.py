"""Which kernels can be used here: found when they are first asked for, as imports take time."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib import import_module


@lru_cache
def why_not(module: str, package: str) -> str | None:
    """Why a module can't be imported, though the package that it needs is there; a warning says so, once a package."""
    try:
        import_module(module)
    except Exception as error:
        reason = f"{package} is installed, but can't be used ({type(error).__name__}: {error})"
        _warn(reason)
        return reason
    return None


@lru_cache  # as several modules need one package
def _warn(reason: str) -> None:
    warnings.warn(f"{reason}: attngraph goes on without, which may be slower", RuntimeWarning, stacklevel=3)
