"""What compare refuses, and that it says where."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.evaluate import compare
from tests.evaluate import tiny

quick = functools.partial(compare, latency=False, resamples=20, progress=False)


@pytest.fixture(scope="module")
def params():
    return tiny.lm_params()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, ValueError, "at least one slice"),
        ({"a": []}, ValueError, "slice 'a' is empty"),
        ({"a": [np.zeros((0, 3), np.int32)]}, ValueError, "'a', batch 0: the batch is empty"),
        ({3: [tiny.tokens(0)]}, TypeError, "got 3 .int."),
        ({"a": tiny.tokens(0)}, TypeError, "slice 'a' is an array of shape .3, 7."),
        ({"a": {"tokens": tiny.tokens(0)}}, TypeError, "slice 'a' is a dict"),
        (7, TypeError, "slice 'all' is a int"),
        ({"a": [tiny.tokens(0), [1, 2]]}, TypeError, "slice 'a', batch 1: .* got a list"),
        ({"a": [{"train": False}]}, TypeError, "slice 'a', batch 0: .*no array"),
    ],
)
def test_data_of_a_wrong_kind(params, data, error, message):
    with pytest.raises(error, match=message):
        quick(tiny.lm, params, params, data)


def test_nan_names_recipe_slice_batch_and_rows(params):
    broken = {**params, "embed": params["embed"].at[22].set(jnp.nan)}
    batches = [tiny.tokens(seed, 4, 6) % 20 for seed in range(2)]
    batches[1][3, 2] = 22
    data = {"fine": batches[:1], "rough": batches}
    with pytest.raises(
        ValueError, match=r"recipe 'bad', slice 'rough', batch 1: 1 positions in rows \[3\]"
    ):
        quick(tiny.lm, params, {"good": params, "bad": broken}, data)
    report = quick(tiny.lm, params, {"good": params, "bad": broken}, data, on_nonfinite="flag")
    (flag,) = report.flags
    assert (flag.recipe, flag.slice, flag.batch, flag.rows) == ("bad", "rough", 1, (3,))
    assert flag.positions == 1
    bad = report["bad"]
    assert bad.slices["fine"].divergence.worst == 0
    assert bad.slices["rough"].divergence.mean.value == np.inf
    assert bad.slices["rough"].divergence.p50.value == 0
    assert bad.overall.divergence.worst == np.inf
    assert (bad.worst[0].slice, bad.worst[0].row, bad.worst[0].position) == ("rough", 3, 2)
    assert report["good"].overall.divergence.worst == 0
    assert any("NOT FINITE: recipe 'bad', slice 'rough', batch 1" in n for n in report.notes())
    assert "NOT FINITE" in str(report)


def test_nan_behind_the_mask_is_no_error(params):
    broken = {**params, "embed": params["embed"].at[22].set(jnp.nan)}
    tokens = tiny.tokens(0) % 20
    tokens[:, -1] = 22
    report = quick(tiny.lm, params, broken, [tokens], mask=lambda b: b != 22)
    assert report.recipes[0].overall.divergence.worst == 0
    with pytest.raises(ValueError, match="the mask leaves no position"):
        quick(tiny.lm, params, params, [tokens], mask=lambda b: b < 0)


def test_a_float_model_that_is_not_finite_is_always_an_error(params):
    broken = {**params, "head": params["head"].at[0, 0].set(jnp.inf)}
    with pytest.raises(ValueError, match=r"slice 'a', batch 0: the float model's own outputs"):
        quick(tiny.lm, broken, params, {"a": [tiny.tokens(0)]}, on_nonfinite="flag")
    with pytest.raises(ValueError, match="the float model's own outputs"):
        quick(lambda w, x: x / w, jnp.float32(0), jnp.float32(1), [np.ones((2, 2, 2), np.float32)])


def test_metrics_must_be_finite_and_of_the_right_shape(params):
    tokens = [tiny.tokens(0)]
    with pytest.raises(ValueError, match="metric 'm' is not finite .float model."):
        quick(tiny.lm, params, params, tokens, metrics={"m": lambda out, b: np.nan})
    with pytest.raises(ValueError, match=r"metric 'm' returned shape \(2,\).*\(3,\) or one scalar"):
        quick(tiny.lm, params, params, tokens, metrics={"m": lambda out, b: np.zeros(2)})


def test_outputs_of_different_shapes(params):
    wider = {**params, "head": jnp.ones((tiny.WIDTH, tiny.VOCABULARY + 1))}
    with pytest.raises(ValueError, match=r"recipe 'wide'.*\(3, 7, 24\).*\(3, 7, 23\)"):
        quick(tiny.lm, params, {"wide": wider}, [tiny.tokens(0)])
    with pytest.raises(ValueError, match="before they were"):
        quick(lambda p, x: x @ p, jnp.eye(4), jnp.eye(4), [np.ones((2, 4)), np.ones((2, 2, 4))])


def test_no_metric_applies():
    def ids(params, x):
        return (x * params).astype(jnp.int32)

    one = jnp.float32(1)
    with pytest.raises(ValueError, match="slice 'all', batch 0: no metric applies"):
        quick(ids, one, one, [np.ones((3, 2))])
    report = quick(ids, one, one, [np.ones((3, 2))], metrics={"sum": lambda out, b: out.sum()})
    assert report.recipes[0].overall.metrics["sum"].value == 6
    assert report.recipes[0].overall.divergence is None
    assert "sum" in str(report)


def test_targets_and_masks_are_checked(params):
    tokens = [tiny.tokens(0)]
    with pytest.raises(ValueError, match=r"targets has shape \(3,\); the outputs need \(3, 7\)"):
        quick(tiny.lm, params, params, tokens, targets=lambda b: np.zeros(3, int))
    with pytest.raises(ValueError, match="targets are integers"):
        quick(tiny.lm, params, params, tokens, targets=lambda b: np.zeros((3, 7)))
    with pytest.raises(ValueError, match="target 23 is outside of the 23 classes"):
        quick(tiny.lm, params, params, tokens, targets=lambda b: np.full((3, 7), 23))
    with pytest.raises(ValueError, match="mask has shape"):
        quick(tiny.lm, params, params, tokens, mask=lambda b: np.ones(3, bool))
    with pytest.raises(ValueError, match="outputs is one of auto, tokens, classes, values"):
        quick(tiny.lm, params, params, tokens, outputs="logits")
    with pytest.raises(ValueError, match="outputs='tokens' needs a floating array"):
        quick(lambda p, x: x @ p, jnp.eye(4), jnp.eye(4), [np.ones((2, 4))], outputs="tokens")


def test_recipes_that_are_no_recipes(params):
    tokens = [tiny.tokens(0)]
    with pytest.raises(TypeError, match="recipe 'a' is neither .*embed.*this has .'emb'"):
        quick(tiny.lm, params, {"a": {"emb": params["embed"]}}, tokens)
    with pytest.raises(TypeError, match="this has int"):
        quick(tiny.lm, params, 3, tokens)
    with pytest.raises(ValueError, match="'float' is the float model's own"):
        quick(tiny.lm, params, {"float": params}, tokens)
    with pytest.raises(ValueError, match="no quantized tree"):
        quick(tiny.lm, params, {}, tokens)
    with pytest.raises(ValueError, match="as many different names; got .'a'."):
        quick(tiny.lm, params, [params, params], tokens, names=["a"])
    with pytest.raises(ValueError, match="drop names="):
        quick(tiny.lm, params, {"a": params}, tokens, names="b")
    with pytest.raises(ValueError, match="'raise' or 'flag'"):
        quick(tiny.lm, params, params, tokens, on_nonfinite="ignore")
    report = quick(tiny.lm, params, [params, params], tokens, names=["a", "b"])
    assert [r.name for r in report.recipes] == ["a", "b"]


def test_a_quantized_tree_in_the_float_models_place(params):
    quantized = jq.ptq(jq.quantize("w8a16")(tiny.lm), params, tiny.tokens(0))
    for variables, qvars in ((quantized, params), (quantized, quantized)):
        with pytest.raises(TypeError, match=r"float model.*quantized weights \(\['.*as qvars"):
            quick(tiny.lm, variables, qvars, [tiny.tokens(0)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": {"m": 3}}, TypeError, "metrics= is a mapping of name to fn"),
        ({"metrics": [len]}, TypeError, "metrics= is a mapping"),
        ({"latency": "yes"}, TypeError, "latency= is True, False or LatencyOptions; got 'yes'"),
        ({"worst": -1}, ValueError, "worst= is an integer of at least 0; got -1"),
        ({"seed": "a"}, ValueError, "seed= is an integer of at least 0; got 'a'"),
    ],
)
def test_options_of_a_wrong_kind_before_anything_runs(params, options, error, message):
    def never(params, tokens):
        raise AssertionError

    with pytest.raises(error, match=message):
        compare(never, params, params, [tiny.tokens(0)], progress=False, **options)
