"""Imports of packages that only the demo needs."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str) -> ModuleType:
    """Imports an optional package.

    Raises:
      ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"the demo model needs the package {package!r}; install it with: "
            "pip install 'jaxquant[demo]'"
        ) from error
