"""The tuner finds what a clock says is fastest; the check on the chip finds what is wrong."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    gpu_check,
    gpu_clock,
    gpu_oracle,
    gpu_oracle_grouped,
    gpu_products,
    gpu_timing,
    gpu_tune,
)
from benchmarks.gpu_aot import on_gpu
from benchmarks.gpu_supervise import Journal
from jaxquant.core.primitives import describe_lowering
from jaxquant.pallas_kernels.gpu import select, tables
from jaxquant.pallas_kernels.gpu.chips import CHIPS
from jaxquant.pallas_kernels.gpu.config import shared_bytes
from jaxquant.pallas_kernels.gpu.heuristics import choose_config
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from tests.pallas_kernels.tpu.cases import make

H200 = CHIPS["H200"]
CASE = gpu_products.Case(4096, 4096, 16, "w4a16 g128", "pallas")


@pytest.mark.parametrize("form", gpu_products.FORMATS)
def test_a_format_is_the_problem_that_dispatch_asks_about(form, monkeypatch):
    """By the same fields, whether there is a kernel for it or not."""
    from jaxquant.pallas_kernels import dispatch

    asked = []

    def select(problem, device_kind, forced):
        asked.append(problem)
        raise Unsupported("it was only asked")

    platform = dataclasses.replace(dispatch.PLATFORMS["cuda"], select=select)
    monkeypatch.setitem(dispatch.PLATFORMS, "cuda", platform)
    case = dataclasses.replace(CASE, k=256, n=128, form=form)
    w = gpu_products.random_weight(jax.random.key(0), 256, 128, gpu_products.FORMATS[form], "cuda")
    place = dispatch.Place("cuda", "NVIDIA H200")
    x = jax.ShapeDtypeStruct((case.m, 256), jnp.bfloat16)
    describe_lowering(x, w, gpu_products.PLAIN, place=place)
    assert asked == [gpu_tune.problem_of(case)]


CASES = {
    "w4a16": CASE,
    "many rows": dataclasses.replace(CASE, m=2048),
    "experts": gpu_products.Case(2048, 768, 128, "w4a16 g128", "pallas", 128),
    "LLM.int8()": dataclasses.replace(CASE, form="llm.int8", m=2048),
}


@pytest.mark.parametrize("name", CASES)
def test_neighbours_differ_in_one_field_and_fit(name):
    case = CASES[name]
    problem, config = gpu_tune.problem_of(case), gpu_tune.chosen(case, H200)
    seen = set()
    for field in gpu_tune.CHOICES:
        for other in gpu_tune.neighbours(case, H200, config, field):
            fields = [f.name for f in dataclasses.fields(config)]
            changed = {f for f in fields if getattr(other, f) != getattr(config, f)}
            # Larger blocks may have fewer stages.
            assert changed - {"stages"} == {field} - {"stages"} and other.stages <= max(
                config.stages, other.stages if field == "stages" else 0
            )
            assert shared_bytes(problem, other) <= H200.shared_bytes
            seen.add(field)
    fixed = {"experts": {"cluster", "blocks"}, "LLM.int8()": {"cluster", "blocks", "split_k"}}
    assert seen and not seen & fixed.get(name, set())
    if name == "many rows":  # tiles of 256 rows, and of 256 columns
        assert 256 in {c.bm for c in gpu_tune.neighbours(case, H200, config, "bm")}
        assert 128 in {c.bn for c in gpu_tune.neighbours(case, H200, config, "bn")}


class Watch:
    """A clock by which split_k = 2 and 3 stages are best; 4 warpgroups do not compile."""

    def __init__(self, xla, refused=(4,)):
        self.xla = lambda: xla
        self.refused = refused

    def of(self, configs):
        return [self.one(config) for config in configs]

    def one(self, config):
        if config.warpgroups in self.refused:
            return None
        return 1.0 + abs(config.split_k - 2) + 0.1 * abs(config.stages - 3) + 0.01 * config.bm


@pytest.mark.parametrize(("xla", "faster"), [(9.0, True), (0.5, False)])
def test_the_tuner_goes_by_the_clock(monkeypatch, xla, faster):
    start = dataclasses.replace(
        choose_config(gpu_tune.problem_of(CASE), H200), warpgroups=2, split_k=8, stages=4
    )
    monkeypatch.setattr(gpu_tune, "chosen", lambda case, chip: start)
    entry = gpu_tune.tune(CASE, H200, Watch(xla))
    assert entry.microseconds == pytest.approx(1.08) and entry.xla_microseconds == xla
    if faster:
        assert (entry.config.split_k, entry.config.stages, entry.config.bm) == (2, 3, 8)
    else:
        assert entry.config is None
    text = tables.render([entry], "H200", {"jax": "0"})
    assert tables.parse(text, "a table", "H200") == (entry,)
    monkeypatch.setattr(
        gpu_tune, "chosen", lambda case, chip: dataclasses.replace(start, warpgroups=4)
    )
    assert gpu_tune.tune(CASE, H200, Watch(xla)).microseconds < 2.0
    with pytest.raises(RuntimeError, match="no config near .* runs and is right"):
        gpu_tune.tune(CASE, H200, Watch(xla, refused=(1, 2, 3, 4)))


def test_every_product_is_tuned_and_kept(monkeypatch, tmp_path):
    """One that fails costs no other; what the journal has is not done again."""
    device = types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(gpu_tune.jax, "devices", lambda: [device])
    monkeypatch.setattr(gpu_tune, "require_gpu", lambda dry_run, script: None)
    tuned = []

    def clock(case, journal, timer):
        tuned.append(case)
        if case.m == 64:
            raise RuntimeError("the memory is full")
        return Watch(9.0, refused=())

    monkeypatch.setattr(gpu_tune, "Clock", clock)
    cases = [*CASES.values(), dataclasses.replace(CASE, m=64), dataclasses.replace(CASE, m=8)]
    journal = Journal(tmp_path / "journal.jsonl")
    gpu_tune.work(journal, cases, tmp_path)
    text = (tmp_path / "H200.json").read_text()
    entries = tables.parse(text, "a table", "H200")
    assert [(e.m, e.experts, e.outliers) for e in entries] == [
        (16, 0, 0),
        (2048, 0, 0),
        (128, 128, 0),
        (2048, 0, 64),
        (8, 0, 0),
    ]
    assert len(tuned) == 6
    gpu_tune.work(Journal(tmp_path / "journal.jsonl"), cases, tmp_path)
    assert len(tuned) == 6 and (tmp_path / "H200.json").read_text() == text


@pytest.mark.parametrize("name", ["w4a16", "experts", "LLM.int8()"])
def test_the_clock_keeps_times_and_drops_what_is_wrong(name, monkeypatch, tmp_path):
    """The kernel stands in by XLA's result, right or not; nothing runs that is in the journal."""
    monkeypatch.setattr(gpu_timing, "ROTATION_BYTES", 1)
    gpu_products.weights.cache_clear()
    sizes = {"k": 256, "n": 128, "m": 16, "experts": 4 if name == "experts" else 0}
    case = dataclasses.replace(CASES[name], **sizes)
    right = gpu_products.function_of(dataclasses.replace(case, route="xla"))
    config = gpu_tune.chosen(case, H200)
    others = [dataclasses.replace(config, stages=stages) for stages in (2, 3, 4)]

    def function_by(case, config):
        if config.stages == 4:
            raise Unsupported("it does not fit")
        return lambda *a: right(*a) * (1 if config.stages == 2 else 2)

    monkeypatch.setattr(gpu_clock, "function_by", function_by)
    timer = lambda *_: gpu_timing.Timing(3.0, 3.0, 1)  # noqa: E731
    path = tmp_path / "journal.jsonl"
    clock = gpu_clock.Clock(case, Journal(path), timer)
    assert clock.xla() == 3.0
    assert clock.of(others) == [3.0, None, None]
    results = list(Journal(path).results.values())
    assert "wrong" in results and any("it does not fit" in str(one) for one in results)
    again = gpu_clock.Clock(case, Journal(path), None)
    assert again.xla() == 3.0 and again.of(others) == [3.0, None, None]


def test_a_config_is_a_kernel_of_its_case():
    """Up to its lowering for CUDA."""
    if not select.has_mosaic_gpu():
        pytest.skip("THIS JAX HAS NO MOSAIC GPU TO LOWER TO")
    for case in CASES.values():
        case = dataclasses.replace(case, k=256, n=128, m=16, experts=min(case.experts, 4))
        sets = gpu_products.inputs(case, "cuda")[0]
        fn = gpu_clock.function_by(case, gpu_tune.chosen(case, H200))
        with on_gpu():
            lowered = jax.jit(fn).trace(*sets).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("mosaic_gpu_v2") == 1


def test_dry_runs(monkeypatch, capsys, tmp_path):
    small = ["--shapes", "4096x4096", "--rows", "16", "--formats", "w4a16 g128"]
    monkeypatch.setattr("sys.argv", ["gpu_tune", "--dry-run", *small, "--out", str(tmp_path)])
    gpu_tune.main()
    assert "candidates around GpuConfig(" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("sys.argv", ["gpu_check", "--dry-run", "--out", str(tmp_path)])
    gpu_check.main()
    record = json.loads((tmp_path / "gpu-check-dry-run.json").read_text())
    assert record["failures"] == [] and sum(record["counts"].values()) == 4
    kinds = [kind.split(":")[0] for kind in record["counts"]]
    assert {"LLM.int8()", "decoder", "experts"} < set(kinds)


def test_random_problems_are_sound():
    for seed in range(200):
        problem = gpu_oracle.random_problem(np.random.default_rng(seed))
        assert problem.k % problem.group == 0 and problem.m >= 1
        product, sizes = gpu_oracle_grouped.random_ragged(np.random.default_rng(seed))
        assert product.k % product.group == 0 and min(sizes) >= 0 and sum(sizes) <= product.m


PROBLEM = MatmulProblem(5, 64, 16, "int4", group=32, out_dtype="float32")


def faults(change):
    """What the check says of XLA's route after a change of its result."""
    attempt = gpu_oracle.by_xla(PROBLEM)
    run = dataclasses.replace(attempt, run=lambda arrays: change(attempt.run(arrays)))
    return gpu_oracle.compare(make(PROBLEM, 0), run)


def test_the_check_sees_wrong_values_and_what_is_not_written():
    assert faults(lambda out: out) == ""
    assert faults(lambda out: out.at[4, 15].add(1.0)).startswith("1 of 80 are wrong")
    assert "(2, 3)" in faults(lambda out: out.at[2, 3].set(jnp.nan))
    counter = iter(range(100))

    def unsteady(out):
        return out + jax.pure_callback(lambda: np.float32(next(counter)), out[0, 0])

    assert faults(unsteady) == "runs differ"


def test_what_died_or_was_wrong_is_a_failure(tmp_path, capsys):
    journal = Journal(tmp_path / "a.jsonl")
    journal.end("environment", {"device": "NVIDIA H200", "jax": "0"})
    journal.end("one", {"done": ["int4"], "wrong": []})
    gpu_check.finish([journal], "", tmp_path)
    journal.end("two", {"died": "no answer in 150 seconds"})
    journal.end("three", {"done": ["int4"], "wrong": ["wrong at (0, 0)"]})
    with pytest.raises(SystemExit, match="1"):
        gpu_check.finish([journal], "", tmp_path)
    record = json.loads((tmp_path / "gpu-check-H200.json").read_text())
    assert record["failures"] == ["two: no answer in 150 seconds", "wrong at (0, 0)"]
    assert record["counts"] == {"int4": 2} and record["device"] == "NVIDIA H200"


def test_every_piece_belongs_to_one_process_and_errors_are_found():
    every = list(gpu_check.pieces(3, small=False))
    assert len({str(piece) for piece in every}) == len(every)
    assert {"format", "rows", "decoder", "llm_int8", "experts", "random"} == {
        piece["kind"] for piece in every
    }
    found = gpu_check.found_in({"kind": "format", "name": "no such", "m": 1}, None)
    assert "KeyError" in found["wrong"][0]


@pytest.mark.parametrize("name", gpu_check.FORMATS)
def test_formats_have_kernels_at_the_shape_they_are_checked_at(name):
    """So that nothing is passed over on a chip as unsupported."""
    for m in gpu_check._ROWS:
        choose_config(gpu_check.format_problem(name, m), H200)
