"""Which kernel a product of rows grouped by expert runs as, and why; or why none fits.

`choose_ragged` is to `quantized_ragged_dot` what `dispatch.choose` is to `quantized_dot_general`:
the lowering asks it and runs the choice, and the plan asks it and shows the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.as_matrix import Kernel, Weight
from jaxquant.pallas_kernels.dispatch import (
    PLATFORMS,
    Choice,
    Implementation,
    Place,
    check_floats,
    part_of,
    settle,
)
from jaxquant.pallas_kernels.gpu.select import select_ragged as select_cuda
from jaxquant.pallas_kernels.problem import RaggedProblem, Unsupported
from jaxquant.pallas_kernels.ragged import RaggedProduct, flatten_ragged
from jaxquant.pallas_kernels.spmd import PartitionedProduct
from jaxquant.pallas_kernels.spmd_ragged import RAGGED_AXES, LocalExperts
from jaxquant.pallas_kernels.tpu.select import select_ragged as select_tpu

# By the names that JAX lowers for: `(problem, device_kind, forced) -> Kernel`, or `Unsupported`.
SELECT: dict[str, Callable[[RaggedProblem, str, bool], Kernel]] = {
    "tpu": select_tpu,
    "cuda": select_cuda,
}


def choose_ragged(
    x_shape: tuple[int, ...],
    x_dtype: Any,
    weight: Weight,
    act: ActQuant | None,
    place: Place,
    *,
    plain: bool,
    out_dtype: Any,
    precision: Any = None,
    implementation: Implementation | None = None,
) -> Choice:
    """Picks a kernel, or XLA with the reason against it.

    Args:
      x_shape: shape of the rows.
      x_dtype: their dtype.
      weight: the experts' static side.
      act: how the rows are quantized first, or None.
      place: where the program runs.
      plain: whether rows are [m, k], experts [experts, k, n].
      out_dtype: dtype of the result.
      precision: as for lax.ragged_dot.
      implementation: forces one; None for the best.

    Returns:
      The choice, whose `run` is a `RaggedProduct`, or runs one on every device.

    Raises:
      ValueError: "pallas" is forced, but no kernel fits; the message has the reason. Or an unknown
        name.
    """

    def find(device_kind: str) -> Choice:
        select = SELECT.get(place.platform)
        if select is None:
            raise Unsupported("there is no kernel for rows grouped by expert")
        check_floats(x_dtype, precision)
        float32 = PLATFORMS[place.platform].float32
        as_it_is = act is None and jnp.dtype(x_dtype) == jnp.float32
        if as_it_is and float32 and implementation is None:
            raise Unsupported(f"x is float32: {float32}")
        parts = None
        if plain:
            parts = part_of(place, x_shape, weight, RAGGED_AXES, act, experts=(0,))
        own_shape, own = (x_shape, weight) if parts is None else (parts.x_shape, parts.weight)
        problem = flatten_ragged(own_shape, own, act, out_dtype, plain)
        wanted = implementation is not None or (parts is not None and parts.lone_group)
        kernel = select(problem, device_kind, wanted)
        product = RaggedProduct(problem, kernel, own, act)
        reason = kernel.reason + ("" if parts is None else f"; {parts}")
        if product.moves_codes:
            reason += "; codes are transposed at every call: jaxquant.prepare does it once"
        if parts is None:
            return Choice(kernel.name, reason, product)
        run = PartitionedProduct(LocalExperts(product, parts), parts, act)
        return Choice(kernel.name, reason, run)

    return settle(place, implementation, find)
