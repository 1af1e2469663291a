"""Plans: the rewriter's own decisions, sizes, and what is drawn."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.recipe import ActScheme, Recipe, Rule, WeightScheme
from jaxquant.frontends.function import transform
from jaxquant.passes.abstract_weights import abstract_weight
from jaxquant.passes.assign_recipe import assign_recipe
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.make_plan import make_plan
from jaxquant.passes.plan_view import format_bytes
from jaxquant.passes.program import trace
from tests.passes import zoo


def planned(scheme, fn, params, *args, act=None):
    recipe = Recipe("test", (Rule(weight=scheme, act=act, optional=True),))
    program = trace(fn, params, args)
    assignment = assign_recipe(find_weights(program), program.parameters, recipe)
    return assignment, make_plan(program, assignment)


def quantized(plan, w):
    return quantize_array(
        w,
        plan.scheme.qtype,
        plan.block_shape,
        packed_axis=plan.packed_axis,
        stack_axes=plan.stack_axes,
        name=plan.path,
    )


@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_scales_go_where_the_rewriter_wants_them(case):
    """The zoo says by hand which axes share scales; the plan finds the same from the jaxpr."""
    assignment, plan = planned(
        WeightScheme("int8"), case.fn, jax.eval_shape(case.params), *case.inputs
    )
    for name, param in assignment.params.items():
        status = {row.status for row in plan.where(param=name)}
        if param.scheme is None:
            assert param.reason
            assert name in case.dequantized or name not in case.axes
        else:
            shared = tuple(i for i, n in enumerate(param.block_shape) if n > 1)
            assert shared == case.axes[name]
            assert ("dequantized" in status) == (name in case.dequantized)


PACKED = {
    "transposed", "reshaped", "several_contracted", "gathered_experts", "scan_stacked_second_axis",
    "concatenated", "tied_embedding", "convolution", "ragged_experts", "remat_in_scan",
}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in zoo.CASES if c.name in PACKED], ids=str)
def test_what_is_planned_computes_what_the_floats_it_stands_for_do(case):
    params = case.params()
    assignment, _ = planned(WeightScheme("int3"), case.fn, params, *case.inputs)
    tree = dict(params)
    for plan in assignment.quantized:
        tree[plan.path] = quantized(plan, params[plan.path])
        made, said = (jax.tree.leaves(x) for x in (tree[plan.path], abstract_weight(plan)))
        assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in said]
    assert assignment.quantized
    floats = {k: v.dequantize() if hasattr(v, "dequantize") else v for k, v in tree.items()}
    got = jax.tree.leaves(transform(case.fn)(tree, *case.inputs))
    for value, expected in zip(got, jax.tree.leaves(case.fn(floats, *case.inputs)), strict=True):
        loose = expected.dtype == jnp.bfloat16
        value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
        np.testing.assert_allclose(value, expected, rtol=0, atol=(0.1 if loose else 1e-4))


X = jnp.ones((4, 256))


def test_bytes_are_those_of_the_format_with_scales():
    params = {"w": jnp.ones((256, 64), jnp.bfloat16), "b": jnp.ones(64)}
    fn = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    _, plan = planned(WeightScheme("int4", group_size=64), fn, params, X)
    (row,) = plan.where(param="w")
    assert (row.bytes_before, row.bytes_after) == (256 * 64 * 2, 256 * 64 // 2 + 4 * 64 * 4)
    assert plan.totals == {
        "ops": {"quantized": 1, "dequantized": 0, "float": 0},
        "parameters": 2,
        "quantized_parameters": 1,
        "bytes_before": 256 * 64 * 2 + 256,
        "bytes_after": row.bytes_after + 256,
        "quantized_bytes_before": row.bytes_before,
        "quantized_bytes_after": row.bytes_after,
        "ratio": row.bytes_after / row.bytes_before,
    }


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (WeightScheme("int8"), 8 + 32 / 256),
        (WeightScheme("int4", group_size=128), 4 + 32 / 128),
        (WeightScheme("int3", group_size=64), 3 + 32 / 64),
        (WeightScheme("int2", group_size=64), 2 + 32 / 64),
        (WeightScheme("int1", group_size=64), 1 + 32 / 64),
        (WeightScheme("int4", group_size=32, symmetric=False), 4 + 40 / 32),
        (WeightScheme("mxfp4"), 4 + 8 / 32),
        (WeightScheme("nf4"), 4 + 32 / 64),
        (WeightScheme("float8_e4m3"), 8 + 32 / 256),
    ],
)
def test_bits_of_a_weight(scheme, bits):
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    assignment, plan = planned(scheme, fn, {"w": jax.ShapeDtypeStruct((256, 64), "float32")}, X)
    assert plan.totals["quantized_bytes_after"] * 8 / (256 * 64) == bits
    w = quantize_array(
        jnp.ones((256, 64)),
        scheme.qtype,
        assignment.params["w"].block_shape,
        symmetric=scheme.symmetric,
    )
    assert w.nbytes == plan.totals["quantized_bytes_after"]


def test_a_static_input_scale_has_a_value_for_each_layer():
    fn = lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]  # noqa: E731
    act = ActScheme(mode="static")
    assignment, _ = planned(
        WeightScheme("int8"), fn, {"w": jnp.ones((3, 8, 8))}, jnp.ones((2, 8)), act=act
    )
    weight = abstract_weight(assignment.params["w"])
    assert (weight.input_scale.shape, weight.act) == ((3, 1, 1), act)


def test_every_row_says_how_or_why_not():
    params = {"w": jnp.ones((8, 6)), "g": jnp.ones(8), "n": jnp.ones(3)}
    fn = lambda p, x: ((x * p["g"]) @ p["w"], x @ x.T, jnp.tanh(p["w"]))  # noqa: E731
    _, plan = planned(WeightScheme("int8"), fn, params, jnp.ones((2, 8)))
    rows = [(row.param, row.kind, row.status) for row in plan.rows]
    assert rows == [
        ("w", "dot", "quantized"),
        (None, "dot", "float"),
        ("w", "other", "dequantized"),
        ("g", "other", "float"),
        ("n", "other", "float"),
    ]
    assert all(row.reason or row.lowering for row in plan.rows)
    assert "is used by tanh" in plan.rows[2].reason
    assert "does not use it" in plan.rows[-1].reason
    assert math.isclose(plan.totals["bytes_before"], 8 * 6 * 4 + 8 * 4 + 3 * 4)


def test_a_plan_with_nothing_to_quantize_says_so():
    _, plan = planned(WeightScheme("int8"), lambda p, x: x * p["g"], {"g": jnp.ones(8)}, X[:, :8])
    assert plan.notes == ("nothing is quantized: every row says why",)
    assert plan.totals["ratio"] is None
    assert "nothing is quantized" in str(plan)


def test_json_holds_every_row():
    params = {"w": jnp.ones((8, 6))}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    _, plan = planned(WeightScheme("int8"), fn, params, jnp.ones((2, 8)), act=ActScheme())
    data = json.loads(json.dumps(plan.to_json()))
    assert data["totals"]["quantized_parameters"] == 1
    (row,) = data["rows"]
    assert (row["param"], row["qtype"], row["act"]) == ("w", "int8", "int8 per token")
    assert (row["param_shape"], row["block_shape"]) == ([8, 6], [8, 1])
    assert row["lowering"].startswith("xla")
    assert "test_plan.py" in row["source"]


def test_numbered_layers_are_drawn_once():
    params = {f"layers_{i}": {"w": jnp.ones((8, 8)), "g": jnp.ones(8)} for i in range(12)}

    def fn(p, x):
        for layer in p.values():
            x = (x * layer["g"]) @ layer["w"]
        return x

    _, plan = planned(WeightScheme("int8"), fn, params, jnp.ones((2, 8)))
    drawn = str(plan)
    assert "layers_{0-11}/w (x12)" in drawn
    assert "layers_{0-11}/g (x12)" in drawn
    assert "12 of 24 parameters" in drawn
    assert "xla:" in drawn
    assert "is used by mul" in drawn


def test_a_table_wider_than_the_page_loses_no_letter():
    names = ("embedding/kernel", "encoder_block/multi_head_dot_product_attention/query/kernel")
    params = {names[0]: jnp.ones((4, 4, 3, 64)), names[1]: jnp.ones((64, 8, 32))}

    def fn(p, x):
        x = jax.lax.conv_general_dilated(
            x, p[names[0]], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.einsum("bhwc,cnd->bhwnd", x, p[names[1]])

    scheme = WeightScheme("int4", group_size=32)
    _, plan = planned(scheme, fn, params, jnp.ones((2, 16, 16, 3)))
    rows = (dataclasses.replace(row, kind="dense", cls="DenseGeneral") for row in plan.rows)
    plan = dataclasses.replace(plan, rows=tuple(rows))
    operations = str(plan).partition("lowering or op")[0]
    for word in ("codes", "dequantize,"):  # the last column's words, whole
        assert word in operations.replace("\n", " ").split(), operations


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1200, "1.2 kB"), (3_400_000, "3.4 MB"), (7 * 10**9, "7.0 GB")],
)
def test_sizes_are_written_as_people_read_them(count, text):
    assert format_bytes(count) == text


def test_layers_that_a_scan_hands_on_are_never_floats():
    def fn(p, x):
        layer = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), w))
        return jax.lax.scan(layer, x, p["w"])

    params = {"w": jax.random.normal(jax.random.key(0), (3, 8, 8))}
    x = jnp.ones((2, 8))
    assignment, plan = planned(WeightScheme("int8"), fn, params, x)
    assert [(row.param, row.status) for row in plan.rows] == [("w", "quantized")]
    w = quantized(assignment.params["w"], params["w"])
    out, layers = transform(fn)({"w": w}, x)
    np.testing.assert_array_equal(layers.codes, w.codes)
    expected, _ = fn({"w": w.dequantize()}, x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
