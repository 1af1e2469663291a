"""A product that is split over GPUs keeps its kernel: lowered for eight that are described only."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.layout import layout_of
from jaxquant.core.placement import placed_structs
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.quantize_array import quantize_array

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11: XLA's route before"
)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("row", [False, True], ids=["column", "row"])
def test_lowering(kind, row):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2, 4), ("data", "model"), axis_types=(kind, kind), abstract_device=device)
    own = NamedSharding(mesh, P("model", None) if row else P(None, "model"))
    floats = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
    w = jax.eval_shape(lambda w: quantize_array(w, "int4", (128, 1)), floats)
    w = placed_structs(w, own)
    out = None
    if kind is AxisType.Auto:
        w = w.replace(mesh_layout=layout_of(own, 2, ("data",)))
    else:
        out = NamedSharding(mesh, P("data", own.spec[1]))
    x_sharding = NamedSharding(mesh, P("data", own.spec[0]))
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16, sharding=x_sharding)

    def fn(x, w):
        return quantized_dot_general(x, w, (((1,), (0,)), ((), ())), out_sharding=out)

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(fn).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "sdy.manual_computation" in text
    assert text.count("all_reduce") == row
    part = "1024x8192" if row else "4096x2048"
    assert f"tensor<{part}xi4>" in text
