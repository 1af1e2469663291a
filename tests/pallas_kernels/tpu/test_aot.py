"""The kernels through the real TPU compiler, for five generations, without a TPU.

What it checks for each: that it compiles, uses no more VMEM than was granted, spills nothing at
decode shapes, and that the program holds the kernel where dispatch says so.
"""

import dataclasses

import jax
import pytest

from benchmarks import tpu_floor
from benchmarks.tpu_aot import Job, available, measure
from benchmarks.tpu_programs import program, same_work, time_of
from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem, Unsupported
from jaxquant.pallas_kernels.tpu import split
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.heuristics import choose_config, choose_ragged_config

pytestmark = pytest.mark.skipif(
    not available(),
    reason="THE TPU COMPILER IS NOT INSTALLED (pip install libtpu): NO TPU KERNEL WAS COMPILED",
)

W4A16 = {"codes": "int4", "group": 128}
INT8 = {"x_dtype": "int8", "x_scale": True}
FP8 = {"x_dtype": "float8_e4m3fn", "x_scale": True}
EVERYTHING = {"zero_point": True, "bias": True, "gate": True, "residual": True}
PROBLEMS = {
    "w4a16": MatmulProblem(16, 1024, 1024, **W4A16),
    "w4a16, zero points, epilogue": MatmulProblem(8, 1024, 512, **W4A16, **EVERYTHING),
    "w4a16, groups of 32": MatmulProblem(16, 512, 512, "int4", group=32),
    "w4a8": MatmulProblem(16, 1024, 1024, **W4A16, **INT8),
    "w4a8, codes fetched in halves": MatmulProblem(16, 4096, 2048, **W4A16, **INT8),
    "w4a4": MatmulProblem(64, 512, 512, **W4A16, x_dtype="int4", x_scale=True),
    "w4a4, 3 rows": MatmulProblem(3, 512, 300, "int4", x_dtype="int4", x_scale=True),
    "prefill w4a4": MatmulProblem(256, 512, 512, "int4", x_dtype="int4", x_scale=True),
    "w8a8": MatmulProblem(16, 1024, 1024, "int8", **INT8),
    "w8a16": MatmulProblem(16, 1024, 1024, "int8", group=64),
    "fp8": MatmulProblem(16, 1024, 1024, "float8_e4m3fn", **FP8),
    "bf16 x fp8": MatmulProblem(16, 512, 512, "float8_e5m2", group=128),
    "w2a16": MatmulProblem(16, 512, 512, "int2", group=64),
    "w3a16": MatmulProblem(16, 512, 256, "int3", group=128),
    "w2a16, 5 rows": MatmulProblem(5, 512, 512, "int2", group=128),
    "w3a16, 5 rows": MatmulProblem(5, 512, 256, "int3", group=128),
    "ragged": MatmulProblem(3, 200, 100, "int4"),
    "narrow last strip": MatmulProblem(17, 512, 384, "int4", group=64),
    "narrow last strip, zero points": MatmulProblem(3, 256, 640, "int4", group=32, zero_point=True),
    "prefill w4a16": MatmulProblem(256, 512, 512, **W4A16),
    "prefill w4a8": MatmulProblem(256, 512, 512, **W4A16, **INT8),
    "prefill w8a8": MatmulProblem(256, 512, 512, "int8", **INT8),
    "prefill w2a16": MatmulProblem(128 + 2, 256, 256, "int2", group=64),
    "table": MatmulProblem(16, 1024, 512, "table4", group=64),
    "e2m1": MatmulProblem(16, 512, 256, "table4", group=32, e2m1=True),
    "prefill table": MatmulProblem(256, 256, 300, "table4", group=64),
    "nvfp4": MatmulProblem(16, 512, 256, "table4", group=16, e2m1=True),
    "prefill nvfp4": MatmulProblem(130, 256, 300, "table4", group=16, e2m1=True),
    "prefill e2m1": MatmulProblem(130, 256, 300, "table4", group=32, e2m1=True),
    "prefill ragged": MatmulProblem(130, 96, 300, "int4", group=32),
}
EXPERTS = {
    "w4a16 experts": MatmulProblem(16, 512, 512, **W4A16, zero_point=True),
    "w4a8 experts": MatmulProblem(40, 512, 512, **W4A16, **INT8),
    "w4a4 experts": MatmulProblem(500, 512, 256, "int4", x_dtype="int4", x_scale=True),
    "w2a16 experts": MatmulProblem(16, 512, 256, "int2", group=64),
    "prefill w8a8 experts": MatmulProblem(500, 512, 256, "int8", **INT8),
    "prefill w4a16 experts": MatmulProblem(1024, 512, 512, **W4A16),
}


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_every_kernel_compiles(chip):
    problems = dict(PROBLEMS)
    if not CHIPS[chip].gathers_sublanes:
        for name in ("table", "prefill table"):
            with pytest.raises(Unsupported, match="does not gather within registers"):
                choose_config(problems.pop(name), CHIPS[chip])
    jobs = [
        Job(
            name,
            "benchmarks.tpu_cases:chosen",
            {"problem": dataclasses.asdict(problem), "chip": chip},
        )
        for name, problem in problems.items()
    ]
    for name, problem in EXPERTS.items():
        arguments = {"product": dataclasses.asdict(problem), "experts": 4, "chip": chip}
        jobs.append(Job(name, "benchmarks.tpu_experts:kernel", arguments))
    experts = {"m": 16, "k": 512, "n": 256, "experts": 4, "codes": "int4", "group": 128}
    experts |= {"act": True, "implementation": ""}
    pair = {"product": dataclasses.asdict(PROBLEMS["w4a16"]), "columns": [512, 300]}
    siblings = {**pair, "chip": chip}
    jobs.append(Job("siblings", "benchmarks.tpu_siblings:siblings", siblings))
    for name, m, k in (("transposed", 16, 512), ("prefill transposed", 260, 300 * 32)):
        back = dataclasses.asdict(MatmulProblem(m, k, 640, "int4", group=64, zero_point=True))
        arguments = {"problem": back, "chip": chip}
        jobs.append(Job(name, "benchmarks.tpu_gradients:ours", arguments))
    jobs.append(Job("experts", "benchmarks.tpu_experts:product", experts))
    for act in (False, True):
        einsum = {"m": 16, "k": 512, "n": 256, "experts": 3, "act": act, "chip": chip}
        einsum["implementation"] = ""
        jobs.append(Job(f"einsum {act}", "benchmarks.tpu_batched:product", einsum))
    product = {"m": 16, "k": 512, "n": 256, "group": 64}
    jobs.append(Job("product", "benchmarks.tpu_cases:product", {**product, "qtype": "int4"}))
    channel = {**product, "group": 0, "qtype": "int8"}
    jobs.append(Job("channel", "benchmarks.tpu_cases:product", channel))
    jobs.append(Job("pushes", "benchmarks.tpu_cases:pushes", {"k": 1024, "n": 512}))
    for dtype in ("int8", "int4", "float8_e4m3fn"):
        rows = {"m": 130, "k": 1024, "dtype": dtype, "kernel": True}
        jobs.append(Job(f"prefill {dtype}", "benchmarks.tpu_cases:quantize_in_front", rows))
    got = measure(jobs, chip, profile=False)
    assert {n: s.error for n, s in got.items() if s.error} == {}
    configs = {n: choose_config(p, CHIPS[chip]) for n, p in problems.items()}
    for name, problem in EXPERTS.items():
        configs[name] = choose_ragged_config(RaggedProblem(problem, 4), CHIPS[chip])
    for name, config in configs.items():
        static = got[name]
        assert static.kernels == 1, name
        assert 0 < static.vmem <= config.vmem_limit_bytes <= CHIPS[chip].vmem_bytes, name
        assert static.bundles > 0 and sum(static.units.values()) > 0, name
    # Few rows: what is live fits the registers. v4's schedules spill on their own, and those of
    # the compilers before jax 0.12 a little. int4 as float8 is converted ahead of its pushes into
    # the matrix units, at 16 rows more of it than registers hold (docs/tpu.md).
    most = 64 if jax.__version_info__ >= (0, 12) else 512
    parts = {n: split.parts(problems[n], c) for n, c in configs.items() if n in problems}
    ahead = [n for n, count in parts.items() if count > 1 and configs[n].bm > 8]
    spills = {
        n: s.spills
        for n, s in got.items()
        if "prefill" not in n and s.spills > (768 if n in ahead else most)
    }
    assert chip == "v4" or spills == {}
    # Nothing copies a weight before its kernel.
    copied = [op["bytes"] for op in got["w4a16"].sequence if op["name"].startswith("copy")]
    assert max(copied, default=0) < problems["w4a16"].weight_bytes / 4
    assert got["transposed"].kernels == got["prefill transposed"].kernels == 1
    assert got["siblings"].kernels == got["product"].kernels == got["experts"].kernels == 1
    assert got["einsum False"].kernels == got["einsum True"].kernels == 1
    assert got["channel"].kernels == 0
    # No floor is above what the compiler schedules at best: weights that lie in VMEM.
    floor = tpu_floor.floor(MatmulProblem(16, 1024, 512, "int8"), "bfloat16", CHIPS[chip])
    pushes = floor.times["push"] * CHIPS[chip].clock * CHIPS[chip].cores / 1e6
    assert pushes <= got["pushes"].units["MATPUSH"] * 1.01
    # The written sequences of a lookup are what a kernel consists of, all in all.
    if "table" in problems:
        floor = tpu_floor.floor(problems["table"], "bfloat16", CHIPS[chip])
        operations = floor.times["vector"] * CHIPS[chip].clock * CHIPS[chip].cores / 1e6
        assert operations <= got["table"].units["VALU"] <= 1.25 * operations


def test_cycles_are_told_and_grow_with_the_work():
    sizes = {n: dataclasses.asdict(MatmulProblem(16, 1024, n, **W4A16)) for n in (1024, 4096)}
    jobs = [
        Job(str(n), "benchmarks.tpu_cases:chosen", {"problem": p, "chip": "v5e"})
        for n, p in sizes.items()
    ]
    jobs.append(Job("broken", "benchmarks.tpu_cases:bfloat16", {"m": 16, "k": -1, "n": 16}))
    got = measure(jobs, "v5e")
    assert got["1024"].source == got["4096"].source == "estimate"
    assert 2 * got["1024"].cycles < got["4096"].cycles
    assert got["broken"].error


def test_xla_grouped_int4_has_an_estimate():
    """The estimator refuses the program, and takes one with the same work."""
    item = program(CHIPS["v5e"], "xla int4 g128", 16, 512, 512)
    got = measure([item.job, item.like], "v5e")
    asked, like = got[item.job.name], got[item.like.name]
    assert like.source == "estimate" and same_work(asked, like)
    assert not time_of(CHIPS["v5e"], item, asked, like).at_least


def test_several_devices():
    """In shard_map kernels run on each one's part, else XLA splits; neither gathers a weight."""
    jobs = [
        Job(
            f"{parallel} {manual}",
            "benchmarks.tpu_cases:sharded",
            {"m": 32, "k": 512, "n": 512, "parallel": parallel, "manual": manual},
            devices=4,
        )
        for parallel in ("column", "row")
        for manual in (True, False)
    ]
    got = measure(jobs, "v5e", profile=False)
    assert {n: s.error for n, s in got.items() if s.error} == {}
    assert {n: s.kernels for n, s in got.items()} == {
        "column True": 1,
        "column False": 0,
        "row True": 1,
        "row False": 0,
    }
    assert all(s.gathers == 0 for s in got.values())
