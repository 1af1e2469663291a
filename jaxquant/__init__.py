"""jaxquant: quantization for JAX models.

Decorate a Flax model or wrap any JAX function, quantize its weights, measure what that cost, save
the result. This module only names the public things; each is loaded at its first use, so that
`import jaxquant` and `jaxquant --help` do not wait for Flax and Orbax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxquant.core.qtensor import QTensor as QTensor
    from jaxquant.core.recipe import PRESETS as PRESETS
    from jaxquant.core.recipe import Recipe as Recipe
    from jaxquant.core.recipe import get_recipe as get_recipe

__version__ = "0.1.0"

_EXPORTS = {
    "QTensor": "jaxquant.core.qtensor",
    "PRESETS": "jaxquant.core.recipe",
    "Recipe": "jaxquant.core.recipe",
    "get_recipe": "jaxquant.core.recipe",
}
"""Public name -> module that defines it. The block above says the same to type checkers."""

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
