"""The only file that touches ``jax._src`` or asks for a JAX version.

Everything that differs between jax 0.10 and the newest release, or that JAX keeps private
although a jaxpr pass cannot do without it, has one small function here. Called by the passes
and the primitives; nothing here knows what quantization is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import custom_derivatives as _custom_derivatives
from jax._src import dispatch as _dispatch
from jax._src import mesh as _mesh
from jax._src import pjit as _pjit
from jax._src import shard_map as _shard_map
from jax._src import source_info_util as _source_info
from jax._src.interpreters import ad as _ad
from jax._src.interpreters import batching as _batching
from jax._src.interpreters import mlir as _mlir
from jax._src.interpreters import partial_eval as _pe
from jax._src.lax import lax as _lax
from jax._src.sharding_impls import UNSPECIFIED as _UNSPECIFIED
from jax._src.sharding_impls import UnspecifiedValue as _Unspecified
from jax._src.sharding_impls import canonicalize_sharding as _canonicalize_sharding
from jax._src.state.types import AbstractRef as _AbstractRef
from jax.extend.core import primitives as jp

__all__ = [
    "abstract_eval",
    "backward_mark",
    "bind",
    "bind_remat",
    "call_bwd",
    "call_primitives",
    "canonical_out_sharding",
    "canonical_precision",
    "custom_rule",
    "custom_with_more_consts",
    "equation_context",
    "explicit_sharding",
    "has_tangent",
    "is_eager",
    "is_tracer",
    "is_unspecified",
    "jaxpr_of_equations",
    "jit_with_more_operands",
    "lower_without_shardings",
    "lowering_devices",
    "lowering_platform",
    "make_primitive",
    "match_varying",
    "mesh_axes",
    "name_stack_names",
    "open_jaxpr",
    "optimization_barrier_p",
    "permuted_sharding",
    "pvary_p",
    "ragged_dot_general_p",
    "reshard_p",
    "run_fwd",
    "scan_arity",
    "scan_with_more_consts",
    "shard_map_p",
    "sharding_for_vmap",
    "source_line",
    "split_p",
    "stack_p",
    "type_in_shard_map",
    "unsplit",
    "unstack_p",
    "vary_like",
    "varying_axes",
    "zero_tangent",
]

# One and the same primitive from jax 0.12 on.
call_primitives = tuple(dict.fromkeys((jp.closed_call_p, jp.call_p)))
shard_map_p = _shard_map.shard_map_p
ragged_dot_general_p = _lax.ragged_dot_general_p
optimization_barrier_p = _lax.optimization_barrier_p
pvary_p = _core.pvary_p
reshard_p = _pjit.reshard_p
split_p = _lax.split_p
stack_p = _lax.stack_p
unstack_p = _lax.unstack_p


def is_tracer(x: Any) -> bool:
    """True for a value that is being traced."""
    return isinstance(x, _core.Tracer)


def is_eager() -> bool:
    """True outside every trace: no jit, grad, vmap or shard_map is being traced."""
    return _core.trace_ctx.is_top_level()


def is_unspecified(sharding: Any) -> bool:
    """True for the marker that ``jit`` stores where no sharding was given."""
    return isinstance(sharding, _Unspecified)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """``(jaxpr, consts)`` of a closed jaxpr, or of an open one that has no constants."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def jaxpr_of_equations(jaxpr: Any, eqns: Sequence[Any]) -> Any:
    """An open jaxpr of some equations of ``jaxpr``: for checking them alone.

    It puts out what the equations do, except references, which no jaxpr may return.
    """
    made = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, _core.DropVar)]
    outputs = [v for v in made if not isinstance(v.aval, _AbstractRef)]
    read = dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, _core.Var))
    own = set(made)
    inputs = [v for v in read if v not in own]
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    info = jaxpr.debug_info.with_unknown_names()
    return _core.Jaxpr((), inputs, outputs, list(eqns), effects, info)


def abstract_eval(primitive: Any, avals: Sequence[Any], params: Any, eqn: Any) -> list[Any]:
    """Types of the outputs of ``primitive`` for an equation to be put beside ``eqn``.

    Inside shard_map the types say over which axes values vary, but rules of JAX's own keep that
    only if they are told to, and look up the names of axes that tracing would have bound.
    """
    varying = any(aval.mat.varying for aval in avals)
    with eqn.ctx.manager, _config._check_vma(varying):
        mesh = _mesh.get_abstract_mesh()
        with _core.extend_axis_env_nd([(name, mesh.shape[name]) for name in mesh.manual_axes]):
            out, _ = primitive.abstract_eval(*avals, **params)
    return list(out) if primitive.multiple_results else [out]


def scan_arity(eqn: Any) -> tuple[int, int]:
    """``(num_consts, num_carry)`` of a scan equation; jax 0.12 keeps them in ``ft_in``."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_with_more_consts(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters of a scan with ``count`` more constants, behind those it has."""
    if "num_consts" in params:
        return {**params, "num_consts": params["num_consts"] + count}
    from jax._src import flattree

    consts, carry, xs = params["ft_in"].unpack()
    return {**params, "ft_in": flattree.pack((flattree.nones(len(consts) + count), carry, xs))}


def jit_with_more_operands(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters of a jitted call with ``count`` more operands, of which nothing is said."""
    more = {
        "in_shardings": (_UNSPECIFIED,) * count,
        "in_layouts": (None,) * count,
        "donated_invars": (False,) * count,
    }
    return {**params, **{name: (*params[name], *values) for name, values in more.items()}}


def custom_with_more_consts(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters of a custom_jvp or custom_vjp call with ``count`` more constants in front.

    They are as those that JAX hoists out of the function: the user's rules do not get them.
    """
    more = {**params, "num_consts": params["num_consts"] + count}
    if "out_trees" in params:
        # It also numbers the operands that the forward rule hands on as residuals.
        def out_trees() -> tuple[Any, Any, list[int | None]]:
            out, residuals, handed_on = params["out_trees"]()
            return out, residuals, [None if i is None else i + count for i in handed_on]

        more["out_trees"] = out_trees
    return more


def type_in_shard_map(eqn: Any, spec: Any, aval: Any) -> Any:
    """The type that an operand of a shard_map equation has in its body."""
    p = eqn.params
    return _core.shard_aval(p["mesh"], p["newly_manual_axes"], p["check_vma"], spec, aval)


def name_stack_names(eqn: Any) -> tuple[str, ...]:
    """Scope names of an equation, outermost first, without the marks of jvp, vmap, transpose."""
    stack = eqn.source_info.name_stack.stack
    return tuple(s.name for s in stack if isinstance(s, _source_info.Scope))


def backward_mark(eqn: Any) -> bool | None:
    """Whether an equation is part of a gradient's backward pass; None where it has no mark.

    Reverse mode marks its equations, or the call around them. What remat computes once more
    inside of the backward pass is the forward function.
    """
    for entry in reversed(eqn.source_info.name_stack.stack):
        if entry.name == "rematted_computation":
            return False
        if entry.name == "transpose" and isinstance(entry, _source_info.Transform):
            return True
    return None


def source_line(eqn: Any) -> str:
    """``file:line (function)`` of the user's line that made the equation."""
    return str(_source_info.summarize(eqn.source_info))


class equation_context:  # noqa: N801 (used as a function; a class costs half a generator)
    """Rebinding inside keeps the equation's traceback, name stack, mesh and metadata."""

    __slots__ = ("_user", "_settings")

    def __init__(self, eqn: Any) -> None:
        info, outer = eqn.source_info, _source_info.current_name_stack()
        names = outer + info.name_stack if outer.stack else info.name_stack
        self._user = _source_info.user_context(info.traceback, name_stack=names)
        self._settings = eqn.ctx.manager

    def __enter__(self) -> None:
        self._user.__enter__()
        self._settings.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._settings.__exit__(*error)
        self._user.__exit__(*error)


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Applies the equation's own primitive and parameters to ``args``; always a list."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def bind_remat(fn: Callable[..., Any], args: Any, *, params: dict[str, Any]) -> Any:
    """``jax.checkpoint`` of ``fn(*args)`` that also keeps ``differentiated`` and ``prevent_cse``.

    Args:
      fn: function of ``args``, pytrees in and out.
      args: its arguments.
      params: the parameters of the remat equation that this one stands for.
    """
    leaves, tree = jax.tree_util.tree_flatten(args)
    closed, out_shape = jax.make_jaxpr(
        lambda *flat: fn(*jax.tree_util.tree_unflatten(tree, flat)), return_shape=True
    )(*leaves)
    inner, consts = open_jaxpr(closed)
    inner = _pe.convert_constvars_jaxpr(inner)
    flat_out = jp.remat_p.bind(*consts, *leaves, **{**params, "jaxpr": inner})
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(out_shape), flat_out)


def custom_rule(eqn: Any) -> tuple[Any, ...]:
    """The user's functions of a custom_jvp (fun, jvp) or custom_vjp (fun, fwd, bwd) equation.

    Each has ``call_wrapped``, over flat arrays.
    """
    return tuple(eqn.primitive.get_bind_params(eqn.params)["subfuns"])


def run_fwd(eqn: Any, fwd: Any, primals: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Runs a custom_vjp's forward rule; every primal counts as differentiated.

    The constants that JAX hoisted out of the function cannot be differentiated.

    Returns:
      ``(outputs, residuals)``, flat.
    """
    num_consts = eqn.params["num_consts"]
    pairs = [x for i, p in enumerate(primals) for x in (p, i >= num_consts)]
    out = list(fwd.call_wrapped(*pairs))
    _, res_tree, forwarded = eqn.params["out_trees"]()
    num_res = res_tree.num_leaves - sum(f is not None for f in forwarded)
    new = iter(out[:num_res])
    residuals = [next(new) if f is None else primals[f] for f in forwarded]
    return out[num_res:], residuals


def call_bwd(bwd: Any, residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """Runs a custom_vjp's backward rule; None where the cotangent is a symbolic zero."""
    out = bwd.call_wrapped(*residuals, *cotangents)
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], list):
        out = out[0]  # jax 0.12 returns (cotangents, logs)
    return [None if isinstance(ct, _ad.Zero) else ct for ct in out]


def has_tangent(tangent: Any) -> bool:
    """True unless the tangent is a symbolic zero (or the float0 of an integer)."""
    if isinstance(tangent, (_ad.Zero, _custom_derivatives.SymbolicZero)):
        return False
    return getattr(tangent, "dtype", None) != jax.dtypes.float0


# -- what our own primitives need ------------------------------------------------------------


def make_primitive(name: str, *, multiple_results: bool = False) -> Any:
    """A new primitive that runs eagerly by compiling itself, as JAX's own do."""
    primitive = _core.Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(functools.partial(_dispatch.apply_primitive, primitive))
    return primitive


def zero_tangent(value: Any) -> Any:
    """The symbolic zero tangent of a value."""
    return _ad.Zero(_core.typeof(value).to_tangent_aval())


def match_varying(*args: Any) -> list[Any]:
    """Inside shard_map, marks every operand as varying over the axes that any of them varies over.

    JAX's own functions do this before they bind a primitive of several operands; its transpose is
    the psum of the cotangents.
    """
    return list(_core.auto_insert_reshard(*args))


def varying_axes(x: Any) -> frozenset[str]:
    """Names of the manual mesh axes that a value, its type, or what stands for it varies over."""
    if isinstance(x, jax.ShapeDtypeStruct):
        manual = x.manual_axis_type
    else:
        manual = getattr(x if isinstance(x, _core.AbstractValue) else jax.typeof(x), "mat", None)
    return frozenset() if manual is None else manual.varying


def vary_like(x: Any, other: Any) -> Any:
    """``x``, marked as varying over the manual axes that ``other`` (or its type) varies over."""
    missing = varying_axes(other) - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def canonical_precision(precision: Any) -> Any:
    """A precision as ``dot_general_p`` holds it: None, a pair, or a dot algorithm."""
    return _lax.canonicalize_precision(precision)


def canonical_out_sharding(sharding: Any, name: str) -> Any:
    """An ``out_sharding`` argument as primitives hold it: a NamedSharding on an abstract mesh."""
    return _canonicalize_sharding(sharding, name)


def sharding_for_vmap(axis_data: Any, sharding: Any, axis: int) -> Any:
    """``sharding`` with the mapped axis put in at ``axis``; None stays None."""
    if sharding is None:
        return None
    return _batching.get_sharding_for_vmap(axis_data, sharding, axis)


def explicit_sharding(aval: Any) -> Any:
    """The sharding in the type of ``aval``; None off explicit meshes."""
    sharding = getattr(aval, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and mesh._any_axis_explicit else None


def mesh_axes(aval: Any) -> tuple[tuple[str, int, str], ...]:
    """Name, size and kind ("explicit", "manual", "auto") of each axis of the mesh of a type."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty:
        return ()
    kinds = [str(kind).rpartition(".")[2].lower() for kind in mesh.axis_types]
    return tuple(zip(mesh.axis_names, mesh.axis_sizes, kinds, strict=True))


def permuted_sharding(aval: Any, order: Sequence[int]) -> Any:
    """The sharding type of ``aval`` with its axes in ``order``; None off explicit meshes."""
    sharding = aval.sharding
    if sharding.mesh.empty or not sharding.mesh._any_axis_explicit:
        return None
    spec = sharding.spec.update(partitions=tuple(sharding.spec.partitions[i] for i in order))
    return sharding.update(spec=spec)


def unsplit(sharding: Any, axes: Sequence[int]) -> Any:
    """The sharding of a type, with ``axes`` split over no mesh axis."""
    if not axes or sharding.mesh.empty or not sharding.mesh._any_axis_explicit:
        return sharding
    parts = (None if i in axes else p for i, p in enumerate(sharding.spec.partitions))
    return sharding.update(spec=sharding.spec.update(partitions=tuple(parts)))


def lowering_devices(ctx: Any) -> tuple[Any, int, bool]:
    """For what a lowering rule's program is meant.

    Args:
      ctx: the rule's context.

    Returns:
      ``(device, devices, manual)``: one of the devices, or the abstract device, or None where
      neither is known (export); how many share the program; and whether every mesh axis is manual.
    """
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    if mesh is not None:
        abstract = getattr(mesh, "abstract_device", None)
        device = mesh.devices.flat[0] if isinstance(mesh, jax.sharding.Mesh) else abstract
        return device, mesh.size, set(mesh.axis_names) == set(context.manual_axes)
    assigned = getattr(context, "device_assignment", None)
    device = assigned[0] if assigned else None
    backend, (platform, *_) = ctx.module_context.backend, ctx.module_context.platforms
    if device is None and backend is not None and lowering_platform(backend) == platform:
        device = (backend.local_devices() or backend.devices())[0]
    if device is None:  # lowered for a device that is described only
        device = getattr(_mesh.get_abstract_mesh(), "abstract_device", None)
    return device, getattr(context, "num_devices", 1), False


def abstract_device(device: Any) -> Any:
    """What a kernel is traced for: kind and cores of a device."""
    cores = getattr(device, "num_cores", getattr(device, "core_count", None))
    return _mesh.AbstractDevice(device.device_kind, cores, device.platform)


def lowering_platform(backend: Any) -> str:
    """The platform that a backend's programs are lowered for: "cuda" where JAX says "gpu"."""
    return str(getattr(backend, "_raw_platform", backend.platform))


def lower_without_shardings(
    fn: Callable[..., Any],
    *,
    multiple_results: bool = False,
    device: Any = None,
    mesh_axes: Sequence[tuple[str, int, str]] = (),
) -> Callable[..., Any]:
    """A lowering rule from a function of arrays, traced without sharding types.

    On an explicit mesh every operation of ``fn`` would need a sharding of its own. Here only the
    results are pinned to the primitive's output types; the partitioner fills in what lies between.
    ``device``, an abstract one, is what kernels in ``fn`` are traced for. ``mesh_axes``, as the
    function of that name has them, are there for a shard_map in ``fn``.
    """
    mesh = _mesh.empty_abstract_mesh
    if device is not None or mesh_axes:
        kinds = jax.sharding.AxisType
        mesh = _mesh.AbstractMesh(
            tuple(size for _, size, _ in mesh_axes),
            tuple(name for name, _, _ in mesh_axes),
            tuple(kinds.Manual if kind == "manual" else kinds.Auto for _, _, kind in mesh_axes),
            abstract_device=device,
        )

    def plain(aval: Any) -> Any:
        return _core.ShapedArray(aval.shape, aval.dtype)

    def rule(ctx: Any, *args: Any, **params: Any) -> Any:
        lowered = _mlir.lower_fun(fn, multiple_results=multiple_results)
        # Nothing in here has a varying type, whatever shard_map around it checks.
        with _mesh.use_abstract_mesh(mesh), _config._check_vma(False):
            inner = ctx.replace(
                avals_in=[plain(a) for a in ctx.avals_in],
                avals_out=[plain(a) for a in ctx.avals_out],
            )
            outs = lowered(inner, *args, **params)
        return [
            _mlir.lower_with_sharding_in_types(ctx, out, aval)
            for out, aval in zip(outs, ctx.avals_out, strict=True)
        ]

    return rule
