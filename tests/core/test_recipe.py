"""Recipes: what a rule matches, what is refused, and the way through JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxquant.core.recipe import (
    OP_KINDS,
    PRESETS,
    ActScheme,
    Recipe,
    Rule,
    WeightScheme,
    get_recipe,
)

W8 = WeightScheme("int8")


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("**", "", True),
        ("**", "a/b/kernel", True),
        ("a/**", "a", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/b/my_kernel", False),
        ("layers/*/attn/*", "layers/3/attn/kernel", True),
        ("layers/*/attn/*", "layers/3/4/attn/kernel", False),
        ("layers/*/attn/**", "layers/3/attn/q/kernel", True),
        ("**/Dense_?/**", "x/Dense_1/kernel", True),
        ("**/Dense_?/**", "x/Dense_10/kernel", False),
        ("a.b/**", "axb/c", False),
    ],
)
def test_globs_match_whole_paths_by_segments(glob, path, expected):
    assert Rule(glob, weight=W8).matches_path(path) is expected


def test_a_rule_matches_parameter_or_module_path():
    rule = Rule("mlp/up", weight=W8)
    assert rule.matches("dense", "Dense", "mlp/up/kernel", "mlp/up")
    assert not rule.matches("dense", "Dense", "mlp/up/kernel", None)


def test_op_is_a_kind_or_a_class_glob():
    assert Rule(op="dense", weight=W8).matches_op("dense", "Dense")
    assert not Rule(op="dense", weight=W8).matches_op("conv", "Conv")
    assert Rule(op="Dense*", weight=W8).matches_op("dense", "DenseGeneral")
    assert not Rule(op="Dense*", weight=W8).matches_op("dot", None)


def test_weightless_products_need_a_rule_that_names_them():
    act = ActScheme("int8")
    assert not Rule(weight=W8, act=act).matches_op("attention", "MultiHeadDotProductAttention")
    assert Rule(op="attention", act=act).matches_op("attention", "MultiHeadDotProductAttention")
    by_class = Rule(op="MultiHead*", weight=W8)
    assert by_class.matches_op("dense", "MultiHeadDotProductAttention")
    assert not by_class.matches_op("attention", "MultiHeadDotProductAttention")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule(), "weight="),
        (lambda: Rule(skip=True, weight=W8), "skip=True"),
        (lambda: Rule("/a", skip=True), "either end"),
        (lambda: Rule(act=ActScheme()), "op='attention'"),
        (lambda: Rule(op="attention", weight=W8), "without a weight"),
        (lambda: WeightScheme("int5"), "int8"),
        (lambda: WeightScheme("int4", granularity="row"), "channel"),
        (lambda: WeightScheme("int4", granularity="tensor", group_size=8), "group_size"),
        (lambda: WeightScheme("int4", group_size=0), "group_size"),
        (lambda: WeightScheme("nf4", symmetric=False), "zero point"),
        (lambda: WeightScheme("int1", symmetric=False), "zero point"),
        (lambda: WeightScheme("mxfp4", group_size=64), "groups of 32"),
        (lambda: WeightScheme("mxfp4", granularity="channel"), "groups of 32"),
        (lambda: WeightScheme(percentile=0.0), "percentile"),
        (lambda: ActScheme("int3"), "int4"),
        (lambda: ActScheme(granularity="token", mode="static"), "static"),
    ],
)
def test_what_has_no_meaning_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_granularity_follows_from_group_size_and_qtype():
    assert WeightScheme("int8").granularity == "channel"
    assert WeightScheme("int4", group_size=32).granularity == "group"
    assert WeightScheme("int4", granularity="group").group_size == 128
    assert (WeightScheme("nf4").granularity, WeightScheme("nf4").group_size) == ("group", 64)
    assert WeightScheme("mxfp4").group_size == 32
    assert WeightScheme("nvfp4").group_size == 16
    assert ActScheme().granularity == "token"
    assert ActScheme(mode="static").granularity == "tensor"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_go_through_json(name):
    recipe = get_recipe(name)
    text = json.dumps(recipe.to_json())
    assert Recipe.from_json(json.loads(text)) == recipe
    assert Recipe.from_json(text) == recipe
    assert hash(Recipe.from_json(text)) == hash(recipe)


paths = st.lists(st.sampled_from(["a", "b_1", "*", "**"]), min_size=1, max_size=4).map("/".join)
weights = st.builds(
    WeightScheme,
    qtype=st.sampled_from(["int8", "int4", "int3"]),
    group_size=st.none() | st.integers(1, 256),
    symmetric=st.booleans(),
    range=st.sampled_from(["absmax", "percentile", "mse"]),
    percentile=st.floats(1, 100),
    double_quant=st.booleans(),
)
rules = st.builds(Rule, path=paths, op=st.none() | st.just("dense"), weight=weights)


@given(st.lists(rules, max_size=4))
def test_any_recipe_goes_through_json(some):
    recipe = Recipe("mine", tuple(some))
    assert Recipe.from_json(json.dumps(recipe.to_json())) == recipe


def test_json_of_a_newer_version_is_refused_by_name():
    data = PRESETS["w8a8"].to_json()
    data["rules"][0]["colour"] = "red"
    with pytest.raises(ValueError, match="colour"):
        Recipe.from_json(data)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"Did you mean 'w4a16_g128'.*nf4.*w8a8"):
        get_recipe("w4a16g128")
    with pytest.raises(TypeError, match="int"):
        get_recipe(4)


def test_none_means_w8a8_and_a_recipe_stays_itself():
    assert get_recipe(None) is PRESETS["w8a8"]
    assert get_recipe(PRESETS["nf4"]) is PRESETS["nf4"]


def test_with_rules_puts_rules_in_front_and_frees_the_old_ones():
    skip = Rule("head/**", skip=True)
    recipe = get_recipe("w8a8").with_rules(skip, name="mine")
    assert recipe.name == "mine"
    assert recipe.rules[0] == skip
    assert [rule.optional for rule in recipe.rules] == [False, True]


def test_short_names_say_what_a_reader_needs():
    assert str(WeightScheme("int4", group_size=64, symmetric=False)) == "int4 g64 asym"
    assert str(ActScheme(mode="static")) == "int8 static"
    rule = Rule("a/**", op="dense", weight=W8)
    assert str(rule) == "Rule('a/**', op='dense', weight=int8 channel)"


def test_the_documentation_names_every_preset_and_kind(repository):
    text = (repository / "docs" / "recipes.md").read_text()
    assert not [name for name in (*PRESETS, *OP_KINDS) if f"`{name}`" not in text]


def test_a_dynamic_range_is_the_absolute_maximum():
    with pytest.raises(ValueError, match="needs calibration data: use mode='static'"):
        ActScheme("int8", mode="dynamic", range="percentile")
    assert ActScheme("int8", mode="static", range="percentile").percentile == 99.9


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule("a", weight="int8"), TypeError, "weight= takes WeightScheme or None"),
        (lambda: Rule("a", weight=W8, act="int8"), TypeError, "act= takes ActScheme or None"),
        (lambda: Rule(3, weight=W8), TypeError, "path= takes str"),
        (lambda: Recipe("r", Rule(weight=W8)), TypeError, "rules= takes Iterable"),
        (lambda: Recipe("r", ["w8a8"]), TypeError, r"rules\[0\]= takes Rule"),
        (lambda: Recipe(None, ()), TypeError, "name= takes str"),
        (lambda: Recipe.from_json("[]"), ValueError, "fields 'name' and 'rules'"),
        (lambda: WeightScheme("int4", group_size=2.5), ValueError, "group_size=2.5 must be an int"),
        (lambda: WeightScheme("int4", group_size="64"), ValueError, "group_size='64' must be an"),
        (lambda: get_recipe("w9"), ValueError, r"unknown recipe 'w9'\..* Known: fp8, "),
    ],
)
def test_fields_of_a_wrong_type_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
