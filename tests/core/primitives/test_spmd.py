"""Products whose operands are split over 8 devices: values, gradients, and who multiplies what."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.primitives.dots import bind_dots
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from tests.core.primitives.spmd_world import (
    AUTO,
    EXPLICIT,
    close,
    collectives,
    kernels_on_cpu,
    mesh_of,
    place,
    place_weight,
)

MATMUL = (((1,), (0,)), ((), ()))
X = jax.random.normal(jax.random.key(1), (8, 64))
W = jax.random.normal(jax.random.key(0), (64, 32))

WEIGHTS = {
    "groups": lambda: quantize_array(W, "int4", (16, 1)),
    "zero points": lambda: quantize_array(W, "int4", (16, 1), symmetric=False),
    "one scale a column": lambda: quantize_array(W, "int8", (64, 1)),
    "packed": lambda: quantize_array(W, "int2", (16, 1)),
    "table": lambda: quantize_array(W, "nf4", (16, 1)),
    "scales in two steps": lambda: quantize_array(W, "int4", (16, 1), double_quant=True),
}
# Where the weight lies, where x does on an explicit mesh, and where the result then is.
COLUMN = P(None, "model"), P("data", None), P("data", "model")
ROW = P("model", None), P("data", "model"), P("data", None)
WHOLE = P(None, None), P("data", None), P("data", None)


@pytest.fixture
def problems(monkeypatch):
    yield kernels_on_cpu(monkeypatch)
    jax.clear_caches()


def product(x, w, out_sharding=None, dims=MATMUL, **options):
    return quantized_dot_general(x, w, dims, out_sharding=out_sharding, **options)


def exact(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)


NAMES = {"column": COLUMN, "row": ROW, "whole": WHOLE}
CASES = [
    *itertools.product([AUTO, EXPLICIT], NAMES, ["groups", "one scale a column"]),
    *itertools.product([AUTO], ["row"], ["zero points", "packed", "table", "scales in two steps"]),
    (AUTO, "column", "packed"),
]


@pytest.mark.parametrize(("kind", "how", "name"), CASES, ids=str)
def test_product_and_gradient(problems, kind, how, name):
    mesh, w = mesh_of(kind), WEIGHTS[name]()
    w_spec, x_spec, out_spec = NAMES[how]
    fn = functools.partial(product, out_sharding=out_spec if kind is EXPLICIT else None)
    with jax.set_mesh(mesh):
        x, placed = place(X, mesh, x_spec), place_weight(w, mesh, w_spec)

        def loss(x, w):
            return jnp.sum(fn(x, w) ** 2)

        got, grad = jax.jit(lambda x, w: (fn(x, w), jax.grad(loss)(x, w)))(x, placed)
        moved = collectives(fn, x, placed)
        back = collectives(jax.grad(loss), x, placed)
    want = exact(X, w)
    close(got, want)
    close(grad, 2 * want @ np.asarray(w.dequantize(), np.float64).T)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, out_spec), 2)
    rows, columns = how == "row", how == "column"
    m, k, n = 4, 64 // (4 if rows else 1), 32 // (4 if columns else 1)
    chosen = {(p.m, p.k, p.n) for p in problems}
    if name == "one scale a column":
        assert chosen == {(m, k, n), (m, n, k)}
    else:  # backwards groups lie along a free axis, which not every kernel takes
        assert {(m, k, n)} <= chosen <= {(m, k, n), (m, n, k)}
    assert moved == ({"all-reduce": 1} if rows else {})
    assert set(back) <= {"all-reduce"}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("w_spec", "x_spec"),
    [(P(None, "model"), P(None, None)), (P("model", None), P(None, "model"))],
    ids=["column", "row"],
)
def test_one_axis(problems, kind, w_spec, x_spec):
    mesh, w = mesh_of(kind, (8,), ("model",)), quantize_array(W, "int4", (8, 1))
    with jax.set_mesh(mesh):
        x, placed = place(X, mesh, x_spec), place_weight(w, mesh, w_spec, ())
        out = P(None, w_spec[1]) if kind is EXPLICIT else None
        close(jax.jit(functools.partial(product, out_sharding=out))(x, placed), exact(X, w))
    assert len(problems) == 1
    assert (problems[0].k, problems[0].n) == ((64, 4) if w_spec[0] is None else (8, 32))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("w_spec", [P("model"), P(None, None, "model")], ids=["experts", "columns"])
def test_an_einsum_over_experts(problems, kind, w_spec):
    mesh = mesh_of(kind)
    weights = jax.random.normal(jax.random.key(0), (8, 64, 32))
    w = quantize_array(weights, "int4", (1, 16, 1))
    x = jax.random.normal(jax.random.key(1), (8, 6, 64))
    out = P(*w_spec[:1], "data", *w_spec[2:]) if kind is EXPLICIT else None
    fn = functools.partial(product, dims=(((2,), (1,)), ((0,), (0,))), out_sharding=out)
    with jax.set_mesh(mesh):
        placed = place_weight(w, mesh, w_spec)
        given = place(x, mesh, P(w_spec[0], "data"))
        got = jax.jit(fn)(given, placed)
        moved = collectives(fn, given, placed)
    close(got, exact(x, w))
    columns = 8 if len(w_spec) > 1 else 32
    assert {(p.m, p.k, p.n) for p in problems} == {(3, 64, columns)}
    assert moved == {}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("row", [False, True], ids=["column", "row"])
def test_the_tpu_kernel_itself(monkeypatch, kind, row):
    problems = kernels_on_cpu(monkeypatch, interpret=True)
    mesh = mesh_of(kind)
    x = jax.random.normal(jax.random.key(1), (16, 512), jnp.bfloat16)
    w = quantize_array(jax.random.normal(jax.random.key(0), (512, 512)), "int4", (64, 1))
    w_spec, x_spec, out = ROW if row else COLUMN
    fn = functools.partial(
        product,
        preferred_element_type=jnp.float32,
        out_sharding=out if kind is EXPLICIT else None,
    )

    def pulled(x, y, w):
        value, pull = jax.vjp(lambda x: fn(x, w), x)
        return value, pull(y)[0]

    y = jax.random.normal(jax.random.key(2), (16, 512), jnp.float32)
    want, weight = exact(x.astype(jnp.float32), w), np.asarray(w.dequantize(), np.float64)
    with jax.set_mesh(mesh):
        placed = place_weight(w.replace(dtype=jnp.dtype("bfloat16")), mesh, w_spec)
        got, back = jax.jit(pulled)(place(x, mesh, x_spec), place(y, mesh, out), placed)
    close(got, want, rtol=1e-2)
    close(back.astype(jnp.float32), np.asarray(y, np.float64) @ weight.T, rtol=1e-2)
    # The gradient's problem is that of the product it belongs to.
    assert [(p.m, p.k, p.n) for p in problems] == [(8, 128, 512) if row else (8, 512, 128)] * 2
    jax.clear_caches()


def test_scales_are_repeated_where_a_group_straddles_devices(problems):
    mesh, w = mesh_of(AUTO), quantize_array(W, "int4", (32, 1), symmetric=False)
    with jax.set_mesh(mesh):
        got = jax.jit(product)(place(X, mesh, P("data", None)), place_weight(w, mesh, ROW[0]))
    close(got, exact(X, w))
    assert [(p.k, p.group) for p in problems] == [(16, 16)]  # half a group a device


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_sums_stay_in_pieces_where_the_result_is_wanted_so(problems, kind):
    """ZeRO: the contracted axis over the batch's mesh axis. Or the type of the result says so."""
    mesh, w = mesh_of(kind), quantize_array(W, "int4", (16, 1))
    with jax.set_mesh(mesh):
        if kind is AUTO:
            spec, fn = P("data", "model"), product
            x, out = place(X, mesh, P("data", None)), P("data", "model")
        else:
            spec, out = P("model", None), P("data", "model")
            x, fn = place(X, mesh, P("data", "model")), functools.partial(product, out_sharding=out)
        placed = place_weight(w, mesh, spec)
        got = jax.jit(fn)(x, placed)
        moved = collectives(fn, x, placed)
    close(got, exact(X, w))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, out), 2)
    assert moved.get("reduce-scatter") == 1 and not moved.keys() & {"all-gather", "all-reduce"}


@pytest.mark.parametrize("specs", [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize(
    "act",
    [ActScheme(), ActScheme(granularity="tensor"), ActScheme(mode="static")],
    ids=["token", "tensor", "static"],
)
def test_activations_are_quantized_as_if_they_were_whole(problems, act, specs):
    mesh, w = mesh_of(AUTO), WEIGHTS["groups"]().replace(act=act)
    if act.mode == "static":
        w = w.replace(input_scale=jnp.full((1, 1), 0.02))
    reduced = (1,) if act.granularity == "token" else (0, 1)
    quant = ActQuant("int8", reduced, act.mode == "static")
    codes, scale = quantize_activation(X, quant, w.input_scale)
    with jax.set_mesh(mesh):
        x, placed = place(X, mesh, P("data", None)), place_weight(w, mesh, specs[0])
        got = jax.jit(product)(x, placed)
    close(got, exact(np.asarray(codes, np.float64) * np.asarray(scale, np.float64), w))
    assert problems[0].x_dtype == "int8"


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("given", [False, True], ids=["floats", "codes"])
def test_several_weights_of_one_input(problems, kind, given):
    mesh, w = mesh_of(kind), quantize_array(W, "int4", (16, 1))
    act = ActQuant("int8", (1,)) if given else None
    quantized = quantize_activation(X, act) if given else ()
    floats = X if not given else np.asarray(quantized[0], np.float64) * np.asarray(quantized[1])

    def fn(x, quantized, weights):
        return bind_dots(
            x,
            weights,
            act=act,
            quantized_x=quantized,
            dimension_numbers=MATMUL,
            weight_side="rhs",
            precision=None,
            preferred_element_type=None,
            out_shardings=(None, None),
        )

    with jax.set_mesh(mesh):
        x, codes = (place(a, mesh, P("data", None)) for a in (X, quantized[0] if given else X))
        pair = (codes, place(quantized[1], mesh, P("data", None))) if given else ()
        placed = place_weight(w, mesh, P(None, "model")), place_weight(w, mesh, P(None, None))
        outs = jax.jit(fn)(x, pair, placed)
        grad = jax.jit(jax.grad(lambda x: sum(o.sum() for o in fn(x, pair, placed))))(x)
    for out in outs:
        close(out, exact(floats, w))
    close(grad, np.broadcast_to(2 * np.asarray(w.dequantize(), np.float64).sum(1), X.shape))
    assert {p.n for p in problems if p.k == 64} == {8, 32}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_scan_over_stacked_layers(problems, kind):
    """Layers of column and row products under scan and remat, with a gradient through them."""
    mesh = mesh_of(kind)
    up = jax.random.normal(jax.random.key(2), (3, 64, 32)) / 8
    down = jax.random.normal(jax.random.key(3), (3, 32, 64)) / 8
    ups, downs = (quantize_array(w, "int4", (1, 8, 1)) for w in (up, down))

    def layer(x, weights):
        up, down = weights
        out = P("data", None) if kind is EXPLICIT else None
        return x + product(jnp.tanh(product(x, up)), down, out_sharding=out), None

    def loss(x, weights):
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
        return jnp.sum(x**2)

    def plain(x):
        for i in range(3):
            x = x + jnp.tanh(x @ ups.dequantize()[i]) @ downs.dequantize()[i]
        return jnp.sum(x**2)

    with jax.set_mesh(mesh):
        weights = (
            place_weight(ups, mesh, P(None, None, "model")),
            place_weight(downs, mesh, P(None, "model", None)),
        )
        x = place(X, mesh, P("data", None))
        got, grad = jax.jit(jax.value_and_grad(loss))(x, weights)
    with jax.enable_x64():
        want, want_grad = jax.value_and_grad(plain)(X.astype(jnp.float64))
    close(got, want)
    close(grad, want_grad)
    assert {(p.m, p.k, p.n) for p in problems} == {(4, 64, 8), (4, 8, 64)}


def test_vmap_over_examples(problems):
    mesh, w = mesh_of(AUTO), quantize_array(W, "int4", (16, 1))
    x = jax.random.normal(jax.random.key(1), (8, 3, 64))
    with jax.set_mesh(mesh):
        placed = place_weight(w, mesh, P(None, "model"))
        fn = jax.vmap(product, in_axes=(0, None))
        got = jax.jit(fn)(place(x, mesh, P("data", None, None)), placed)
        assert collectives(fn, place(x, mesh, P("data", None, None)), placed) == {}
    close(got, exact(x, w))
    assert {(p.m, p.n) for p in problems} == {(12, 8)}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("manual", [("data",), ("model",), ("data", "model")], ids=str)
def test_inside_the_users_shard_map(problems, kind, manual):
    """Some mesh axes are the user's, and the product takes those that are left, or none."""
    mesh, w = mesh_of(kind), quantize_array(W, "int4", (16, 1))

    def own(spec):
        return P(*(name if name in manual else None for name in spec))

    with jax.set_mesh(mesh):
        x, placed = place(X, mesh, P("data", None)), place_weight(w, mesh, P(None, "model"))
        fn = jax.shard_map(
            product,
            in_specs=(own(P("data", None)), jax.tree.map(lambda _: own(P(None, "model")), placed)),
            out_specs=own(P("data", "model")),
            axis_names=set(manual),
        )
        got, grad = jax.jit(lambda x, w: (fn(x, w), jax.grad(lambda x: fn(x, w).sum())(x)))(
            x, placed
        )
    close(got, exact(X, w))
    close(grad, np.broadcast_to(np.asarray(w.dequantize(), np.float64).sum(1), X.shape))
    assert {(p.m, p.k, p.n) for p in problems} == {(4, 64, 8)}


@st.composite
def splits(draw):
    """A product of few axes with a random side, order of axes, and mesh axes on each."""
    w_free, x_free = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    contract = draw(st.integers(1, 2))
    k_first = draw(st.booleans())
    side = draw(st.sampled_from(["lhs", "rhs"]))
    order = draw(st.permutations(range(x_free + contract)))
    names = draw(st.permutations([("data",), ("model",), (), ()]))
    joined = draw(st.sampled_from([names[: w_free + contract], [("data", "model")] + [()] * 3]))
    return w_free, x_free, contract, k_first, side, tuple(order), joined[: w_free + contract]


@hypothesis.given(splits())
@hypothesis.settings(max_examples=6)
def test_any_split(case):
    w_free, x_free, contract, k_first, side, order, names = case
    with pytest.MonkeyPatch.context() as patch:
        problems = kernels_on_cpu(patch)
        mesh = mesh_of(AUTO)
        sizes = [16] * contract + [8] * w_free if k_first else [8] * w_free + [16] * contract
        w_contract = range(contract) if k_first else range(w_free, w_free + contract)
        block = [2 if i in w_contract and i == max(w_contract) else 1 for i in range(len(sizes))]
        w = quantize_array(jax.random.normal(jax.random.key(0), sizes), "int4", block)
        x_sizes = [16] * contract + [4] * x_free
        x = jax.random.normal(jax.random.key(1), x_sizes).transpose(order)
        x_contract = [order.index(i) for i in range(contract)]
        pair = (x_contract, list(w_contract)) if side == "rhs" else (list(w_contract), x_contract)
        fn = functools.partial(product, dims=(pair, ((), ())), weight_side=side)
        floats = np.asarray(w.dequantize(), np.float64)
        operands = (x, floats) if side == "rhs" else (floats, x)
        want = np.tensordot(*(np.asarray(a, np.float64) for a in operands), axes=pair)
        spec = P(*(own or None for own in names))
        with jax.set_mesh(mesh):
            placed = place_weight(w, mesh, spec)
            got = jax.jit(fn)(place(x, mesh, P()), placed)
        close(got, want)
        shards = [int(np.prod([mesh.shape[n] for n in own], dtype=int)) for own in names]
        k = 16**contract // int(np.prod([shards[i] for i in w_contract]))
        assert [p.k for p in problems] == [k]
    jax.clear_caches()


REFUSALS = [
    (P(None, "model"), None, "is not recorded (jaxquant.with_shardings does that)"),
    (P(None, "model"), (4, 2), "recorded for another mesh (data: 4, model: 2)"),
]


@pytest.mark.parametrize(("spec", "recorded", "reason"), REFUSALS, ids=["unknown", "another mesh"])
def test_where_nothing_is_known_it_is_the_partitioners(problems, spec, recorded, reason):
    mesh, w = mesh_of(AUTO), quantize_array(W, "int4", (16, 1))
    with jax.set_mesh(mesh):
        placed = place_weight(w, mesh, spec)
        layout = None
        if recorded is not None:
            layout = place_weight(w, mesh_of(AUTO, recorded), spec).mesh_layout
        placed = placed.replace(mesh_layout=layout)
        x = place(X, mesh, P("data", None))
        close(jax.jit(product)(x, placed), exact(X, w))
        with pytest.raises(ValueError, match="no kernel fits") as error:
            jax.jit(functools.partial(product, implementation="pallas"))(x, placed)
    assert reason in str(error.value)
    assert problems == []


def test_on_one_device_the_record_means_nothing(problems):
    w = quantize_array(W, "int4", (16, 1))
    placed = place_weight(w, mesh_of(AUTO), P(None, "model"))
    alone = w.replace(mesh_layout=placed.mesh_layout)
    close(jax.jit(product)(X, alone), exact(X, w))
    assert [(p.m, p.k, p.n) for p in problems] == [(8, 64, 32)]


def test_pieces_that_do_not_come_apart(problems):
    w = quantize_array(W[:, :30], "int4", (16, 1))
    mesh = mesh_of(AUTO)
    layout = place_weight(quantize_array(W, "int4", (16, 1)), mesh, P(None, "model")).mesh_layout
    with jax.set_mesh(mesh):
        fn = jax.jit(functools.partial(product, implementation="pallas"))
        with pytest.raises(ValueError, match="axis 1 of the weight, 30 long, does not come apart"):
            fn(place(X, mesh, P("data", None)), w.replace(mesh_layout=layout))
    assert problems == []
