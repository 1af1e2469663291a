"""Small programs that use weights in every way the rewriter must follow.

Each entry is a function of a parameter dict and inputs, its parameters, for each weight the axes
that share a scale, and what is expected: the events' (path, action) pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.qtensor import QTensor, make_qtensor


def quantize_axes(w: jax.Array, axes: tuple[int, ...], qtype: str = "int8") -> QTensor:
    """Symmetric absmax quantization with one scale over ``axes``."""
    limit = {"int8": 127, "int4": 7}[qtype]
    scale = jnp.max(jnp.abs(w), axis=axes, keepdims=True).astype(jnp.float32) / limit
    codes = jnp.clip(jnp.round(w / scale), -limit, limit).astype(qtype)
    return make_qtensor(codes, scale, qtype=qtype, dtype=w.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    fn: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[int, ...]]
    inputs: tuple[Any, ...]
    dequantized: tuple[str, ...] = ()
    grad: bool = True
    tolerance: float = 3e-5

    def __str__(self) -> str:
        return self.name

    @property
    def has_gradient(self) -> bool:
        """Whether the first input can be differentiated."""
        return self.grad and jnp.issubdtype(self.inputs[0].dtype, jnp.floating)

    def params(self) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(self.shapes))
        return {
            name: jax.random.normal(key, shape) / (shape[0] ** 0.5 if shape else 1)
            for key, (name, shape) in zip(keys, self.shapes.items(), strict=True)
        }

    def quantized(self, params: dict[str, jax.Array], qtype: str = "int8") -> dict[str, Any]:
        return {
            name: quantize_axes(w, self.axes[name], qtype) if name in self.axes else w
            for name, w in params.items()
        }


X = jax.random.normal(jax.random.key(1), (5, 8))
IDS = jnp.array([[1, 4, 2], [0, 3, 9]])
CASES: list[Case] = []


def case(
    shapes: dict[str, tuple[int, ...]],
    axes: dict[str, tuple[int, ...]],
    *inputs: Any,
    dequantized: tuple[str, ...] = (),
    grad: bool = True,
    tolerance: float = 3e-5,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(fn: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(fn.__name__, fn, shapes, axes, inputs, dequantized, grad, tolerance))
        return fn

    return enter


K_N = {"w": (8, 6)}
OVER_K = {"w": (0,)}


@case(K_N, OVER_K, X)
def matmul(p, x):
    return x @ p["w"]


@case({"w": (6, 8)}, {"w": (1,)}, X)
def weight_on_the_left(p, x):
    return jnp.einsum("nk,mk->nm", p["w"], x)


@case({"w": (6, 8)}, {"w": (1,)}, X)
def transposed(p, x):
    return x @ p["w"].T


@case(K_N, OVER_K, X, tolerance=3e-2)  # products of bfloat16
def cast(p, x):
    return x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)


@case({"w": (8, 2, 3)}, {"w": (0,)}, X)
def reshaped(p, x):
    return x @ p["w"].reshape(8, 6)


@case({"w": (8, 2, 3)}, {"w": (0,)}, X)
def dense_general(p, x):
    return jnp.einsum("mk,khd->mhd", x, p["w"])


@case({"w": (2, 4, 6)}, {"w": (0, 1)}, X)
def several_contracted(p, x):
    return jnp.einsum("mhd,hdn->mn", x.reshape(5, 2, 4), p["w"])


@case({"w": (3, 8, 6)}, {"w": (1,)}, X)
def sliced_layer(p, x):
    return x @ p["w"][1]


@case({"w": (3, 8, 6)}, {"w": (1,)}, X, jnp.array(2))
def one_expert(p, x, e):
    return x @ p["w"][e]


@case({"w": (3, 8, 6)}, {"w": (1,)}, X, jnp.array([0, 2, 1, 1, 0]))
def gathered_experts(p, x, ids):
    return jnp.einsum("mk,mkn->mn", x, p["w"][ids])


@case({"w": (3, 8, 6)}, {"w": (1,)}, X)
def batched_experts(p, x):
    return jnp.einsum("mk,ekn->emn", x, p["w"])


@case({"a": (8, 6), "b": (8, 6)}, {"a": (0,), "b": (0,)}, X)
def stacked_then_used(p, x):
    return jnp.einsum("mk,ikn->imn", x, jnp.stack([p["a"], p["b"]]))


@case({"a": (8, 6), "b": (8, 4)}, {"a": (0,), "b": (0,)}, X)
def concatenated(p, x):
    return x @ jnp.concatenate([p["a"], p["b"]], axis=1)


@case({"w": (8, 6)}, OVER_K, X)
def split_in_halves(p, x):
    a, b = jnp.split(p["w"], 2, axis=1)
    return (x @ a) * (x @ b)


@case({"e": (10, 8)}, {"e": (1,)}, IDS)
def tied_embedding(p, ids):
    h = jnp.take(p["e"], ids, axis=0) * jnp.sqrt(8.0)
    return h @ p["e"].T


@case({"e": (10, 8), "w": (8, 6)}, {"e": (1,), "w": (0,)}, IDS)
def lookup_times_weight(p, ids):
    return p["e"][ids] @ p["w"]


@case(K_N, OVER_K, X)
def scaled_by_a_number(p, x):
    return x @ (p["w"] * 0.5)


@case({"w": (8, 6), "g": (8,), "b": (6,)}, OVER_K, X)
def norm_gain_and_bias(p, x):
    return jnp.einsum("mk,k->mk", x, p["g"]) @ p["w"] + p["b"]


@case({"w": (8, 8)}, OVER_K, X)
def scan_constant(p, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), c.sum()), x, None, length=3)


@case({"w": (3, 8, 8)}, {"w": (1,)}, X)
def scan_stacked(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, p["w"])


@case({"w": (8, 3, 8)}, {"w": (0,)}, X)
def scan_stacked_second_axis(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, jnp.moveaxis(p["w"], 1, 0))


@case({"w": (8, 8)}, OVER_K, X)
def scan_carries_the_weight(p, x):
    def body(carry, _):
        w, c = carry
        return (w, jnp.tanh(c @ w)), c.sum()

    return lax.scan(body, (p["w"], x), None, length=3)[0][1]


@case({"w": (3, 8, 8)}, {"w": (1,)}, X)
def remat_in_scan(p, x):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(c, w):
        return jnp.tanh(c @ w)

    return lax.scan(lambda c, w: (block(c, w), None), x, p["w"])[0]


@case({"w": (8, 8)}, OVER_K, X, grad=False)
def while_constant(p, x):
    return lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x)
    )[1]


@case({"a": (8, 6), "b": (8, 6)}, {"a": (0,), "b": (0,)}, X)
def cond_branches(p, x):
    return lax.cond(x.sum() > 0, lambda x: x @ p["a"], lambda x: x @ p["b"], x)


@case({"a": (8, 6), "b": (8, 6)}, {"a": (0,), "b": (0,)}, X, dequantized=("a", "b"))
def cond_returns_the_weight(p, x):
    return x @ lax.cond(x.sum() > 0, lambda: p["a"], lambda: p["b"])


@case({"w": (8, 6)}, OVER_K, X)
def jitted_inside(p, x):
    @jax.jit
    def layer(w, x):
        for _ in range(4):
            x = jnp.sin(x) * 2 + 1
        return jnp.tanh(x @ w)

    return layer(p["w"], x)


@jax.custom_jvp
def _custom_jvp_layer(w, x):
    return jnp.tanh(x @ w)


@_custom_jvp_layer.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    y = _custom_jvp_layer(w, x)
    return y, 2 * (1 - y**2) * (dx @ w + x @ dw)


@case(K_N, OVER_K, X, dequantized=())
def custom_jvp_layer(p, x):
    return _custom_jvp_layer(p["w"], x)


@jax.custom_vjp
def _custom_vjp_layer(w, x):
    return jnp.tanh(x @ w)


_custom_vjp_layer.defvjp(
    lambda w, x: (_custom_vjp_layer(w, x), (w, x)),
    lambda res, ct: (res[1].T @ ct, 3 * ct @ res[0].T),
)


@case(K_N, OVER_K, X)
def custom_vjp_layer(p, x):
    return _custom_vjp_layer(p["w"], x)


@case(K_N, OVER_K, X)
def gradient_inside(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x)


@case({"k": (3, 3, 2, 4)}, {"k": (0, 1, 2)}, jax.random.normal(jax.random.key(2), (2, 6, 6, 2)))
def convolution(p, x):
    return lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@case({"w": (3, 8, 6)}, {"w": (1,)}, X, jnp.array([2, 0, 3]))
def ragged_experts(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


@case({"w": (8, 6)}, OVER_K, X)
def vmapped_inside(p, x):
    return jax.vmap(lambda row: row @ p["w"])(x)


@case({"w": (3, 8, 6)}, {"w": (1,)}, jax.random.normal(jax.random.key(3), (3, 5, 8)))
def vmapped_over_weights(p, x):
    return jax.vmap(jnp.matmul)(x, p["w"])


@case({"w": (8, 6)}, OVER_K, X, dequantized=("w",))
def elementwise_use(p, x):
    return x @ jnp.tanh(p["w"])


@case({"w": (8, 6)}, OVER_K, X, jnp.arange(5))
def integer_einsum_beside(p, x, positions):
    mask = jnp.einsum("i,j->ij", positions, positions)
    return jnp.where(mask[:, :1] > 2, x @ p["w"], 0.0)


@case({"a": (8, 8), "b": (8, 8)}, {"a": (0,), "b": (0,)}, jnp.eye(8) * 0.3)
def same_shapes_everywhere(p, x):
    return x @ p["a"] + jnp.einsum("mk,kn->mn", jnp.tanh(x @ p["b"]), x)


@case({"u": (8, 4), "v": (4, 6)}, {"u": (0,), "v": (0,)}, X)
def three_operand_einsum(p, x):
    return jnp.einsum("mk,kr,rn->mn", x, p["u"], p["v"])


# --- more ways of one weight ---------------------------------------------------------------------


@case({"w": (16, 6)}, OVER_K, X, jnp.array(4), dequantized=())
def dynamic_rows(p, x, start):
    return x @ lax.dynamic_slice_in_dim(p["w"].T, start * 0, 6, 0).T[:8]


@case({"w": (8, 12)}, OVER_K, X, jnp.array(3))
def dynamic_columns(p, x, start):
    return x @ lax.dynamic_slice(p["w"], (0, start), (8, 6))


@case({"w": (8, 1, 6)}, OVER_K, X)
def squeezed(p, x):
    return x @ jnp.squeeze(p["w"], 1)


@case(K_N, OVER_K, X)
def broadcast(p, x):
    return jnp.einsum("mk,bkn->bmn", x, jnp.broadcast_to(p["w"], (3, 8, 6)))


@case({"w": (8, 12)}, OVER_K, X)
def every_other_column(p, x):
    return x @ p["w"][:, ::2]


@case(K_N, OVER_K, X)
def reversed_rows(p, x):
    return x @ p["w"][::-1]


@case({"w": (3, 8, 6)}, {"w": (1,)}, X)
def unstacked(p, x):
    return sum(x @ w for w in jnp.unstack(p["w"]))


@case({"w": (8, 12)}, OVER_K, X)
def split_unevenly(p, x):
    a, b, c = jnp.split(p["w"], [2, 6], axis=1)
    return jnp.concatenate([x @ c, x @ a, x @ b], axis=1)


@case({"a": (8, 2), "b": (8, 4), "c": (6, 8)}, {"a": (0,), "b": (0,), "c": (1,)}, X)
def joined_cut_and_transposed(p, x):
    w = jnp.concatenate([p["a"], p["b"], p["c"].T], axis=1)
    return x @ w[:, :9]


@case({"w": (8, 8)}, OVER_K, X)
def used_transposed_as_well(p, x):
    """An autoencoder with tied weights: the second product sums over the other axis."""
    return jnp.tanh(x @ p["w"]) @ p["w"].T


@case({"w": (8, 6), "v": (6, 8)}, {"w": (0,), "v": (0,)}, X, dequantized=("w",))
def also_used_elementwise(p, x):
    y = jnp.tanh(x @ p["w"]) @ p["v"]
    return y + jnp.mean(p["w"] ** 2)


@case({"w": (3, 8, 6)}, {"w": (1,)}, X, jnp.array(1), dequantized=("w",))
def one_layer_also_elementwise(p, x, layer):
    """A layer that is picked by one index is no lookup: its floats are reported."""
    return x @ p["w"][layer] + jnp.max(p["w"][layer])


@case({"w": (3, 8, 6)}, {"w": (1,)}, X, jnp.array(1))
def operand_of_a_switch(p, x, index):
    branches = [lambda w, x, i=i: x @ w[i] for i in range(3)]
    return lax.switch(index, branches, p["w"], x)


@case({"w": (2, 8, 8)}, {"w": (1,)}, X)
def calls_in_calls(p, x):
    block = jax.checkpoint(jax.jit(lambda w, x: _custom_jvp_layer(w, x)))
    return lax.scan(lambda c, w: (block(w, c), None), x, p["w"])[0]


def tanh_layers(x, stack):
    """The inputs of the layers ``x = tanh(x @ w)``."""
    inputs = []
    for w in stack:
        inputs.append(x)
        x = jnp.tanh(x @ w)
    return inputs
