"""Ranges: which interval of a block's values its codes are spread over.

A range is a hashable function (w, block_shape, qtype, symmetric) -> (lo, hi), float32 with one
value a block, that `jaxquant.core.quantize_array` traces into its program. It must not need
memory of the weight's size beside the weight, nor know what the axes mean.
"""

from jaxquant.algorithms.ranges.mse import mse_range
from jaxquant.algorithms.ranges.percentile import PercentileRange
from jaxquant.core.quantize_array import RangeFn, absmax_range

__all__ = ["PercentileRange", "RangeFn", "absmax_range", "mse_range"]
