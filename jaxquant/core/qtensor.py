"""`QTensor`, the one container of a quantized weight, and its validator.

Every floor meets it: quantizers make it, the rewriter moves it through a jaxpr
(`jaxquant.core.structure`), primitives compute with it, files store it. It does no arithmetic:
a QTensor that reaches an undecorated module is an error that names the fix, never a silent
dequantization.

Block structure is derived: one scale serves `shape[i] // scale.shape[i]` neighbours along axis
i. So slicing, scanning and vmapping a leading axis of all parts alike keeps a QTensor valid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core._compat import explicit_sharding
from jaxquant.core.blocks import broadcast_blocks
from jaxquant.core.codes import code_values
from jaxquant.core.invariants import check_codes, check_scales
from jaxquant.core.layout import MeshLayout
from jaxquant.core.qtypes import QType, get_qtype
from jaxquant.core.turns import InputTurn, weight_of
from jaxquant.pallas_kernels import packing

_DATA_FIELDS = ("codes", "scale", "zero_point", "input_scale", "input_factor")
_STATIC_FIELDS = (
    "qtype", "dtype", "act", "packed_axis", "packed_length", "op_rules", "input_group",
    "contracted", "prepared", "mesh_layout", "act_ops", "input_turn",
)  # fmt: skip
_data_fields, _static_fields = attrgetter(*_DATA_FIELDS), attrgetter(*_STATIC_FIELDS)
_NO_ARITHMETIC = (
    "a QTensor holds quantized codes and does no arithmetic ({what}). Decorate the module with"
    " @jaxquant.quantize, wrap the function with jaxquant.transform, or call .dequantize() for a"
    " float copy."
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized array: `w = (value(codes) - zero_point) * scale`, blockwise.

    With an input factor or turn that is not w but what the op's transformed input is multiplied
    with, see `jaxquant.core.turns`: `dequantize` gives w all the same.

    The constructor and unflattening check nothing, since JAX puts tracers, shardings and other
    objects into the leaves; `make_qtensor` builds a validated one.

    Attributes:
      codes: stored codes, dtype `qtype.storage` (packed types whose `packed_axis` is None: int8).
      scale: floats, or itself a QTensor (double quantization, nvfp4). Same rank as codes; every
        size divides the logical size of its axis.
      zero_point: None, or an array of the scale's shape, in code units; may be real-valued.
      input_scale: None, or the static scale of the op's input activations: same rank as
        codes, size 1 except on axes that stack layers or experts.
      qtype: storage format (static).
      dtype: the float dtype the weight stands for (static).
      act: what the op does with its input, an `ActScheme` or None (static, opaque here).
      packed_axis: negative axis along which codes are packed, or None (static). Negative, so
        that removing leading axes keeps it; a packed axis must therefore lie behind every axis
        that a scan or an index will remove (see `choose_packed_axis`).
      packed_length: logical length of the packed axis (static).
      act_ops: names of the primitives whose input `act` is for, where the weight meets others as
        well ("dot_general", "conv", "ragged_dot"), or None for all of its products (static).
      op_rules: rules for weightless operations that are saved with the tree (static, opaque).
      input_group: None, or the way from this weight to the first of those of the tree whose
        `input_scale` and `input_factor` are the same arrays, because they read the same input:
        "../../q/kernel", see `names.group_names` (static). Whoever gives a weight others takes it
        away.
      contracted: negative axes that the matrix product of the weight sums over, () for an op that
        is none, or None where that is not known (static). Nothing is computed from it: it says how
        to lay codes out for a platform.
      prepared: name of the platform for whose kernels codes lie in memory, or None (static, not
        saved). See `jaxquant.core.prepared`; no value and no shape depends on it.
      mesh_layout: how the weight lies on an automatic mesh, a `jaxquant.core.layout.MeshLayout`,
        or None where that is not recorded (static, not saved). No value depends on it.
      input_factor: None, or what the op multiplies its input with before anything else: floats of
        the rank of codes, every size divides the logical size of its axis.
      input_turn: None, or the Hadamard matrix that it multiplies its input with then, an
        `InputTurn` (static).
    """

    codes: Any
    scale: Any
    zero_point: Any = None
    input_scale: Any = None
    qtype: QType = dataclasses.field(default=get_qtype("int8"))
    dtype: Any = np.dtype("float32")
    act: Any = None
    packed_axis: int | None = None
    packed_length: int | None = None
    op_rules: tuple[Any, ...] = ()
    input_group: str | None = None
    contracted: tuple[int, ...] | None = None
    prepared: str | None = None
    mesh_layout: MeshLayout | None = None
    act_ops: tuple[str, ...] | None = None
    input_factor: Any = None
    input_turn: InputTurn | None = None

    # -- pytree ------------------------------------------------------------------------------

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        """Data fields as children under their attribute names; the rest is static."""
        children, static = self.tree_flatten()
        return tuple(zip(map(jax.tree_util.GetAttrKey, _DATA_FIELDS), children)), static

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """As `tree_flatten_with_keys`, without keys: at every jitted call, for every weight."""
        return _data_fields(self), _static_fields(self)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> QTensor:
        """Rebuilds without validating: children may be any objects."""
        named = dict(zip((*_DATA_FIELDS, *_STATIC_FIELDS), (*children, *static), strict=True))
        return cls(**named)

    # -- what it stands for --------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: that of the float array it stands for."""
        shape = list(self.codes.shape)
        if self.packed_axis is not None:
            assert self.packed_length is not None
            shape[self.packed_axis] = self.packed_length
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Neighbours along each axis that share a scale."""
        return tuple(n // s if s else 1 for n, s in zip(self.shape, self.scale.shape, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts at their real width: int4 counts half a byte (numpy says one)."""
        return sum(storage_bytes(leaf) for leaf in jax.tree.leaves(self))

    def nbytes_on_device(self) -> int:
        """Bytes all parts occupy on the device, as the runtime reports them.

        Parts that are not device arrays (tracers, ShapeDtypeStruct, numpy) count by format, as
        in `nbytes`. jax 0.10 on CPU really holds int4 at one byte a value; this says so.
        """
        return sum(_device_bytes(leaf) for leaf in jax.tree.leaves(self))

    def dequantize(self) -> jax.Array:
        """The float array it stands for, computed in float32 (or wider) and cast to `dtype`.

        Shape: `self.shape`. Plain JAX operations, so it works under any transformation. On an
        explicit mesh the result has the sharding type of the codes.
        """
        if not isinstance(self.codes, jax.Array):  # what restore or device_get gave for NumPy
            return self._dequantized()
        sharding = explicit_sharding(jax.typeof(self.codes))
        if sharding is None:
            return self._dequantized()
        return jax.sharding.auto_axes(QTensor._dequantized, out_sharding=sharding)(self)

    def _dequantized(self) -> jax.Array:
        scale = self.scale._dequantized() if isinstance(self.scale, QTensor) else self.scale
        compute = jnp.promote_types(jnp.float32, self.dtype)
        values = code_values(self.unpacked_codes(), self.qtype, compute)
        if self.zero_point is not None:
            values = values - broadcast_blocks(self.zero_point.astype(compute), self.shape)
        values = values * broadcast_blocks(scale.astype(compute), self.shape)
        return weight_of(values, self.input_factor, self.input_turn).astype(self.dtype)

    def unpacked_codes(self) -> jax.Array:
        """Codes of the logical shape: bit-packed ones as int8, others as they are stored."""
        if self.packed_axis is None:
            return self.codes
        assert self.packed_length is not None
        return packing.unpack(self.codes, self.qtype.bits, self.packed_axis, self.packed_length)

    def replace(self, **changes: Any) -> QTensor:
        """A copy with some fields replaced; not validated."""
        return dataclasses.replace(self, **changes)

    # -- validation --------------------------------------------------------------------------

    def validate(self, name: str = "QTensor") -> QTensor:
        """Checks the numbered invariants and returns self; leaves must have shape and dtype.

        1. codes have the qtype's storage dtype (int8 for packed types that are not packed).
        2. packed_axis is None, or negative, in range, of a packed qtype, with as many bytes as
           packed_length codes take.
        3. scale has the rank of codes and each of its sizes divides the logical size.
        4. zero_point is None or has the scale's shape, and only integer qtypes have one.
        5. input_scale is None or has the rank of codes and sizes 1 or the logical size.
        6. dtype and the dtypes of scale, input_scale and input_factor are floating; a scale that
           is a QTensor is valid itself.
        7. input_group is None where there is neither input_scale nor input_factor.
        8. contracted is None, or has different negative axes of the weight.
        9. input_factor is None or has the rank of codes and sizes that divide the logical ones.
        10. input_turn is None, or its runs fill an axis and there is a matrix of their size.

        Raises:
          ValueError: names the invariant, the part and both sides of the mismatch.
        """
        check_codes(self, name)
        check_scales(self, name)
        return self

    # -- no arithmetic -----------------------------------------------------------------------

    def __jax_array__(self) -> jax.Array:
        """Raises: a QTensor never becomes an array silently."""
        raise TypeError(_NO_ARITHMETIC.format(what="it was passed to a JAX operation"))

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Raises: a QTensor never becomes an array silently."""
        raise TypeError(_NO_ARITHMETIC.format(what="it was passed to a numpy operation"))

    def __getattr__(self, name: str) -> Any:
        """Raises: it has not the attributes of an array (`astype`, `T`, `at` ...)."""
        if not name.startswith("_") and hasattr(jax.Array, name):
            raise AttributeError(_NO_ARITHMETIC.format(what=f".{name} was read"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        """Qtype, shape, dtype, blocks, parts and bytes in one line."""
        try:
            parts = [f"{self.qtype.name} {list(self.shape)} for {np.dtype(self.dtype).name}"]
            parts.append(f"blocks {list(self.block_shape)}")
            parts.append(f"scale {_describe(self.scale)}")
            size = f"{self.nbytes:,} bytes"
        except (AttributeError, TypeError, ValueError):  # leaves are not arrays
            return f"QTensor({self.qtype.name}, codes={self.codes!r}, scale={self.scale!r})"
        for name in ("zero_point", "input_scale", "input_factor"):
            if getattr(self, name) is not None:
                parts.append(f"{name} {_describe(getattr(self, name))}")
        if self.input_turn is not None:
            parts.append(f"input turned by {self.input_turn}")
        if self.packed_axis is not None:
            parts.append(f"packed along {self.packed_axis}")
        if self.act is not None:
            parts.append(f"act={self.act!r}")
        return f"QTensor({', '.join(parts)}, {size})"


def _refuse(operation: str) -> Any:
    def method(self: QTensor, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(_NO_ARITHMETIC.format(what=f"{operation} was called"))

    method.__name__ = operation
    method.__doc__ = "Raises TypeError: a QTensor does no arithmetic."
    return method


_ARITHMETIC = """
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul
    rmatmul neg pos abs lt le gt ge getitem iter len bool float int
"""
for _name in _ARITHMETIC.split():
    setattr(QTensor, f"__{_name}__", _refuse(f"__{_name}__"))


def make_qtensor(
    codes: Any,
    scale: Any,
    zero_point: Any = None,
    input_scale: Any = None,
    *,
    qtype: str | QType,
    dtype: Any = jnp.float32,
    act: Any = None,
    packed_axis: int | None = None,
    packed_length: int | None = None,
    op_rules: tuple[Any, ...] = (),
    input_group: str | None = None,
    contracted: Sequence[int] | None = None,
    name: str = "QTensor",
) -> QTensor:
    """A validated QTensor; see `QTensor` for the fields and `QTensor.validate` for the errors.

    Args:
      codes: stored codes. With `packed_axis` they are already packed bytes.
      scale: scale array or QTensor.
      zero_point: zero points in code units, or None.
      input_scale: static scale of the activations, or None.
      qtype: a QType or its name.
      dtype: float dtype the weight stands for.
      act: activation scheme.
      packed_axis: axis along which codes are packed (made negative here).
      packed_length: logical length of that axis.
      op_rules: rules of weightless operations.
      input_group: name of the input, where other weights share `input_scale`.
      contracted: axes that the weight's op sums over, if that is known (made negative here).
      name: parameter name for error messages.
    """
    if packed_axis is not None and packed_axis >= 0:
        packed_axis -= codes.ndim
    return QTensor(
        codes,
        scale,
        zero_point,
        input_scale,
        get_qtype(qtype),
        np.dtype(dtype),
        act,
        packed_axis,
        packed_length,
        tuple(op_rules),
        input_group,
        None if contracted is None else negative_axes(contracted, codes.ndim),
    ).validate(name)


def negative_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes, sorted and counted from the end: removing leading axes keeps their numbers."""
    return tuple(sorted(axis - ndim if axis >= 0 else axis for axis in axes))


def is_qtensor(x: Any) -> bool:
    """`is_leaf` predicate for tree functions that treat a QTensor as one leaf."""
    return isinstance(x, QTensor)


def _bits(dtype: Any) -> int:
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return dtype.itemsize * 8


def storage_bytes(leaf: Any) -> int:
    """Bytes of an array or abstract value at its real width: int4 counts half a byte."""
    return -(-math.prod(leaf.shape) * _bits(leaf.dtype) // 8)


def _device_bytes(leaf: Any) -> int:
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        return int(leaf.on_device_size_in_bytes())
    return storage_bytes(leaf)


def _describe(part: Any) -> str:
    if isinstance(part, QTensor):
        return f"<{part.qtype.name} {list(part.shape)}, blocks {list(part.block_shape)}>"
    return f"{np.dtype(part.dtype).name} {list(part.shape)}"
