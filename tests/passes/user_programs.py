"""Programs as users write them around quantized weights: effects, references, placement, solvers.

Each is `fn(p, x)` of two square matrices p["w"], p["v"] and x of eight rows. `PROGRAMS` says what
may be done to it besides running it: "g" a gradient by x, "m" mapping over x; "3" says that values
go through float32. Used by `test_user_programs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Program = Callable[[dict[str, Any], Any], Any]
PROGRAMS: dict[Program, str] = {}


def program(may: str) -> Callable[[Program], Program]:
    """Enters a program; `may` is as in `PROGRAMS`."""

    def enter(fn: Program) -> Program:
        PROGRAMS[fn] = may
        return fn

    return enter


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Eight devices in two axes."""
    return jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)


def placed(x: Any, *spec: Any) -> Any:
    return lax.with_sharding_constraint(x, NamedSharding(mesh(), P(*spec)))


def layer(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


def repeated(step: Callable[[Any], Any], x: Any, length: int = 3) -> Any:
    return lax.scan(lambda c, _: (step(c), None), x, None, length=length)[0]


# -- effects and references ----------------------------------------------------------------------


@program("gm")
def debug_callback_of_a_weight_and_a_product(p, x):
    y = layer(p["w"], x)
    jax.debug.callback(lambda *_: None, p["v"], y)
    return y @ p["v"]


@program("")
def ordered_callbacks_in_a_loop(p, x):
    def step(c):
        io_callback(lambda v: None, None, c[0, 0], ordered=True)
        return layer(p["w"], c) + x @ p["v"]

    return repeated(step, x)


@program("m3")
def pure_callbacks(p, x):
    def tanh(y):
        short = y.astype(jnp.float32)  # callbacks run in a thread that has no float64
        out = jax.ShapeDtypeStruct(y.shape, short.dtype)
        return jax.pure_callback(np.tanh, out, short, vmap_method="sequential").astype(y.dtype)

    return tanh(x @ p["w"]) @ tanh(p["v"]) + x @ p["v"]


@program("gm")
def a_reference_in_a_scan(p, x):
    ref = jax.new_ref(jnp.zeros_like(x))

    def step(c):
        ref[...] = ref[...] + x @ p["w"]
        return layer(p["v"], c)

    return repeated(step, x) + ref[...]


@program("g")
def a_reference_in_branches_and_calls(p, x):
    ref = jax.new_ref(jnp.zeros_like(x))

    @jax.jit
    def call(ref, w):
        ref[...] = ref[...] + layer(w, x)
        for _ in range(8):
            ref[...] = jnp.sin(ref[...])

    def one():
        ref[...] = x @ p["w"]

    def other():
        ref[...] = x @ p["v"]

    lax.cond(x[0, 0] > 0, one, other)
    call(ref, p["v"])
    return jax.freeze(ref)


# -- placement, donation, names ------------------------------------------------------------------


@program("gm")
def constraints_on_all(p, x):
    w, x = placed(p["w"], None, "t"), placed(x, "d")
    return placed(layer(w, x), "d", "t") @ placed(p["v"].T, "t")


@program("gm")
def constraints_on_layers(p, x):
    stacked = placed(jnp.stack([p["w"], p["v"]]), None, None, "t")

    def step(c, w):
        return placed(layer(placed(w, "t"), c), "d"), None

    return lax.scan(step, x, stacked)[0]


@program("gm")
def donated_calls(p, x):
    call = jax.jit(lambda c, w: layer(w, c) + c, donate_argnums=(0, 1))
    shared = jax.jit(lambda c, w: layer(w, jnp.sin(c) + repeated(jnp.cos, c)), donate_argnums=0)
    y = call(x * 1.0, p["w"] * 1.0) + shared(x * 2.0, p["v"])
    return repeated(lambda c: call(c, p["w"] + 0), y) + shared(y, p["w"])


@program("gm")
def names_and_remat(p, x):
    save = jax.checkpoint_policies.save_only_these_names

    def block(p, x):
        with jax.named_scope("up"):
            y = checkpoint_name(jnp.tanh(x @ p["w"]), "up")
        return y @ checkpoint_name(p["v"].T, "down weight") + x @ p["w"]

    checkpoint_name(x, "read by nobody")
    return repeated(lambda c: jax.checkpoint(block, policy=save("up"))(p, c), x)


@program("gm")
def barriers(p, x):
    p, y = lax.optimization_barrier((p, x))
    return repeated(lambda c: layer(lax.optimization_barrier(p["w"]), c), y) @ p["v"]


def _partitioned(fn, rule):
    wrapped = custom_partitioning(fn)
    wrapped.def_partition(
        infer_sharding_from_operands=lambda mesh, args, result: result.sharding,
        partition=lambda mesh, args, result: (
            mesh, fn, result.sharding, tuple(a.sharding for a in args)
        ),
        sharding_rule=rule,
    )  # fmt: skip
    return wrapped


@program("")
def custom_partitioning_of_both(p, x):
    tanh = _partitioned(lambda x: jnp.tanh(x), "i j -> i j")
    dot = _partitioned(lambda x, w: x @ w, "i j, j k -> i k")
    return dot(tanh(x @ p["w"]), p["v"]) + x @ p["v"]


# -- platforms, kernels, foreign calls -----------------------------------------------------------


@program("gm")
def dependent_on_the_platform(p, x):
    def on_tpu(x):
        """Refused by every other platform."""
        return pl.pallas_call(_double, out_shape=jax.typeof(x))(x @ p["w"])

    by_kernel = lax.platform_dependent(
        lax.stop_gradient(x), tpu=on_tpu, default=lambda x: layer(p["w"], x)
    )
    return by_kernel + lax.platform_dependent(
        x, p["v"], cpu=lambda x, v: layer(v, x), default=lambda x, v: x @ v
    )


def _double(x_ref, o_ref):
    o_ref[...] = 2 * x_ref[...]


def _product(x_ref, w_ref, o_ref):
    o_ref[...] = x_ref[...] @ w_ref[...]


@program("m")
def kernels_of_the_users_own(p, x):
    out = jax.typeof(x)
    y = pl.pallas_call(_double, out_shape=out, interpret=True)(x @ p["w"])
    return pl.pallas_call(_product, out_shape=out, interpret=True)(y, p["v"]) + y @ p["v"]


@program("gm")
def foreign_calls(p, x):
    q, r = jnp.linalg.qr(x @ p["w"] + 3 * jnp.eye(8))
    low = jnp.linalg.cholesky(p["v"] @ p["v"].T + jnp.eye(8))
    return q @ p["v"] + r + low


@program("")
def a_composite(p, x):
    tanh = lax.composite(lambda x: jnp.tanh(x), name="my.tanh")
    dot = lax.composite(lambda x, w: x @ w, name="my.dot")
    return dot(tanh(x @ p["w"]), p["v"]) + x @ p["v"]


# -- functions that take functions ---------------------------------------------------------------


@program("gm")
def scans_and_maps(p, x):
    y = lax.associative_scan(jnp.multiply, layer(p["w"], x))
    y = lax.map(functools.partial(layer, p["v"]), y, batch_size=3)
    return y + jnp.cumsum(lax.map(lambda r: r @ p["w"], x), 0)


@program("gm")
def an_associative_scan_of_weights(p, x):
    powers = lax.associative_scan(jnp.matmul, jnp.stack([p["w"], p["v"], p["w"]]))
    return x @ powers[-1] + x @ p["w"]


@program("gm")
def reductions(p, x):
    y = x @ p["w"]
    total = lax.reduce(y, jnp.zeros((), y.dtype), lax.add, (0,))
    most = lax.reduce_window(y, -jnp.inf, lax.max, (2, 2), (1, 1), "SAME")
    return total @ p["v"] + most + lax.reduce(p["v"], jnp.zeros((), y.dtype), lax.add, (0,))


@program("gm")
def linear_solves(p, x):
    def by_weight(v):
        return v + 0.02 * (p["w"].T @ (p["w"] @ v))

    inner = jax.scipy.sparse.linalg.cg(by_weight, x[0] @ p["w"], maxiter=30)[0]
    square = jnp.eye(8) * 3 + x.T @ x
    outer = lax.custom_linear_solve(
        lambda v: square @ v, inner, lambda _, b: jnp.linalg.solve(square, b), symmetric=True
    )
    return outer @ p["v"]


@program("gm")
def roots(p, x):
    def root(f, y):
        return lax.custom_root(
            f,
            y,
            lambda f, y: lax.fori_loop(0, 30, lambda i, y: y - f(y), y),
            lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y),
        )

    inner = root(lambda y: y - 0.1 * jnp.tanh(p["w"] @ y) - x[0], x[0])
    rows = x[0] @ p["v"]
    return root(lambda y: y - 0.1 * jnp.tanh(y) - rows, inner) @ p["v"]


@program("gm")
def weights_in_conditions(p, x):
    y = lax.fori_loop(0, 3, lambda i, y: layer(p["w"], y), x)
    y = lax.switch(2 * (y[0, 0] > 0), [lambda w, y: y @ w, lambda w, y: y, layer], p["v"], y)
    _, z = lax.while_loop(
        lambda s: (s[0] < 3) & ((s[1] @ p["w"]).sum() < 1e9),
        lambda s: (s[0] + 1, jnp.abs(s[1] @ p["v"]) + 1),
        (0, lax.stop_gradient(y)),
    )
    return z + y @ p["w"]


# -- shard_map -----------------------------------------------------------------------------------


def sharded(fn, in_specs, out_specs, **options):
    return jax.shard_map(fn, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, **options)


@program("gm")
def sums_over_devices(p, x):
    by_terms = sharded(lambda x, w: lax.psum(x @ w, "t"), (P("d", "t"), P("t")), P("d"))
    scattered = sharded(
        lambda x, w: lax.psum_scatter(x @ w, "t", scatter_dimension=1, tiled=True),
        (P("d", "t"), P("t")), P("d", "t"),
    )  # fmt: skip
    return jnp.tanh(by_terms(x, p["w"])) @ p["v"] + scattered(x, p["v"])


@program("gm")
def gathers_over_devices(p, x):
    def gathered(x, w, v):
        y = lax.all_gather(x @ w, "t", axis=1, tiled=True)
        return y @ lax.all_gather(v, "t", axis=1, tiled=True)

    specs = P("d"), P(None, "t"), P(None, "t")
    return sharded(gathered, specs, P("d"), check_vma=False)(x, p["w"], p["v"]) + x @ p["v"]


@program("gm")
def moves_over_devices(p, x):
    def moved(x, w):
        y = lax.ppermute(x, "d", [(i, (i + 1) % 4) for i in range(4)]) @ w
        own = lax.dynamic_slice_in_dim(w, 4 * lax.axis_index("t"), 4, axis=1)
        return jnp.concatenate([y[:, :4] @ own[:4], repeated(lambda c: c, x @ own)], axis=1)

    return sharded(moved, (P("d"), P()), P("d", "t"))(x, p["w"]) @ jnp.concatenate([p["v"]] * 2)


@program("gm")
def everything_inside_of_shards(p, x):
    save = jax.checkpoint_policies.save_only_these_names("h")

    def inside(x, w):
        ref = jax.new_ref(x)
        ref[...] = ref[...] @ w
        jax.debug.callback(lambda _: None, x)
        step = jax.checkpoint(lambda c: checkpoint_name(layer(w, c), "h") @ w, policy=save)
        return repeated(step, x, 2) + ref[...]

    return sharded(inside, (P("d"), P()), P("d"), check_vma=False)(x, p["w"]) + x @ p["v"]
