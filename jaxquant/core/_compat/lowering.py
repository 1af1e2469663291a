"""Lowering rules: for which devices a program is meant, and rules made of array functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import mesh as _mesh
from jax._src.interpreters import mlir as _mlir


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
