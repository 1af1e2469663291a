"""One product in every format: random weights, as a program that `benchmarks.gpu_timing` times.

Called by `benchmarks.gpu`. Values are random codes and scales: what is timed does not depend on
them, and nothing has to be quantized first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxquant as jq
from benchmarks.gpu_timing import Timer, Timing, program, rotation
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.qtensor import QTensor, make_qtensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels import packing
from jaxquant.pallas_kernels.dispatch import Implementation

PLAIN = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is stored and its input treated.

    Attributes:
      qtype: name of the weight's type.
      group: contracted values that share a scale; None for a scale a column.
      act: type that x is quantized to, with a scale a row; None for bfloat16.
      zero_point: whether there are zero points.
    """

    qtype: str
    group: int | None = None
    act: str | None = None
    zero_point: bool = False


FORMATS = {
    "w4a16 g128": Format("int4", 128),
    "w8a16": Format("int8"),
    "w2a16 g64": Format("int2", 64),
    "w8a8": Format("int8", None, "int8"),
    "fp8": Format("float8_e4m3", None, "float8_e4m3"),
    "nf4 g64": Format("nf4", 64),
    "w4a8 g128": Format("int4", 128, "int8"),
    "w4a16 g128 zero": Format("int4", 128, None, True),
    "w4a16": Format("int4"),
    "w3a16 g128": Format("int3", 128),
    "mxfp4": Format("mxfp4", 32),
    "bf16 x fp8": Format("float8_e4m3"),
}


def random_weight(key: Any, k: int, n: int, form: Format, platform: str | None) -> QTensor:
    """A weight [k, n] of random codes, laid out for the platform; None leaves it as it is."""
    qtype = get_qtype(form.qtype)
    bits, scales = jax.random.split(key)
    group = form.group or k
    if qtype.kind == "float":
        codes = jax.random.normal(bits, (k, n), jnp.bfloat16).astype(jnp.float8_e4m3fn)
    else:
        low, high = (-8, 8) if qtype.kind == "table" else (int(qtype.qmin), int(qtype.qmax) + 1)
        codes = jax.random.randint(bits, (k, n), low, high, jnp.int8)
        if qtype.step == 2:
            codes = codes | 1  # the odd grid
        codes = packing.pack(codes, qtype.bits, 0) if qtype.packed else codes.astype(qtype.storage)
    scale = jax.random.uniform(scales, (k // group, n), jnp.float32, 0.5, 1.5)
    scale = scale.astype(qtype.scale_dtype or "float32")
    zero = jnp.ones(scale.shape, jnp.int8) if form.zero_point else None
    act = None if form.act is None else jq.ActScheme(form.act)
    weight = make_qtensor(
        codes, scale, zero, qtype=qtype, dtype=jnp.bfloat16, act=act, contracted=(-2,),
        packed_axis=-2 if qtype.packed else None, packed_length=k if qtype.packed else None,
    )  # fmt: skip
    return weight if platform is None else jq.prepare(weight, platform)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product to be timed.

    Attributes:
      k: contracted values.
      n: columns.
      m: rows.
      form: a key of `FORMATS`, or "bf16".
      route: "pallas", "xla", or "bf16" for the float product.
    """

    k: int
    n: int
    m: int
    form: str
    route: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
      case: the case.
      timing: None where nothing was timed.
      bytes: moved once: weight, x, result.
      note: why there is no timing, else "".
    """

    case: Case
    timing: Timing | None
    bytes: int
    note: str = ""


@functools.lru_cache(maxsize=2)
def weights(k: int, n: int, form: str, platform: str) -> list[Any]:
    """As many weights as no cache holds."""
    make: Any
    if form == "bf16":
        make = jax.jit(lambda key: jax.random.normal(key, (k, n), jnp.bfloat16))
    else:
        make = functools.partial(random_weight, k=k, n=n, form=FORMATS[form], platform=platform)
    keys = jax.random.split(jax.random.key(0), _count(k, n, form))
    return [jax.block_until_ready(make(key)) for key in keys]


def _count(k: int, n: int, form: str) -> int:
    bits = 16 if form == "bf16" else get_qtype(FORMATS[form].qtype).bits
    return rotation(k * n * bits // 8)


def product(x: jax.Array, w: Any, implementation: Implementation | None) -> jax.Array:
    """The result [m, n] in bfloat16; floats multiply as they are."""
    if isinstance(w, QTensor):
        return quantized_dot_general(x, w, PLAIN, implementation=implementation)
    return lax.dot_general(x, w, PLAIN)


def time_case(case: Case, timer: Timer, platform: str) -> Result:
    """Compiles and times a case; what does not fit or compile is the result's note."""
    ws = weights(case.k, case.n, case.form, platform)
    keys = jax.random.split(jax.random.key(1), len(ws))
    xs = [jax.random.normal(key, (case.m, case.k), jnp.bfloat16) for key in keys]
    sets: Sequence[Any] = list(zip(xs, ws, strict=True))
    least = 2 * case.m * (case.k + case.n) + sum(getattr(leaf, "nbytes", 0) for leaf in (ws[0],))
    forced: Any = {"pallas": "pallas", "xla": "xla", "bf16": None}[case.route]
    fn = functools.partial(product, implementation=forced)
    try:
        compiled = jax.jit(program(fn)).lower(sets).compile()
        timing = timer(compiled, (sets,), len(sets))
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
        return Result(case, None, least, f"{type(error).__name__}: {error}"[:300])
    return Result(case, timing, least)
