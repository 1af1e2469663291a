"""A comparison of trees that come from a checkpoint: their arrays are committed to a device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import jaxquant as jq


def test_restored_int4_weights_are_compared(tmp_path):
    recipe = jq.Recipe("g8", (jq.Rule(weight=jq.WeightScheme("int4", group_size=8)),))

    @jq.quantize(recipe)
    def fn(params, x):
        def layer(x, w):
            return jnp.tanh(jnp.einsum("bd,dhk->bhk", x, w).reshape(x.shape)), None

        return jax.lax.scan(layer, x, params["w"])[0] @ params["head"]

    key = jax.random.key(0)
    params = {
        "w": jax.random.normal(key, (3, 16, 2, 8)),
        "head": jax.random.normal(key, (16, 8)),
    }
    x = jax.random.normal(key, (4, 16))
    q = jq.ptq(fn, params, x)
    jq.save(tmp_path / "q", q)
    back = jax.device_put(jq.restore(tmp_path / "q"), jax.devices()[0])
    report = jq.compare(fn, params, {"ptq": q, "restored": back}, {"all": [x]}, progress=False)
    means = [report[name].overall.divergence.mean.value for name in ("ptq", "restored")]
    assert means[0] == means[1] > 0
