"""A weight is read when its product is due: what XLA on CPU has to be told.

Reading codes depends on nothing but the parameters, so XLA's CPU backend does it for all layers
as soon as a program starts, and holds every weight of an unrolled model as floats at once: as many
bytes as the float model has, and several times its time (`python -m benchmarks.reading`). Used by
the lowerings for CPU. jax 0.10 drops barriers before it orders operations; there this changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant


def read_late(
    x: jax.Array, quantized: Sequence[jax.Array], w: QTensor, act: ActQuant | None
) -> tuple[jax.Array, list[jax.Array], QTensor]:
    """The operands of a product, such that the weight cannot be read before its input is there.

    Args:
      x: the input.
      quantized: nothing, or its codes and scale.
      w: the weight.
      act: how the input is quantized, or None.
    """
    given = list(quantized)
    if w.codes.dtype == jnp.int8 and act is not None and act.dtype == "int8":
        return x, given, w  # multiplied as it lies
    if w.codes.dtype != jnp.int4:
        return jax.lax.optimization_barrier((x, given, w))
    # A scan's slice of int4 is int8 in truth, and a barrier would make XLA pack it: instead a zero
    # that is known no sooner than x is added wherever codes are read.
    zero = jnp.zeros((), jnp.int4)
    x, given, zero = jax.lax.optimization_barrier((x, given, zero))
    return x, given, w.replace(codes=w.codes + zero)
