"""Operations that quantization commutes with: quantize first, then move codes and scale alike.

`before` says how the operand of such an equation would have to be quantized for the result to be
that of quantizing its output, bit by bit; `replay` makes the equations that move codes and scale.
Used by `share_activation_quant`, which quantizes a value once for all its shapes, and by
`elide_roundtrips`, which takes a part of what is quantized already.

* A transpose always commutes. A reshape does where no axis that it makes or takes is partly shared
  by a scale and partly not. A broadcast repeats values, and no range changes.
* A slice commutes along the axes that have scales of their own: a token's range is its own.
  Through a slice of what shares a scale it would be another range, unless that is given (static).
* A conversion to a wider float type is exact, and the first thing that quantization does. Marking a
  value as varying over a mesh axis changes its type only.
* Not through checkpoint names, sharding constraints and barriers: they are there to be met. On an
  explicit mesh not through reshapes and broadcasts, whose shardings the user spelt for x only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.passes.edit_jaxpr import apply, is_var

#: Operations after which a value is as large as before, or larger.
WHOLE = frozenset(
    {
        jp.broadcast_in_dim_p,
        jp.convert_element_type_p,
        jp.copy_p,
        jp.reshape_p,
        jp.squeeze_p,
        jp.transpose_p,
        _compat.pvary_p,
    }
)
#: Operations that take a part of a value.
PARTS = frozenset({jp.slice_p, jp.dynamic_slice_p})


def canonical(act: ActQuant, shape: Sequence[int]) -> ActQuant:
    """The scheme without axes that do not matter: of size 1, or any where the scale is given."""
    axes = tuple(i for i in act.reduce_axes if shape[i] != 1 and not act.static)
    return act if axes == act.reduce_axes else dataclasses.replace(act, reduce_axes=axes)


def scale_shape(shape: Sequence[int], act: ActQuant) -> tuple[int, ...]:
    """Shape of the scale of a value of `shape`; of a given one, all sizes are 1."""
    return tuple(1 if act.static or i in act.reduce_axes else n for i, n in enumerate(shape))


def before(
    eqn: Any, act: ActQuant, allowed: frozenset[Primitive], given: Any = None
) -> ActQuant | None:
    """How the first operand must be quantized instead of the output.

    Args:
      eqn: an equation with one output.
      act: how its output is quantized (canonical).
      allowed: `WHOLE`, `PARTS` or both.
      given: the variable of the given scale, where there is one and it is known.

    Returns:
      The canonical scheme for the operand; None if that is not exact.
    """
    if eqn.primitive not in allowed:
        return None
    x, out = eqn.invars[0].aval, eqn.outvars[0].aval
    if 0 in out.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    if eqn.primitive is _compat.pvary_p and act.static and not _varies_as(given, x):
        return None
    axes = _BEFORE[eqn.primitive](eqn, frozenset(act.reduce_axes), act.static)
    if axes is None:
        return None
    return canonical(dataclasses.replace(act, reduce_axes=tuple(sorted(axes))), x.shape)


def replay(eqn: Any, codes: Any, scale: Any, act: ActQuant) -> tuple[list[Any], Any, Any]:
    """Codes and scale of an equation's output from those of its operand.

    Args:
      eqn: an equation for which `before` gave a scheme.
      codes: the operand's codes.
      scale: the operand's scale.
      act: the scheme of the output (canonical).

    Returns:
      New equations, codes and scale.
    """
    if eqn.primitive in (jp.convert_element_type_p, jp.copy_p):
        return [], codes, scale
    if eqn.primitive is _compat.pvary_p:
        new = [apply(eqn.primitive, [part], eqn.params, like=eqn) for part in (codes, scale)]
        return new, new[0].outvars[0], new[1].outvars[0]
    moved = apply(eqn.primitive, [codes, *eqn.invars[1:]], eqn.params, like=eqn)
    shape = scale_shape(eqn.outvars[0].aval.shape, act)
    if scale.aval.shape == shape and set(shape) <= {1}:
        return [moved], moved.outvars[0], scale
    primitive, params = _of_scale(eqn, scale, shape)
    rest = eqn.invars[1:] if primitive is jp.dynamic_slice_p else []
    scaled = apply(primitive, [scale, *rest], params, like=eqn)
    return [moved, scaled], moved.outvars[0], scaled.outvars[0]


def _varies_as(given: Any, x: Any) -> bool:
    """Whether a given scale is the same on all devices on which x is."""
    return given is not None and _compat.varying_axes(given.aval) <= _compat.varying_axes(x)


def varying_like(scale: Any, x: Any, like: Any) -> tuple[list[Any], Any]:
    """A scale with the type of one for values that vary over mesh axes as ``x`` does.

    Args:
      scale: a variable that varies over no other axes than ``x``.
      x: a variable.
      like: the equation whose source line and context a new one gets.

    Returns:
      New equations, and the variable.
    """
    missing = _compat.varying_axes(x.aval) - _compat.varying_axes(scale.aval)
    if not missing:
        return [], scale
    eqn = apply(_compat.pvary_p, [scale], {"axes": tuple(sorted(missing))}, like=like)
    return [eqn], eqn.outvars[0]


def _of_scale(eqn: Any, scale: Any, shape: tuple[int, ...]) -> tuple[Primitive, dict[str, Any]]:
    """The operation that does to the scale what `eqn` does to the values."""
    primitive, params = eqn.primitive, eqn.params
    if primitive is jp.transpose_p:
        return primitive, params
    if primitive is jp.dynamic_slice_p:
        return primitive, {**params, "slice_sizes": shape}
    if primitive is jp.slice_p:
        whole = [n == 1 for n in scale.aval.shape]
        starts = tuple(0 if w else s for w, s in zip(whole, params["start_indices"], strict=True))
        limits = tuple(1 if w else s for w, s in zip(whole, params["limit_indices"], strict=True))
        return primitive, {**params, "start_indices": starts, "limit_indices": limits}
    if primitive is jp.broadcast_in_dim_p:
        return primitive, {**params, "shape": shape}
    return jp.reshape_p, {"new_sizes": shape, "dimensions": None, "sharding": None}


Axes = frozenset[int]


def _same(eqn: Any, axes: Axes, static: bool) -> Axes | None:
    return axes


def _convert(eqn: Any, axes: Axes, static: bool) -> Axes | None:
    narrow, wide = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return axes if jnp.promote_types(narrow, wide) == wide else None


def _transpose(eqn: Any, axes: Axes, static: bool) -> Axes | None:
    permutation = eqn.params["permutation"]
    return frozenset(permutation[i] for i in axes)


def _reshape(eqn: Any, axes: Axes, static: bool) -> Axes | None:
    permuted = eqn.primitive is jp.reshape_p and eqn.params["dimensions"] is not None
    if permuted or _on_explicit_mesh(eqn):
        return None
    x, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if not all(isinstance(n, int) for n in (*x, *out)):  # symbolic sizes (jax.export)
        return None
    found: set[int] = set()
    for ins, outs in _factors(x, out):
        shared = {i in axes for i in outs if out[i] != 1}
        if static or shared == {True}:
            found.update(ins)
        elif len(shared) == 2:
            return None
    return frozenset(found)


def _broadcast(eqn: Any, axes: Axes, static: bool) -> Axes | None:
    if _on_explicit_mesh(eqn):
        return None
    return frozenset(j for j, i in enumerate(eqn.params["broadcast_dimensions"]) if i in axes)


def _part(eqn: Any, axes: Axes, static: bool) -> Axes | None:
    if _on_explicit_mesh(eqn):
        return None
    x, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    # Axes that the slice leaves with one value may have been reduced before, or not: not.
    return axes if static or all(x[i] == out[i] for i in axes) else None


_BEFORE: dict[Primitive, Callable[[Any, Axes, bool], Axes | None]] = {
    jp.broadcast_in_dim_p: _broadcast,
    jp.convert_element_type_p: _convert,
    jp.copy_p: _same,
    jp.dynamic_slice_p: _part,
    jp.reshape_p: _reshape,
    jp.slice_p: _part,
    jp.squeeze_p: _reshape,
    jp.transpose_p: _transpose,
    _compat.pvary_p: _same,
}


def representatives(jaxpr: Any) -> dict[Any, Any]:
    """For each variable that is the same move of the same value as one before it, that one.

    Layers often shape or convert their common input each for itself; weights with a common
    `QTensor.input_factor` transform it each for itself, by one jitted function.
    """
    seen: dict[Any, Any] = {}
    found: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        known = eqn.primitive in WHOLE | PARTS or _is_pure_call(eqn)
        if not known or not all(map(is_var, eqn.invars)):
            continue
        operands = tuple(found.get(var, var) for var in eqn.invars)
        key = (eqn.primitive, operands, tuple(sorted(eqn.params.items())))
        (out,) = eqn.outvars
        first = seen.setdefault(key, out)
        if first is not out:
            found[out] = first
    return found


def _is_pure_call(eqn: Any) -> bool:
    return eqn.primitive is jp.jit_p and not eqn.effects and len(eqn.outvars) == 1


def _on_explicit_mesh(eqn: Any) -> bool:
    return _compat.explicit_sharding(eqn.outvars[0].aval) is not None


def _factors(x: Sequence[int], out: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes before and after a reshape that hold the same values."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(x) or j < len(out):
        ins: list[int] = []
        outs: list[int] = []
        sizes = [1, 1]
        while not (ins or outs) or sizes[0] != sizes[1]:
            if i < len(x) and (sizes[0] <= sizes[1] or j == len(out)):
                ins.append(i)
                sizes[0] *= x[i]
                i += 1
            else:
                outs.append(j)
                sizes[1] *= out[j]
                j += 1
        groups.append((ins, outs))
    return groups
