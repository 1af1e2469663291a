"""Which parameter meets which operation, in plain JAX programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.program import trace


def f32(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


X = f32(5, 8)
IDS = f32(5, dtype=jnp.int32)


def uses(fn, params, *args, **kwargs):
    return find_weights(trace(fn, params, args, kwargs))


def only(fn, params, *args, param="w"):
    """The one use of a parameter."""
    found = [u for u in uses(fn, params, *args) if u.param == param]
    assert len(found) == 1, found
    return found[0]


def roles(use):
    return [axis.role for axis in use.axes]


def blocks(use):
    """How many neighbours are summed over, axis by axis."""
    return [axis.contracted for axis in use.axes]


W = {"w": f32(8, 6)}


@pytest.mark.parametrize(
    ("fn", "shape", "expected", "side"),
    [
        (lambda p, x: x @ p["w"], (8, 6), [8, 1], "rhs"),
        (lambda p, x: jnp.dot(x, p["w"]), (8, 6), [8, 1], "rhs"),
        (lambda p, x: jnp.einsum("nk,mk->nm", p["w"], x), (6, 8), [1, 8], "lhs"),
        (lambda p, x: p["w"] @ x.T, (6, 8), [1, 8], "lhs"),
        (lambda p, x: x @ p["w"].T, (6, 8), [1, 8], "rhs"),
        (lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), (8, 6), [8, 1], "rhs"),
        (lambda p, x: x @ p["w"].reshape(8, 6), (8, 2, 3), [8, 1, 1], "rhs"),
        (lambda p, x: x @ p["w"].reshape(8, 6), (2, 4, 6), [2, 4, 1], "rhs"),
        (lambda p, x: jnp.einsum("mk,khd->mhd", x, p["w"]), (8, 2, 3), [8, 1, 1], "rhs"),
        (
            lambda p, x: jnp.einsum("mhd,hdn->mn", x.reshape(5, 2, 4), p["w"]),
            (2, 4, 6),
            [2, 4, 1],
            "rhs",
        ),
        (lambda p, x: x @ (p["w"] * 0.5), (8, 6), [8, 1], "rhs"),
        (lambda p, x: x @ (p["w"] / 3), (8, 6), [8, 1], "rhs"),
        (lambda p, x: x @ lax.stop_gradient(p["w"]), (8, 6), [8, 1], "rhs"),
        (lambda p, x: x @ lax.optimization_barrier(p["w"]), (8, 6), [8, 1], "rhs"),
        (lambda p, x: x @ p["w"][::-1], (8, 6), [8, 1], "rhs"),
        (lambda p, x: x @ checkpoint_name(p["w"], "w"), (8, 6), [8, 1], "rhs"),
        (lambda p, x: x @ jnp.broadcast_to(p["w"], (2, 8, 6)), (8, 6), [8, 1], "rhs"),
    ],
)
def test_contracted_axes_follow_the_weight_to_its_product(fn, shape, expected, side):
    use = only(fn, {"w": f32(*shape)}, X)
    assert (use.primitive, use.kind, blocks(use), use.weight_side) == (
        "dot_general",
        "dot",
        expected,
        side,
    )


def test_heads_of_a_split_axis_bound_the_blocks():
    """q, k and v in one kernel whose columns are (heads, head_dim), used head by head."""

    def fn(p, x):
        w = p["w"].reshape(8, 4, 16)
        return jnp.einsum("mhd,khd->mhk", x.reshape(5, 4, 16), w)

    use = only(fn, {"w": f32(8, 64)}, f32(5, 64))
    assert roles(use) == ["free", "contract"]
    assert use.axes[1].parts == ((4, "batch"), (16, "contract"))
    assert (use.axes[1].contracted, use.axes[1].splits) == (16, (16,))


def test_two_parameters_of_one_shape_are_told_apart():
    found = uses(lambda p, x: (x @ p["a"]) @ p["b"].T, {"a": f32(8, 6), "b": f32(8, 6)}, X)
    assert [(u.param, blocks(u)) for u in found] == [("a", [8, 1]), ("b", [1, 6])]


def test_an_activation_of_a_parameters_shape_is_no_parameter():
    found = uses(lambda p, x, y: (x @ y, x @ p["w"]), W, X, f32(8, 6))
    assert [(u.param, u.kind) for u in found] == [(None, "dot"), ("w", "dot")]
    assert found[0].x.shape == (5, 8)


# --- slices, stacks, lookups -----------------------------------------------------------------


@pytest.mark.parametrize(
    "pick",
    [
        lambda w, i: w[1],
        lambda w, i: w[i],
        lambda w, i: lax.dynamic_index_in_dim(w, i, 0, keepdims=False),
        lambda w, i: jnp.take(w, i, axis=0),
        lambda w, i: lax.dynamic_slice_in_dim(w, i, 1, 0).reshape(8, 6),
    ],
)
def test_one_expert_at_a_time_leaves_a_layer_axis(pick):
    use = only(lambda p, x, i: x @ pick(p["w"], i), {"w": f32(3, 8, 6)}, X, f32(dtype=jnp.int32))
    assert (roles(use), use.gathered) == (["layer", "contract", "free"], False)


def test_a_stacked_gain_picked_by_layer_is_no_lookup():
    use = only(lambda p, x, i: x * p["g"][i], {"g": f32(3, 8)}, X, f32(dtype=jnp.int32), param="g")
    assert (use.primitive, use.detail) == ("other", "is used by mul")


def test_experts_gathered_by_token_keep_the_expert_axis_apart():
    use = only(
        lambda p, x, ids: jnp.einsum("mk,mkn->mn", x, p["w"][ids]), {"w": f32(3, 8, 6)}, X, IDS
    )
    assert (use.primitive, use.gathered) == ("dot_general", True)
    assert roles(use) == ["indexed", "contract", "free"]
    assert use.weight.shape == (5, 8, 6)


def test_batched_experts():
    use = only(
        lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]), {"w": f32(3, 8, 6)}, f32(3, 5, 8)
    )
    assert roles(use) == ["batch", "contract", "free"]


def test_fused_kernel_cut_into_parts_on_a_free_axis():
    def fn(p, x):
        q, k = jnp.split(p["w"], 2, axis=1)
        return x @ q, x @ k, x @ p["w"][:, 1:4]

    found = uses(fn, W, X)
    assert [blocks(u) for u in found] == [[8, 1]] * 3
    assert [u.axes[1].align for u in found] == [3, 3, 1]


def test_a_sliced_contracted_axis_aligns_its_groups():
    found = uses(lambda p, x: (x[:, :4] @ p["w"][:4], x[:, 2:] @ p["w"][2:]), W, X)
    assert [(u.axes[0].contracted, u.axes[0].align) for u in found] == [(8, 4), (8, 2)]


@pytest.mark.parametrize(
    ("join", "spec"),
    [
        (lambda a, b: jnp.stack([a, b]), "mk,ikn->imn"),
        (lambda a, b: jnp.stack([a, b], 1), "mk,kin->imn"),
        (lambda a, b: jnp.concatenate([a, b], 1), "mk,kn->mn"),
        (lambda a, b: jnp.stack([a, b]).reshape(2, 8, 3, 2), "mk,iknj->imnj"),
    ],
)
def test_joined_parameters_each_have_their_use(join, spec):
    params = {"a": f32(8, 6), "b": f32(8, 6)}
    found = uses(lambda p, x: jnp.einsum(spec, x, join(p["a"], p["b"])), params, X)
    assert [(u.param, u.joined, blocks(u)) for u in found] == [
        ("a", ("b",), [8, 1]),
        ("b", ("a",), [8, 1]),
    ]


def test_one_of_several_joined_parameters_cut_out_again():
    def fn(p, x):
        w = jnp.concatenate([p["a"], p["b"]], 1)
        return x @ w[:, 6:]

    assert [u.param for u in uses(fn, {"a": f32(8, 6), "b": f32(8, 4)}, X)] == ["b"]


def test_a_lookup_used_as_activation_is_an_embedding():
    found = uses(lambda p, i: jnp.tanh(p["e"][i] * 2.0), {"e": f32(10, 8)}, IDS)
    assert [(u.primitive, u.kind, roles(u)) for u in found] == [
        ("gather", "embed", ["indexed", "free"])
    ]


def test_a_tied_table_is_looked_up_and_attended():
    def fn(p, i):
        return jnp.take(p["e"], i, axis=0).astype(jnp.bfloat16) @ p["e"].astype(jnp.bfloat16).T

    found = uses(fn, {"e": f32(10, 8)}, IDS)
    assert [(u.kind, roles(u)) for u in found] == [
        ("embed", ["indexed", "free"]),
        ("attend", ["free", "contract"]),
    ]


def test_looked_up_rows_are_the_input_of_another_weight():
    found = uses(lambda p, i: p["e"][i] @ p["w"], {"e": f32(10, 8), "w": f32(8, 6)}, IDS)
    assert [(u.param, u.kind) for u in found] == [("e", "embed"), ("w", "dot")]


def test_a_lookup_nobody_reads_is_not_listed():
    assert uses(lambda p, i: (p["e"][i], i)[1], {"e": f32(10, 8)}, IDS) == ()


# --- control flow ------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layers_stacked_along_any_axis(axis):
    shape = [8, 8]
    shape.insert(axis, 4)

    def fn(p, x):
        return lax.scan(lambda c, w: (c @ w, None), x, jnp.moveaxis(p["w"], axis, 0))[0]

    expected = ["contract", "free"]
    expected.insert(axis, "layer")
    use = only(fn, {"w": f32(*shape)}, X)
    assert roles(use) == expected
    assert use.axes[axis].is_layer


def test_layers_folded_into_the_contracted_axis():
    def fn(p, x):
        return lax.scan(lambda c, w: (c @ w, None), x, p["w"].reshape(4, 8, 8))[0]

    use = only(fn, {"w": f32(32, 8)}, X)
    assert use.axes[0].parts == ((4, "layer"), (8, "contract"))
    assert use.axes[0].contracted == 8


def scan_const(p, x):
    return lax.scan(lambda c, _: (c @ p["w"], None), x, None, length=3)[0]


def scan_carried(p, x):
    return lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (x, p["w"]), None, length=3)[0][0]


def while_const(p, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ p["w"]), (0, x))[1]


def while_carried(p, x):
    return lax.while_loop(
        lambda c: jnp.sum(c[1] @ c[2]) < 3, lambda c: (c[0] + 1, c[1] @ c[2], c[2]), (0, x, p["w"])
    )[1]


def fori(p, x):
    return lax.fori_loop(0, 3, lambda i, c: c @ p["w"], x)


def branches(p, x):
    return lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x @ w.T, p["w"])


def jitted(p, x):
    return jax.jit(jax.jit(lambda a, b: a @ b))(x, p["w"])


def rematted(p, x):
    return jax.checkpoint(lambda w, x: jax.checkpoint(jnp.matmul)(x, w))(p["w"], x)


def custom_jvp(p, x):
    @jax.custom_jvp
    def f(w, x):
        return x @ w

    f.defjvp(lambda ps, ts: (f(*ps), ts[1] @ ps[0]))
    return f(p["w"], x)


def custom_vjp(p, x):
    @jax.custom_vjp
    def f(w, x):
        return x @ w

    f.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    return f(p["w"], x)


@pytest.mark.parametrize(
    ("fn", "sites"),
    [
        (scan_const, [(0, 0, 0)]),
        (scan_carried, [(0, 0, 0)]),
        (while_const, [(0, 1, 1)]),
        (while_carried, [(0, 1, 1), (0, 0, 0)]),
        (fori, None),
        (branches, None),
        (jitted, [(0, 0, 0, 0, 0)]),
        (rematted, [(0, 0, 0, 0, 0)]),
        (custom_jvp, [(0, 0, 0)]),
        (custom_vjp, [(0, 0, 0)]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_the_way_goes_through_calls_loops_and_branches(fn, sites):
    found = [u for u in uses(fn, {"w": f32(8, 8)}, X) if u.param == "w"]
    assert {u.primitive for u in found} == {"dot_general"}
    if fn is branches:
        assert [blocks(u) for u in found] == [[1, 8], [8, 1]]
    else:
        assert all(blocks(u) == [8, 1] for u in found)
    if sites is not None:
        assert [u.site for u in found] == sites


def test_a_weight_that_a_loop_changes_stays_float():
    def fn(p, x):
        return lax.scan(lambda c, _: (c * 2, x @ c), p["w"], None, length=3)[1]

    use = only(fn, W, X)
    assert (use.primitive, use.detail) == ("other", "is carried by scan and changed")


def test_a_function_called_twice_is_used_twice():
    apply = jax.jit(lambda w, x: x @ w)
    found = uses(lambda p, x: apply(p["b"], apply(p["a"], x)), {"a": f32(8, 8), "b": f32(8, 8)}, X)
    assert [(u.param, u.site) for u in found] == [("a", (0, 0, 0)), ("b", (1, 0, 0))]


def test_vmap_over_weights_makes_a_batch_axis():
    fn = lambda p, x: jax.vmap(lambda w: x @ w)(p["w"])  # noqa: E731
    assert roles(only(fn, {"w": f32(3, 8, 6)}, X)) == ["free", "contract", "free"]
    fn = lambda p, x: jax.vmap(jnp.matmul)(x, p["w"])  # noqa: E731
    assert roles(only(fn, {"w": f32(3, 8, 6)}, f32(3, 5, 8))) == ["batch", "contract", "free"]


@pytest.mark.parametrize(("spec", "align"), [(P("d", None), 4), (P(None, "d"), 0)])
def test_shards_bound_the_blocks_of_the_axis_they_cut(spec, align):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, P()), out_specs=P(None, "d"))
    def local(w, x):
        return x[:, : w.shape[0]] @ w

    use = only(lambda p, x: local(p["w"], x), W, X)
    assert (use.axes[0].contracted, use.axes[0].align) == (8, align)


@pytest.mark.parametrize(("dim", "align"), [(0, 4), (1, 0)])
def test_gathered_shards_are_the_axis_again(dim, align):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = P(*[None] * dim, "d")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, P("d")), out_specs=P("d"))
    def local(w, x):
        return x @ lax.all_gather(w, "d", axis=dim, tiled=True)

    use = only(lambda p, x: local(p["w"], x), W, f32(4, 8))
    contract, free = use.axes
    assert (contract.contracted, contract.align, free.role) == (8, align, "free")


def test_gathered_copies_are_a_weight_repeated():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))

    unchecked = functools.partial(jax.shard_map, check_vma=False)

    @functools.partial(unchecked, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    def local(w, x):
        return x @ lax.all_gather(w, "d", axis=0, tiled=True)

    use = only(lambda p, x: local(p["w"], x), W, f32(5, 16))
    assert (use.primitive, blocks(use)) == ("dot_general", [8, 1])


def test_resharded_weights_keep_their_way():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        w, x = (
            jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh, P("d", None)))
            for shape in ((8, 6), (4, 8))
        )
        use = only(lambda p, x: x @ jax.sharding.reshard(p["w"], P()), {"w": w}, x)
    assert (use.primitive, blocks(use)) == ("dot_general", [8, 1])


# --- convolutions, ragged products ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "shape", "free"),
    [(("NHWC", "HWIO", "NHWC"), (3, 3, 4, 6), 3), (("NCHW", "OIHW", "NCHW"), (6, 4, 3, 3), 0)],
)
def test_conv_kernels_have_one_free_axis(numbers, shape, free):
    x = f32(2, 8, 8, 4) if numbers[0] == "NHWC" else f32(2, 4, 8, 8)
    use = only(
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers),
        {"w": f32(*shape)},
        x,
    )
    assert (use.primitive, use.kind, use.with_role("free")) == ("conv", "conv", (free,))
    assert blocks(use) == [1 if i == free else n for i, n in enumerate(shape)]


def test_ragged_dot_has_an_expert_axis():
    use = only(
        lambda p, x, g: lax.ragged_dot(x, p["w"], g),
        {"w": f32(3, 8, 6)},
        X,
        f32(3, dtype=jnp.int32),
    )
    assert (use.kind, roles(use)) == ("ragged_dot", ["batch", "contract", "free"])


# --- what is not a weight --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "shape", "detail"),
    [
        (lambda p, x: x + p["w"], (8,), "is used by"),
        (lambda p, x: x @ (p["w"] * p["w"]), (8, 6), "is used by"),
        (lambda p, x: x @ jnp.maximum(p["w"], 0), (8, 6), "is used by max"),
        (lambda p, x: x @ jnp.concatenate([p["w"], x.T], 1), (8, 6), "joined with values"),
        (lambda p, x: p["w"], (8, 6), ""),
        (lambda p, x: p["w"].T, (8, 6), "is returned"),
        (lambda p, x: x @ p["w"].reshape(6, 8).T, (8, 6), "reshape cuts"),
        (lambda p, x: x @ p["w"].astype(jnp.int32), (8, 6), "converted to int32"),
        (lambda p, x: (x > 0).astype(jnp.int32) @ p["w"], (8, 6), "with int32 values"),
        (lambda p, x: jnp.zeros((4, 8, 6)).at[0].set(p["w"]), (8, 6), "is used by"),
    ],
)
def test_other_uses_are_listed_with_what_is_done(fn, shape, detail):
    found = [u for u in uses(fn, {"w": f32(*shape)}, X) if u.primitive == "other"]
    assert len(found) == bool(detail)
    if detail:
        assert detail in found[0].detail
        assert "is returned" in detail or "test_find_weights.py" in found[0].source


def test_a_product_of_two_parameters_uses_neither_as_weight():
    found = uses(lambda p, x: x @ (p["a"] @ p["b"]), {"a": f32(8, 2), "b": f32(2, 6)}, X)
    assert [(u.param, u.primitive) for u in found] == [
        ("a", "other"),
        ("b", "other"),
        (None, "dot_general"),
    ]


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        ("bd,d->bd", (8,), ["batch"]),
        ("bd,e->bde", (6,), ["free"]),
        ("bhd,hd->bhd", (2, 4), ["batch", "batch"]),
    ],
)
def test_gains_and_biases_applied_by_einsum_contract_nothing(spec, shape, expected):
    x = f32(5, 2, 4) if spec.startswith("bhd") else X
    use = only(lambda p, x: jnp.einsum(spec, x, p["w"]), {"w": f32(*shape)}, x)
    assert (roles(use), use.contracts) == (expected, False)


def test_integer_parameters_are_not_followed():
    found = uses(
        lambda p, x: (x @ p["w"].astype(jnp.float32), jnp.einsum("ij,jk->ik", p["m"], p["m"])),
        {"w": f32(8, 6, dtype=jnp.int8), "m": f32(3, 3, dtype=jnp.int32)},
        X,
    )
    assert [u.param for u in found] == [None, None]


def test_a_gradient_taken_inside_contracts_the_other_axis():
    def fn(p, x):
        return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x)

    found = [u for u in uses(fn, W, X) if u.param == "w"]
    assert [blocks(u) for u in found] == [[8, 1], [1, 6]]


def test_what_is_only_handed_on_is_no_use():
    """As nnx.jit, nnx.remat and nnx.scan do with a module's state."""

    def fn(p, x):
        x, w = jax.jit(lambda w, x: (x @ w, w))(p["w"], x)
        x, v = jax.checkpoint(lambda v, x: (jnp.tanh(x @ v), v))(p["v"], x)
        step = jax.checkpoint(lambda c, s: ((c[0] @ s, c[1]), s))
        (x, w), s = lax.scan(step, (x, w), p["s"])
        return x, w, v, s

    params = {"w": f32(8, 8), "v": f32(8, 8), "s": f32(3, 8, 8)}
    found = uses(fn, params, X)
    assert [(u.param, u.primitive) for u in found] == [
        ("w", "dot_general"),
        ("v", "dot_general"),
        ("s", "dot_general"),
    ]
