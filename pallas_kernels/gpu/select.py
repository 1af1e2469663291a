"""Which GPU kernel a matrix product runs as, and why; or why none.

One of the platforms of `jaxquant.pallas_kernels.dispatch`.
"""

from __future__ import annotations

from jaxquant.pallas_kernels.as_matrix import Kernel
from jaxquant.pallas_kernels.gpu.chips import CHIPS, chip_of
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported


def select(problem: MatmulProblem, device_kind: str, forced: bool) -> Kernel:
    """The kernel for a product.

    Args:
      problem: the product.
      device_kind: of the device.
      forced: a kernel is wanted also where XLA is the better choice.

    Raises:
      Unsupported: none fits, or XLA is better; says why.
    """
    if chip_of(device_kind) is None:
        raise Unsupported(f"{device_kind} is none of {', '.join(CHIPS)}")
    raise Unsupported("there is no GPU kernel for it yet")
