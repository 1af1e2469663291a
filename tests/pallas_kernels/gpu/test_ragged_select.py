"""What dispatch picks on a GPU for rows grouped by expert; plans, lowering and values agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxquant.core.primitives import quantized_ragged_dot
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Place
from jaxquant.pallas_kernels.gpu import select
from jaxquant.pallas_kernels.ragged_dispatch import choose_ragged

H200 = Place("cuda", "NVIDIA H200")
EXPERTS = Weight("int4", (4, 256, 128), (4, 4, 128))
has_mosaic_gpu = pytest.mark.skipif(
    not select.has_mosaic_gpu(), reason="THIS JAX HAS NO MOSAIC GPU (0.11 HAS): NO GPU KERNEL"
)


def pick(weight=EXPERTS, x_shape=(16, 256), x_dtype="bfloat16", place=H200, act=None, **options):
    options = {"plain": True, "out_dtype": "float32"} | options
    return choose_ragged(x_shape, x_dtype, weight, act, place, **options)


REFUSALS = [
    ({"place": Place("cuda", "NVIDIA A100-SXM4-40GB")}, "A100-SXM4-40GB is none of H100, H200"),
    ({"place": Place("cuda", "NVIDIA H200", 4)}, "4 devices share the program"),
    ({"place": Place("rocm", "MI300X")}, "the program runs on rocm"),
    ({"plain": False}, "none of rows"),
    ({"x_dtype": "float32"}, "x is float32: XLA multiplies it in TF32, kernels in bfloat16"),
    ({"weight": Weight("int4", (4, 256, 128), (4, 16, 128))}, "groups of 16 are no multiple"),
]


@has_mosaic_gpu
@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[r for _, r in REFUSALS])
def test_why_not(change, reason):
    choice = pick(**change)
    assert choice.run is None and choice.name == "xla" and reason in choice.reason


def test_an_older_jax_takes_the_other_route(monkeypatch):
    monkeypatch.setattr(select, "has_mosaic_gpu", lambda: False)
    choice = pick()
    assert choice.run is None and choice.name == "xla"
    assert "this jax has no Mosaic GPU that they could be written in: 0.11 has" in choice.reason


@has_mosaic_gpu
def test_what_is_chosen():
    choice = pick()
    assert choice.name == "pallas gpu H200: int4 experts, scale after the dot"
    assert "4 experts, 16 rows in tiles of 8" in choice.reason
    assert "codes are transposed at every call" in choice.reason
    assert "transposed" not in pick(dataclasses.replace(EXPERTS, prepared=True)).reason
    assert pick(implementation="xla").name == "xla"
    assert pick(x_dtype="float32", implementation="pallas").run is not None


@has_mosaic_gpu
@pytest.mark.parametrize("act", [None, ActScheme()])
def test_the_choice_does_what_the_reference_does(act):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(30, 128)), jnp.bfloat16)
    w = quantize_array(jnp.asarray(rng.normal(size=(3, 128, 64)), jnp.float32), "int8", (1, 64, 1))
    w = w.replace(act=act, dtype=jnp.dtype("bfloat16"))
    sizes = jnp.asarray([17, 0, 9], jnp.int32)
    quant = None if act is None else ActQuant("int8", (1,))
    choice = pick(Weight("int8", w.shape, w.scale.shape), x.shape, act=quant)
    kernel = choice.run.kernel
    config = kernel.multiply.keywords["config"]
    # Registers are not interpreted.
    staged = dataclasses.replace(config, staged=config.reading != "direct")
    multiply = lambda *a, **k: kernel.multiply(*a, **k | {"config": staged})  # noqa: E731
    run = dataclasses.replace(choice.run, kernel=dataclasses.replace(kernel, multiply=multiply))
    interpret = plgpu.InterpretGPUParams()
    got = jax.jit(
        lambda x, w: run(x, None, w.codes, w.scale, None, None, sizes, interpret=interpret)
    )(x, w)
    want = np.asarray(quantized_ragged_dot(x, w, sizes, preferred_element_type=jnp.float32))
    assert not np.asarray(got)[26:].any()
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=5e-3 * np.abs(want).max())


@has_mosaic_gpu
def test_the_primitive_lowers_to_it():
    struct = jax.ShapeDtypeStruct
    w = QTensor(
        struct((4, 256, 128), jnp.dtype("int4")),
        struct((4, 2, 128), jnp.float32),
        qtype=get_qtype("int4"),
        dtype=jnp.dtype("bfloat16"),
    )
    x, sizes = struct((32, 256), jnp.bfloat16), struct((4,), jnp.int32)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")

    def lowered(fn):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return jax.jit(fn).trace(x, w, sizes).lower(lowering_platforms=("cuda",)).as_text()

    assert lowered(quantized_ragged_dot).count("mosaic_gpu_v2") == 1
    forced = lambda *a: quantized_ragged_dot(*a, implementation="xla")  # noqa: E731
    assert "mosaic_gpu" not in lowered(forced)
    grad = lambda x, w, s: jax.value_and_grad(  # noqa: E731
        lambda x: quantized_ragged_dot(x, w, s).astype(jnp.float32).sum()
    )(x)
    assert lowered(grad).count("mosaic_gpu_v2") >= 1
