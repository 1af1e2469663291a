"""Which scales each operation gets, and that it computes with them, in every granularity.

Layers and experts keep scales of their own whatever the granularity. Values are compared with a
float64 oracle on the dequantized weights; inputs are rounded in the oracle where the recipe does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.core.recipe import ActScheme, Recipe, Rule, WeightScheme
from tests.pallas_kernels.dot_oracle import assert_close

SCHEMES = {
    "channel": WeightScheme("int8"),
    "group": WeightScheme("int8", group_size=4),
    "tensor": WeightScheme("int8", granularity="tensor"),
    "asymmetric": WeightScheme("int8", symmetric=False),
    "int4 group": WeightScheme("int4", group_size=4),
}


def random(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """One weight ``w`` in one operation.

    Attributes:
      fn: the function of the weight and an input.
      shape: the weight's shape.
      x: the input.
      channel: shape of its scales with one a channel.
      group: with groups of 4.
      tensor: with one a tensor.
      kind: kind of the operation in plans.
    """

    fn: Callable[[Any, Any], Any]
    shape: tuple[int, ...]
    x: Any
    channel: tuple[int, ...]
    group: tuple[int, ...]
    tensor: tuple[int, ...]
    kind: str = "dot"

    def scales(self, scheme: str) -> tuple[int, ...]:
        if scheme == "tensor":
            return self.tensor
        return self.group if "group" in scheme else self.channel


def conv(w, x, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def scanned(layer):
    return lambda w, x: lax.scan(lambda c, w: (jnp.tanh(layer(w, c)), None), x, w)[0]


IMAGES = random(1, 2, 6, 5, 4) * jnp.array([1.0, 20.0])[:, None, None, None]
SIZES = jnp.array([4, 0, 3], jnp.int32)
CASES = {
    "dot_general": Case(
        lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ()))), (8, 6), random(0, 5, 8),
        (1, 6), (2, 6), (1, 1),
    ),
    "transposed": Case(lambda w, x: x @ w.T, (6, 8), random(0, 5, 8), (6, 1), (6, 2), (1, 1)),
    "einsum, weight first": Case(
        lambda w, x: jnp.einsum("nk,mk->nm", w, x), (6, 8), random(0, 5, 8), (6, 1), (6, 2), (1, 1)
    ),
    "einsum, heads": Case(
        lambda w, x: jnp.einsum("mhd,hdn->mn", x, w), (4, 8, 6), random(0, 5, 4, 8),
        (1, 1, 6), (4, 2, 6), (1, 1, 1),
    ),
    "einsum, experts": Case(
        lambda w, x: jnp.einsum("ecd,edf->ecf", x, w), (3, 8, 6), random(0, 3, 5, 8),
        (3, 1, 6), (3, 2, 6), (3, 1, 1),
    ),
    "vmap over experts": Case(
        lambda w, x: jax.vmap(jnp.matmul)(x, w), (3, 8, 6), random(0, 3, 5, 8),
        (3, 1, 6), (3, 2, 6), (3, 1, 1),
    ),
    "experts by token": Case(
        lambda w, x: jnp.einsum("mk,mkn->mn", x, w[jnp.array([2, 0, 1, 1, 2])]), (3, 8, 6),
        random(0, 5, 8), (3, 1, 6), (3, 2, 6), (3, 1, 1),
    ),
    "layers": Case(
        scanned(lambda w, c: c @ w), (3, 8, 8), random(0, 5, 8), (3, 1, 8), (3, 2, 8), (3, 1, 1)
    ),
    "layers of experts": Case(
        scanned(lambda w, c: jnp.einsum("ecd,edf->ecf", c, w)), (2, 3, 8, 8), random(0, 3, 5, 8),
        (2, 3, 1, 8), (2, 3, 2, 8), (2, 3, 1, 1),
    ),
    "conv": Case(
        conv, (3, 3, 4, 6), IMAGES, (1, 1, 1, 6), (1, 1, 1, 6), (1, 1, 1, 1), "conv"
    ),
    "conv, strided and dilated": Case(
        lambda w, x: conv(w, x, window_strides=(2, 1), rhs_dilation=(1, 2), padding="VALID"),
        (3, 2, 4, 6), IMAGES, (1, 1, 1, 6), (1, 1, 1, 6), (1, 1, 1, 1), "conv",
    ),
    "conv, input dilated": Case(
        lambda w, x: conv(w, x, lhs_dilation=(2, 1), padding=((1, 1), (0, 1))),
        (3, 2, 4, 6), IMAGES, (1, 1, 1, 6), (1, 1, 1, 6), (1, 1, 1, 1), "conv",
    ),
    "conv, feature groups": Case(
        lambda w, x: conv(w, x, feature_group_count=2), (3, 3, 2, 6), IMAGES,
        (1, 1, 1, 6), (1, 1, 1, 6), (1, 1, 1, 1), "conv",
    ),
    "conv, depthwise": Case(
        lambda w, x: conv(w, x, feature_group_count=4), (3, 3, 1, 8), IMAGES,
        (1, 1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 1), "conv",
    ),
    "layers of convs": Case(
        scanned(conv), (2, 3, 3, 4, 4), IMAGES, (2, 1, 1, 1, 4), (2, 1, 1, 1, 4), (2, 1, 1, 1, 1),
        "conv",
    ),
    "ragged_dot": Case(
        lambda w, x: lax.ragged_dot(x, w, SIZES), (3, 8, 6), random(0, 7, 8),
        (3, 1, 6), (3, 2, 6), (3, 1, 1), "ragged_dot",
    ),
    "layers of ragged_dots": Case(
        scanned(lambda w, c: lax.ragged_dot(c, w, SIZES)), (2, 3, 8, 8), random(0, 7, 8),
        (2, 3, 1, 8), (2, 3, 2, 8), (2, 3, 1, 1), "ragged_dot",
    ),
    "gather": Case(
        lambda w, x: jnp.take(w, x, axis=0), (10, 8), jnp.array([[3, 1], [9, 0]]),
        (10, 1), (10, 2), (1, 1), "embed",
    ),
}  # fmt: skip


def quantized(case, scheme, act=None, op=None, **options):
    """The recipe's tree, plan and result of a case."""
    recipe = Recipe("test", (Rule(op=op, weight=scheme, act=act),))
    fn = jq.quantize(recipe)(lambda p, x: case.fn(p["w"], x))
    params = {"w": random(9, *case.shape) / 3}
    (row,) = jq.explain(fn, params, case.x).where(param="w")
    tree = jq.ptq(fn, params, case.x, progress=False, **options)
    return tree["w"], row, fn(tree, case.x)


def in_float64(case, w, x):
    """The case on the floats that a weight stands for; no integer input is touched."""
    with jax.enable_x64(True):
        scale = np.asarray(w.scale, np.float64)
        values = np.asarray(w.unpacked_codes(), np.float64)
        zero = 0 if w.zero_point is None else np.asarray(w.zero_point, np.float64)
        for axis, n in enumerate(values.shape):
            scale = np.repeat(scale, n // scale.shape[axis], axis)
            zero = zero if w.zero_point is None else np.repeat(zero, n // zero.shape[axis], axis)
        x = np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return np.asarray(case.fn(jnp.asarray((values - zero) * scale), x))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_scales_and_values(name, scheme):
    case = CASES[name]
    w, row, out = quantized(case, SCHEMES[scheme])
    assert w.scale.shape == case.scales(scheme)
    assert (row.kind, row.status) == (case.kind, "quantized")
    assert_close(out, in_float64(case, w, case.x), 3e-5)


def rounded(x, axes):
    """What int8 makes of x, with one scale over these axes."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis=axes, keepdims=True) / 127
    return np.round(x / scale) * scale


# The axes of the input that share a scale per token.
TOKENS = {
    "dot_general": -1,
    "einsum, weight first": -1,
    "einsum, heads": (1, 2),
    "einsum, experts": -1,
    "experts by token": -1,
    "conv": (1, 2, 3),
    "conv, strided and dilated": (1, 2, 3),
    "conv, input dilated": (1, 2, 3),
    "conv, feature groups": (1, 2, 3),
    "conv, depthwise": (1, 2, 3),
    "ragged_dot": -1,
}


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("scheme", ["channel", "group", "tensor"])
@pytest.mark.parametrize("name", TOKENS)
def test_inputs_of_eight_bits(name, scheme, granularity):
    """Where a rule names the operation; values are those of the rounded input."""
    case = CASES[name]
    act = ActScheme(granularity=granularity)
    w, row, out = quantized(case, SCHEMES[scheme], act, op=case.kind)
    assert row.act == str(act)
    x = rounded(case.x, TOKENS[name] if granularity == "token" else None)
    assert_close(out, in_float64(case, w, x), 3e-5)
    if scheme == "channel":
        assert row.lowering == f"xla: int8 {case.kind.replace('_', ' ')}"


@pytest.mark.parametrize("name", ["conv", "ragged_dot"])
def test_inputs_stay_float_where_no_rule_names_the_operation(name):
    case = CASES[name]
    w, row, out = quantized(case, SCHEMES["channel"], ActScheme())
    assert w.act is None
    assert row.act == ""
    assert f"op='{case.kind}' quantizes it" in row.reason
    assert_close(out, in_float64(case, w, case.x), 3e-5)


@pytest.mark.parametrize("name", ["dot_general", "conv", "layers of convs", "ragged_dot"])
def test_static_inputs(name):
    case = CASES[name]
    act = ActScheme(mode="static")
    w, row, out = quantized(case, SCHEMES["channel"], act, op=case.kind, calibration=[case.x])
    layers = 2 if name.startswith("layers") else 1
    assert w.input_scale.size == layers
    assert row.act == "int8 static"
    scales = np.ravel(np.asarray(w.input_scale, np.float64))
    np.testing.assert_allclose(scales[0], np.abs(np.asarray(case.x)).max() / 127, rtol=1e-6)

    static = lambda x, scale: jnp.clip(jnp.round(x / scale), -127, 127) * scale  # noqa: E731

    def in_layers(weight, x):
        for i, scale in enumerate(scales):
            x = jnp.tanh(conv(weight[i], static(x, scale)))
        return x

    fn = in_layers if layers > 1 else lambda w, x: case.fn(w, static(x, scales[0]))
    assert_close(out, in_float64(dataclasses.replace(case, fn=fn), w, case.x), 3e-5)


def test_a_slice_is_no_more_work_than_it_multiplies():
    """The same work in both directions: the first product decides, whatever the rest of w is."""

    def both(p, x):
        first = x @ p["w"][:, :16]
        return first @ p["w"][:, :16].T

    fn = jq.quantize(Recipe("test", (Rule(weight=WeightScheme("int8")),)))(both)
    w = jq.ptq(fn, {"w": random(0, 8, 64)}, random(1, 5, 8), progress=False)["w"]
    assert w.scale.shape == (1, 64)
