"""The scripts of the GPU figures, on a machine without a GPU: they run, refuse, and count right."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_decoder, gpu_peers, gpu_products, gpu_report, gpu_timing
from benchmarks.gpu_supervise import Journal, key_of

ENVIRONMENT = {"device": "a GPU", "jax": "0"}


def test_without_a_gpu_they_refuse():
    for script in ("gpu", "gpu_tune", "gpu_check", "gpu_decoder"):
        with pytest.raises(SystemExit, match=f"benchmarks.{script} times .* this machine has cpu"):
            gpu_timing.require_gpu(False, script)
    assert gpu_timing.require_gpu(True, "gpu") is gpu_timing.run_once


def test_a_program_calls_once_for_each_set_in_turn():
    def fn(x, w):
        return x @ w

    sets = [(jnp.full((2, 4), i, jnp.float32), jnp.ones((4, 3))) for i in range(5)]
    run = jax.jit(gpu_timing.program(fn))
    for i, out in enumerate(run(sets)):
        np.testing.assert_array_equal(out, np.full((2, 3), 4.0 * i))
    assert run.lower(sets).as_text().count("optimization_barrier") == 4
    assert run.lower(sets).compile().as_text().count(" dot(") == 5  # none is left out or joined


def test_a_timing_is_the_median_of_the_kernels_of_a_call(monkeypatch):
    profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")
    runs = [[("a", 0.002 * i), ("b", 0.001)] for i in (3, 1, 2, 9, 2, 2, 2)]  # milliseconds

    def measure(compiled, *, aggregate, iterations):
        assert not aggregate and iterations == len(runs)
        return lambda *arguments: (compiled(*arguments), runs)

    monkeypatch.setattr(profiler, "measure", measure)
    x = jnp.ones(3)
    timing = gpu_timing.measure(jax.jit(lambda x: x + 1), (x,), calls=2)
    assert timing.device == pytest.approx(2.5) and timing.kernels == 1
    assert timing.wall > 0
    monkeypatch.setattr(profiler, "measure", lambda *a, **k: lambda *arguments: (x, None))
    with pytest.raises(RuntimeError, match="CUPTI reported no kernel"):
        gpu_timing.measure(jax.jit(lambda x: x + 1), (x,), calls=2)


def test_weights_outgrow_the_cache_and_no_program_is_endless():
    assert gpu_timing.rotation(2**20) == 64
    assert gpu_timing.rotation(8 * 2**20) * 8 * 2**20 >= gpu_timing.ROTATION_BYTES
    assert gpu_timing.rotation(10**9) == 2


@pytest.mark.parametrize("form", gpu_products.FORMATS)
def test_every_format_is_a_product_of_its_weight(form, monkeypatch):
    monkeypatch.setattr(gpu_timing, "ROTATION_BYTES", 1)
    gpu_products.weights.cache_clear()
    case = gpu_products.Case(256, 128, 4, form, "xla")
    result = gpu_products.time_case(case, gpu_timing.run_once, "cuda")
    assert (result.timing, result.note) == (None, "")
    weight, *_ = gpu_products.weights(256, 128, form, "cuda")
    assert result.bytes == 2 * 4 * (256 + 128) + weight.nbytes
    assert weight.prepared == "cuda" and weight.shape == (256, 128)
    x = jax.random.normal(jax.random.key(1), (4, 256), jnp.bfloat16)
    got = gpu_products.product(x, weight, implementation="xla").astype(jnp.float32)
    want = x.astype(jnp.float32) @ weight.dequantize().astype(jnp.float32)
    np.testing.assert_allclose(got, want, atol=0.04 * float(jnp.abs(want).max()))
    refused = gpu_products.time_case(
        dataclasses.replace(case, route="pallas"), gpu_timing.run_once, "cuda"
    )
    assert "no kernel fits" in refused.note


@pytest.mark.parametrize("form", ["bf16", "w4a16 g128", "llm.int8"])
def test_experts_and_outliers_are_products_too(form, monkeypatch):
    monkeypatch.setattr(gpu_timing, "ROTATION_BYTES", 1)
    gpu_products.weights.cache_clear()
    experts = 0 if form == "llm.int8" else 3
    route = "bf16" if form == "bf16" else "xla"
    case = gpu_products.Case(256, 128, 20, form, route, experts)
    result = gpu_products.time_case(case, gpu_timing.run_once, "cuda")
    assert (result.timing, result.note) == (None, "") and result.bytes > 2 * 20 * (256 + 128)
    x, w, *rest = gpu_products.inputs(case, "cuda")[0]
    got = np.asarray(gpu_products.function_of(case)(x, w, *rest), np.float32)
    if form == "llm.int8":
        floats = w["codes"].astype(jnp.float32).T * w["scale"]
        want = np.asarray(x.astype(jnp.float32) @ floats)
    else:
        floats = (w if form == "bf16" else w.dequantize()).astype(jnp.float32)
        owner = np.repeat(np.arange(3), rest[0])
        want = np.stack([x[i].astype(jnp.float32) @ floats[e] for i, e in enumerate(owner)])
    np.testing.assert_allclose(got, want, atol=0.04 * float(np.abs(want).max()))


def test_a_case_that_cannot_be_is_a_note(monkeypatch):
    monkeypatch.setattr(gpu_products, "inputs", lambda *_: 1 / 0)
    case = gpu_products.Case(256, 128, 4, "bf16", "bf16")
    assert "ZeroDivisionError" in gpu_products.time_case(case, None, "cuda").note


def test_a_dry_run_records_every_case_and_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_timing, "ROTATION_BYTES", 1)
    peer = tmp_path / "peer"
    peer.write_text(
        "#!/bin/sh\ncat > /dev/null\n"
        """echo '{"library": "torch", "form": "bf16", "k": 256, "n": 128, "m": 1, "us": 2.0}'\n"""
    )
    peer.chmod(0o755)
    parts = [part for part in gpu.PARTS if part != "decoder"]
    options = ["--dry-run", "--out", str(tmp_path), "--only", *parts, "--peer-python", str(peer)]
    monkeypatch.setattr("sys.argv", ["gpu", *options, "--formats", "w4a16 g128", "--rows", "1"])
    gpu.main()
    data = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    cases = [row["case"] for row in data["rows"]]
    assert [case["route"] for case in cases] == ["bf16", "pallas", "xla", "pallas", "xla"] + [
        "bf16",
        "pallas",
        "xla",
    ]
    assert [case["experts"] for case in cases] == [0] * 5 + [4] * 3
    assert {case["form"] for case in cases} == {"bf16", "w4a16 g128", "llm.int8"}
    assert all(one["timing"] is None for row in data["rows"] for one in row["passes"])
    assert {len(row["passes"]) for row in data["rows"]} == {2}
    assert data["peers"][0]["us"] == 2.0 and len(data["copy"]) == len(data["prepare"]) == 2
    text = (tmp_path / "gpu-dry-run.md").read_text()
    assert "| w4a16 g128, xla | not measured |" in text and "reached" not in text.lower()
    assert "## 4 experts of 256 x 128" in text
    lines = (tmp_path / "gpu-dry-run.jsonl").read_text()
    gpu.main()  # keeps what is there; peers are asked again only for what they did not measure
    assert (tmp_path / "gpu-dry-run.jsonl").read_text().startswith(lines)
    assert json.loads((tmp_path / "gpu-dry-run.json").read_text())["rows"] == data["rows"]


def test_what_took_its_process_with_it_is_a_note(tmp_path):
    journal = Journal(tmp_path / "gpu.jsonl")
    journal.end("environment", ENVIRONMENT)
    case = gpu_products.Case(8192, 8192, 1, "w8a16", "pallas")
    key = key_of(part="product", number=1, **dataclasses.asdict(case))
    journal.end(key, {"died": "no answer in 180 seconds"})
    journal.end(key_of(part="copy", number=1), {"died": "exit status 3"})
    gpu.write(journal.path)
    assert "w8a16: no answer in 180 seconds" in (tmp_path / "gpu.md").read_text()


def test_a_decode_step_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/sleep")  # its arguments make it fail at once
    assert "error" in gpu.decoder("bf16", 1, "apart", True, 5.0)


@pytest.mark.parametrize("recipe", ["bf16", "w4a16_g128"])
def test_a_decode_step_of_a_small_model(recipe):
    found = gpu_decoder.decode(recipe, 2, "stacked", dry_run=True)
    assert found == {
        "recipe": recipe,
        "batch": 2,
        "layers": "stacked",
        "milliseconds": None,
        "peak_bytes": None,
    }


def test_the_decoder_has_eight_billion_parameters():
    shapes = jax.eval_shape(
        gpu_decoder.linen.Decoder(gpu_decoder.CONFIG).init,
        jax.random.key(0),
        jnp.zeros((1, 1), jnp.int32),
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert 8.0e9 < count < 8.1e9


def record():
    """w4a16 is 4 times as fast as bf16 at 80% of copying; at 64 rows 2 times only."""

    def row(form, route, m, us, size=10**6, shape=(8192, 8192)):
        timing = {"device": us, "wall": 2 * us, "kernels": 1}
        passes = [{"timing": timing, "bytes": size, "note": ""}] * 2
        fields = ("k", "n", "m", "form", "route", "experts")
        case = dict(zip(fields, (*shape, m, form, route, 0), strict=True))
        return {"case": case, "passes": passes}

    rows = [row("bf16", "bf16", m, 40.0) for m in (1, 64)]
    rows += [row("w4a16 g128", "pallas", m, us) for m, us in ((1, 10.0), (64, 20.0))]
    rows += [row("w4a16 g128", "xla", m, 30.0) for m in (1, 64)]
    steps = [
        {"recipe": r, "batch": 1, "layers": "stacked", "milliseconds": ms, "peak_bytes": peak}
        for r, ms, peak in (("bf16", [9.0, 9.3], 100), ("w4a16_g128", [3.0, 3.1], 30))
    ]
    return {
        "environment": ENVIRONMENT,
        "copy": [1.2e11, 1.25e11],
        "rows": rows,
        "decoder": steps,
        "peers": [
            {"versions": {"torch": "2"}},
            {"library": "a", "form": "nf4", "k": 1, "n": 2, "m": 3, "us": 7.0, "off": 0.1},
            {"library": "a", "form": "nf4", "k": 1, "n": 2, "error": "no"},
        ],
        "prepare": [{"bytes": 10**9, "seconds": 0.5}],
    }


def test_gains_shares_and_verdicts():
    text = gpu_report.report(record())
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:1] == "|"}
    assert "10.00 (4.00x, 80%)" in lines["w4a16 g128, pallas"]
    assert "20.00 (2.00x, 40%)" in lines["w4a16 g128, pallas"]
    assert lines["w4a16 g128, M <= 16, large"].endswith("| 4.00x, 80% | reached |")
    assert lines["w4a16 g128, M = 64, large"].endswith("| 2.00x | MISSED |")
    assert lines["nf4 g64, M <= 16"].endswith("| not measured | not measured |")
    step = "decode step of 8B, batch 1, w4a16_g128, layers "
    assert lines[step + "stacked"].endswith("| 2.90x, 0.300x | reached |")
    assert lines[step + "apart"].endswith("| not measured | not measured |")
    assert "Laying out a weight: 2 GB/s" in text and "0.12 TB/s / 0.12 TB/s" in text
    assert "| a | nf4 | 1 x 2 | 3 | 7.00 | 0.100 |" in text
    assert "| a | nf4 | 1 x 2 | all | no |  |" in text


def test_peers_are_named_as_our_formats():
    assert {form for _, form, *_ in gpu_peers.PEERS} <= {"bf16", "llm.int8", *gpu_products.FORMATS}


def test_what_a_peer_runs_is_counted_once():
    """Kernels on the device; not what the program names there, nor what the host does."""
    kind = lambda name: types.SimpleNamespace(name=name)  # noqa: E731
    took = types.SimpleNamespace(elapsed_us=lambda: 5.0)

    def event(where, **more):
        return types.SimpleNamespace(device_type=kind(where), time_range=took, **more)

    events = [event("CUDA"), event("CUDA", is_user_annotation=True), event("CPU"), event("CUDA")]
    assert gpu_peers.kernel_microseconds(events) == 10.0
