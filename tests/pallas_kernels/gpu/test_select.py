"""What dispatch picks on a GPU, what it says when nothing fits; plans and lowering agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

import jaxquant as jq
from benchmarks.gpu_formats import FORMATS
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Place, choose
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.gpu import select
from jaxquant.pallas_kernels.gpu.chips import CHIPS
from jaxquant.pallas_kernels.gpu.heuristics import choose_config
from jaxquant.pallas_kernels.problem import MatmulProblem

H200 = Place("cuda", "NVIDIA H200")
PLAIN = (((1,), (0,)), ((), ()))
INT4 = Weight("int4", (512, 256), (4, 256))
TOKEN = ActQuant("int8", (1,))
has_mosaic_gpu = pytest.mark.skipif(
    not select.has_mosaic_gpu(), reason="THIS JAX HAS NO MOSAIC GPU (0.11 HAS): NO GPU KERNEL"
)


def pick(weight=INT4, x_shape=(16, 512), dims=PLAIN, act=None, place=H200, x="bfloat16", **options):
    axes = DotAxes.make(dims, len(x_shape), len(weight.shape), "rhs")
    options = {"out_dtype": jnp.bfloat16} | options
    return choose(x_shape, jnp.dtype(x), weight, axes, act, place, **options)


REFUSALS = [
    ({"place": Place("rocm", "MI300X")}, "pallas: the program runs on rocm"),
    ({"place": Place("cuda")}, "the GPU generation is not known"),
    ({"place": Place("cuda", "NVIDIA A100-SXM4-40GB")}, "A100-SXM4-40GB is none of H100, H200"),
    ({"place": Place("cuda", "NVIDIA H200", 4)}, "4 devices share the program"),
    ({"x": "float32"}, "x is float32: XLA multiplies it in TF32, kernels in bfloat16"),
    ({"x": "float16"}, "x is float16"),
    ({"precision": lax.Precision.HIGHEST}, "more than one bfloat16 pass"),
    ({"weight": Weight("int8", (512, 256), (1, 256))}, "XLA fuses the conversion"),
    ({"weight": Weight("int8", (512, 256), (1, 256)), "act": TOKEN}, "XLA fuses the conversion"),
    ({"weight": Weight("int4", (512, 256), (4, 32))}, "blocks along free axis 1"),
    ({"weight": Weight("int1", (512, 256), (4, 256))}, "no kernel reads int1 codes"),
    ({"x_shape": (0, 512)}, "empty"),
]


@has_mosaic_gpu
@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[r for _, r in REFUSALS])
def test_why_not(change, reason):
    choice = pick(**change)
    assert choice.run is None and choice.name == "xla"
    assert reason in choice.reason
    if "XLA" not in reason:  # those are a matter of speed or of precision
        with pytest.raises(ValueError, match="implementation='pallas', but no kernel fits: pallas"):
            pick(**change, implementation="pallas")


def test_an_older_jax_has_none(monkeypatch):
    monkeypatch.setattr(select, "has_mosaic_gpu", lambda: False)
    assert pick().reason == (
        "pallas cuda: this jax has no Mosaic GPU that they could be written in: 0.11 has"
    )


def test_a_place_says_which_gpu_platform():
    with pytest.raises(ValueError, match="'gpu' may be 'cuda' or 'rocm'"):
        Place("gpu", "NVIDIA H200")


@has_mosaic_gpu
def test_grouped_codes_are_kernels_and_say_what_preparing_spares():
    choice = pick()
    assert choice.name == "pallas gpu H200: int4, scale after the dot"
    assert choice.reason.endswith("transposed at every call: jaxquant.prepare does it once")
    ready = pick(dataclasses.replace(INT4, prepared=True))
    assert ready.name == choice.name and "jaxquant.prepare" not in ready.reason
    table = Weight("int4", (256, 512), (256, 4))  # [n, k] by nature
    assert "jaxquant.prepare" not in pick(table, dims=(((1,), (1,)), ((), ()))).reason
    many = pick(x_shape=(2048, 512))
    assert many.name.startswith("pallas gpu H200: int4, scale")
    assert "2048 rows: XLA would write the weight out in bfloat16" in many.reason


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_have_blocks_that_stay(name):
    """Persistent: as many blocks as multiprocessors, of two warpgroups and one that loads."""
    chip = CHIPS["H200"]
    config = choose_config(MatmulProblem(2048, 4096, 4096, **FORMATS[name][0]), chip)
    assert config.blocks * config.cluster == chip.multiprocessors
    assert (config.warpgroups, config.split_k) == (2, 1) and config.bm >= 64


@has_mosaic_gpu
def test_forced():
    channel = Weight("int8", (512, 256), (1, 256))
    name = pick(channel, implementation="pallas").name
    assert name == "pallas gpu H200: int8, scale on the output"
    assert pick(implementation="xla").reason == "asked for by implementation='xla'"
    assert pick(x="float32", implementation="pallas").run is not None


P = {
    "q": jax.ShapeDtypeStruct((512, 256), jnp.bfloat16),
    "k": jax.ShapeDtypeStruct((512, 128), jnp.bfloat16),
    "out": jax.ShapeDtypeStruct((3, 256, 256), jnp.bfloat16),
}
X = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)


def net(p, x):
    h = (x @ p["q"]) * jnp.tile(x @ p["k"], 2)
    return lax.scan(lambda h, w: (h @ w, None), h, p["out"])[0]


def on_h200(fn, *args):
    """The lowered program, without a GPU and without its compiler."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@functools.cache
def quantized(recipe):
    return jq.ptq(jq.quantize(recipe)(net), P, X, progress=False)


@pytest.mark.parametrize("recipe", ["w4a16_g128", "w8a8"])
def test_the_plan_is_what_is_lowered(recipe):
    """On every jax: kernels on those that have them, else XLA with the reason."""
    compiled = jq.compile(net, quantized(recipe), X, place=H200)
    found = compiled.program.facts["lowerings"]
    planned = [one for one in found if one.implementation.startswith("pallas gpu H200")]
    kernels = recipe == "w4a16_g128" and select.has_mosaic_gpu()
    assert len(found) == 3 and len(planned) == 3 * kernels
    text = on_h200(jq.transform(net), quantized(recipe), X)
    assert text.count("mosaic_gpu") >= 3 if kernels else "mosaic_gpu" not in text
    explained = [row.lowering for row in jq.explain(net, quantized(recipe), X, place=H200).rows]
    assert sorted(explained) == sorted(one.implementation for one in found)
    assert not any("gpu" in row.lowering for row in jq.explain(net, quantized(recipe), X).rows)
    if not select.has_mosaic_gpu():
        assert all("no Mosaic GPU" in one.reason for one in found)
    elif not kernels:
        assert all("XLA fuses the conversion" in one.reason for one in found)
