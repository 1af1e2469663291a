"""A dot_general with a quantized weight as one matrix product, if the weight is stored as one.

Used by `jaxquant.pallas_kernels.dispatch`: `flatten` says what the product is as a `MatmulProblem`,
or why it is none; a `MatrixProduct` then runs it between the layouts of the caller.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.blocks import spread_axis
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.problem import PACKED, STORAGE, MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import DECODE_ROWS
from jaxquant.pallas_kernels.tpu.matmul import quantized_matmul
from jaxquant.pallas_kernels.tpu.quantize_rows import quantize_rows


@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantized weight by its static side.

    Attributes:
      codes: a key of `problem.STORAGE`, or another name, which no kernel takes.
      shape: logical shape.
      scale_shape: shape of the scale; every size divides the weight's.
      zero_point: whether there are zero points.
      table: the 16 values of "table4" codes.
      packed_axis: axis along which codes are packed into bytes, counted from the front.
    """

    codes: str
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    zero_point: bool = False
    table: tuple[float, ...] | None = None
    packed_axis: int | None = None


def flatten(
    x_shape: tuple[int, ...],
    x_dtype: Any,
    weight: Weight,
    axes: DotAxes,
    act: ActQuant | None,
    out_dtype: Any,
) -> MatmulProblem:
    """The product as one matrix [m, k] times another [k, n].

    Raises:
      Unsupported: it is none without copying the weight; says why.
    """
    count = len(axes.w_contract)
    if axes.w_batch:
        raise Unsupported("the product has batch axes")
    if sorted(axes.w_contract) != list(range(count)):
        raise Unsupported(
            f"contracted axes {axes.w_contract} of the weight are not its first: as a matrix"
            " [k, n] it would have to be copied"
        )
    if weight.codes not in STORAGE:
        raise Unsupported(f"no kernel reads {weight.codes} codes")
    if weight.codes in PACKED and (count != 1 or weight.packed_axis != 0):
        raise Unsupported("codes are packed along another axis than the contracted one")
    m, n = axes.rows(x_shape), axes.columns(weight.shape)
    k = math.prod(weight.shape[:count])
    if not m * n * k:
        raise Unsupported("an operand is empty")
    group = _group(weight, count)
    for axis in axes.w_free:
        if weight.scale_shape[axis] not in (1, weight.shape[axis]):
            raise Unsupported(f"scales have blocks along free axis {axis} of the weight")
    x_name = "bfloat16" if act is None else act.dtype
    return MatmulProblem(
        m,
        k,
        n,
        weight.codes,
        x_name,
        group,
        weight.zero_point,
        x_scale=act is not None,
        out_dtype=jnp.dtype(out_dtype).name,
    )


def _group(weight: Weight, count: int) -> int:
    """Contracted values, flattened, that share a scale: they must lie in a row."""
    group = 1
    sizes = list(zip(weight.shape[:count], weight.scale_shape[:count], strict=True))
    for at in range(count - 1, -1, -1):
        size, scales = sizes[at]
        group *= size // scales
        if scales > 1:
            if any(n != s for n, s in sizes[:at]):
                raise Unsupported("scale blocks over several contracted axes do not lie in a row")
            break
    return group


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """Runs a choice: flattens, quantizes x if need be, multiplies, and lays the result out."""

    problem: MatmulProblem
    config: MatmulConfig
    weight: Weight
    axes: DotAxes
    act: ActQuant | None

    def __call__(
        self,
        x: jax.Array,
        quantized: tuple[jax.Array, jax.Array] | None,
        codes: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        input_scale: jax.Array | None,
        interpret: Any = False,
    ) -> jax.Array:
        """The product, laid out as lax.dot_general's.

        Args:
          x: floats, as the problem was flattened from.
          quantized: the codes and scale of x where they are at hand.
          codes: as stored.
          scale: floats of the weight's rank.
          zero_point: None, or of the scale's shape.
          input_scale: the static scale of x, of the weight's rank, or None.
          interpret: as for pl.pallas_call.
        """
        p, axes = self.problem, self.axes
        free = [x.shape[a] for a in axes.x_free]
        rows, x_scale = self._quantized_rows(x, quantized, input_scale, interpret)
        out = quantized_matmul(
            rows,
            codes.reshape(p.code_rows, p.n),
            self._columns(scale),
            None if zero_point is None else self._columns(zero_point),
            problem=p,
            config=self.config,
            x_scale=x_scale,
            table=self.weight.table,
            interpret=interpret,
        )
        columns = [self.weight.shape[a] for a in axes.w_free]
        out = out.reshape(*free, *columns)
        if axes.weight_side == "rhs":
            return out
        return lax.transpose(out, (*range(len(free), out.ndim), *range(len(free))))

    def _quantized_rows(
        self,
        x: jax.Array,
        quantized: tuple[jax.Array, jax.Array] | None,
        input_scale: jax.Array | None,
        interpret: Any,
    ) -> tuple[jax.Array, jax.Array | None]:
        """X as [m, k], quantized as `act` says, and its scales [m, 1]."""
        p, act, axes = self.problem, self.act, self.axes
        if act is None:
            return self._rows(x, p.k), None
        if quantized is None:
            a_row = not act.static and sorted(act.reduce_axes) == sorted(axes.x_contract)
            if a_row and p.m > DECODE_ROWS:  # fewer rows are not worth a launch of their own
                parallel = self.config.parallel
                rows = self._rows(x, p.k)
                return quantize_rows(rows, act.dtype, parallel=parallel, interpret=interpret)
            given = None if input_scale is None else axes.w_to_x(input_scale)
            quantized = quantize_activation(x, act, given)
        codes, scale = quantized
        sizes = [1 if a in axes.x_contract else n for a, n in enumerate(x.shape)]
        scale = jnp.broadcast_to(scale, sizes).astype(jnp.float32)
        return self._rows(codes, p.k), self._rows(scale, 1)

    def _rows(self, x: jax.Array, size: int) -> jax.Array:
        """Arrays over x's axes as [m, size]; contracted axes in the weight's order."""
        contract = [a for _, a in sorted(zip(self.axes.w_contract, self.axes.x_contract))]
        return lax.transpose(x, (*self.axes.x_free, *contract)).reshape(-1, size)

    def _columns(self, part: jax.Array) -> jax.Array:
        """Scales or zero points as [k / group, n]."""
        for axis in self.axes.w_free:
            part = spread_axis(part, axis, self.weight.shape[axis])
        return part.reshape(self.problem.groups, self.problem.n)
