"""Products on slices of TPUs through the real TPU compiler: kernels are there, no weight moves."""

import pytest

from benchmarks.spmd_aot import Job, compile_all
from benchmarks.tpu_aot import available

pytestmark = pytest.mark.skipif(
    not available(),
    reason="THE TPU COMPILER IS NOT INSTALLED (pip install libtpu): NO SLICE WAS COMPILED FOR",
)

SIZE = {"m": 256, "k": 1024, "n": 1024}


def compiled(jobs, topology):
    programs = compile_all(jobs, topology)
    assert {name: p.error for name, p in programs.items() if p.error} == {}
    return programs


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_four_chips(kind):
    size = {**SIZE, "kind": kind}
    jobs = [
        Job(f"{parallel} {'back' if backward else 'forward'}", {**size, **case})
        for parallel in ("column", "row", "both", "whole")
        for backward in (False, True)
        for case in [{"parallel": parallel, "backward": backward}]
    ]
    jobs.append(Job("packed", {**size, "qtype": "int2", "group": 64, "parallel": "row"}))
    jobs.append(Job("siblings", {**size, "siblings": 3}))
    got = compiled(jobs, "v5e:2x2")
    kernels = {name: p.kernels for name, p in got.items() if "back" not in name}
    assert kernels == {
        "column forward": 1,
        "row forward": 1,
        "both forward": 1,
        "whole forward": 1,
        "packed": 1,
        "siblings": 3,
    }
    moved = {name: [kind for kind, _ in p.collectives] for name, p in got.items()}
    assert moved["column forward"] == moved["whole forward"] == moved["siblings"] == []
    assert moved["row forward"] == moved["packed"] == ["all-reduce"]
    assert got["row forward"].collectives == [["all-reduce", 256 // 2 * 1024 * 2]]
    assert moved["column back"] == ["all-reduce"] and moved["row back"] == []
    if kind == "auto":  # the weight has the batch's mesh axis too: its rows come to it
        assert sorted(moved["both forward"]) == ["all-to-all", "reduce-scatter"]
        moved["both back"].remove("all-gather")  # of the cotangent, which has more bytes than
        gathered = dict(got["both back"].collectives)["all-gather"]
        assert gathered == 256 * 512 * 2  # its part, and not those of the weight (bfloat16)
    assert not [name for name, kinds in moved.items() if "all-gather" in kinds]


@pytest.mark.parametrize(
    ("topology", "model"), [("v5e:16x16", 16), ("v6e:16x16", 8), ("v5p:4x4x4", 8)]
)
def test_large_slices(topology, model):
    size = {"m": 2048, "k": 2048, "n": 4096, "model": model}
    jobs = [
        Job(f"{parallel} {backward}", {**size, "parallel": parallel, "backward": backward})
        for parallel in ("column", "row")
        for backward in (False, True)
    ]
    got = compiled(jobs, topology)
    assert {name: [kind for kind, _ in p.collectives] for name, p in got.items()} == {
        "column False": [],
        "column True": ["all-reduce"],
        "row False": ["all-reduce"],
        "row True": [],
    }
    assert got["column False"].kernels == got["row False"].kernels == 1


def test_the_shipped_decoder():
    """Forward and a gradient through all of it: kernels for every layer, sums and nothing else."""
    jobs = [
        Job(f"backward={backward}", {"backward": backward}, "benchmarks.spmd_cases:decoder")
        for backward in (False, True)
    ]
    for program in compiled(jobs, "v5e:4x4").values():
        assert program.kernels >= 7
        assert {kind for kind, _ in program.collectives} == {"all-reduce"}


def test_experts():
    """Backwards as well: XLA's partitioner, left alone, gathers the dequantized experts."""
    size = {"m": 256, "k": 512, "n": 256, "count": 8, "model": 4}
    jobs = [
        Job(f"backward={backward}", {**size, "backward": backward}, "benchmarks.spmd_cases:experts")
        for backward in (False, True)
    ]
    forward, back = compiled(jobs, "v5e:4x4").values()
    assert forward.kernels == 1
    assert forward.collectives == [["all-reduce", 256 // 4 * 256 * 2]]
    assert back.collectives == [["all-reduce", 256 // 4 * 512 * 2]]


def test_a_weight_gathered_in_shard_map():
    """Its codes travel at their four bits, its scales beside them, and meet in a kernel."""
    size = {"m": 256, "k": 2048, "n": 1024}
    (program,) = compiled([Job("", size, "benchmarks.spmd_cases:gathered")], "v5e:4x4").values()
    assert program.kernels == 1
    assert {kind for kind, _ in program.collectives} == {"all-gather"}
    assert sum(n for _, n in program.collectives) == 2048 * 1024 // 2 + 2048 // 128 * 1024 * 4
