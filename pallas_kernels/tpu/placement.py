"""Where a kernel's codes lie when it is called.

Called by the kernels of this package. On v7x XLA copies operands that fit to VMEM before a kernel
begins. Its pipeline then copies blocks of them once more, with vector loads and stores, into
buffers that are its own, and what XLA holds is missing there: a weight that is used once is
brought in late, and twice. So codes stay in HBM, and the pipeline fetches them as they are needed.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.tpu.config import MatmulConfig


def placed(
    operands: dict[str, jax.Array], config: MatmulConfig, interpret: Any
) -> dict[str, jax.Array]:
    """Operands of a kernel by name, the codes to be left in HBM where the config says so.

    Args:
      operands: codes among them.
      config: of the kernel.
      interpret: as for pl.pallas_call; an interpreted kernel has no memory to choose.
    """
    # Codes that are no tracer are of one kernel alone: there is no program to constrain.
    traced = isinstance(operands["codes"], jax.core.Tracer)
    if not config.codes_in_hbm or interpret or not traced:
        return operands
    return operands | {"codes": _in_hbm(operands["codes"])}


@jax.custom_batching.custom_vmap
def _in_hbm(codes: jax.Array) -> jax.Array:
    constrained: jax.Array = pltpu.with_memory_space_constraint(codes, pltpu.HBM)
    return constrained


@_in_hbm.def_vmap
def _mapped(size: int, batched: list[bool], codes: jax.Array) -> tuple[jax.Array, bool]:
    # JAX 0.10 has no rule of its own for the constraint.
    return _in_hbm(codes), batched[0]
