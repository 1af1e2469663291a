"""Quantized products on slices of TPUs, for `benchmarks.spmd_aot`.

Each maker returns `(fn, avals)`: the avals have shardings over a mesh of described devices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.layout import layout_of
from jaxquant.core.placement import placed_structs
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.primitives.dots import bind_dots
from jaxquant.core.qtensor import QTensor
from jaxquant.core.quantize_array import quantize_array

SPECS = {
    "column": P(None, "model"),
    "row": P("model", None),
    "both": P("data", "model"),
    "whole": P(None, None),
}
_MATMUL = (((1,), (0,)), ((), ()))


def mesh_of(devices: Any, model: int, kind: str) -> Mesh:
    """Axes (data, model), `model` of them in a row."""
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    return Mesh(np.asarray(devices).reshape(-1, model), ("data", "model"), axis_types=types)


def weight(mesh: Mesh, shape: tuple[int, ...], spec: P, qtype: str, block: Any) -> QTensor:
    """A QTensor of ShapeDtypeStructs that stands for bfloat16, split like `spec`."""
    own = NamedSharding(mesh, spec)
    struct = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    w = placed_structs(jax.eval_shape(lambda w: quantize_array(w, qtype, block), struct), own)
    if mesh.axis_types[0] is AxisType.Auto:
        w = w.replace(mesh_layout=layout_of(own, len(shape), ("data",)))
    return w


def product(
    devices: Any,
    m: int,
    k: int,
    n: int,
    qtype: str = "int4",
    group: int = 128,
    parallel: str = "column",
    model: int = 2,
    kind: str = "auto",
    backward: bool = False,
    siblings: int = 1,
) -> tuple[Any, Any]:
    """One product, or several of one input; `backward`: the cotangent of x besides."""
    mesh, spec = mesh_of(devices, model, kind), SPECS[parallel]
    w = weight(mesh, (k, n), spec, qtype, (group or k, 1))
    rows = None if parallel == "both" and kind == "explicit" else "data"
    x_spec = P(rows, None if spec[0] == rows else spec[0])
    out_spec = P(rows, spec[1])
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16, sharding=NamedSharding(mesh, x_spec))
    out_sharding = NamedSharding(mesh, out_spec) if kind == "explicit" else None

    def fn(x: jax.Array, *weights: QTensor) -> list[jax.Array]:
        if siblings == 1:
            return [quantized_dot_general(x, *weights, _MATMUL, out_sharding=out_sharding)]
        return bind_dots(
            x,
            weights,
            act=None,
            dimension_numbers=_MATMUL,
            weight_side="rhs",
            precision=None,
            preferred_element_type=None,
            out_shardings=(out_sharding,) * siblings,
        )

    def back(x: jax.Array, cotangents: list[jax.Array], *weights: QTensor) -> Any:
        return jax.vjp(lambda x: fn(x, *weights), x)[1](cotangents)

    weights = (w,) * siblings
    if not backward:
        return fn, (x, *weights)
    out = jax.ShapeDtypeStruct((m, n), jnp.bfloat16, sharding=NamedSharding(mesh, out_spec))
    return back, (x, [out] * siblings, *weights)
