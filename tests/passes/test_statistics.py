"""Every statistic against numpy in float64: over batches, loops, experts and devices."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.passes.histogram import Histogram, Percentile
from jaxquant.passes.insert_observers import Observation, check_finite, read
from jaxquant.passes.moving_average import MovingAverage
from jaxquant.passes.observe_rules import STATISTICS, observe_rules
from jaxquant.passes.observed import Operand, Seen
from jaxquant.passes.program import trace
from jaxquant.passes.row_statistics import Hessian, Reservoir
from jaxquant.passes.statistics import AbsMax, MeanAbs, MinMax
from tests.passes.zoo import tanh_layers

X = jax.random.normal(jax.random.key(0), (6, 8)) + 0.25
W = jax.random.normal(jax.random.key(1), (8, 8)) / 2
STACK = jax.random.normal(jax.random.key(2), (3, 8, 8)) / 2
MESH = Mesh(np.array(jax.devices()[:8]), ("d",))
ORDER_FREE = [name for name in STATISTICS if not name.startswith("moving")]


def collect(fn, params, *batches, statistics=tuple(STATISTICS), rules=None):
    """Values after several batches, jitted, each batch a tuple of arguments."""
    program = trace(fn, params, batches[0])
    observation = Observation(program, observe_rules(rules or list(statistics)))
    accumulate = jax.jit(observation.accumulate)
    state = observation.init()
    for batch in batches:
        state = accumulate(state, *program.flatten(params, *batch))
    check_finite(state["seen"], observation.met)
    return read(state["seen"], observation.statistics)


def oracle(rows):
    """What the statistics are of rows [n, k], in float64."""
    rows = np.asarray(rows, np.float64)
    size = np.abs(rows)
    return {
        "absmax": size.max(),
        "minmax": [rows.min(), rows.max()],
        "mean": size.mean(),
        "channel_absmax": size.max(0),
        "channel_minmax": np.stack([rows.min(0), rows.max(0)], -1),
        "channel_mean": size.mean(0),
        "hessian": 2 / len(rows) * rows.T @ rows,
    }


def same(found, rows):
    for name, value in oracle(rows).items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    assert float(found["histogram"].sum()) == np.size(rows)
    same_rows(found["reservoir"], rows)


def same_rows(sample, rows):
    """All rows fit the sample: it holds each of them once, and NaN behind them."""
    sample = np.asarray(sample)
    assert np.isnan(sample[len(rows) :]).all()
    ordered = [np.asarray(x)[np.lexsort(np.asarray(x).T)] for x in (sample[: len(rows)], rows)]
    np.testing.assert_allclose(*ordered, rtol=1e-5, atol=1e-6)


def test_batches_of_different_sizes_are_one_sample():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    second = 3 * X[:2] - 1
    program = trace(fn, {"w": W}, (X,))
    other = trace(fn, {"w": W}, (second,))
    rules = observe_rules(list(STATISTICS))
    first = Observation(program, rules)
    state = jax.jit(first.accumulate)(first.init(), W, X)
    state = jax.jit(Observation(other, rules).accumulate)(state, W, second)
    same(read(state["seen"], first.statistics)["w"], np.concatenate([X, second]))


def test_layers_of_a_scan_are_kept_apart():
    def fn(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    found = collect(fn, {"w": STACK}, (X,))["w"]
    for i, x in enumerate(tanh_layers(X, STACK)):
        same({name: value[i] for name, value in found.items()}, x)


@pytest.mark.parametrize("how", ["scan", "while", "remat", "shard_map"])
def test_loops_and_devices_are_merged(how):
    step = jax.checkpoint(lambda w, x: jnp.tanh(x @ w)) if how == "remat" else None

    def fn(p, x):
        if how == "shard_map":
            local = jax.shard_map(
                lambda w, x: jnp.tanh(x @ w), mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d")
            )
            return local(p["w"], x)
        if how == "while":
            start = (0, x)
            return lax.while_loop(
                lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), start
            )[1]
        if how == "remat":
            return step(p["w"], step(p["w"], step(p["w"], x)))
        return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=3)[0]

    x = jax.random.normal(jax.random.key(7), (16, 8))
    seen = [x] if how == "shard_map" else tanh_layers(x, [W, W, W])
    same(collect(fn, {"w": W}, (x,), statistics=ORDER_FREE)["w"], np.concatenate(seen))


def test_a_branch_that_did_not_run_adds_nothing():
    def fn(p, x):
        return lax.cond(x.sum() > -1e9, lambda x: x @ p["a"], lambda x: (9 * x) @ p["b"], x)

    found = collect(fn, {"a": W, "b": W}, (X,))
    same(found["a"], X)
    for name in set(found["b"]) - {"reservoir"}:
        limit = 2.0**-23 if name.startswith("percentile") else 0
        assert float(np.max(np.abs(found["b"][name]))) <= limit, name
    assert np.isnan(found["b"]["reservoir"]).all()


def test_automatic_sharding_of_the_batch():
    def fn(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    x = jax.random.normal(jax.random.key(6), (16, 8))
    sharded = jax.device_put(x, NamedSharding(MESH, P("d")))
    plain = collect(fn, {"w": STACK}, (x,), (2 * x,))["w"]
    found = collect(fn, {"w": STACK}, (sharded,), (2 * sharded,))["w"]
    assert len(found["hessian"].sharding.device_set) == 8
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_control_flow_inside_shard_map_and_an_axis_that_repeats_the_data():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("d", "t"))

    def local(w, v, x):
        x = lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: (x - 1) @ v, x)  # by device
        return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]

    def fn(p, x):
        return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P("d"))(
            p["w"], p["v"], x
        )

    x = jax.random.normal(jax.random.key(8), (8, 8))
    found = collect(fn, {"w": W, "v": W / 3}, (x,), statistics=ORDER_FREE)
    seen: dict[str, list] = {"w": [], "v": []}
    for rows in np.split(np.asarray(x), 4):
        name = "w" if rows.sum() > 0 else "v"
        seen[name].append(rows if name == "w" else rows - 1)
        out = seen[name][-1] @ np.asarray(W if name == "w" else W / 3)
        seen["w"] += [out, out @ np.asarray(W)]
    assert all(seen.values())
    for name, rows in seen.items():
        same(found[name], np.concatenate(rows))  # each value once, though "t" holds it twice


def test_vmap_of_the_observed_function():
    program = trace(lambda p, x: x @ p["w"], {"w": W}, (X,))
    observation = Observation(program, observe_rules(["channel_absmax", "hessian"]))
    many = jnp.stack([X, 2 * X, X - 1])
    _, found = jax.vmap(observation, in_axes=(None, 0))(W, many)
    for i, x in enumerate(many):
        one = {name: jax.tree.map(lambda v, i=i: v[i], s) for name, s in found["w"].items()}
        value = read({"w": one}, observation.statistics)["w"]["hessian"]
        np.testing.assert_allclose(value, oracle(x)["hessian"], rtol=1e-5, atol=1e-5)


def test_channels_follow_the_axes_of_the_weight():
    x = jax.random.normal(jax.random.key(3), (5, 2, 4))
    found = collect(
        lambda p, x: jnp.einsum("mhd,dhn->mn", x, p["w"]),
        {"w": jnp.ones((4, 2, 3))},
        (x,),
        statistics=["channel_absmax", "hessian"],
    )["w"]
    np.testing.assert_allclose(found["channel_absmax"], np.abs(x).max(0).T)
    rows = np.asarray(x, np.float64).transpose(0, 2, 1).reshape(5, 8)
    np.testing.assert_allclose(found["hessian"], 2 / 5 * rows.T @ rows, rtol=1e-5)


def test_experts_of_a_batched_product_and_of_a_ragged_dot():
    x = jax.random.normal(jax.random.key(4), (3, 5, 8))
    batched = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"])  # noqa: E731
    names = ["channel_absmax", "channel_minmax", "channel_mean", "hessian", "reservoir"]
    found = collect(batched, {"w": STACK}, (x,), statistics=names)["w"]
    for i in range(3):
        expected = oracle(x[i])
        for name in names[:-1]:
            np.testing.assert_allclose(found[name][i], expected[name], rtol=1e-5, atol=1e-6)
        same_rows(found["reservoir"][i], x[i])
    rows, sizes = x.reshape(15, 8), jnp.array([4, 0, 9])  # two rows belong to nobody
    ragged = lambda p, x, n: lax.ragged_dot(x, p["w"], n)  # noqa: E731
    found = collect(
        ragged, {"w": STACK}, (rows, sizes), statistics=[*names, MovingAverage(channels=True)]
    )["w"]
    for i, own in enumerate((rows[:4], rows[:0], rows[4:13])):
        if not len(own):
            assert np.isnan(found["reservoir"][i]).all()
            assert all(not np.any(found[name][i]) for name in names[:-1])
            continue
        expected = oracle(own)
        for name in names[:-1]:
            np.testing.assert_allclose(found[name][i], expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            found["channel_moving_absmax"][i], expected["channel_absmax"], rtol=1e-5
        )
        same_rows(found["reservoir"][i], own)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_a_product_with_patches(groups):
    x = jax.random.normal(jax.random.key(5), (2, 5, 6, 4))
    kernel = jax.random.normal(jax.random.key(6), (3, 2, 4 // groups, 6))

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["k"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    found = collect(fn, {"k": kernel}, (x,), statistics=["channel_absmax", Hessian(False)])["k"]
    np.testing.assert_allclose(found["channel_absmax"], np.abs(x).max((0, 1, 2)))
    # x' H x over the outputs of a kernel is the sum of squares of what the convolution gives.
    h = np.asarray(found["hessian"], np.float64).reshape(groups, *[kernel.size // 6] * 2)
    out = np.asarray(fn({"k": kernel}, x), np.float64)
    for feature in range(6):
        w = np.asarray(kernel[..., feature], np.float64).ravel()
        own = h[feature * groups // 6]
        np.testing.assert_allclose(w @ own @ w, (out[..., feature] ** 2).sum(), rtol=1e-4)


@hypothesis.given(
    st.lists(st.floats(0.0, 8.0, width=32), min_size=1, max_size=6), st.floats(0.0, 0.99)
)
def test_moving_average_is_the_recursion_with_its_start_corrected(values, momentum):
    statistic = MovingAverage(momentum=momentum)
    expected, weight = 0.0, 0.0
    for value in values:
        expected = momentum * expected + (1 - momentum) * value
        weight = momentum * weight + (1 - momentum)
    state = {"decay": jnp.ones(()), "total": jnp.zeros(())}
    for value in values:
        one = {"decay": jnp.float32(momentum), "total": jnp.float32((1 - momentum) * value)}
        state = statistic.merge(state, one)
    np.testing.assert_allclose(statistic.value(state), expected / weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("what", ["absmax", "minmax"])
def test_moving_average_over_batches_and_iterations(what):
    statistic = MovingAverage(of_what=what, momentum=0.5)

    def fn(p, x):
        return lax.scan(lambda c, _: (2 * (c @ p["w"]), None), x, None, length=2)[0]

    batches = [X, -3 * X + 1, X / 7]
    found = collect(fn, {"w": jnp.eye(8)}, *[(x,) for x in batches], statistics=[statistic])["w"]
    average, weight = 0.0, 0.0
    for x in batches:
        for seen in (x, 2 * x):
            one = oracle(seen)[what]
            average = 0.5 * average + 0.5 * np.asarray(one)
            weight = 0.5 * weight + 0.5
    np.testing.assert_allclose(found[statistic.name], average / weight, rtol=1e-5)
    again = collect(
        fn, {"w": jnp.eye(8)}, *[(x,) for x in batches[::-1]], statistics=[statistic]
    )["w"]
    assert not np.allclose(found[statistic.name], again[statistic.name])  # the order counts


def test_moving_average_of_one_batch_over_devices():
    def fn(p, x):
        return jax.shard_map(
            lambda w, x: x @ w, mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d")
        )(p["w"], x)

    x = jax.random.normal(jax.random.key(7), (16, 8))
    found = collect(fn, {"w": W}, (x,), (x / 2,), statistics=["moving_absmax", "moving_minmax"])
    factor = (0.99 + 0.5) / 1.99
    np.testing.assert_allclose(found["w"]["moving_absmax"], factor * np.abs(x).max(), rtol=1e-5)
    np.testing.assert_allclose(
        found["w"]["moving_minmax"], [factor * x.min(), factor * x.max()], rtol=1e-4
    )


def test_percentile_is_read_from_the_histogram():
    found = collect(
        lambda p, x: x @ p["w"], {"w": W}, (X,), (4 * X,),
        statistics=[Histogram(), Percentile(90.0), "absmax"],
    )["w"]  # fmt: skip
    exact = np.percentile(np.abs(np.concatenate([X, 4 * X])), 90.0, method="inverted_cdf")
    assert exact * (1 - 1e-5) <= found["percentile_90"] <= exact * 2 ** (1.01 / 64)


# --- the reservoir ------------------------------------------------------------------------------


def draw(x, capacity, seed, batches=1, fn=None):
    program = trace(fn or (lambda p, x: x @ p["w"]), {"w": jnp.eye(x.shape[-1])}, (x,))
    observation = Observation(program, observe_rules(Reservoir(capacity, seed)))
    state = observation.init()
    for part in np.split(np.asarray(x), batches):
        state = observation.accumulate(state, jnp.eye(x.shape[-1]), jnp.asarray(part))
    return np.asarray(read(state["seen"], observation.statistics)["w"]["reservoir"])


def test_a_reservoir_is_deterministic_by_its_seed():
    x = jnp.arange(64.0)[:, None] * jnp.ones(2)
    np.testing.assert_array_equal(draw(x, 8, 0), draw(x, 8, 0))
    assert not np.array_equal(draw(x, 8, 0), draw(x, 8, 1))
    assert len(set(draw(x, 8, 0)[:, 0])) == 8  # without replacement


@pytest.mark.parametrize("batches", [1, 4])
def test_a_reservoir_is_uniform_over_all_batches(batches):
    rows, capacity, seeds = 32, 8, 300
    x = jnp.arange(float(rows))[:, None] * jnp.ones(2)
    use = Operand((rows // batches, 2), x.dtype, (1,))

    @jax.jit
    @jax.vmap
    def sample(key):
        statistic = Reservoir(capacity)
        state = statistic.empty(use)
        for step, part in enumerate(jnp.split(x, batches)):
            drawn = statistic.of(Seen(part, use, jax.random.fold_in(key, step)))
            state = statistic.merge(state, drawn)
        return statistic.value(state)[:, 0]

    drawn = np.asarray(sample(jax.random.split(jax.random.key(0), seeds))).astype(int)
    assert all(len(set(one)) == capacity for one in drawn)
    counts = np.bincount(drawn.ravel(), minlength=rows)
    expected = seeds * capacity / rows
    # Counts of draws without replacement vary less, by the share that is not drawn.
    chi2 = ((counts - expected) ** 2 / expected).sum() / (1 - capacity / rows)
    assert 9 < chi2 < 61.1  # the middle 99.9 per cent with 31 degrees of freedom


def test_the_iterations_of_a_loop_draw_differently():
    def fn(p, x):
        return lax.scan(lambda c, _: (c @ p["w"] + 100, None), x, None, length=3)[0]

    x = jnp.arange(50.0)[:, None] * jnp.ones(2)
    sample = draw(x, 30, 0, fn=fn)[:, 0]
    places = [set(np.mod(sample[(sample >= 100 * i) & (sample < 100 * i + 100)], 100))
              for i in range(3)]  # fmt: skip
    assert all(places)
    assert places[0] != places[1] != places[2]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MovingAverage(momentum=1.0), "momentum=1.0 must lie in"),
        (lambda: MovingAverage(of_what="mean"), "of_what='mean' must be"),
        (lambda: Reservoir(0), "capacity=0 must be at least 1"),
        (lambda: Percentile(0.0), "percentile=0.0 must lie in"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_two_uses_with_other_channels_are_refused():
    def fn(p, x):
        return x @ p["w"] + (x[:, :4] @ p["w"][:4])

    with pytest.raises(ValueError, match="'w': channel_absmax has shape"):
        collect(fn, {"w": W}, (X,), statistics=["channel_absmax"])
    found = collect(fn, {"w": W}, (X,), statistics=["absmax"])
    np.testing.assert_allclose(found["w"]["absmax"], oracle(X)["absmax"])


def test_two_uses_that_sum_over_other_axes_are_refused():
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    with pytest.raises(ValueError, match="'w': hessian tells channels apart, and .* other axes"):
        collect(fn, {"w": W}, (X,), statistics=["hessian"])
    found = collect(fn, {"w": W}, (X,), statistics=["absmax"])
    np.testing.assert_allclose(found["w"]["absmax"], oracle(X)["absmax"])


def test_cotangents_are_not_observed():
    def fn(p, x):
        return jax.grad(lambda x: 100 * jnp.sum(jnp.tanh(x @ p["w"])))(x)

    same(collect(fn, {"w": W}, (X,), statistics=ORDER_FREE)["w"], X)


def test_channels_that_shard_map_splits_are_refused():
    mesh = Mesh(np.array(jax.devices()[:4]), ("t",))

    def fn(p, x):
        def local(w, x):
            return lax.psum(x @ w, "t")

        return jax.shard_map(
            local, mesh=mesh, in_specs=(P("t"), P(None, "t")), out_specs=P()
        )(p["w"], x)

    with pytest.raises(ValueError, match="'w': hessian tells apart the channels"):
        collect(fn, {"w": W}, (X,), statistics=["hessian"])
    found = collect(fn, {"w": W}, (X,), statistics=["absmax", MinMax(), MeanAbs(False), AbsMax()])
    np.testing.assert_allclose(found["w"]["absmax"], oracle(X)["absmax"])
    np.testing.assert_allclose(found["w"]["mean"], oracle(X)["mean"], rtol=1e-6)
