"""A world in which CPU has kernels: what is tested of a split product is all but the kernel.

`kernels_on_cpu` enters a platform whose kernels are plain matmuls of one device's part, or the TPU
kernels in interpret mode; both note every problem that they were chosen for.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.placement import part_shardings
from jaxquant.frontends.with_shardings import with_shardings
from jaxquant.pallas_kernels import dispatch
from jaxquant.pallas_kernels.as_matrix import Kernel
from jaxquant.pallas_kernels.packing import unpack
from jaxquant.pallas_kernels.problem import PACKED, STORAGE
from jaxquant.pallas_kernels.tpu.select import select as select_tpu
from jaxquant.pallas_kernels.tpu.select import select_transposed as select_tpu_transposed

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
_COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def kernels_on_cpu(monkeypatch, interpret=False):
    """Gives CPU kernels until the test ends.

    Returns:
      A list that gets every `MatmulProblem` a kernel is chosen for.
    """
    problems = []

    def select(problem, device_kind, forced):
        problems.append(problem)
        if not interpret:
            multiply = functools.partial(_multiply, problem)
            kernel = Kernel("a matmul on cpu", "this is a test", multiply, k_minor=True)
            return dataclasses.replace(kernel, batched=multiply)
        return _interpreted(select_tpu(problem, "TPU v5 lite", forced))

    def select_transposed(problem, device_kind, forced):
        problems.append(problem)
        return _interpreted(select_tpu_transposed(problem, "TPU v6 lite", forced))

    jax.clear_caches()  # programs of other tests know nothing of these kernels
    transposed = select_transposed if interpret else None
    platform = dispatch.Platform(select, "CPU", k_last=not interpret, transposed=transposed)
    monkeypatch.setitem(dispatch.PLATFORMS, "cpu", platform)
    return problems


def _interpreted(kernel):
    def multiply(*args, interpret, **options):
        return kernel.multiply(*args, interpret=True, **options)

    return dataclasses.replace(kernel, multiply=multiply, batched=multiply, quantize=None)


def _multiply(problem, x, codes, scale, zero_point, *, x_scale, table, interpret):
    if problem.codes in PACKED:
        codes = unpack(codes, STORAGE[problem.codes][1], 1, problem.k)
    w = codes.astype(jnp.float32).T
    if table is not None:
        w = jnp.asarray(table, jnp.float32)[codes.astype(jnp.int32).T + 8]

    def spread(part):
        return jnp.repeat(part.astype(jnp.float32), problem.group, axis=0)

    if zero_point is not None:
        w = w - spread(zero_point)
    out = x.astype(jnp.float32) @ (w * spread(scale))
    if x_scale is not None:
        out = out * x_scale
    return out.astype(problem.out_dtype)


def mesh_of(kind, shape=(2, 4), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def place(value, mesh, spec):
    return jax.device_put(value, NamedSharding(mesh, spec))


def place_weight(w, mesh, spec, batch_axes=("data",)):
    """The weight's parts on the mesh, and on an automatic one the record of it."""
    w = jax.device_put(w, part_shardings(w, NamedSharding(mesh, spec)))
    if mesh.axis_types[0] is EXPLICIT:
        return w
    return with_shardings(w, batch_axes=batch_axes)


def collectives(fn, *args):
    """Kinds and counts of the collectives in the program that is compiled for these arguments."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    found = re.findall(rf" ({_COLLECTIVES})(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def close(got, want, rtol=1e-5):
    """Equal up to rounding, measured at the largest value."""
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(jax.device_get(got), want, rtol=0, atol=rtol * np.abs(want).max())


__all__ = ["AUTO", "EXPLICIT", "P"]
