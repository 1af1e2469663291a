"""Several products of one x as one launch, where a platform's kernel can do them so.

`join` is asked by the lowering of `quantized_dots` about what `dispatch.choose` chose for each of
its weights, and by the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxquant.pallas_kernels.as_matrix import MatrixProduct
from jaxquant.pallas_kernels.problem import Unsupported

# A weight by its parts: codes, scale, zero point or None, as stored.
Parts = tuple[jax.Array, jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class SiblingProducts:
    """Runs several products as one: lays out x once, multiplies, lays out each result."""

    products: tuple[MatrixProduct, ...]
    multiply: Callable[..., list[jax.Array]]

    def __call__(
        self,
        x: jax.Array,
        quantized: tuple[jax.Array, jax.Array] | None,
        weights: Sequence[Parts],
        interpret: Any = False,
    ) -> list[jax.Array]:
        """The products, each laid out as lax.dot_general's.

        Args:
          x: floats.
          quantized: the codes and scale of x, if the products quantize it.
          weights: the parts of each.
          interpret: as for pl.pallas_call.
        """
        first = self.products[0]
        rows, x_scale = first.quantized_rows(x, quantized, None, interpret)
        pairs = zip(self.products, weights, strict=True)
        codes, scales, zeros = zip(*(p.matrices(*parts) for p, parts in pairs), strict=True)
        outs = self.multiply(
            rows,
            codes,
            scales,
            zeros,
            x_scale=x_scale,
            table=first.weight.table,
            interpret=interpret,
        )
        return [p.lay_out(out, x) for p, out in zip(self.products, outs, strict=True)]


def join(runs: Sequence[Any]) -> SiblingProducts | str:
    """One launch for all of them, or why there is none.

    Args:
      runs: what `Choice.run` is for each product of the same x, quantized alike.
    """
    products = tuple(run for run in runs if isinstance(run, MatrixProduct))
    if len(products) < max(2, len(runs)):
        return "not all of them are a kernel's, each a matrix on one device"
    first, *others = products
    together = first.kernel.together
    alike = all(
        p.weight.table == first.weight.table
        and p.axes.x_free == first.axes.x_free
        and sorted(zip(p.axes.w_contract, p.axes.x_contract))
        == sorted(zip(first.axes.w_contract, first.axes.x_contract))
        and dataclasses.replace(p.problem, n=first.problem.n) == first.problem
        for p in others
    )
    if together is None:
        return "the platform's kernels take one weight each"
    if not alike:
        return "they differ in more than their columns"
    try:
        return SiblingProducts(products, together([p.problem for p in products]))
    except Unsupported as why:
        return str(why)
