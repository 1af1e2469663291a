"""The tuner finds what a clock says is fastest; the check on the chip finds what is wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_check, gpu_oracle, gpu_oracle_grouped, gpu_products, gpu_timing, gpu_tune
from benchmarks.gpu_supervise import Journal
from jaxquant.core.primitives import describe_lowering
from jaxquant.pallas_kernels.gpu import tables
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


def test_neighbours_differ_in_one_field_and_fit():
    problem = gpu_tune.problem_of(CASE)
    config = choose_config(problem, H200)
    for field in gpu_tune.CHOICES:
        for other in gpu_tune.neighbours(problem, H200, config, field):
            fields = [f.name for f in dataclasses.fields(config)]
            assert [f for f in fields if getattr(other, f) != getattr(config, f)] == [field]
            assert shared_bytes(problem, other) <= H200.shared_bytes


def clock(config):
    """Microseconds by which split_k = 2 and 3 stages are best; 4 warpgroups do not compile."""
    if config.warpgroups == 4:
        return None
    return 1.0 + abs(config.split_k - 2) + 0.1 * abs(config.stages - 3) + 0.01 * config.bm


@pytest.mark.parametrize(("xla", "faster"), [(9.0, True), (0.5, False)])
def test_the_tuner_goes_by_the_clock(monkeypatch, xla, faster):
    start = dataclasses.replace(
        choose_config(gpu_tune.problem_of(CASE), H200), warpgroups=2, split_k=8, stages=4
    )
    monkeypatch.setattr(
        "jaxquant.pallas_kernels.gpu.heuristics.choose_config", lambda problem, chip: start
    )
    monkeypatch.setattr(gpu_tune, "microseconds", lambda case, problem, config: clock(config))
    monkeypatch.setattr(gpu_tune, "require_gpu", lambda dry_run, script: None)
    timing = gpu_timing.Timing(xla, xla, 1)
    monkeypatch.setattr(
        gpu_tune, "time_case", lambda case, *_: gpu_products.Result(case, timing, 0)
    )
    entry = gpu_tune.tune(CASE, H200)
    assert entry.microseconds == pytest.approx(1.08) and entry.xla_microseconds == xla
    if faster:
        assert (entry.config.split_k, entry.config.stages, entry.config.bm) == (2, 3, 8)
    else:
        assert entry.config is None
    text = tables.render([entry], "H200", {"jax": "0"})
    assert tables.parse(text, "a table", "H200") == (entry,)


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
