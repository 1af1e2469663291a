"""Which kernel a quantized product runs as, on what device, and why; or why none fits.

`choose` is asked by the lowering of `quantized_dot_general`, which then runs the choice, and by the
plan, which shows it. It looks at shapes, dtypes and the place only. Each platform with kernels has
a `select` of its own (`PLATFORMS`). Where no kernel fits, XLA's route
(`jaxquant.pallas_kernels.reference`) is taken and `Choice.reason` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.as_matrix import (
    Kernel,
    MatrixProduct,
    TransposedProduct,
    Weight,
    flatten,
    flatten_transposed,
    takes_transposed,
)
from jaxquant.pallas_kernels.batched import BatchedProduct, one_element
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.gpu.select import select as select_cuda
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from jaxquant.pallas_kernels.spmd import Partition, PartitionedProduct, Split, partition
from jaxquant.pallas_kernels.tpu.select import select as select_tpu
from jaxquant.pallas_kernels.tpu.select import select_transposed as select_tpu_transposed

Implementation = Literal["xla", "pallas"]


@dataclasses.dataclass(frozen=True)
class Platform:
    """What has kernels.

    Attributes:
      select: `(problem, device_kind, forced) -> Kernel`; raises `Unsupported` with the reason.
      chips: what its devices are called.
      k_last: its kernels take weights stored as [n, k] as well.
      float32: why float32 products are left to XLA unless a kernel is forced; "" if they are not.
      transposed: as `select`, for products that take the transpose of a weight; None without any.
    """

    select: Callable[[MatmulProblem, str, bool], Kernel]
    chips: str
    k_last: bool = False
    float32: str = ""
    transposed: Callable[[MatmulProblem, str, bool], Kernel] | None = None


# By the names that JAX lowers for.
PLATFORMS: dict[str, Platform] = {
    "tpu": Platform(select_tpu, "TPU", transposed=select_tpu_transposed),
    "cuda": Platform(select_cuda, "GPU", True, "XLA multiplies it in TF32, kernels in bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program runs.

    Attributes:
      platform: as JAX lowers for it: "tpu", "cuda", "rocm", "cpu" ...
      device_kind: of its devices; None if it is compiled for devices that are not known yet.
      devices: how many share the program; None for as many as the types of its arrays say.
      manual: every mesh axis is manual: the arrays are one device's own (inside shard_map).
      split: how the operands lie on several devices; else why that is not known.
    """

    platform: str
    device_kind: str | None = None
    devices: int | None = None
    manual: bool = False
    split: Split | str = "the operands' shardings are not known"

    def __post_init__(self) -> None:
        if self.platform == "gpu":
            raise ValueError("platform 'gpu' may be 'cuda' or 'rocm': say which")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
      name: e.g. "pallas tpu v5e: int4, scale after the dot", or "xla".
      reason: why, in words.
      run: `(x, quantized, codes, scale, zero_point, input_scale) -> result`; None for XLA.
    """

    name: str
    reason: str
    run: Callable[..., jax.Array] | None = None


def choose(
    x_shape: tuple[int, ...],
    x_dtype: Any,
    weight: Weight,
    axes: DotAxes,
    act: ActQuant | None,
    place: Place,
    *,
    out_dtype: Any,
    precision: Any = None,
    implementation: Implementation | None = None,
) -> Choice:
    """Picks a kernel, or XLA with the reasons against each kernel.

    Args:
      x_shape: shape of the activation.
      x_dtype: its dtype.
      weight: the weight's static side.
      axes: which axis does what.
      act: how the activation is quantized first, or None.
      place: where the program runs.
      out_dtype: dtype of the result.
      precision: as for lax.dot_general.
      implementation: forces one; None for the best.

    Returns:
      The choice.

    Raises:
      ValueError: "pallas" is forced, but no kernel fits; the message lists the reasons. Or an
        unknown name.
    """

    def find(device_kind: str) -> Choice:
        check_floats(x_dtype, precision)
        parts = part_of(place, x_shape, weight, axes, act)
        own_shape, own = (x_shape, weight) if parts is None else (parts.x_shape, parts.weight)
        platform = PLATFORMS[place.platform]
        as_it_is = act is None and jnp.dtype(x_dtype) == jnp.float32
        if as_it_is and platform.float32 and implementation is None:
            raise Unsupported(f"x is float32: {platform.float32}")
        wanted = implementation is not None or (parts is not None and parts.lone_group)
        own_axes = axes
        if axes.w_batch:
            own_shape, own, own_axes = one_element(own_shape, own, axes)
        if platform.transposed is not None and takes_transposed(own, own_axes):
            problem = flatten_transposed(own_shape, own, own_axes, act, out_dtype)
            kernel = platform.transposed(problem, device_kind, wanted)
            product: MatrixProduct = TransposedProduct(problem, kernel, own, own_axes, act)
        else:
            k_last = platform.k_last
            problem = flatten(own_shape, x_dtype, own, own_axes, act, out_dtype, k_last=k_last)
            kernel = platform.select(problem, device_kind, wanted)
            product = MatrixProduct(problem, kernel, own, own_axes, act)
        reason = kernel.reason + ("" if parts is None else f"; {parts}")
        if product.moves_codes:
            reason += "; codes are transposed at every call: jaxquant.prepare does it once"
        run: Callable[..., jax.Array] = product
        if axes.w_batch:
            run = BatchedProduct.make(product, axes)
            reason += "; mapped over batch axes"
        if parts is not None:
            run = PartitionedProduct(run, parts, act)
        return Choice(kernel.name, reason, run)

    return settle(place, implementation, find)


def settle(
    place: Place, implementation: Implementation | None, find: Callable[[str], Choice]
) -> Choice:
    """What `find` makes of the kind of the devices, or XLA with the reason.

    Args:
      place: where the program runs.
      implementation: forces one.
      find: raises `Unsupported` with the reason where no kernel fits.

    Raises:
      ValueError: as `choose`.
    """
    if check_implementation(implementation) == "xla":
        return Choice("xla", "asked for by implementation='xla'")
    try:
        return find(_device_kind(place))
    except Unsupported as why:
        of = f"pallas {place.platform}" if place.platform in PLATFORMS else "pallas"
        refused = f"{of}: {why}"
    if implementation == "pallas":
        raise ValueError(f"implementation='pallas', but no kernel fits: {refused}")
    return Choice("xla", refused)


def check_implementation(implementation: Any) -> Implementation | None:
    """The argument, if it is one.

    Raises:
      ValueError: it is none; the message lists them.
    """
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation is 'xla', 'pallas' or None, not {implementation!r}")
    return implementation


def _device_kind(place: Place) -> str:
    platform = PLATFORMS.get(place.platform)
    if platform is None:
        raise Unsupported(f"the program runs on {place.platform}")
    if place.device_kind is None:
        raise Unsupported(
            f"the {platform.chips} generation is not known when the program is lowered"
        )
    return place.device_kind


def part_of(
    place: Place,
    x_shape: tuple[int, ...],
    weight: Weight,
    axes: DotAxes,
    act: ActQuant | None,
    experts: tuple[int, ...] = (),
) -> Partition | None:
    """What each device does of a product; None for all of it.

    Args:
      place: where the program runs.
      x_shape: as of `partition`, like all that follow.
      weight: likewise.
      axes: likewise.
      act: likewise.
      experts: likewise.

    Raises:
      Unsupported: it is not known, or the product does not come apart; says why.
    """
    if (place.devices or 1) == 1 or place.manual:
        return None
    if isinstance(place.split, Split):
        return partition(place.split, x_shape, weight, axes, act, experts)
    raise Unsupported(
        f"{place.devices} devices share the program, whose partitioner takes no Pallas calls, and"
        f" {place.split}"
    )


def check_floats(x_dtype: Any, precision: Any) -> None:
    """That kernels are as exact as what was asked for.

    Raises:
      Unsupported: they are not; says why.
    """
    if jnp.dtype(x_dtype) not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"x is {jnp.dtype(x_dtype).name}; kernels take bfloat16 and float32")
    wanted = precision if isinstance(precision, tuple) else (precision,)
    if any(p not in (None, lax.Precision.DEFAULT) for p in wanted):
        raise Unsupported(f"precision {precision} asks for more than one bfloat16 pass")
