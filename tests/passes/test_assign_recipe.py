"""What a recipe makes of each parameter: block shapes, reasons, merged uses, errors."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.core.recipe import PRESETS, ActScheme, Recipe, Rule, WeightScheme
from jaxquant.passes.assign_recipe import assign_recipe
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.param_blocks import GroupSizeError
from jaxquant.passes.program import trace

INT8, INT4 = WeightScheme("int8"), WeightScheme("int4")


def f32(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ids(*shape):
    return f32(*shape, dtype=jnp.int32)


def assign(recipe, fn, params, *args):
    if isinstance(recipe, WeightScheme):
        recipe = Recipe("test", (Rule(weight=recipe),))
    program = trace(fn, params, args)
    return assign_recipe(find_weights(program), program.parameters, recipe)


def plan(recipe, fn, shape, *args, **kwargs):
    return assign(recipe, fn, {"w": f32(*shape, **kwargs)}, *args).params["w"]


def groups(size):
    return WeightScheme("int4", group_size=size)


def matmul(p, x):
    return x @ p["w"]


def out_proj(p, x):
    return jnp.einsum("bhd,hdn->bn", x, p["w"])


def experts(p, x):
    return jnp.einsum("ecd,edf->ecf", x, p["w"])


def scanned(p, x):
    return lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]


def embed(p, i):
    return jnp.take(p["w"], i, axis=0) * 2.0


def tied(p, i):
    return jnp.tanh(jnp.take(p["w"], i, axis=0)) @ p["w"].T


def conv(p, x):
    return lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def heads(p, x):
    return jnp.einsum("bhd,khd->bhk", x, p["w"].reshape(8, 4, 16))


def merged_backwards(p, x):
    return x @ p["w"].transpose(1, 0, 2).reshape(64, 6)


TENSOR = WeightScheme("int8", granularity="tensor")


@pytest.mark.parametrize(
    ("scheme", "fn", "shape", "x", "expected"),
    [
        (INT8, matmul, (64, 6), f32(2, 64), (64, 1)),
        (TENSOR, matmul, (64, 6), f32(2, 64), (64, 6)),
        (groups(16), matmul, (64, 6), f32(2, 64), (16, 1)),
        (groups(64), matmul, (64, 6), f32(2, 64), (64, 1)),
        (INT8, out_proj, (4, 16, 6), f32(2, 4, 16), (4, 16, 1)),
        (groups(8), out_proj, (4, 16, 6), f32(2, 4, 16), (1, 8, 1)),
        (groups(32), out_proj, (4, 16, 6), f32(2, 4, 16), (2, 16, 1)),
        (groups(64), out_proj, (4, 16, 6), f32(2, 4, 16), (4, 16, 1)),
        (groups(2), merged_backwards, (4, 16, 6), f32(2, 64), (2, 1, 1)),
        (groups(8), merged_backwards, (4, 16, 6), f32(2, 64), (4, 2, 1)),
        (INT8, experts, (3, 64, 6), f32(3, 5, 64), (1, 64, 1)),
        (TENSOR, experts, (3, 64, 6), f32(3, 5, 64), (1, 64, 6)),
        (groups(16), experts, (3, 64, 6), f32(3, 5, 64), (1, 16, 1)),
        (INT8, scanned, (3, 8, 8), f32(2, 8), (1, 8, 1)),
        (TENSOR, scanned, (3, 8, 8), f32(2, 8), (1, 8, 8)),
        (INT8, embed, (50, 32), ids(4), (1, 32)),
        (groups(8), embed, (50, 32), ids(4), (1, 8)),
        (TENSOR, embed, (50, 32), ids(4), (50, 32)),
        (groups(8), tied, (50, 32), ids(4), (1, 8)),
        (INT8, conv, (3, 3, 4, 6), f32(1, 8, 8, 4), (3, 3, 4, 1)),
        (groups(32), conv, (3, 3, 4, 6), f32(1, 8, 8, 4), (3, 3, 4, 1)),
        (WeightScheme("mxfp4"), conv, (3, 3, 64, 6), f32(1, 8, 8, 64), (1, 1, 32, 1)),
        (INT8, heads, (8, 64), f32(2, 4, 16), (1, 16)),
        (groups(8), heads, (8, 64), f32(2, 4, 16), (1, 8)),
    ],
)
def test_block_shapes(scheme, fn, shape, x, expected):
    found = plan(scheme, fn, shape, x)
    assert (found.block_shape, found.scheme, found.reason) == (expected, scheme, "")


def test_layers_and_experts_are_told_apart_from_what_is_shared():
    assert plan(INT8, scanned, (3, 8, 8), f32(2, 8)).layer_axes == (0,)
    found = plan(INT8, experts, (3, 64, 6), f32(3, 5, 64))
    assert (found.layer_axes, found.stack_axes) == ((), (0,))
    found = plan(INT8, embed, (50, 32), ids(4))
    assert (found.layer_axes, found.stack_axes) == ((), ())


@pytest.mark.parametrize(
    ("fn", "shape", "x", "axis"),
    [
        (matmul, (64, 8), f32(2, 64), -2),
        (out_proj, (4, 16, 8), f32(2, 4, 16), -2),
        (scanned, (3, 8, 8), f32(2, 8), -2),
        (embed, (50, 32), ids(4), -1),
    ],
)
def test_packed_types_are_packed_along_a_summed_axis(fn, shape, x, axis):
    assert plan(WeightScheme("int3"), fn, shape, x).packed_axis == axis
    assert plan(INT4, fn, shape, x).packed_axis is None


@pytest.mark.parametrize(
    ("fn", "shape", "x", "size", "message"),
    [
        (
            matmul,
            (48, 6),
            f32(2, 48),
            32,
            "w: .* 32 .* axis 0 of length 48 .* 2, 3, 4, 6, 8, 12, 16",
        ),
        (matmul, (48, 6), f32(2, 48), 96, "axis 0 of length 48"),
        (heads, (8, 64), f32(2, 4, 16), 32, "axis 1 of length 64 .in pieces of 16"),
        (out_proj, (3, 16, 6), f32(2, 3, 16), 32, "axis 1 .* together have 48"),
    ],
)
def test_groups_that_do_not_divide_name_the_axis_and_what_would(fn, shape, x, size, message):
    with pytest.raises(GroupSizeError, match=message):
        plan(groups(size), fn, shape, x)


def test_all_wrong_group_sizes_are_told_at_once():
    with pytest.raises(GroupSizeError, match=r"(?s)a: groups.*b: groups"):
        assign(
            groups(64),
            lambda p, x: x @ p["a"] @ p["b"],
            {"a": f32(8, 6), "b": f32(6, 8)},
            f32(2, 8),
        )


def test_sliced_contracted_axes_bound_the_groups():
    def fn(p, x):
        return x[:, :48] @ p["w"][:48] + x[:, 48:] @ p["w"][48:]

    assert plan(groups(16), fn, (64, 8), f32(2, 64)).block_shape == (16, 1)
    assert plan(INT8, fn, (64, 8), f32(2, 64)).block_shape == (64, 1)
    with pytest.raises(GroupSizeError, match="2, 4, 8, 16, 64"):
        plan(groups(32), fn, (64, 8), f32(2, 64))


@pytest.mark.parametrize(
    ("fn", "aval", "x", "reason"),
    [
        (lambda p, x: x * p["w"], f32(8), f32(2, 8), "is used by"),
        (lambda p, x: jnp.einsum("bd,d->bd", x, p["w"]), f32(8), f32(2, 8), "gain, bias or outer"),
        (
            lambda p, x: jnp.einsum("bhd,hd->bhd", x, p["w"]),
            f32(2, 4),
            f32(2, 2, 4),
            "gain, bias or outer",
        ),
        (lambda p, x: jnp.einsum("bd,d->b", x, p["w"]), f32(8), f32(2, 8), "a vector"),
        (
            lambda p, x: lax.scan(lambda c, g: (c + x @ g, None), x[:, 0], p["w"])[0],
            f32(3, 8),
            f32(2, 8),
            "a vector",
        ),
        (lambda p, x: x @ p["w"], ids(8, 6), ids(2, 8), "int32 is not floating point"),
        (lambda p, x: x, f32(8, 6), f32(2), "does not use"),
        (lambda p, x: x @ p["w"], f32(1, 6), f32(2, 1), "gain, bias or outer"),
        (lambda p, x: x @ p["w"], f32(0, 6), f32(2, 0), "gain, bias or outer"),
        (lambda p, x: x @ p["w"], f32(2, 6, dtype=jnp.bfloat16), f32(2, 2), "no less than floats"),
    ],
)
def test_what_is_never_quantized_says_why(fn, aval, x, reason):
    recipe = Recipe("test", (Rule(weight=INT8, optional=True),))
    found = assign(recipe, fn, {"w": aval}, x).params["w"]
    assert found.scheme is None
    assert reason in found.reason


def test_a_bias_picked_by_row_is_no_embedding():
    fn = lambda p, i: p["e"]["bias"][i] + 1.0  # noqa: E731
    assert (
        "by its name"
        in assign(INT8, fn, {"e": {"bias": f32(5, 8)}}, ids(4)).params["e/bias"].reason
    )


# --- rules -------------------------------------------------------------------------------------

TWO = {"a": f32(8, 6), "b": f32(6, 8)}


def two(p, x):
    return x @ p["a"] @ p["b"]


def test_the_first_rule_that_matches_decides():
    recipe = Recipe("test", (Rule("a", weight=INT4), Rule(weight=INT8, act=ActScheme())))
    found = assign(recipe, two, TWO, f32(2, 8)).params
    assert [(p.scheme.qtype, p.act) for p in found.values()] == [
        ("int4", None),
        ("int8", ActScheme()),
    ]


def test_skip_leaves_float_and_says_so():
    recipe = Recipe("test", (Rule("a", skip=True), Rule(weight=INT8)))
    found = assign(recipe, two, TWO, f32(2, 8))
    assert [p.path for p in found.quantized] == ["b"]
    assert "Rule('a', skip=True) skips dot 'a'" in found.params["a"].reason


def test_no_rule_means_float():
    found = assign(Recipe("test", (Rule("b", weight=INT8),)), two, TWO, f32(2, 8)).params["a"]
    assert "no rule of the recipe matches dot 'a'" in found.reason


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("aa", weight=INT8), "Near: a"),
        (Rule("a", op="conv", weight=INT8), r"path matches, but not its op='conv': a \(dot\)"),
        (Rule("a", weight=INT8), "rules before it take all.*Rule.*'a'"),
        (Rule("zzzz/**", skip=True), "no path is like it. There are: a, b"),
        (Rule(".*a", weight=INT8), "a path is a glob, no regular expression. Near: a"),
        (Rule(op="attention", act=ActScheme()), "not its op='attention': a"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_with_near_misses(rule, message):
    recipe = Recipe("test", (Rule("*", weight=INT8), rule))
    if "before" not in message:
        recipe = Recipe("test", (rule, Rule("*", weight=INT8)))
    with pytest.raises(ValueError, match=message):
        assign(recipe, two, TWO, f32(2, 8))


def test_a_rule_for_what_has_no_quantized_form_says_so():
    recipe = Recipe("test", (Rule("**/bias", weight=INT8), Rule(weight=INT8)))
    params = {"w": f32(8, 6), "bias": f32(6)}
    with pytest.raises(ValueError, match="no quantized form: bias is used by"):
        assign(recipe, lambda p, x: x @ p["w"] + p["bias"], params, f32(2, 8))


def test_skipping_what_is_float_anyway_is_fine():
    recipe = Recipe("test", (Rule("bias", skip=True), Rule(weight=INT8)))
    params = {"w": f32(8, 6), "bias": f32(6)}
    found = assign(recipe, lambda p, x: x @ p["w"] + p["bias"], params, f32(2, 8))
    assert [p.path for p in found.quantized] == ["w"]


# --- several uses ------------------------------------------------------------------------------


def test_a_tied_table_shares_row_scales_and_the_head_decides():
    recipe = Recipe(
        "test", (Rule(op="embed", weight=INT4), Rule(op="attend", weight=INT8, act=ActScheme()))
    )
    found = plan(recipe, tied, (50, 32), ids(4))
    assert (found.scheme, found.act, found.block_shape) == (INT8, ActScheme(), (1, 32))
    assert found.notes == ("embed 'w' would follow Rule('**', op='embed', weight=int4 channel); "
                           "attend 'w' decides",)  # fmt: skip


def test_low_bit_presets_keep_tables_at_int8():
    params = {"w": f32(50, 32), "v": f32(50, 64)}
    found = assign(PRESETS["w4a16"], lambda p, i: tied(p, i) @ p["v"], params, ids(4)).params
    assert (found["w"].scheme, found["w"].block_shape) == (INT8, (1, 32))
    channel = WeightScheme("int4", range="mse")
    assert (found["v"].scheme, found["v"].block_shape) == (channel, (50, 1))


def test_an_embedding_has_no_input_to_quantize():
    assert plan(PRESETS["w8a8"], embed, (50, 32), ids(4)).act is None


def test_skipping_one_use_keeps_the_parameter_float():
    recipe = Recipe("test", (Rule(op="attend", skip=True), Rule(weight=INT8)))
    found = plan(recipe, tied, (50, 32), ids(4))
    assert found.scheme is None
    assert "skips attend 'w'" in found.reason


def test_the_product_with_most_work_decides():
    def spectral(p, x):
        v = jnp.ones(16) @ p["w"]  # a step of power iteration
        return x @ (p["w"] / jnp.sum(v))

    found = plan(INT8, spectral, (16, 8), f32(4, 16))
    assert (found.block_shape, found.notes) == ((16, 1), ())

    def backwards(p, x):
        v = p["w"] @ jnp.ones(8)
        return x @ (p["w"] / jnp.sum(v))

    assert plan(INT8, backwards, (16, 8), f32(4, 16)).block_shape == (16, 1)


def test_the_first_product_decides_and_the_others_are_reported():
    found = plan(INT8, lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (16, 8), f32(2, 16))
    assert found.block_shape == (16, 1)
    assert len(found.notes) == 1
    assert "sums over axes that have a scale each" in found.notes[0]


def test_a_further_use_that_needs_floats_is_reported():
    found = plan(INT8, lambda p, x: (x @ p["w"], jnp.sum(p["w"])), (16, 8), f32(2, 16))
    assert found.scheme == INT8
    assert "is used by reduce_sum" in found.notes[0]
    assert "dequantized there" in found.notes[0]


def test_parameters_joined_but_stored_differently_are_reported():
    recipe = Recipe("test", (Rule("a", weight=INT4), Rule(weight=INT8)))
    params = {"a": f32(8, 6), "b": f32(8, 6)}
    found = assign(recipe, lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1), params, f32(2, 8))
    assert found.params["a"].notes == ("joined with b, stored differently: dequantized there",)


def test_weightless_rules_are_kept_if_they_apply():
    found = assign(PRESETS["w8a8"], two, TWO, f32(2, 8))
    assert found.op_rules == ()
