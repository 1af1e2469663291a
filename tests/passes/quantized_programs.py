"""Quantized programs for the tests of passes that edit them: made, run, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import check_jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.core import _compat
from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.schemes import ActScheme
from jaxquant.passes.insert_scales import InsertScales
from jaxquant.passes.pass_manager import Pass, PassManager
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.program import Program, trace
from tests.passes.zoo import quantize_axes

DYNAMIC = ActScheme()


def weight(key: int, *shape: int, axes: tuple[int, ...] = (0,), act: Any = DYNAMIC, **kwargs: Any):
    """A random quantized weight."""
    w = jax.random.normal(jax.random.key(key), shape) / shape[0] ** 0.5
    return quantize_axes(w, axes, **kwargs).replace(act=act)


def placed(w: Any, mesh: Any, spec: Any) -> Any:
    """A matrix on a mesh: its codes by ``spec``, its scales by the columns' part of it."""
    codes, scale = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec(None, spec[1]))
    return w.replace(codes=jax.device_put(w.codes, codes), scale=jax.device_put(w.scale, scale))


def quantized(fn: Callable[..., Any], tree: Any, *args: Any) -> tuple[Program, list[Any]]:
    """The quantized program of ``fn(tree, *args)``, and the inputs of its jaxpr."""
    program = trace(fn, tree, args)
    arguments = program.flatten(tree, *args)
    weights = {i: value for i, value in enumerate(arguments) if is_qtensor(value)}
    program = PassManager([InsertScales(weights)], verify="all").run(program)
    return program, jax.tree_util.tree_leaves(arguments)


def apply(program: Program, *passes: Pass) -> Program:
    """The program after passes, every one verified, and each of them idempotent."""
    for step in passes:
        after = PassManager([step], verify="all").run(program)
        again = step.run(after)
        assert again.program is after, f"{step.name} changed its own result"
        assert again.notes == ()
        assert str(step.run(program).program.jaxpr) == str(after.jaxpr), "not deterministic"
        check_jaxpr(_compat.open_jaxpr(after.jaxpr)[0])
        program = after
    return program


def run(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """The program, compiled."""
    return jax.jit(lambda *flat: evaluate(program, flat))(*inputs)


def gradient(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Gradients of the sum of sines of the outputs with respect to all float inputs."""
    return run_and_gradient(program, inputs)[1]


def run_and_gradient(program: Program, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Outputs, and gradients of the sum of their sines with respect to all float inputs."""
    floats = [i for i, known in enumerate(program.inputs) if known.part is None]
    floats = [i for i in floats if jax.numpy.issubdtype(inputs[i].dtype, np.floating)]

    def loss(values: list[Any]) -> tuple[Any, list[Any]]:
        full = list(inputs)
        for i, value in zip(floats, values, strict=True):
            full[i] = value
        outs = evaluate(program, full)
        return sum(jax.numpy.sin(out).sum() for out in outs), outs

    grads, outs = jax.jit(jax.grad(loss, has_aux=True))([inputs[i] for i in floats])
    return outs, grads


def assert_same(got: Any, want: Any) -> None:
    """Bit-equal trees of arrays."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
