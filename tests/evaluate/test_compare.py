"""Numbers of a comparison against float64 by hand; candidates are float trees with an error."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.evaluate import LatencyOptions, compare
from jaxquant.evaluate.runner import Runner
from tests.evaluate import tiny

quick = functools.partial(compare, latency=False, resamples=50, progress=False)


@pytest.fixture(scope="module")
def params():
    return tiny.lm_params()


@pytest.fixture(scope="module")
def nudged(params):
    rng = np.random.default_rng(9)
    return {n: w + jnp.asarray(0.1 * rng.normal(size=w.shape), w.dtype) for n, w in params.items()}


@pytest.fixture(scope="module")
def data():
    return {
        "short": [tiny.tokens(1, 3, 5), tiny.tokens(2, 2, 5)],
        "long": [tiny.tokens(3, 4, 9)],
    }


def by_hand(params, other, batches):
    """Float64: KL and agreement per position, and the loss terms of both models."""
    found = {"kl": [], "same": [], "float": [], "other": []}
    for tokens in batches:
        log_p = tiny.log_softmax64(jax.jit(tiny.lm)(params, tokens))
        log_q = tiny.log_softmax64(jax.jit(tiny.lm)(other, tokens))
        found["kl"].append((np.exp(log_p) * (log_p - log_q)).sum(-1).ravel())
        found["same"].append((log_p.argmax(-1) == log_q.argmax(-1)).ravel())
        for name, logs in (("float", log_p), ("other", log_q)):
            picked = np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], -1)
            found[name].append(-picked.ravel())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_tokens_match_float64_by_hand_per_slice_and_overall(params, nudged, data):
    report = quick(tiny.lm, params, nudged, data, names="nudged")
    assert report.kind == "tokens"
    assert report.slices == ("short", "long")
    everything = [batch for batches in data.values() for batch in batches]
    found = [(name, data[name]) for name in data] + [(None, everything)]
    for name, batches in found:
        exact = by_hand(params, nudged, batches)
        got = report["nudged"].slices[name] if name else report["nudged"].overall
        base = report["float"].slices[name] if name else report["float"].overall
        assert got.examples == sum(len(b) for b in batches)
        assert got.positions == exact["kl"].size
        kl = np.sort(exact["kl"])
        tail = got.divergence
        assert tail.mean.value == pytest.approx(kl.mean(), rel=1e-4)
        assert tail.p50.value == pytest.approx(
            np.quantile(kl, 0.5, method="inverted_cdf"), rel=1e-4
        )
        assert tail.p99.value == pytest.approx(
            np.quantile(kl, 0.99, method="inverted_cdf"), rel=1e-4
        )
        assert tail.worst == pytest.approx(kl[-1], rel=1e-4)
        assert got.agreement.value == pytest.approx(exact["same"].mean(), rel=1e-12)
        assert got.loss.value == pytest.approx(exact["other"].mean(), rel=1e-5)
        assert base.loss.value == pytest.approx(exact["float"].mean(), rel=1e-5)
        delta = (exact["other"] - exact["float"]).mean()
        assert got.loss_delta.value == pytest.approx(delta, abs=1e-5)
        assert got.perplexity.value == pytest.approx(math.exp(exact["other"].mean()), rel=1e-5)
        assert base.divergence is None and base.loss_delta is None
        for interval in (tail.mean, tail.p99, got.agreement, got.loss, got.loss_delta):
            assert interval.low <= interval.value <= interval.high


def test_the_same_tree_is_no_divergence_at_all(params, data):
    overall = quick(tiny.lm, params, params, data, names="same")["same"].overall
    assert overall.divergence.worst == 0
    assert overall.agreement.value == 1
    assert overall.loss_delta.value == 0


def test_accuracy_is_the_share_of_right_next_tokens(params, data):
    report = quick(tiny.lm, params, params, data)
    hits = []
    for batch in data["long"]:
        top = np.asarray(jax.jit(tiny.lm)(params, batch)).argmax(-1)
        hits.append((top[:, :-1] == batch[:, 1:]).ravel())
    assert report["float"].slices["long"].accuracy.value == np.concatenate(hits).mean()


def test_worst_example_is_found_where_it_was_planted(params):
    planted = {**params, "embed": params["embed"].at[21].add(3.0)}
    batches = [tiny.tokens(seed, 4, 8) % 20 for seed in range(3)]
    batches[1][2, 5] = 21
    report = quick(tiny.lm, params, planted, {"a": batches[:1], "b": batches[1:]}, names="planted")
    worst = report["planted"].worst
    first = worst[0]
    assert (first.slice, first.batch, first.row, first.position) == ("b", 0, 2, 5)
    log_p, log_q = (tiny.log_softmax64(tiny.lm(p, batches[1])) for p in (params, planted))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[2, 5]
    assert first.divergence == pytest.approx(kl, rel=1e-4)
    assert first.float_top == log_p[2, 5].argmax()
    assert first.quantized_top == log_q[2, 5].argmax()
    assert first.float_probability == pytest.approx(np.exp(log_p[2, 5].max()), rel=1e-5)
    assert first.quantized_probability == pytest.approx(np.exp(log_q[2, 5].max()), rel=1e-5)
    assert first.target == batches[1][2, 6]
    assert first.tokens == tuple(batches[1][2, :6])
    assert len(worst) == 1  # nothing else differs


def test_worst_examples_are_the_largest_rows_in_order_and_decoded(params, nudged):
    batches = [tiny.tokens(seed, 6, 5) for seed in range(4)]
    decode = lambda ids: "".join(chr(97 + i) for i in ids)  # noqa: E731
    report = quick(
        tiny.lm, params, nudged, {"a": batches[:2], "b": batches[2:]}, worst=5, decode=decode
    )
    exact = by_hand(params, nudged, batches)["kl"].reshape(24, 5).max(axis=1)
    worst = report.recipes[0].worst
    np.testing.assert_allclose([w.divergence for w in worst], np.sort(exact)[::-1][:5], rtol=1e-4)
    places = [(w.slice, w.batch, w.row) for w in worst]
    assert len(set(places)) == len(places)
    assert worst[0].context_text == decode(worst[0].tokens)
    assert worst[0].float_text == decode([worst[0].float_top])


def test_no_worst_examples_where_none_are_asked_for(params, nudged, data):
    assert quick(tiny.lm, params, nudged, data, worst=0).recipes[0].worst == ()


def test_numpy_parameters_are_put_on_the_device_once(params, nudged, data, monkeypatch):
    host = jax.tree.map(np.asarray, params)
    seen, call = [], Runner.__call__

    def watched(runner, batch):
        seen.append(runner.tree)
        return call(runner, batch)

    monkeypatch.setattr(Runner, "__call__", watched)
    report = quick(tiny.lm, host, nudged, data)
    assert all(isinstance(leaf, jax.Array) for tree in seen for leaf in jax.tree.leaves(tree))
    assert len({id(tree) for tree in seen}) == 2
    assert report["float"].overall == quick(tiny.lm, params, nudged, data)["float"].overall


def test_survival_holds_the_distribution(params, nudged, data):
    report = quick(tiny.lm, params, nudged, data)
    everything = [batch for batches in data.values() for batch in batches]
    kl = by_hand(params, nudged, everything)["kl"]
    largest_first = np.sort(kl)[::-1]
    survival = report.recipes[0].survival
    for value, share in survival:
        assert value == pytest.approx(largest_first[round(share * kl.size) - 1], rel=1e-4)
    assert survival[0][1] == 1.0 and survival[-1][1] == pytest.approx(1 / kl.size)


def test_several_recipes_in_one_report_are_as_each_alone(params, nudged, data):
    recipes = {"one": nudged, "two": params, "bf16": jax.tree.map(jnp.bfloat16, params)}
    report = quick(tiny.lm, params, recipes, data)
    assert [r.name for r in report.recipes] == ["one", "two", "bf16"]
    alone = quick(tiny.lm, params, nudged, data, names="one")
    assert report["one"] == alone["one"]
    assert report["two"].overall.divergence.worst == 0
    assert 0 < report["bf16"].overall.divergence.mean.value < 1e-3
    with pytest.raises(KeyError, match="it has float, one, two, bf16"):
        report["three"]


def test_slices_may_be_generators_and_are_walked_once(params, nudged):
    batches = [tiny.tokens(1), tiny.tokens(2)]
    once = quick(tiny.lm, params, nudged, (b for b in batches))
    assert once.slices == ("all",)
    assert once.recipes == quick(tiny.lm, params, nudged, {"all": batches}).recipes


def test_logits_of_no_more_than_one_batch_are_alive(params, nudged):
    shape = (5, 31, tiny.VOCABULARY)
    alive = []

    def count(outputs, batch):
        alive.append(sum(a.shape == shape for a in jax.live_arrays()))
        return 0.0

    batches = [tiny.tokens(seed, *shape[:2]) for seed in range(6)]
    recipes = {"a": nudged, "b": params, "c": nudged}
    quick(tiny.lm, params, recipes, batches, metrics={"count": count})
    assert len(alive) == 6 * 4
    assert max(alive) <= 3  # the float model's, a recipe's, and the one before until it is replaced


def test_metrics_per_example_and_per_batch(params, nudged, data):
    metrics = {
        "mean logit": lambda outputs, batch: np.asarray(outputs).mean((1, 2)),
        "largest": lambda outputs, batch: outputs.max(),
    }
    report = quick(tiny.lm, params, nudged, data, metrics=metrics)
    for name, batches in data.items():
        outs = {
            "float": [np.asarray(jax.jit(tiny.lm)(params, b), np.float64) for b in batches],
            "quantized": [np.asarray(jax.jit(tiny.lm)(nudged, b), np.float64) for b in batches],
        }
        mean, largest = {}, {}
        for who, logits in outs.items():
            mean[who] = np.concatenate([o.mean((1, 2)) for o in logits]).mean()
            largest[who] = np.average([o.max() for o in logits], weights=[len(o) for o in logits])
            got = report[who].slices[name].metrics
            assert got["mean logit"].value == pytest.approx(mean[who], rel=1e-4)
            assert got["largest"].value == pytest.approx(largest[who], rel=1e-5)
        deltas = report["quantized"].slices[name].metric_deltas
        assert deltas["mean logit"].value == pytest.approx(
            mean["quantized"] - mean["float"], abs=1e-5
        )
        assert deltas["largest"].value == pytest.approx(
            largest["quantized"] - largest["float"], abs=1e-5
        )


def test_a_loss_of_the_users_replaces_the_own_and_has_no_perplexity(params, nudged, data):
    report = quick(tiny.lm, params, nudged, data, loss=lambda out, batch: 2.0 * np.ones(len(out)))
    overall = report.recipes[0].overall
    assert overall.loss.value == 2.0 and overall.loss_delta.value == 0.0
    assert overall.perplexity is None and overall.accuracy is None


def test_mask_leaves_out_positions_and_their_targets(params, nudged):
    tokens = tiny.tokens(4, 4, 6)
    lengths = np.array([6, 4, 2, 5])
    keep = np.arange(6) < lengths[:, None]
    batch = {"tokens": tokens, "keep": keep}
    report = quick(
        tiny.lm,
        params,
        nudged,
        [batch],
        inputs=lambda b: {"tokens": b["tokens"]},
        mask=lambda b: b["keep"],
    )
    log_p, log_q = (tiny.log_softmax64(tiny.lm(p, tokens)) for p in (params, nudged))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    nll = -np.take_along_axis(log_q[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    got = report.recipes[0].overall
    assert got.positions == keep.sum()
    assert got.divergence.mean.value == pytest.approx(kl[keep].mean(), rel=1e-4)
    assert got.divergence.worst == pytest.approx(kl[keep].max(), rel=1e-4)
    assert got.loss.value == pytest.approx(nll[keep[:, 1:]].mean(), rel=1e-5)


def test_targets_of_the_users_with_none_where_negative(params, nudged):
    tokens = tiny.tokens(5, 3, 4)
    targets = np.array([[1, -1, 2, 3], [-1, -1, -1, -1], [4, 5, 6, 7]])
    report = quick(tiny.lm, params, nudged, [tokens], targets=lambda batch: targets)
    log_q = tiny.log_softmax64(tiny.lm(nudged, tokens))
    nll = -np.take_along_axis(log_q, targets.clip(0)[..., None], -1)[..., 0]
    assert report.recipes[0].overall.loss.value == pytest.approx(nll[targets >= 0].mean(), rel=1e-5)


def classify(params, images):
    return images.reshape(len(images), -1) @ params["w"]


def test_classifiers_are_scored_per_example():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)}
    other = {"w": params["w"] + 0.1}
    other["w"] = other["w"].at[:, 0].add(0.2)
    images = rng.normal(size=(20, 3, 4)).astype(np.float32)
    labels = rng.integers(0, 5, 20)
    report = quick(
        classify,
        params,
        other,
        [(images, labels)],
        inputs=lambda batch: batch[0],
        targets=lambda batch: batch[1],
    )
    log_p, log_q = (tiny.log_softmax64(jax.jit(classify)(p, images)) for p in (params, other))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    got = report.recipes[0].overall
    assert report.kind == "classes"
    assert (got.examples, got.positions) == (20, 20)
    assert got.divergence.mean.value == pytest.approx(kl.mean(), rel=1e-4)
    assert got.divergence.worst == pytest.approx(kl.max(), rel=1e-4)
    assert got.agreement.value == (log_p.argmax(-1) == log_q.argmax(-1)).mean()
    assert got.loss.value == pytest.approx(-log_q[np.arange(20), labels].mean(), rel=1e-5)
    assert got.accuracy.value == (log_q.argmax(-1) == labels).mean()
    assert report.recipes[0].worst[0].row == kl.argmax()
    assert "class logits" in report.notes()[0]


def test_other_outputs_get_relative_error_and_sqnr_and_it_is_said():
    params, other = jnp.float32(2.0), jnp.float32(2.02)
    x = np.arange(1.0, 25.0, dtype=np.float32).reshape(2, 3, 4)

    def model(scale, x):
        return {"image": x * scale, "pooled": x.sum((1, 2)) + scale}

    report = quick(model, params, other, [x])
    f = [x * 2.0, x.sum((1, 2)) + 2.0]
    q = [x * 2.02, x.sum((1, 2)) + 2.02]
    signal = (f[0] ** 2).sum((1, 2)) + f[1] ** 2
    noise = ((q[0] - f[0]) ** 2).sum((1, 2)) + (q[1] - f[1]) ** 2
    got = report.recipes[0].overall
    assert report.kind == "values" and report.divergence == "relative error"
    assert got.divergence.mean.value == pytest.approx(np.sqrt(noise / signal).mean(), rel=1e-4)
    assert got.sqnr_db.value == pytest.approx(10 * math.log10(signal.sum() / noise.sum()), rel=1e-4)
    assert got.agreement is None and got.loss is None
    assert "relative error stands in for KL" in report.notes()[0]


def test_regression_can_be_told_from_classes():
    params, x = jnp.ones((3, 2)), np.ones((4, 3), np.float32)
    report = quick(lambda w, x: x @ w, params, params * 1.01, [x], outputs="values")
    assert report.recipes[0].overall.divergence.mean.value == pytest.approx(0.01, rel=1e-3)


def test_logits_are_picked_from_a_tuple_of_outputs(params, nudged, data):
    def model(params, tokens):
        return {"hidden": params["embed"][tokens]}, tiny.lm(params, tokens)

    report = quick(model, params, nudged, data, logits=lambda outputs: outputs[1])
    assert report.recipes == quick(tiny.lm, params, nudged, data).recipes


def test_batches_as_tuples_keywords_and_static_arguments(params, nudged):
    tokens = tiny.tokens(6)

    def model(params, tokens, scale=1.0, *, train):
        assert train is False  # static: a traced bool would be no False
        return scale * tiny.lm(params, tokens)

    reports = [
        quick(model, params, nudged, [batch])
        for batch in (
            {"tokens": tokens, "train": False},
            {"tokens": tokens, "train": False, "scale": 1.0},
        )
    ]
    assert reports[0].recipes == reports[1].recipes
    other = quick(lambda p, t, s: tiny.lm(p, t), params, nudged, [(tokens, np.float32(1))])
    assert other.recipes == reports[0].recipes


def test_latency_has_all_candidates_and_throughput_in_tokens(params, nudged, data):
    options = LatencyOptions(rounds=4, warmup=1, min_sample_s=0)
    report = compare(
        tiny.lm, params, {"n": nudged}, data, latency=options, resamples=0, progress=False
    )
    for result in (report["float"], report["n"]):
        speed = result.speed
        assert len(speed.timing.samples_s) == 4
        assert speed.items_per_s == pytest.approx(15 / speed.timing.median_s)  # 3 rows of 5
        assert speed.trace_s > 0 and speed.compile_s > 0
    assert report["float"].speed.speedup is None
    pairs = zip(report["float"].speed.timing.samples_s, report["n"].speed.timing.samples_s)
    assert report["n"].speed.speedup.median == pytest.approx(np.median([a / b for a, b in pairs]))
    assert report["n"].overall.divergence.mean.low is None  # no resamples, no intervals
