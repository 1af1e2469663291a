"""The programs whose static cost is asked for: ours, bfloat16, and XLA's own lowering.

Makers for `benchmarks.tpu_aot.Job`: each returns `(fn, avals, steps)` from plain numbers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels import reference
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.problem import E2M1, STORAGE, MatmulProblem
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import choose_config
from jaxquant.pallas_kernels.tpu.matmul import quantized_matmul
from jaxquant.pallas_kernels.tpu.quantize_rows import quantize_rows

# Any 16 values but E2M1's will do: what a lookup costs does not depend on them.
_TABLE = tuple(i / 8 - 1 for i in range(16))


def ours(problem: dict[str, Any], config: dict[str, Any]) -> tuple[Any, Any, int]:
    """`quantized_matmul` with this problem and config (their fields)."""
    p, c = MatmulProblem(**problem), MatmulConfig(**config)
    struct = jax.ShapeDtypeStruct
    arrays = {
        "x": struct((p.m, p.k), jnp.dtype(p.x_dtype)),
        "codes": struct((p.code_rows, p.n), jnp.dtype(STORAGE[p.codes][0])),
        "scale": struct((p.groups, p.n), jnp.float32),
    }
    if p.zero_point:
        arrays["zero_point"] = struct((p.groups, p.n), jnp.int8)
    if p.x_scale:
        arrays["x_scale"] = struct((p.m, 1), jnp.float32)
    if p.bias:
        arrays["bias"] = struct((p.n,), jnp.float32)
    for name in ("gate", "residual"):
        if getattr(p, name):
            arrays[name] = struct((p.m, p.n), jnp.dtype(p.out_dtype))
    values = E2M1 if p.e2m1 else _TABLE
    table = values if p.codes == "table4" else None

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return quantized_matmul(**arrays, problem=p, config=c, table=table)

    steps = math.ceil(p.m / c.bm) * math.ceil(p.n / c.bn) * (p.k // c.bk)
    return fn, (arrays,), steps


def chosen(
    problem: dict[str, Any], chip: str, config: dict[str, Any] | None = None
) -> tuple[Any, Any, int]:
    """`ours` with this config, or the one that the heuristics choose for the chip.

    The steps are those of one of the chip's cores.
    """
    if config is None:
        config = dataclasses.asdict(choose_config(MatmulProblem(**problem), CHIPS[chip]))
    fn, avals, steps = ours(problem, config)
    return fn, avals, math.ceil(steps / CHIPS[chip].cores)


def bfloat16(m: int, k: int, n: int) -> tuple[Any, Any, int]:
    """The float product, as XLA does it: what quantization is to beat."""
    struct = jax.ShapeDtypeStruct
    avals = struct((m, k), jnp.bfloat16), struct((k, n), jnp.bfloat16)

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    return fn, avals, 0


def pushes(k: int, n: int) -> tuple[Any, Any, int]:
    """16 rows by bfloat16 weights, whole in VMEM: a kernel whose work is to push them."""
    struct, rows = jax.ShapeDtypeStruct, 16
    avals = struct((rows, k), jnp.bfloat16), struct((k, n), jnp.bfloat16)

    def kernel(x: Any, w: Any, out: Any) -> None:
        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return pl.pallas_call(kernel, out_shape=struct((rows, n), jnp.float32))(x, w)

    return fn, avals, 1


def product(m: int, k: int, n: int, qtype: str, group: int) -> tuple[Any, Any, int]:
    """`quantized_dot_general` on a QTensor: whatever dispatch makes of it."""
    struct = jax.ShapeDtypeStruct
    kind = get_qtype(qtype)
    weight = QTensor(
        struct((k, n), jnp.dtype(kind.storage)),
        struct((k // (group or k), n), jnp.float32),
        qtype=kind,
        dtype=jnp.dtype("bfloat16"),
    )

    def fn(x: jax.Array, w: QTensor) -> jax.Array:
        return quantized_dot_general(x, w, (((1,), (0,)), ((), ())))

    return fn, (struct((m, k), jnp.bfloat16), weight), 0


def xla(m: int, k: int, n: int, codes: str, group: int, x_dtype: str) -> tuple[Any, Any, int]:
    """XLA's own lowering of the same product: the reference, as dispatch takes it."""
    struct = jax.ShapeDtypeStruct
    act = ActQuant("int8", (1,)) if x_dtype == "int8" else None
    avals = (
        struct((m, k), jnp.bfloat16),
        struct((k, n), jnp.dtype(codes)),
        struct((k // (group or k), n), jnp.float32),
    )

    def fn(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return reference.dot_general(
            x,
            codes,
            scale,
            dimension_numbers=(((1,), (0,)), ((), ())),
            act=act,
            out_dtype=jnp.bfloat16,
        )

    return fn, avals, 0


def quantize_in_front(m: int, k: int, dtype: str, kernel: bool) -> tuple[Any, Any, int]:
    """Dynamic quantization of x a row, by the kernel or by XLA."""
    avals = (jax.ShapeDtypeStruct((m, k), jnp.bfloat16),)

    def fn(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if kernel:
            return quantize_rows(x, dtype)
        return quantize_activation(x, ActQuant(dtype, (1,)))

    return fn, avals, 1


def sharded(
    m: int, k: int, n: int, parallel: str, manual: bool, devices: Any
) -> tuple[Any, Any, int]:
    """An int4 product on a mesh (data, model): its weight split by "column" or by "row".

    `manual`: inside shard_map; else the partitioner's to split.
    """
    mesh = Mesh(np.asarray(devices).reshape(-1, 2), ("data", "model"))
    spec = P(None, "model") if parallel == "column" else P("model", None)
    fn, (x, w), _ = product(m, k, n, "int4", 64)

    def body(x: jax.Array, w: QTensor) -> jax.Array:
        out = fn(x, w)
        return jax.lax.psum(out, "model") if parallel == "row" else out

    def place(aval: Any, own: P) -> Any:
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=NamedSharding(mesh, own))

    x_spec, out_spec = P("data", spec[0]), P("data", spec[1])
    avals = place(x, x_spec), jax.tree.map(lambda leaf: place(leaf, spec), w)
    if not manual:
        return fn, avals, 0
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(x_spec, spec), out_specs=out_spec)
    return mapped, avals, 0
