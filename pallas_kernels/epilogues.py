"""Products with what follows them in the same launch, where a platform's kernel can do that.

`gate` and `finish` are asked by the lowering of `fused_epilogue` about what `dispatch.choose` chose
for its products, and by the plan: silu of one product times the other, or a bias and a residual
that are added. Everything is in float32 until the last cast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.as_matrix import MatrixProduct
from jaxquant.pallas_kernels.problem import Unsupported
from jaxquant.pallas_kernels.siblings import Parts

Quantized = tuple[jax.Array, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class GatedProducts:
    """Runs two products of one x as one launch: silu of the first times the second."""

    products: tuple[MatrixProduct, MatrixProduct]
    multiply: Callable[..., jax.Array]

    def __call__(
        self,
        x: jax.Array,
        quantized: Quantized,
        gate: Parts,
        up: Parts,
        biases: tuple[jax.Array | None, jax.Array | None] = (None, None),
        interpret: Any = False,
    ) -> jax.Array:
        """The result, laid out as lax.dot_general's.

        Args:
          x: floats.
          quantized: the codes and scale of x, if the products quantize it.
          gate: the parts of the weight whose product goes through silu.
          up: of the other.
          biases: of both, [n] each; None for none.
          interpret: as for pl.pallas_call.
        """
        first, second = self.products
        pair = None
        if any(bias is not None for bias in biases):
            none = jnp.zeros((first.problem.n,), jnp.float32)
            pair = tuple(none if bias is None else bias for bias in biases)
        rows, x_scale = first.quantized_rows(x, quantized, None, interpret)
        out = self.multiply(
            rows,
            first.matrices(*gate),
            second.matrices(*up),
            biases=pair,
            x_scale=x_scale,
            table=first.weight.table,
            interpret=interpret,
        )
        return first.lay_out(out, x)


@dataclasses.dataclass(frozen=True)
class FinishedProduct:
    """Runs a product with a bias, a residual or both, as one launch."""

    product: MatrixProduct
    multiply: Callable[..., jax.Array]

    def __call__(
        self,
        x: jax.Array,
        quantized: Quantized,
        weight: Parts,
        input_scale: jax.Array | None,
        bias: jax.Array | None,
        residual: jax.Array | None,
        interpret: Any = False,
    ) -> jax.Array:
        """The result, laid out as lax.dot_general's.

        Args:
          x: floats.
          quantized: the codes and scale of x where they are at hand.
          weight: its parts.
          input_scale: the static scale of x, of the weight's rank, or None.
          bias: [n], or None.
          residual: of the result's shape, or None.
          interpret: as for pl.pallas_call.
        """
        product = self.product
        rows, x_scale = product.quantized_rows(x, quantized, input_scale, interpret)
        out = self.multiply(
            rows,
            *product.matrices(*weight),
            x_scale=x_scale,
            bias=bias,
            residual=None if residual is None else self._as_matrix(residual),
            table=product.weight.table,
            interpret=interpret,
        )
        return product.lay_out(out, x)

    def _as_matrix(self, residual: jax.Array) -> jax.Array:
        """An array that lies as the result, as [m, n]."""
        product = self.product
        if product.axes.weight_side == "lhs":
            own = len(product.axes.w_free)
            residual = lax.transpose(residual, (*range(own, residual.ndim), *range(own)))
        return residual.reshape(product.problem.m, product.problem.n)


def gate(gate_run: Any, up_run: Any, bias: bool, out_dtype: Any) -> GatedProducts | str:
    """One launch for silu of a product times another, or why there is none.

    Args:
      gate_run: what `Choice.run` is for the product that goes through silu.
      up_run: for the other, of the same x, quantized alike.
      bias: whether each has a bias.
      out_dtype: dtype of the result.
    """
    if type(gate_run) is not MatrixProduct or type(up_run) is not MatrixProduct:
        return "not both are a kernel's, each a matrix on one device"
    if gate_run.kernel.gated is None:
        return "the platform's kernels have no gate"
    alike = (
        gate_run.problem == up_run.problem
        and gate_run.axes == up_run.axes
        and gate_run.weight.table == up_run.weight.table
    )
    if not alike:
        return "the two weights differ"
    problem = dataclasses.replace(gate_run.problem, bias=bias, out_dtype=jnp.dtype(out_dtype).name)
    try:
        return GatedProducts((gate_run, up_run), gate_run.kernel.gated(problem))
    except Unsupported as why:
        return str(why)


def finish(run: Any, bias: bool, residual: bool, out_dtype: Any) -> FinishedProduct | str:
    """One launch for a product and what is added to it, or why there is none.

    Args:
      run: what `Choice.run` is for the product.
      bias: whether a bias is added.
      residual: whether an array of the result's shape is.
      out_dtype: dtype of the result.
    """
    if type(run) is not MatrixProduct:
        return "it is no kernel's, as a matrix on one device"
    if run.kernel.finished is None:
        return "the platform's kernels have no epilogues"
    problem = dataclasses.replace(
        run.problem, bias=bias, residual=residual, out_dtype=jnp.dtype(out_dtype).name
    )
    try:
        return FinishedProduct(run, run.kernel.finished(problem))
    except Unsupported as why:
        return str(why)
