"""Which implementation each product gets, at which place, and what is pinned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jaxquant as jq
from jaxquant.pallas_kernels.dispatch import Place
from jaxquant.passes import PassManager, edit_jaxpr
from jaxquant.passes.lower_to_kernels import LowerToKernels

X = jax.random.normal(jax.random.key(0), (8, 512))
P = {
    "q": jax.random.normal(jax.random.key(1), (512, 256)),
    "k": jax.random.normal(jax.random.key(2), (512, 128)),
    "out": jax.random.normal(jax.random.key(3), (3, 256, 256)),
}


def net(p, x):
    h = (x @ p["q"]) * jnp.tile(x @ p["k"], 2)

    def layer(h, w):
        return h @ w, None

    return jax.lax.scan(layer, h, p["out"])[0]


@pytest.fixture(scope="module")
def quantized():
    return jq.ptq(jq.quantize("w4a16_g128")(net), P, X)


def lowered(quantized, *passes):
    return jq.compile(net, quantized, X, passes=lambda p: [*p[:-1], *passes])


def test_on_cpu_everything_is_xla_with_the_reason(quantized):
    compiled = jq.compile(net, quantized, X)
    found = compiled.program.facts["lowerings"]
    assert [one.shapes[1] for one in found] == [(512, 256), (512, 128), (256, 256)]
    assert {one.implementation for one in found} == {"xla: float dot per group, all at once"}
    assert all("group scales (128)" in one.reason for one in found)
    assert compiled.records[-1].changed is False


def test_on_a_tpu_grouped_products_are_kernels(quantized):
    compiled = lowered(quantized, LowerToKernels(Place("tpu", "TPU v5e")))
    names = [one.implementation for one in compiled.program.facts["lowerings"]]
    assert names == ["pallas tpu v5e: int4, scale after the dot"] * 3
    assert "test_lower_to_kernels.py" in str(compiled.program.facts["lowerings"][0])
    together = ["one launch" in one.reason for one in compiled.program.facts["lowerings"]]
    assert together == [True, True, False]


def test_the_plan_says_why_siblings_are_apart(quantized):
    compiled = lowered(quantized, LowerToKernels(Place("tpu", "TPU v5")))
    reasons = [one.reason for one in compiled.program.facts["lowerings"]]
    apart = "a launch apart from its siblings: a weight of 128 columns: at least 256 share blocks"
    assert [apart in reason for reason in reasons] == [True, True, False]


def experts(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.asarray([3, 0, 5], jnp.int32))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (Place("tpu", "TPU v6e"), "pallas tpu v6e: int4 experts, scale after the dot"),
        (Place("tpu", "TPU v6e", devices=4), "4 devices share the program"),
        (Place("cpu"), "xla: dequantize, then float ragged dot"),
    ],
)
def test_rows_grouped_by_expert(place, says):
    p = {"w": jax.random.normal(jax.random.key(4), (3, 512, 128))}
    tree = jq.ptq(jq.quantize("w4a16_g128")(experts), p, X)
    compiled = jq.compile(experts, tree, X, passes=lambda p: [*p[:-1], LowerToKernels(place)])
    (one,) = compiled.program.facts["lowerings"]
    assert one.shapes == ((8, 512), (3, 512, 128)) and says in str(one)


def test_several_devices_without_known_shardings_take_xla(quantized):
    compiled = lowered(quantized, LowerToKernels(Place("tpu", "TPU v5e", devices=4)))
    for one in compiled.program.facts["lowerings"]:
        assert one.implementation.startswith("xla: ")
        assert "4 devices share the program" in one.reason


def test_a_forced_implementation_is_pinned_everywhere_once(quantized):
    compiled = jq.compile(net, quantized, X, implementation="xla")
    pinned = [
        eqn.params["implementation"]
        for body in edit_jaxpr.all_bodies(compiled.jaxpr)
        for eqn in body.eqns
        if "implementation" in eqn.params
    ]
    assert pinned == ["xla", "xla"]  # siblings in one, and the scan's body
    chosen = jq.compile(net, quantized, X)
    np.testing.assert_array_equal(compiled(quantized, X), chosen(quantized, X))
    again = PassManager([LowerToKernels(implementation="xla")]).run(compiled.program)
    assert again.jaxpr is compiled.jaxpr


def test_a_forced_kernel_that_does_not_fit_is_an_error_with_the_line(quantized):
    with pytest.raises(ValueError, match="implementation='pallas', but no kernel fits: .*cpu") as e:
        jq.compile(net, quantized, X, implementation="pallas")
    assert "test_lower_to_kernels.py" in e.value.__notes__[0]
    with pytest.raises(ValueError, match="implementation is 'xla', 'pallas' or None, not 'cuda'"):
        jq.compile(net, quantized, X, implementation="cuda")


def test_gradients_of_a_pinned_program_choose_for_themselves(quantized):
    def loss(x, **options):
        return jnp.sum(jq.compile(net, quantized, x, **options)(quantized, x) ** 2)

    pinned = jax.grad(lambda x: loss(x, implementation="xla"))
    np.testing.assert_allclose(pinned(X), jax.grad(loss)(X), rtol=1e-6)
    assert "implementation=None" in str(jax.make_jaxpr(pinned)(X))


def test_siblings_lower_for_tpu_as_kernels(quantized):
    device = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        step = jax.jit(jq.compile(net, quantized, X))
        text = step.trace(quantized, X).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2  # the siblings are one
