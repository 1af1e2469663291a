"""Trees' bytes and weight errors; table, JSON and page of a report with QTensors."""

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.quantize_array import quantize_array
from jaxquant.evaluate import LatencyOptions, Report, compare
from jaxquant.evaluate.trees import measure_memory, weight_errors
from tests.evaluate import tiny

EVIL = "<b>&\"'é"


@pytest.fixture(scope="module")
def report():
    params = tiny.lm_params()
    broken = {**params, "up": params["up"] * jnp.nan}
    data = {name: [tiny.tokens(seed, 3, 6)] for seed, name in enumerate(["one", EVIL])}
    return compare(
        tiny.lm,
        params,
        {"int8": tiny.quantized(params), EVIL: tiny.quantized(params, "int4"), "nan": broken},
        data,
        metrics={f"m{EVIL}": lambda out, batch: out.mean((1, 2))},
        decode=lambda ids: f"<i>{ids[-1]}</i>\n",
        latency=LatencyOptions(rounds=3, min_sample_s=0),
        resamples=50,
        progress=False,
        on_nonfinite="flag",
        title=f"Title {EVIL}",
        command=f"run {EVIL}",
    )


def test_memory_is_what_the_device_reports():
    params = {"w": jnp.ones((64, 32)), "b": jnp.ones(32), "n": jnp.arange(5)}
    tree = {**params, "w": quantize_array(params["w"], "int8", (64, 1))}
    got = measure_memory(params, tree)
    assert (got.quantized, got.leaves) == (64 * 32 + 32 * 4, 1)
    assert got.total == got.quantized + 32 * 4 + 5 * 4
    assert got.total_float == 64 * 32 * 4 + 32 * 4 + 5 * 4
    assert got.total_bf16 == 64 * 32 * 2 + 32 * 2 + 5 * 4
    assert (got.quantized_float, got.quantized_bf16) == (64 * 32 * 4, 64 * 32 * 2)
    assert got.quantized == tree["w"].nbytes_on_device()
    assert measure_memory(params, params).leaves == 0
    twins = {"params": {"a": jnp.ones(8)}, "a": jnp.ones(4)}  # one path, two leaves
    assert measure_memory(twins, twins).total == 12 * 4


@pytest.mark.parametrize("qtype", ["int8", "int4", "nf4"])
def test_weight_errors_match_float64_per_layer_of_a_stacked_weight(qtype):
    rng = np.random.default_rng(0)
    w = jnp.asarray(
        rng.normal(size=(3, 16, 8)) * np.array([1, 10, 0.1])[:, None, None], jnp.float32
    )
    params = {"layers": {"w": w}, "head": w[0]}
    tree = {
        "layers": {"w": quantize_array(w, qtype, (1, 16, 1))},
        "head": quantize_array(w[0], qtype, (16, 1)),
    }
    found = weight_errors(params, tree, {"layers/w": (0,)})
    assert [(e.path, e.layer) for e in found] == [("head", None)] + [
        ("layers/w", i) for i in range(3)
    ]
    exact = np.asarray(w, np.float64)
    error = np.asarray(tree["layers"]["w"].dequantize(), np.float64) - exact
    db = 10 * np.log10((exact**2).sum((1, 2)) / (error**2).sum((1, 2)))
    np.testing.assert_allclose([e.sqnr_db for e in found[1:]], db, atol=1e-3)
    assert found[0].sqnr_db == pytest.approx(db[0], abs=1e-3)
    assert {e.qtype for e in found} == {qtype}
    whole = weight_errors(params, tree)[1]
    assert whole.sqnr_db == pytest.approx(
        10 * math.log10((exact**2).sum() / (error**2).sum()), abs=1e-3
    )


def test_a_weight_that_is_exact_has_infinite_sqnr():
    params = {"w": jnp.full((8, 4), 127.0)}
    tree = {"w": quantize_array(params["w"], "int8", (8, 1))}
    assert weight_errors(params, tree)[0].sqnr_db == math.inf


def test_layers_of_a_scanned_weight_are_found_from_its_use():
    rng = np.random.default_rng(0)
    params = {"stack": jnp.asarray(rng.normal(size=(4, 8, 8)), jnp.float32)}
    tree = {"stack": quantize_array(params["stack"], "int4", (1, 8, 1))}

    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])[0]

    x = rng.normal(size=(2, 8)).astype(np.float32)
    got = compare(model, params, tree, [x], latency=False, resamples=0, progress=False)
    assert [(w.path, w.layer) for w in got.recipes[0].weights] == [("stack", i) for i in range(4)]


def test_a_quantized_tree_scores_as_its_dequantized_copy_does():
    params = tiny.lm_params()
    tree = tiny.quantized(params)
    report = compare(
        tiny.lm,
        params,
        {"quantized": tree, "dequantized": tiny.dequantized(tree)},
        [tiny.tokens(0, 8, 16)],
        latency=False,
        resamples=0,
        progress=False,
    )
    got, want = report["quantized"].overall, report["dequantized"].overall
    assert want.divergence.mean.value > 0
    assert got.divergence.mean.value == pytest.approx(want.divergence.mean.value, rel=1e-3)
    assert got.loss.value == pytest.approx(want.loss.value, rel=1e-5)
    assert report["quantized"].memory.quantized > 0
    assert report["dequantized"].memory.leaves == 0
    assert len(report["quantized"].weights) == 3 and not report["dequantized"].weights


def test_json_is_strict_and_rebuilds_the_report(report, tmp_path):
    path = report.save_json(tmp_path / "report.json")
    text = path.read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["format"] == 1
    assert [r["name"] for r in data["recipes"]] == ["int8", EVIL, "nan"]
    assert data["recipes"][2]["overall"]["divergence"]["worst"] == "inf"
    again = Report.from_json(text)
    assert again.to_json() == report.to_json()
    assert again["int8"] == report["int8"]
    with pytest.raises(ValueError, match="report format 99"):
        Report.from_json(json.dumps({**data, "format": 99}))
    with pytest.raises(ValueError, match="not a stored Report"):
        Report.from_json(json.dumps({"format": 1}))


def test_table_shows_every_recipe_slice_metric_and_the_platform(report):
    text = str(report)
    for part in ("int8", EVIL, "one", f"m{EVIL}", "KL mean", "KL p99", "speed-up", "NOT FINITE"):
        assert part in text
    assert f"{jax.default_backend()} with jax {jax.__version__}" in text
    assert "says nothing of other platforms" in " ".join(text.split())


class Checker(html.parser.HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_self_contained_well_formed_and_escaped(report, tmp_path):
    page = report.save_html(tmp_path / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    names = [tag for tag, _ in checker.tags]
    assert not {"script", "link", "img", "iframe", "b>", "i"} & set(names)
    for _, attrs in checker.tags:
        assert not {"src", "href", "onload"} & set(attrs)
    assert "http" not in page and "url(" not in page and "@import" not in page
    shown = "".join(checker.text)
    for part in (f"Title {EVIL}", f"run {EVIL}", f"m{EVIL}", "<i>", "NOT FINITE", "Not drawn: nan"):
        assert part in shown
    assert "prefers-color-scheme:dark" in page


def test_plots_are_valid_xml_with_a_dot_for_every_recipe_that_can_be_drawn(report):
    drawings = re.findall(r"<svg.*?</svg>", report.to_html(), flags=re.DOTALL)
    assert len(drawings) == 1 + 2 + 1 + 1  # overall, two slices, tail, weights
    roots = [ElementTree.fromstring(d) for d in drawings]
    for root in roots[:3]:
        assert len(root.findall("circle")) == 2
    assert len(roots[-1].findall("circle")) == 2 * 3
    for root in roots:
        wide, high = map(float, root.attrib["viewBox"].split()[2:])
        for circle in root.iter("circle"):
            assert 0 <= float(circle.attrib["cx"]) <= wide
            assert 0 <= float(circle.attrib["cy"]) <= high


def test_overlapping_labels_are_moved_apart():
    from jaxquant.evaluate.svg import Labels

    labels = Labels(0, 400, 0, 300)
    spots = [(100.0 + i, 100.0) for i in range(4)]
    for x, y in spots:
        labels.block(x, y, 6)
    found = [labels.place(x, y, f"recipe{i}") for i, (x, y) in enumerate(spots)]
    assert len({(round(y), anchor) for _, y, anchor in found}) == 4


def test_a_report_of_one_exact_recipe_says_that_there_is_nothing_to_draw():
    params = tiny.lm_params()
    same = compare(
        tiny.lm, params, params, [tiny.tokens(0)], latency=False, resamples=10, progress=False
    )
    page = same.to_html()
    assert page.count("Nothing to draw.") == 3
    assert "speed-up" not in str(same)
