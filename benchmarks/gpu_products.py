"""One product in every format: random weights, as a program that `benchmarks.gpu_timing` times.

Called by `benchmarks.gpu` and `gpu_tune`. Values are random codes and scales: what is timed does
not depend on them, and nothing has to be quantized first. A product may be of rows grouped by
expert, or LLM.int8()'s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxquant as jq
from benchmarks.gpu_oracle_grouped import two_parts
from benchmarks.gpu_timing import Timer, Timing, program, rotation
from jaxquant.core.primitives import quantized_dot_general, quantized_ragged_dot
from jaxquant.core.qtensor import QTensor, make_qtensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels import packing
from jaxquant.pallas_kernels.dispatch import Implementation
from jaxquant.pallas_kernels.gpu.chips import CHIPS, chip_of
from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.gpu.llm_int8 import (
    choose_outlier_config,
    find_outliers,
    llm_int8_matmul,
)

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
# int8 but for columns of x with outliers, which are found in the program that is timed.
LLM_INT8, CAPACITY = "llm.int8", 64
_OUTLIERS = 30


def random_weight(
    key: Any, k: int, n: int, form: Format, platform: str | None, experts: int = 0
) -> QTensor:
    """A weight [k, n], or experts [experts, k, n], of random codes, laid out for the platform.

    None leaves it as it is.
    """
    qtype = get_qtype(form.qtype)
    bits, scales = jax.random.split(key)
    group, lead = form.group or k, (experts,) * (experts > 0)
    if qtype.kind == "float":
        codes = jax.random.normal(bits, (*lead, k, n), jnp.bfloat16).astype(jnp.float8_e4m3fn)
    else:
        low, high = (-8, 8) if qtype.kind == "table" else (int(qtype.qmin), int(qtype.qmax) + 1)
        codes = jax.random.randint(bits, (*lead, k, n), low, high, jnp.int8)
        if qtype.step == 2:
            codes = codes | 1  # the odd grid
        packed = qtype.packed
        codes = (
            packing.pack(codes, qtype.bits, len(lead)) if packed else codes.astype(qtype.storage)
        )
    scale = jax.random.uniform(scales, (*lead, k // group, n), jnp.float32, 0.5, 1.5)
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
      m: rows; with experts, all of them.
      form: a key of `FORMATS`, `LLM_INT8`, or "bf16".
      route: "pallas", "xla", or "bf16" for the float product.
      experts: weights that rows are grouped by; 0 for one weight.
    """

    k: int
    n: int
    m: int
    form: str
    route: str
    experts: int = 0


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
def weights(k: int, n: int, form: str, platform: str, experts: int = 0) -> list[Any]:
    """As many weights as no cache holds."""
    make: Any
    lead = (experts,) * (experts > 0)
    if form == "bf16":
        make = jax.jit(lambda key: jax.random.normal(key, (*lead, k, n), jnp.bfloat16))
    elif form == LLM_INT8:
        make = functools.partial(_plain_int8, k=k, n=n)
    else:
        make = functools.partial(
            random_weight, k=k, n=n, form=FORMATS[form], platform=platform, experts=experts
        )
    bits = {"bf16": 16, LLM_INT8: 8}.get(form) or get_qtype(FORMATS[form].qtype).bits
    keys = jax.random.split(jax.random.key(0), rotation(k * n * bits // 8 * max(1, experts)))
    return [jax.block_until_ready(make(key)) for key in keys]


def _plain_int8(key: Any, k: int, n: int) -> dict[str, jax.Array]:
    """What LLM.int8()'s kernel takes: codes [n, k] and scales [1, n]."""
    codes = jax.random.randint(key, (n, k), -127, 128, jnp.int8)
    return {"codes": codes, "scale": jax.random.uniform(key, (1, n), jnp.float32, 0.5, 1.5)}


def sizes_of(case: Case) -> np.ndarray:
    """Rows of each expert, as a router without preferences deals them out."""
    even = [1 / case.experts] * case.experts
    return np.random.default_rng(0).multinomial(case.m, even).astype(np.int32)


def inputs(case: Case, platform: str) -> list[tuple[Any, ...]]:
    """Arguments of `function_of`, one set for each weight."""
    ws = weights(case.k, case.n, case.form, platform, case.experts)
    keys = jax.random.split(jax.random.key(1), len(ws))
    xs = [jax.random.normal(key, (case.m, case.k), jnp.bfloat16) for key in keys]
    if case.form == LLM_INT8:
        xs = [x.at[:, :_OUTLIERS].multiply(10) for x in xs]
    rest = (jnp.asarray(sizes_of(case)),) if case.experts else ()
    return [(x, w, *rest) for x, w in zip(xs, ws, strict=True)]


def product(
    x: jax.Array, w: Any, *sizes: jax.Array, implementation: Implementation | None
) -> jax.Array:
    """The result [m, n] in bfloat16; floats multiply as they are."""
    if isinstance(w, QTensor):
        if sizes:
            return quantized_ragged_dot(x, w, *sizes, implementation=implementation)
        return quantized_dot_general(x, w, PLAIN, implementation=implementation)
    return lax.ragged_dot(x, w, *sizes) if sizes else lax.dot_general(x, w, PLAIN)


def llm_int8(x: jax.Array, w: Any, *, config: GpuConfig | None) -> jax.Array:
    """LLM.int8() from float x: outliers are found and split off; None for XLA's two products."""
    found = find_outliers(x, capacity=CAPACITY)
    arrays = {"x": x, "indices": found.indices, "mask": found.mask, **w}
    if config is None:
        return two_parts(arrays).astype(jnp.bfloat16)
    return llm_int8_matmul(**arrays, config=config)


def function_of(case: Case) -> Any:
    """From a set of `inputs` to the result, by the case's route."""
    if case.form == LLM_INT8:
        # A dry run is on no chip at all.
        chip = chip_of(jax.devices()[0].device_kind) or CHIPS["H200"]
        chosen = choose_outlier_config(case.m, case.k, case.n, chip, CAPACITY)
        return functools.partial(llm_int8, config=chosen if case.route == "pallas" else None)
    forced: Any = {"pallas": "pallas", "xla": "xla", "bf16": None}[case.route]
    return functools.partial(product, implementation=forced)


def bytes_of(case: Case, w: Any) -> int:
    """What has to be moved once: x, the result, the weight, or those experts that have rows."""
    parts = w.values() if isinstance(w, dict) else (w,)
    weight = sum(part.nbytes for part in parts)
    used = (sizes_of(case) > 0).mean() if case.experts else 1.0
    return 2 * case.m * (case.k + case.n) + int(weight * used)


def time_case(case: Case, timer: Timer, platform: str) -> Result:
    """Compiles and times a case; what does not fit or compile is the result's note."""
    least = 0
    try:
        sets: Sequence[Any] = inputs(case, platform)
        least = bytes_of(case, sets[0][1])
        compiled = jax.jit(program(function_of(case))).lower(sets).compile()
        timing = timer(compiled, (sets,), len(sets))
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
        if "RESOURCE_EXHAUSTED" in str(error):
            weights.cache_clear()  # the next case has the memory
        return Result(case, None, least, f"{type(error).__name__}: {error}"[:300])
    return Result(case, timing, least)
