"""Random architectures, and what must hold of every fold and rotation in them.

Called by `test_random_folds.py` and `benchmarks/random_folds.py`. An architecture follows from a
number: norm, attention with grouped heads, gated or plain MLP, a stem of convolutions, layers under
scan or one after the other, a head that is tied or not. All in float64, where a fold that is right
differs by rounding only, and nothing else can hide there.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from jaxquant.passes.fold_transforms import (
    FACT,
    FoldError,
    FoldTransforms,
    check_same,
    fold_parameters,
)
from jaxquant.passes.program import Program, trace
from jaxquant.passes.rotate import FACT as ROTATIONS
from jaxquant.passes.rotate import Rotate, rotate_parameters

TOLERANCE = 1e-9

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The choices of a model."""

    norm: str
    bias: bool
    attention: str
    gated: bool
    activation: str
    layers: str
    tied: bool
    stem: str
    after: str
    depth: int
    width: int
    inner: int
    heads: int
    groups: int

    def params(self, rng: np.random.Generator) -> Params:
        """Random parameters: gains around one, no bias zero."""
        d, f, h, g = self.width, self.inner, self.heads, self.groups
        c = d // h
        shapes: dict[str, tuple[int, ...]] = {"out_gain": (d,), "out_bias": (d,)}
        shapes["embed"] = (11, d)
        if not self.tied:
            shapes["head"] = (d, 11)
        if self.stem != "lookup":
            k = d // h if self.stem == "grouped" else d
            shapes |= {"stem_in": (3, d, d), "stem_mid": (3, k, d), "stem_out": (1, d, d)}
        shapes |= {
            f"{self.depth}*{name}": shape
            for name, shape in {
                "gain": (d,), "bias": (d,), "q": (d, h * c), "k": (d, g * c), "v": (d, g * c),
                "o": (h * c, d), "vb": (g * c,), "gain2": (d,), "bias2": (d,),
                "up": (d, f), "gate": (d, f), "upb": (f,), "down": (f, d),
            }.items()
        }  # fmt: skip
        params = {}
        for name, shape in shapes.items():
            count, star, own = name.rpartition("*")
            full = (int(count), *shape) if star else shape
            value = rng.normal(size=full) * (shape[0] ** -0.5 if len(shape) > 1 else 0.3)
            params[own] = value + (1.5 if "gain" in own else 0.0)
        return params

    def __call__(self, p: Params, tokens: jax.Array) -> jax.Array:
        """Logits of tokens [B, T]."""
        x = p["embed"][tokens]
        if self.stem != "lookup":
            act = jax.nn.relu
            groups = self.heads if self.stem == "grouped" else 1
            x = _conv(act(_conv(act(_conv(x, p["stem_in"])), p["stem_mid"], groups)), p["stem_out"])
        names = ("gain", "bias", "q", "k", "v", "o", "vb", "gain2", "bias2", "up", "gate", "upb",
                 "down")  # fmt: skip
        stacked = {name: p[name] for name in names}

        def layer(x: jax.Array, own: Params) -> tuple[jax.Array, None]:
            return self._layer(own, x), None

        if self.layers == "remat":
            layer = jax.checkpoint(layer)
        if self.layers == "unrolled":
            for i in range(self.depth):
                x, _ = layer(x, {name: value[i] for name, value in stacked.items()})
        else:
            x, _ = jax.lax.scan(layer, x, stacked)
        x = self._norm(x, p["out_gain"], p["out_bias"])
        return x @ (p["embed"].T if self.tied else p["head"])

    def _layer(self, p: Params, x: jax.Array) -> jax.Array:
        if self.after == "parallel":
            y = self._norm(x, p["gain"], p["bias"])
            return x + self._attention(p, y) + self._mlp(p, y)
        x = x + self._attention(p, self._norm(x, p["gain"], p["bias"]))
        return x + self._mlp(p, self._norm(x, p["gain2"], p["bias2"]))

    def _norm(self, x: jax.Array, gain: jax.Array, bias: jax.Array) -> jax.Array:
        if self.norm == "none":
            return x
        if self.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain
        return y + bias if self.bias else y

    def _attention(self, p: Params, y: jax.Array) -> jax.Array:
        if self.attention == "none":
            return y @ p["o"]
        b, t, d = y.shape
        h, g = self.heads, self.groups
        c = d // h
        q = (y @ p["q"]).reshape(b, t, h, c)
        k = (y @ p["k"]).reshape(b, t, g, c)
        v = y @ p["v"]
        v = (v + p["vb"] if self.bias else v).reshape(b, t, g, c)
        if self.attention == "repeated":
            k, v = jnp.repeat(k, h // g, 2), jnp.repeat(v, h // g, 2)
            w = jax.nn.softmax(jnp.einsum("bthc,bshc->bhts", q, k))
            mixed = jnp.einsum("bhts,bshc->bthc", w, v)
        else:
            q = q.reshape(b, t, g, h // g, c)
            w = jax.nn.softmax(jnp.einsum("btgrc,bsgc->bgrts", q, k))
            mixed = jnp.einsum("bgrts,bsgc->btgrc", w, v)
        return mixed.reshape(b, t, d) @ p["o"]

    def _mlp(self, p: Params, y: jax.Array) -> jax.Array:
        up = y @ p["up"]
        up = up + p["upb"] if self.bias else up
        act = ACTIVATIONS[self.activation]
        hidden = act(y @ p["gate"]) * up if self.gated else act(up)
        return hidden @ p["down"]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu3": lambda x: jax.nn.relu(x) ** 3,
    "abs": jnp.abs,
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "norm": ("rms", "rms", "layer", "none"),
    "bias": (False, True),
    "attention": ("repeated", "grouped", "none"),
    "gated": (False, True),
    "activation": tuple(ACTIVATIONS),
    "layers": ("scan", "unrolled", "remat"),
    "tied": (False, True),
    "stem": ("lookup", "lookup", "convolutions", "grouped"),
    "after": ("serial", "serial", "parallel"),
    "depth": (1, 2),
    "width": (8, 12, 16),
    "inner": (8, 20, 24),
    "heads": (2, 4),
    "groups": (1, 2),
}


def architecture(number: int) -> Architecture:
    """The architecture of a number."""
    rng = random.Random(number)
    return Architecture(**{name: rng.choice(options) for name, options in _CHOICES.items()})


def _conv(x: jax.Array, w: jax.Array, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


def check(number: int) -> collections.Counter[str]:
    """Folds and rotates an architecture in every way there is.

    Returns:
      How often each thing was done: "folded" and "multiplied" groups of weights, groups "left",
      "rotated" streams and heads, inputs "turned", streams "refused".

    Raises:
      FoldError: a function changed by more than rounding.
    """
    model = architecture(number)
    rng = np.random.default_rng(number)
    params = model.params(rng)
    tokens = jnp.asarray(rng.integers(0, 11, (2, 3)))
    program = trace(model, params, (tokens,))
    paths = frozenset(program.parameters)
    want = _run(program, params, tokens)
    done: collections.Counter[str] = collections.Counter()

    def compare(after: Program, new: Mapping[str, Any], what: str) -> None:
        got = _run(after, {**params, **new}, tokens)
        check_same(want, got, tolerance=TOLERANCE, what=f"{what} of architecture {number}")

    def factors(group: Any) -> Any:
        if not group.foldable:
            done["left"] += 1
            return None  # not even explicitly: it would be refused
        return np.exp(0.7 * rng.normal(size=group.count))

    result = FoldTransforms(factors, "multiply").run(program)
    compare(result.program, fold_parameters(params, result.program.facts[FACT]), "a fold")
    for note in result.notes:
        done["multiplied" if "explicit operation" in note else "folded"] += 1
    steps = {
        "parameters": Rotate(inputs=frozenset(), seed=number),
        "inputs": Rotate(inputs=paths, seed=number),
        "online": Rotate(online=True, seed=number),
    }
    for name, step in steps.items():
        try:
            result = step.run(program)
        except FoldError:  # there is no stream that can be rotated, and that is said
            done["refused"] += 1
            continue
        turned = result.program.facts[ROTATIONS]
        compare(result.program, rotate_parameters(params, turned), f"rotation ({name})")
        for found, _ in turned:
            done["turned" if found.role == "input" else "rotated"] += 1
    return done


def _run(program: Program, params: Params, tokens: jax.Array) -> Any:
    # Compiling is what takes time here, and the programs are tiny.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    run = jax.jit(jaxpr_as_fun(program.jaxpr), compiler_options=options)
    return run(*program.flatten(params, tokens))
