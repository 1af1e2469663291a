"""Structural operations on QTensors: codes and scales are moved, no number changes.

Called by the rewriter's rules, where a jaxpr transposes, reshapes, slices or gathers a weight on
its way to a matmul. Each takes a QTensor and returns one that stands for exactly the same
operation on the float array, or raises `Unstructured` with the reason, upon which the caller
dequantizes and reports it.
"""

from jaxquant.core.structure.basic import (
    Unstructured,
    astype,
    broadcast_in_dim,
    expand_dims,
    rev,
    scale_by,
    squeeze,
    transpose,
    unpacked,
)
from jaxquant.core.structure.collect import all_gather
from jaxquant.core.structure.gather import gather
from jaxquant.core.structure.reshape import reshape
from jaxquant.core.structure.slicing import concatenate, dynamic_slice, slice

__all__ = [
    "Unstructured",
    "all_gather",
    "astype",
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
    "expand_dims",
    "gather",
    "reshape",
    "rev",
    "scale_by",
    "slice",
    "squeeze",
    "transpose",
    "unpacked",
]
