"""Qwix (from PyPI) set up to do the same work as jaxquant, as far as it can.

What it cannot do on the shipped model, each tried: a tied embedding that is both gathered and
attended (`take` meets its weight wrapper), stacked weights of `nn.scan` (scales lose the layer
axis, tiles are counted from it), and groups along several contracted axes (it groups the innermost
only). So it runs the unstacked model with a float embedding and head; jaxquant is also measured
with these left float, so that both quantize the same matmuls. Products of activations stay float
in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import qwix

_FLOAT_RULES = (
    qwix.QuantizationRule(module_path=r"embed.*"),
    qwix.QuantizationRule(op_names=("einsum",)),
)

SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8},
    "w8a16": {"weight_qtype": jnp.int8},
    "w4a16_g128": {"weight_qtype": jnp.int4, "tile_size": 128},
    "w4a16_g64": {"weight_qtype": jnp.int4, "tile_size": 64},
    "w4a8": {"weight_qtype": jnp.int4, "act_qtype": jnp.int8},
    "nf4": {"weight_qtype": "nf4", "tile_size": 64},
    "w2a16": {"weight_qtype": jnp.int2, "tile_size": 64},
    "fp8": {"weight_qtype": jnp.float8_e4m3fn, "act_qtype": jnp.float8_e4m3fn},
}
"""Preset of jaxquant -> the same thing in Qwix's words."""


def quantized(model: Any, params: Any, preset: str, *args: Any) -> tuple[Callable[..., Any], Any]:
    """Quantizes a Linen model's parameters.

    Returns:
      fn and tree, for `fn(tree, *args)`.
    """
    rules = (*_FLOAT_RULES, qwix.QuantizationRule(module_path=".*", **SCHEMES[preset]))
    quantizable = qwix.quantize_model(model, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(quantizable.init, jax.random.key(0), *args)
    tree = qwix.quantize_params(params, abstract["params"])
    return lambda tree, *args: quantizable.apply({"params": tree}, *args), tree


def matmul_w8a8(w: jax.Array) -> tuple[Callable[..., jax.Array], Any]:
    """X @ w with int8 per-channel weights and dynamic int8 per-token activations."""
    qw = qwix.quantize(w, jnp.int8, channelwise_axes=[1])

    def matmul(qw: Any, x: jax.Array) -> jax.Array:
        qx = qwix.quantize(x, jnp.int8, channelwise_axes=[0])
        return qwix.dot_general(qx, qw, (((1,), (0,)), ((), ())))

    return matmul, qw
