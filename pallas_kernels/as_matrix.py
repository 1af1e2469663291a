"""A dot_general with a quantized weight as one matrix product, if the weight is stored as one.

Used by `jaxquant.pallas_kernels.dispatch`: `flatten` says what the product is as a `MatmulProblem`,
or why it is none; a platform makes a `Kernel` of that; a `MatrixProduct` then runs it between the
layouts of the caller.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.blocks import spread_axis
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.problem import E2M1, PACKED, STORAGE, MatmulProblem, Unsupported


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
      prepared: whether codes lie in memory as the platform's kernels read them.
    """

    codes: str
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    zero_point: bool = False
    table: tuple[float, ...] | None = None
    packed_axis: int | None = None
    prepared: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a platform does a matrix product.

    Attributes:
      name: e.g. "pallas tpu v5e: int4, scale after the dot".
      reason: why this one, in words.
      multiply: `(x, codes, scale, zero_point, x_scale=, table=, interpret=) -> [m, n]`: x is
        [m, k], scale and zero_point are [k / group, n], x_scale is [m, 1] or None.
      quantize: `(x, dtype, interpret=) -> (codes, scale)`, a kernel that quantizes rows of x;
        None where XLA does it best.
      k_minor: `multiply` takes codes as [n, k], not [k, n].
      together: `(problems) -> multiply` of several weights with one x, as one launch: it takes
        sequences of codes, scales and zero points, and returns a list. Raises `Unsupported` where
        they cannot be one; None if no weights can.
      batched: `multiply` where it is mapped over a batch; None if it cannot be.
      gated: `(problem) -> multiply` of two weights alike with one x: silu of the first product
        times the second, each with a bias if the problem says so. It takes `(x, gate, up,
        biases=, ...)`, weights by their parts. Raises `Unsupported` as `together` does; None if
        there is none.
      finished: `(problem) -> multiply` with what the problem has of bias and residual, given by
        these names as [n] and [m, n]; likewise.
    """

    name: str
    reason: str
    multiply: Callable[..., jax.Array]
    quantize: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    k_minor: bool = False
    together: Callable[[Sequence[MatmulProblem]], Callable[..., list[jax.Array]]] | None = None
    batched: Callable[..., jax.Array] | None = None
    gated: Callable[[MatmulProblem], Callable[..., jax.Array]] | None = None
    finished: Callable[[MatmulProblem], Callable[..., jax.Array]] | None = None


def flatten(
    x_shape: tuple[int, ...],
    x_dtype: Any,
    weight: Weight,
    axes: DotAxes,
    act: ActQuant | None,
    out_dtype: Any,
    k_last: bool = False,
) -> MatmulProblem:
    """The product as one matrix [m, k] times another [k, n].

    Args:
      x_shape: shape of the activation.
      x_dtype: its dtype.
      weight: the weight's static side.
      axes: which axis does what, without batch axes.
      act: how the activation is quantized first, or None.
      out_dtype: dtype of the result.
      k_last: the contracted axes may as well be the weight's last ones: it is [n, k] then.

    Raises:
      Unsupported: it is none without copying the weight; says why.
    """
    contract = sorted(axes.w_contract)
    if not (_k_first(axes) or (k_last and _k_last(axes, len(weight.shape)))):
        ends = "first or last" if k_last else "first"
        raise Unsupported(
            f"contracted axes {axes.w_contract} of the weight are not its {ends}: as a matrix it"
            " would have to be copied"
        )
    if weight.codes not in STORAGE:
        raise Unsupported(f"no kernel reads {weight.codes} codes")
    if weight.codes in PACKED:
        _check_packed(weight, contract)
    m, n = axes.rows(x_shape), axes.columns(weight.shape)
    k = math.prod(weight.shape[a] for a in contract)
    if not m * n * k:
        raise Unsupported("an operand is empty")
    group = _group([(weight.shape[a], weight.scale_shape[a]) for a in contract])
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
        e2m1=weight.table == E2M1,
    )


def takes_transposed(weight: Weight, axes: DotAxes) -> bool:
    """Whether a product wants the transpose of a matrix whose groups were contracted once.

    So does the gradient of a product: it sums over the weight's last axes, and scales have blocks
    along its first ones.
    """
    blocks = any(1 < weight.scale_shape[a] < weight.shape[a] for a in axes.w_free)
    return blocks and _k_last(axes, len(weight.shape))


def flatten_transposed(
    x_shape: tuple[int, ...],
    weight: Weight,
    axes: DotAxes,
    act: ActQuant | None,
    out_dtype: Any,
) -> MatmulProblem:
    """A product that `takes_transposed`, as the problem [m, k] x [k, n] of the weight itself.

    Args:
      x_shape: shape of what takes the place of the activation: [m, n].
      weight: the weight's static side.
      axes: which axis does what.
      act: how that is quantized first: by nothing.
      out_dtype: dtype of the result, [m, k].

    Raises:
      Unsupported: it is none without copying the weight; says why.
    """
    if act is not None:
        raise Unsupported(f"{act.dtype} activations meet a transposed weight")
    if weight.codes not in STORAGE or weight.codes in PACKED:
        raise Unsupported(f"no kernel reads {weight.codes} codes transposed")
    m, k = axes.rows(x_shape), axes.columns(weight.shape)
    n = math.prod(weight.shape[a] for a in axes.w_contract)
    if not m * n * k:
        raise Unsupported("an operand is empty")
    group = _group([(weight.shape[a], weight.scale_shape[a]) for a in axes.w_free])
    for axis in axes.w_contract:
        if weight.scale_shape[axis] not in (1, weight.shape[axis]):
            raise Unsupported(f"scales have blocks along contracted axis {axis} of the weight too")
    return MatmulProblem(
        m,
        k,
        n,
        weight.codes,
        "bfloat16",
        group,
        weight.zero_point,
        out_dtype=jnp.dtype(out_dtype).name,
        e2m1=weight.table == E2M1,
    )


def _check_packed(weight: Weight, contract: list[int]) -> None:
    """That the bytes of the contracted axes, flattened, are those of one packed axis."""
    if weight.packed_axis != contract[-1]:
        raise Unsupported("codes are packed along another axis than the contracted one")
    length = weight.shape[contract[-1]]
    if len(contract) > 1 and length % 8:
        raise Unsupported(f"codes are packed along an axis of {length}, which ends within a byte")


def _k_first(axes: DotAxes) -> bool:
    return sorted(axes.w_contract) == list(range(len(axes.w_contract)))


def _k_last(axes: DotAxes, ndim: int) -> bool:
    return sorted(axes.w_contract) == list(range(ndim - len(axes.w_contract), ndim))


def _group(sizes: list[tuple[int, int]]) -> int:
    """Contracted values, flattened, that share a scale: they must lie in a row.

    `sizes` has the values and the scales of each contracted axis.
    """
    group = 1
    for at in range(len(sizes) - 1, -1, -1):
        size, scales = sizes[at]
        group *= size // scales
        if scales > 1:
            if any(n != s for n, s in sizes[:at]):
                raise Unsupported("scale blocks over several contracted axes do not lie in a row")
            break
    return group


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """Runs a kernel: flattens, quantizes x if need be, multiplies, and lays the result out."""

    problem: MatmulProblem
    kernel: Kernel
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
        rows, x_scale = self.quantized_rows(x, quantized, input_scale, interpret)
        out = self.kernel.multiply(
            rows,
            *self.matrices(codes, scale, zero_point),
            x_scale=x_scale,
            table=self.weight.table,
            interpret=interpret,
        )
        return self.lay_out(out, x)

    def matrices(
        self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The weight's parts as a kernel takes them."""
        zero = None if zero_point is None else self._columns(zero_point)
        return self._matrix(codes), self._columns(scale), zero

    def lay_out(self, out: jax.Array, x: jax.Array) -> jax.Array:
        """What a kernel made, [m, n], laid out as lax.dot_general's result."""
        free = [x.shape[a] for a in self.axes.x_free]
        out = out.reshape(*free, *(self.weight.shape[a] for a in self.axes.w_free))
        if self.axes.weight_side == "rhs":
            return out
        return lax.transpose(out, (*range(len(free), out.ndim), *range(len(free))))

    @property
    def moves_codes(self) -> bool:
        """Whether codes are transposed at every call."""
        return self.kernel.k_minor and _k_first(self.axes) and not self.weight.prepared

    def _matrix(self, codes: jax.Array) -> jax.Array:
        """Codes as the kernel takes them: of a weight prepared for it, no element moves."""
        p = self.problem
        if not _k_first(self.axes):
            return codes.reshape(p.n, p.code_rows)
        matrix = codes.reshape(p.code_rows, p.n)
        return matrix.T if self.kernel.k_minor else matrix

    def quantized_rows(
        self,
        x: jax.Array,
        quantized: tuple[jax.Array, jax.Array] | None,
        input_scale: jax.Array | None,
        interpret: Any,
    ) -> tuple[jax.Array, jax.Array | None]:
        """X as a matrix, quantized as `act` says, and its scales [m, 1]."""
        act, axes = self.act, self.axes
        if act is None:
            return self._rows(x), None
        if quantized is None:
            a_row = not act.static and sorted(act.reduce_axes) == sorted(axes.x_contract)
            if a_row and self.kernel.quantize is not None:
                return self.kernel.quantize(self._rows(x), act.dtype, interpret=interpret)
            given = None if input_scale is None else axes.w_to_x(input_scale)
            quantized = quantize_activation(x, act, given)
        codes, scale = quantized
        sizes = [1 if a in axes.x_contract else n for a, n in enumerate(x.shape)]
        scale = jnp.broadcast_to(scale, sizes).astype(jnp.float32)
        return self._rows(codes), self._rows(scale)

    def _rows(self, x: jax.Array) -> jax.Array:
        """Arrays over x's axes as a matrix; contracted axes in the weight's order."""
        contract = [a for _, a in sorted(zip(self.axes.w_contract, self.axes.x_contract))]
        terms = math.prod(x.shape[a] for a in contract)
        return lax.transpose(x, (*self.axes.x_free, *contract)).reshape(-1, terms)

    def _columns(self, part: jax.Array) -> jax.Array:
        """Scales or zero points as [k / group, n]."""
        for axis in self.axes.w_free:
            part = spread_axis(part, axis, self.weight.shape[axis])
        if not _k_first(self.axes):
            return part.reshape(self.problem.n, self.problem.groups).T
        return part.reshape(self.problem.groups, self.problem.n)


class TransposedProduct(MatrixProduct):
    """Runs a kernel on the transpose of a matrix, as `flatten_transposed` has it."""

    def matrices(
        self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The weight's parts as stored: codes [k, n], scale and zero points [k / group, n]."""
        p = self.problem

        def whole(part: jax.Array) -> jax.Array:
            for axis in self.axes.w_contract:
                part = spread_axis(part, axis, self.weight.shape[axis])
            return part.reshape(p.groups, p.n)

        zero = None if zero_point is None else whole(zero_point)
        return codes.reshape(p.k, p.n), whole(scale), zero
