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

import jaxquant as jq
from jaxquant.core.layout import layout_of
from jaxquant.core.placement import placed_structs
from jaxquant.core.primitives import quantized_dot_general, quantized_ragged_dot
from jaxquant.core.primitives.dots import bind_dots
from jaxquant.core.qtensor import QTensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.models import next_token_loss, shipped

SPECS = {
    "column": P(None, "model"),
    "row": P("model", None),
    "both": P("data", "model"),
    "whole": P(None, None),
}
# Of the shipped decoder's parameters, by the names in their paths; the others are whole.
DECODER = {
    "embedding": P("model", None),
    "query": P(None, None, "model", None),
    "key": P(None, None, "model", None),
    "value": P(None, None, "model", None),
    "out": P(None, "model", None, None),
    "gate": P(None, None, "model"),
    "up": P(None, None, "model"),
    "down": P(None, "model", None),
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
            out_shardings=(None,) * siblings,
        )

    def back(x: jax.Array, cotangents: list[jax.Array], *weights: QTensor) -> Any:
        return jax.vjp(lambda x: fn(x, *weights), x)[1](cotangents)

    weights = (w,) * siblings
    if not backward:
        return fn, (x, *weights)
    out = jax.ShapeDtypeStruct((m, n), jnp.bfloat16, sharding=NamedSharding(mesh, out_spec))
    return back, (x, [out] * siblings, *weights)


def experts(
    devices: Any,
    m: int,
    k: int,
    n: int,
    count: int,
    group: int = 128,
    model: int = 2,
    backward: bool = False,
) -> tuple[Any, Any]:
    """Rows grouped by expert, the experts over "model" and the rows over "data"."""
    mesh = mesh_of(devices, model, "auto")
    w = weight(mesh, (count, k, n), P("model", None, None), "int4", (1, group, 1))
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16, sharding=NamedSharding(mesh, P("data", None)))
    sizes = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=NamedSharding(mesh, P()))
    if not backward:
        return quantized_ragged_dot, (x, w, sizes)

    def summed(x: jax.Array, w: QTensor, sizes: jax.Array) -> jax.Array:
        return jnp.sum(quantized_ragged_dot(x, w, sizes).astype(jnp.float32))

    return jax.grad(summed), (x, w, sizes)


def gathered(
    devices: Any, m: int, k: int, n: int, qtype: str = "int4", group: int = 128, model: int = 2
) -> tuple[Any, Any]:
    """Fully sharded data parallelism in the user's own shard_map: rows of w over "data"."""
    mesh = mesh_of(devices, model, "auto")
    w = weight(mesh, (k, n), P("data", None), qtype, (group, 1))
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16, sharding=NamedSharding(mesh, P("data", None)))

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ jax.lax.all_gather(w, "data", axis=0, tiled=True)

    fn = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    return jq.transform(lambda w, x: fn(x, w)), (w, x)


def decoder(
    devices: Any, recipe: str = "w4a16_g64", model: int = 2, batch: int = 64, backward: bool = False
) -> tuple[Any, Any]:
    """The shipped decoder, quantized where it lies; `backward`: a gradient through all of it."""
    mesh = mesh_of(devices, model, "auto")
    net, variables = shipped.load(dtype=jnp.bfloat16)
    net = jq.quantize(recipe)(net)

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        spec = decoder_spec(path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.tree_util.tree_map_with_path(placed, variables)
    own = NamedSharding(mesh, P("data", None))
    tokens = jax.ShapeDtypeStruct((batch, 17), jnp.int32, sharding=own)
    qvars = jq.with_shardings(jq.ptq(net, shapes, tokens, progress=False), batch_axes="data")
    if not backward:
        return net.apply, (qvars, tokens)

    def loss(scale: jax.Array, variables: Any, tokens: jax.Array) -> jax.Array:
        params = variables["params"]
        layers = {**params["layers"], "attention_norm": {"scale": scale}}
        logits = net.apply({"params": {**params, "layers": layers}}, tokens)
        return next_token_loss(logits, tokens).mean()

    scale = qvars["params"]["layers"]["attention_norm"]["scale"]
    return jax.grad(loss), (scale, qvars, tokens)


def decoder_spec(path: Any) -> P:
    """How a parameter of the decoder is split, by its path in the tree."""
    names = {getattr(key, "key", None) for key in path}
    return next((spec for name, spec in DECODER.items() if name in names), P())
