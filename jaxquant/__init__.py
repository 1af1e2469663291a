"""jaxquant: quantization for JAX models.

Decorate a Flax model or wrap any JAX function, quantize its weights, measure what that cost, save
the result. This module only names the public things; each is loaded at its first use, so that
`import jaxquant` and `jaxquant --help` do not wait for Flax and Orbax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxquant.algorithms.calibrate import calibrate as calibrate
    from jaxquant.algorithms.compiled import Compiled as Compiled
    from jaxquant.algorithms.compiled import compile as compile
    from jaxquant.algorithms.explain import explain as explain
    from jaxquant.algorithms.prepare import prepare as prepare
    from jaxquant.algorithms.ptq import ptq as ptq
    from jaxquant.algorithms.qat import qat as qat
    from jaxquant.algorithms.transforms.explain_folds import explain_folds as explain_folds
    from jaxquant.algorithms.transforms.rotate import rotate as rotate
    from jaxquant.algorithms.transforms.smooth import smooth as smooth
    from jaxquant.core.qtensor import QTensor as QTensor
    from jaxquant.core.qtypes import QType as QType
    from jaxquant.core.qtypes import get_qtype as get_qtype
    from jaxquant.core.quantize_array import quantize_array as quantize_array
    from jaxquant.core.recipe import PRESETS as PRESETS
    from jaxquant.core.recipe import Recipe as Recipe
    from jaxquant.core.recipe import Rule as Rule
    from jaxquant.core.recipe import get_recipe as get_recipe
    from jaxquant.core.remat_policy import as_dot_policy as as_dot_policy
    from jaxquant.core.schemes import ActScheme as ActScheme
    from jaxquant.core.schemes import WeightScheme as WeightScheme
    from jaxquant.core.transforms import Rotate as Rotate
    from jaxquant.core.transforms import Smooth as Smooth
    from jaxquant.evaluate.compare import compare as compare
    from jaxquant.evaluate.latency import LatencyOptions as LatencyOptions
    from jaxquant.evaluate.report import Report as Report
    from jaxquant.frontends.decorator import quantize as quantize
    from jaxquant.frontends.dequantize import dequantize as dequantize
    from jaxquant.frontends.function import transform as transform
    from jaxquant.frontends.with_shardings import with_shardings as with_shardings
    from jaxquant.io.manifest import CheckpointError as CheckpointError
    from jaxquant.io.orbax import inspect as inspect
    from jaxquant.io.orbax import restore as restore
    from jaxquant.io.orbax import save as save
    from jaxquant.pallas_kernels.dispatch import Place as Place
    from jaxquant.passes.observe_rules import Observe as Observe
    from jaxquant.passes.plan import Plan as Plan
    from jaxquant.passes.rewrite import StrictError as StrictError

__version__ = "0.1.0"

_EXPORTS = {
    "calibrate": "jaxquant.algorithms.calibrate",
    "Compiled": "jaxquant.algorithms.compiled",
    "compile": "jaxquant.algorithms.compiled",
    "explain": "jaxquant.algorithms.explain",
    "prepare": "jaxquant.algorithms.prepare",
    "ptq": "jaxquant.algorithms.ptq",
    "qat": "jaxquant.algorithms.qat",
    "explain_folds": "jaxquant.algorithms.transforms.explain_folds",
    "rotate": "jaxquant.algorithms.transforms.rotate",
    "smooth": "jaxquant.algorithms.transforms.smooth",
    "QTensor": "jaxquant.core.qtensor",
    "QType": "jaxquant.core.qtypes",
    "get_qtype": "jaxquant.core.qtypes",
    "quantize_array": "jaxquant.core.quantize_array",
    "PRESETS": "jaxquant.core.recipe",
    "Recipe": "jaxquant.core.recipe",
    "Rule": "jaxquant.core.recipe",
    "get_recipe": "jaxquant.core.recipe",
    "as_dot_policy": "jaxquant.core.remat_policy",
    "ActScheme": "jaxquant.core.schemes",
    "WeightScheme": "jaxquant.core.schemes",
    "Rotate": "jaxquant.core.transforms",
    "Smooth": "jaxquant.core.transforms",
    "compare": "jaxquant.evaluate.compare",
    "LatencyOptions": "jaxquant.evaluate.latency",
    "Report": "jaxquant.evaluate.report",
    "quantize": "jaxquant.frontends.decorator",
    "dequantize": "jaxquant.frontends.dequantize",
    "transform": "jaxquant.frontends.function",
    "with_shardings": "jaxquant.frontends.with_shardings",
    "CheckpointError": "jaxquant.io.manifest",
    "inspect": "jaxquant.io.orbax",
    "restore": "jaxquant.io.orbax",
    "save": "jaxquant.io.orbax",
    "Place": "jaxquant.pallas_kernels.dispatch",
    "Observe": "jaxquant.passes.observe_rules",
    "Plan": "jaxquant.passes.plan",
    "StrictError": "jaxquant.passes.rewrite",
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
    return sorted(__all__)
