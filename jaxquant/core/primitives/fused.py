"""`fused_epilogue`: a quantized product and what follows it elementwise, as one JAX primitive.

`jaxquant.passes.fuse_epilogues` makes it of equations that a kernel can do in one launch; its
parameter is a jaxpr of these very equations. Wherever no kernel takes them together it *is* they:
it is lowered to them, differentiated as they are, and mapped by mapping them, so that it has no
derivative of its own and changes no bit where nothing is fused. What it computes is read from the
jaxpr when it is lowered (`epilogues.find`), so a transformed one is known by what it has become.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.interpreters import ad, batching, mlir

from jaxquant.core import _compat
from jaxquant.core.primitives.epilogues import Epilogue, find, product_of
from jaxquant.core.primitives.kernels import Product, choose_kernel, kernel_parts
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.dispatch import Implementation, Place
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.epilogues import FinishedProduct, GatedProducts, finish, gate

fused_epilogue_p = _compat.make_primitive("fused_epilogue")
Launch = GatedProducts | FinishedProduct
# Where kernels have epilogues, as JAX names the platform that it lowers for.
_PLATFORM = "tpu"


@dataclasses.dataclass(frozen=True)
class Fused:
    """What a `fused_epilogue` computes.

    Attributes:
      product: its equation with a product.
      epilogue: what follows.
      out: type of the result.
    """

    product: Any
    epilogue: Epilogue
    out: Any

    @classmethod
    def make(cls, closed: Any) -> Fused | None:
        """Of the primitive's jaxpr; None if a transformation made something else of it."""
        jaxpr = closed.jaxpr
        found = find(jaxpr)
        if len(found) != 1 or len(found[0].members) != len(jaxpr.eqns):
            return None
        (epilogue,) = found
        return cls(jaxpr.eqns[epilogue.product], epilogue, jaxpr.outvars[0].aval)

    def choose(self, place: Place, implementation: Implementation | None) -> Launch | str:
        """The launch for all of it, or why there is none.

        Args:
          place: where it runs.
          implementation: forces one for the products.

        Raises:
          ValueError: the forced one does not fit.
        """
        if place.platform != _PLATFORM:
            return f"kernels on {place.platform} have no epilogues"
        eqn, params = self.product, self.product.params
        x, _, weights, axes = product_of(eqn, [atom.aval for atom in eqn.invars])
        runs = []
        for w, own, var in zip(weights, axes, eqn.outvars, strict=True):
            sharding = _compat.explicit_sharding(var.aval)
            options = params["act"], var.aval.dtype, params["precision"], sharding
            runs.append(
                choose_kernel(Product(x, w, own, *options), place, params["implementation"]).run
            )
        finishes, dtype = self.epilogue.finishes, self.out.dtype
        biases = any(f.bias is not None for f in finishes)
        if self.epilogue.gated:
            first = self.epilogue.gate
            return gate(runs[first], runs[1 - first], biases, dtype)
        return finish(runs[0], biases, finishes[0].residual is not None, dtype)

    def run(self, launch: Launch, values: Callable[[Any], jax.Array]) -> jax.Array:
        """The result, by a launch that `choose` gave.

        Args:
          launch: the launch.
          values: the array that a variable of the jaxpr has.
        """
        x, quantized, weights, axes = product_of(
            self.product, list(map(values, self.product.invars))
        )
        x = x.astype(jnp.promote_types(x.dtype, weights[0].dtype))
        pair = (quantized[0], quantized[1]) if quantized else None
        parts = [kernel_parts(w) for w in weights]
        finishes = self.epilogue.finishes
        biases = [
            None if finish.bias is None else _columns(values(finish.bias), finish.bias_axes, w, own)
            for finish, w, own in zip(finishes, weights, axes, strict=True)
        ]
        if isinstance(launch, GatedProducts):
            first, second = self.epilogue.gate, 1 - self.epilogue.gate
            return launch(x, pair, parts[first], parts[second], (biases[first], biases[second]))
        residual = finishes[0].residual
        added = None if residual is None else values(residual)
        return launch(x, pair, parts[0], weights[0].input_scale, biases[0], added)


def _columns(bias: jax.Array, places: Sequence[int], w: QTensor, axes: DotAxes) -> jax.Array:
    """A bias, whose axes lie at these places of the result, as [n]."""
    sizes = dict(zip(places, bias.shape, strict=True))
    own = [sizes.get(axes.weight_out_axis(a), 1) for a in axes.w_free]
    return jnp.broadcast_to(bias.reshape(own), [w.shape[a] for a in axes.w_free]).reshape(-1)


def bind_fused(closed: Any, args: Sequence[Any]) -> Any:
    """Binds the primitive.

    Args:
      closed: a closed jaxpr without constants and with one result.
      args: its operands.
    """
    return fused_epilogue_p.bind(*args, jaxpr=closed)


def _apart(closed: Any, *args: Any) -> Any:
    """The equations, one by one."""
    (out,) = jax.core.eval_jaxpr(closed.jaxpr, (), *args)
    return out


def _impl(*args: Any, jaxpr: Any) -> Any:
    """Eagerly, too, a launch where there may be one, and else what the equations give."""
    devices = {d for arg in args if isinstance(arg, jax.Array) for d in arg.devices()}
    if any(_compat.lowering_platform(device.client) == _PLATFORM for device in devices):
        return _compat.apply_primitive(fused_epilogue_p, *args, jaxpr=jaxpr)
    return _apart(jaxpr, *args)


def _abstract_eval(*args: Any, jaxpr: Any) -> Any:
    given = [(a.shape, a.dtype) for a in args]
    wanted = [(v.aval.shape, v.aval.dtype) for v in jaxpr.jaxpr.invars]
    if given != wanted:
        raise TypeError(f"fused_epilogue of {wanted} was given {given}")
    return jaxpr.jaxpr.outvars[0].aval


def _batch(
    axis_data: Any, args: Sequence[Any], dims: Sequence[int | None], *, jaxpr: Any
) -> tuple[Any, int]:
    args = [arg if dim is None else jnp.moveaxis(arg, dim, 0) for arg, dim in zip(args, dims)]
    mapped = jax.vmap(
        functools.partial(_apart, jaxpr),
        in_axes=tuple(None if dim is None else 0 for dim in dims),
        axis_size=axis_data.size,
        axis_name=axis_data.name,
        spmd_axis_name=axis_data.spmd_name,
    )
    closed = jax.make_jaxpr(mapped)(*args)
    return (mapped(*args) if closed.consts else bind_fused(closed, args)), 0


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: Any) -> tuple[Any, Any]:
    """That of the equations; zero tangents stay symbolic."""
    active = [i for i, t in enumerate(tangents) if _compat.has_tangent(t)]
    if not active:
        out = bind_fused(jaxpr, primals)
        return out, _compat.zero_tangent(out)

    def of_active(*values: Any) -> Any:
        full = list(primals)
        for i, value in zip(active, values, strict=True):
            full[i] = value
        return _apart(jaxpr, *full)

    out, tangent = jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])
    return out, tangent


def _transpose(cotangent: Any, *args: Any, jaxpr: Any) -> list[Any]:
    """That of the equations, where they are linear in what is not known."""
    unknown = [i for i, arg in enumerate(args) if ad.is_undefined_primal(arg)]

    def of_unknown(*values: Any) -> Any:
        full = list(args)
        for i, value in zip(unknown, values, strict=True):
            full[i] = value
        return _apart(jaxpr, *full)

    avals = [args[i].aval for i in unknown]
    found: list[Any] = [None] * len(args)
    parts = [ad.Zero(aval) for aval in avals]
    if _compat.has_tangent(cotangent):
        parts = jax.linear_transpose(of_unknown, *avals)(cotangent)
    for i, part in zip(unknown, parts, strict=True):
        found[i] = part
    return found


def _lower(ctx: Any, *args: Any, jaxpr: Any) -> Any:
    return mlir.lower_fun(functools.partial(_apart, jaxpr), multiple_results=False)(ctx, *args)


def _lower_to_kernel(ctx: Any, *args: Any, jaxpr: Any) -> Any:
    fused = Fused.make(jaxpr)
    if fused is None:
        return _lower(ctx, *args, jaxpr=jaxpr)
    device, devices, manual = _compat.lowering_devices(ctx)
    kind = None if device is None else device.device_kind
    forced = fused.product.params["implementation"]
    launch = fused.choose(Place(_PLATFORM, kind, devices, manual), forced)
    if isinstance(launch, str):
        return _lower(ctx, *args, jaxpr=jaxpr)

    def fn(*args: jax.Array) -> jax.Array:
        known = dict(zip(jaxpr.jaxpr.invars, args, strict=True))
        return fused.run(launch, lambda a: a.val if isinstance(a, Literal) else known[a])

    rule = _compat.lower_without_shardings(fn, device=_compat.abstract_device(device))
    return rule(ctx, *args)


fused_epilogue_p.def_impl(_impl)
fused_epilogue_p.def_abstract_eval(_abstract_eval)
batching.fancy_primitive_batchers[fused_epilogue_p] = _batch
ad.primitive_jvps[fused_epilogue_p] = _jvp
ad.primitive_transposes[fused_epilogue_p] = _transpose
mlir.register_lowering(fused_epilogue_p, _lower)
mlir.register_lowering(fused_epilogue_p, _lower_to_kernel, platform=_PLATFORM)
