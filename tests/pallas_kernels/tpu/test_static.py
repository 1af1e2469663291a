"""How the static figures are read: programs that stand for larger ones, floors, lower bounds."""

import dataclasses
import importlib.metadata
import json

import pytest

from benchmarks import tpu_floor, tpu_schedule, tpu_static
from benchmarks.tpu_aot import Job, Static
from benchmarks.tpu_fingerprint import fingerprint
from benchmarks.tpu_programs import FORMATS, program, time_of
from benchmarks.tpu_schedule import conditional
from benchmarks.tpu_static import lines
from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.heuristics import choose_config

V5E = CHIPS["v5e"]
HLO = """HloModule jit_fn

%inside (p: s4[64,128]) -> bf16[64,128] {
  ROOT %convert = bf16[64,128]{1,0} convert(%p)
}

ENTRY %main (x: bf16[16,64], w: s4[64,128]) -> bf16[16,128] {
  %x = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %w = s4[64,128]{1,0:T(64,128)(8,1)E(4)} parameter(1)
  %fusion = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kLoop, calls=%inside, \
backend_config={"window_config":{"estimated_cycles":"70","iteration_bounds":["2","4"]}}
  ROOT %dot = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%fusion, %x), kind=kOutput, \
backend_config={"window_config":{"estimated_cycles":"50","iteration_bounds":["3"]}}
}
"""


def test_operations_of_a_program():
    """VMEM, S(1), costs no bandwidth; int4 takes half a byte."""
    assert tpu_schedule.operations(HLO) == [
        tpu_schedule.Operation("fusion", 70, 8, 64 * 128 // 2),
        tpu_schedule.Operation("dot", 50, 3, 2 * 16 * 128 + 2 * 16 * 64),
    ]
    assert tpu_schedule.operations("HloModule empty") == []


def test_a_schedule_is_read(tmp_path):
    name = "17-my-fusion.1-01-final_hlo-static-per-bundle-utilization.txt"
    table = "MATMUL, VALU, VLOAD:FILL, VSTORE:SPILL\n 2 4 3 1\n== UTILIZATION:\n1 4 2 1\n0 2 0 0\n"
    (tmp_path / name).write_text("== CAPACITY:\n" + table)
    (tmp_path / name.replace("my-fusion.1", "<late-finalization>")).write_text("")
    assert tpu_schedule.schedules(str(tmp_path)) == {
        "my-fusion.1": tpu_schedule.Schedule(
            2, {"MATMUL": 0.5, "VALU": 1.5}, {"MATMUL": 2, "VALU": 4}, 3
        )
    }


def test_programs_stand_for_larger_ones():
    few = program(V5E, "w4a16 g128", 1, 8192, 28672)
    same = program(V5E, "w4a16 g128", 8, 8192, 28672)
    assert few.times == 1 and few.job.name == same.job.name
    many = program(V5E, "w4a16 g128", 4096, 8192, 28672)
    assert many.times == 4 * 28672 / 7168 and "1024x8192x7168" in many.job.name
    assert many.config.bn <= 7168 and 7168 % many.config.bn == 0
    assert many.problem.m == 4096


def test_time_without_an_estimate_is_a_lower_bound():
    item = program(V5E, "xla int4 g128", 16, 4096, 4096)
    slow = {"name": "fusion", "bundles": 1000, "steps": 100, "bytes": 0, "cycles": 300_000}
    static = Static("", "v5e", sequence=[slow, slow | {"bundles": 0, "bytes": 819_000_000}])
    time = time_of(V5E, item, static)
    assert time.at_least
    assert time.microseconds == pytest.approx(100_000 / V5E.clock * 1e6 + 1000)
    assert time.model == pytest.approx(600_000 / V5E.clock * 1e6)
    many = program(V5E, "xla int4 g128", 1024, 4096, 4096)
    macs = time_of(V5E, many, Static("", "v5e", sequence=[slow], units={"MATMUL": 5.0}))
    assert macs.microseconds == pytest.approx(1024 * 4096 * 4096 / (V5E.bf16_flops / 2) * 1e6)
    memory = time_of(V5E, item, Static("", "v5e"))
    assert memory.microseconds == pytest.approx(item.problem.least_bytes / V5E.hbm_bandwidth * 1e6)
    assert time_of(V5E, item, Static("", "v5e", error="no\nway")).microseconds is None


def test_a_copy_that_the_product_waits_for():
    """XLA copies the weight to VMEM, then multiplies: the estimate counts the product alone."""
    item = program(V5E, "xla int4 g128", 8, 4096, 4096)
    copy = {"name": "copy-done", "bundles": 0, "steps": 1, "bytes": 2**23, "cycles": 0}
    dot = {"name": "fusion", "bundles": 9, "steps": 1, "bytes": 0, "cycles": 0}
    cycles = {"fusion": 20_000}
    static = Static("", "v5e", cycles=20_000, operations=cycles, sequence=[copy, dot])
    time = time_of(V5E, item, static)
    product = 20_000 / V5E.clock * 1e6
    assert time.microseconds == pytest.approx(product)
    assert time.in_turn == pytest.approx(product + 2**23 / V5E.hbm_bandwidth * 1e6)
    floats = program(V5E, "bf16", 8, 4096, 4096)
    assert time_of(V5E, floats, static).in_turn is None


def test_what_xla_copies_of_x_is_copied_once_for_all_columns():
    item = program(V5E, "xla int4 g128", 4096, 8192, 28672)
    rows, columns = item.job.arguments["m"], item.job.arguments["n"]
    assert rows < 4096 and columns < 28672
    copy = {"name": "copy-done", "bundles": 0, "steps": 1, "bytes": 2 * rows * 8192, "cycles": 0}
    static = Static("", "v5e", cycles=1, operations={}, sequence=[copy])
    time = time_of(V5E, item, static)
    assert time.in_turn == pytest.approx(2 * 4096 * 8192 / V5E.hbm_bandwidth * 1e6)


def test_an_estimate_of_the_same_work_stands_for_one_that_is_refused():
    item = program(V5E, "xla int4 g128", 16, 4096, 4096)
    assert item.like is not None and item.like.int4_rows == 8
    assert item.like.arguments == item.job.arguments and item.like.maker == item.job.maker
    op = {"name": "fusion", "bundles": 1000, "steps": 8, "bytes": 0, "cycles": 0}
    units = {"MATMUL": 500.0, "VALU": 900.0}
    static = Static("", "v5e", sequence=[op], units=units)
    like = Static(
        "", "v5e", cycles=50_000, operations={"fusion": 50_000}, units=units, sequence=[op]
    )
    time = time_of(V5E, item, static, like)
    assert not time.at_least
    assert time.microseconds == time.in_turn == pytest.approx(50_000 / V5E.clock * 1e6)
    for other in (
        dataclasses.replace(like, units=units | {"VALU": 920.0}),
        dataclasses.replace(like, sequence=[op | {"bundles": 1100}]),
        dataclasses.replace(like, sequence=[op | {"steps": 9}]),
        dataclasses.replace(like, sequence=[op, op]),
        dataclasses.replace(like, cycles=None),
    ):
        assert time_of(V5E, item, static, other) == time_of(V5E, item, static)


def test_bundles_that_a_condition_may_leave_out():
    """Of the body of the loop, a region that is jumped over; what sets off transfers is short."""
    plain = [f" 0x{i:x}   : > {{ %v = vadd.f32 }}" for i in range(400)]
    lines = ["CT: control target", *plain]
    for at, target in ((3, 5), (10, 7), (20, 9), (120, 11)):
        lines[at] = f" 0x{at:x}   : > {{ %9 = sbr.rel (!%p4) target = $region{target} }}"
    for at, target in ((8, 5), (100, 9), (140, 11), (390, 7)):
        lines[at] = f" 0x{at:x} PF: > {{ %v = vadd.f32 }} /* Start/End empty region {target} */"
    assert conditional(lines) == 80


def test_what_is_made_of_x_is_made_once():
    """A kernel without an estimate: two buffers, and a region of its first step alone."""
    v7x = CHIPS["v7x"]
    item = program(v7x, "w4a16 g128", 16, 4096, 4096)
    block = item.problem.least_bytes / v7x.hbm_bandwidth * 1e6 / 4  # of 4 steps
    for bundles, bound in ((20_000, 20_000), (200, 0)):
        step = bundles / v7x.clock * 1e6
        every = Static("", "v7x", cycles=1, source="bundles x steps", bundles=bundles)
        first = dataclasses.replace(every, bundles=bundles + 3000, conditional=3000)
        more = time_of(v7x, item, first).microseconds - time_of(v7x, item, every).microseconds
        alone = max(3000 / v7x.clock * 1e6 + step, block) - max(step, block)
        assert more == pytest.approx(alone)
        assert time_of(v7x, item, every).microseconds >= 4 * bound / v7x.clock * 1e6
    cut = dataclasses.replace(item, config=dataclasses.replace(item.config, bk=2048))
    assert time_of(v7x, cut, first) == time_of(v7x, cut, dataclasses.replace(first, conditional=0))


def test_first_blocks_come_once():
    """A program of a quarter of the columns: what is multiplied is not the first blocks."""
    ours = program(V5E, "w4a16 g128", 1024, 8192, 28672)
    c, cycles = ours.config, 10**6
    assert ours.times == 4
    block = 2 * c.bm * c.bk + c.bk * c.bn // 2 + 4 * 64 * c.bn
    first, whole = block / V5E.hbm_bandwidth * 1e6, cycles / V5E.clock * 1e6
    time = time_of(V5E, ours, Static("", "v5e", cycles=cycles)).microseconds
    assert time == pytest.approx(4 * whole - 3 * first)
    theirs = program(V5E, "xla int4 g128", 1024, 8192, 28672)
    op = {"name": "dot", "bundles": 9, "steps": 10, "bytes": 8_190_000, "cycles": 0}
    static = Static("", "v5e", cycles=cycles, operations={"dot": cycles}, sequence=[op])
    time = time_of(V5E, theirs, static)
    assert time.microseconds == time.in_turn == pytest.approx(4 * whole - 3 * 1.0)


def test_what_bounds_our_time():
    item = program(V5E, "w4a16 g128", 16, 4096, 4096)
    units = {"VALU": 90.0, "MATMUL": 10.0}
    memory = item.problem.least_bytes / V5E.hbm_bandwidth * V5E.clock
    for cycles, bundles, bound in (
        (memory / 2, 10, "memory"),
        (memory * 2, 10, "waiting for blocks"),
        (memory * 2, memory, "VALU"),
    ):
        static = Static("", "v5e", cycles=int(cycles), bundles=int(bundles), units=units)
        time = time_of(V5E, item, static)
        assert (time.bound, time.at_least) == (bound, False)
        assert time.microseconds == pytest.approx(max(cycles, memory) / V5E.clock * 1e6, rel=1e-4)


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_every_format_has_a_floor(chip):
    for label, fields in FORMATS.items():
        problem = MatmulProblem(1024, 4096, 4096, **fields)
        if label == "table4 g64" and not CHIPS[chip].gathers_sublanes:
            continue  # no kernel
        floor = tpu_floor.floor(problem, choose_config(problem, CHIPS[chip]).operand, CHIPS[chip])
        assert floor.times[floor.bound] == floor.microseconds > 0, label
        macs = 1024 * 4096 * 4096 / CHIPS[chip].bf16_flops * 2e6 / CHIPS[chip].cores
        assert macs / 2.01 < floor.times["matrix"] < macs * 1.01, label
    with pytest.raises(KeyError, match="no sequence"):
        tpu_floor.unpack("int8", "int4", CHIPS[chip])


def test_floors_of_tables_and_of_int4():
    """On v5e E2M1 by its bits is less than a table, by words; on v6e both are tables by bytes; v7x
    converts E2M1; int4 is taken as is.
    """
    nf4 = MatmulProblem(16, 4096, 4096, "table4", group=64)
    e2m1 = dataclasses.replace(nf4, e2m1=True)

    def vector(problem, chip):
        return tpu_floor.floor(problem, "bfloat16", CHIPS[chip]).times["vector"]

    assert vector(nf4, "v5e") / vector(e2m1, "v5e") == pytest.approx(5.75 / 4.125)
    cycles = {chip: vector(nf4, chip) * CHIPS[chip].clock for chip in ("v5e", "v6e")}
    # 0.5 operations a code to scale sums.
    assert cycles["v5e"] / cycles["v6e"] == pytest.approx(5.75 / 2.5)
    assert vector(nf4, "v6e") == vector(e2m1, "v6e") > 1.5 * vector(e2m1, "v7x")
    int4 = MatmulProblem(1024, 4096, 4096, "int4", "int4", x_scale=True)
    times = {o: tpu_floor.floor(int4, o, V5E).times["matrix"] for o in ("int4", "int8")}
    assert times["int8"] == 2 * times["int4"]


def test_the_vector_floor_by_hand():
    """v5e, int4 to bfloat16: 11 operations on a word of 8 codes, and 2 a partial sum."""
    problem = MatmulProblem(16, 1024, 1024, "int4", group=128)
    operations = 1024 * 1024 / 8 * 11 + 2 * 16 * 1024 * 8
    times = tpu_floor.floor(problem, "bfloat16", V5E).times
    assert times["vector"] == pytest.approx(operations / 1024 / 4 / V5E.clock * 1e6)
    assert times["bytes"] == pytest.approx(problem.least_bytes / 819e9 * 1e6)
    on_v4 = tpu_floor.floor(problem, "bfloat16", CHIPS["v4"]).times["vector"]
    assert on_v4 == pytest.approx(operations / 1024 / 2 / CHIPS["v4"].clock / 2 * 1e6)


def test_lines_are_json():
    record = {"a": 1, "b": [{"c": 2}, {"c": 3}], "d": {"e": [4], "f": None}, "g": [], "h": {}}
    assert json.loads(lines(record)) == record
    assert lines(record).count("\n") > 8


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_recorded_figures_are_of_todays_kernels(chip):
    """Packed codes of 8192 contracted values are left out: seconds each, of the same body."""
    record = tpu_static.recorded(chip)
    jax = f"jax {importlib.metadata.version('jax')}"
    if not record["compiler"].endswith(f", {jax}"):
        pytest.skip(f"the figures are of {record['compiler']}; {jax} prints kernels otherwise")
    packed = ("w2a16 g128", "w3a16 g128")
    rows = [row for row in record["rows"] if row["k"] < 8192 or row["name"] not in packed]
    hint = f"python -m benchmarks.tpu_static --resume --recorded --chips {chip}"
    assert tpu_static.stale(chip, rows) == [], hint
    assert sum(row["program"] in record["kernels"] for row in rows) > 7


@pytest.mark.parametrize("chip", CHIPS)
def test_every_recorded_kernel_compiled(chip):
    rows = [row for row in tpu_static.recorded(chip)["rows"] if row["name"] in FORMATS]
    assert rows and [row["program"] for row in rows if row["microseconds"] is None] == []


def test_a_fingerprint_is_of_what_is_compiled():
    """Of body, blocks, limits and scratch; not of the job's name."""
    item = program(V5E, "w4a16 g128", 16, 1024, 1024)
    arguments, fields = item.job.arguments, dataclasses.asdict(item.config)
    was = fingerprint(item.job)
    assert was == fingerprint(Job("another", item.job.maker, arguments))
    changed = {"bn": 256}, {"reading": "cast"}, {"vmem_limit_bytes": 2**25}, {"parallel": True}
    others = {
        fingerprint(Job("", item.job.maker, arguments | {"config": fields | change}))
        for change in changed
    }
    assert len(others | {was}) == 1 + len(changed)
    with pytest.raises(ValueError, match="no Pallas call"):
        fingerprint(Job("bf16", "benchmarks.tpu_cases:bfloat16", {"m": 16, "k": 256, "n": 128}))


def test_a_row_of_another_kernel_is_stale(monkeypatch):
    def row(label, size):
        item = program(V5E, label, *size)
        return {"name": label, "m": size[0], "k": size[1], "n": size[2], "program": item.job.name}

    size = (16, 1024, 1024)
    true, floats = row("w4a16 g128", size), row("bf16", size)
    kernels = {true["program"]: fingerprint(program(V5E, "w4a16 g128", *size).job)}
    monkeypatch.setattr(tpu_static, "recorded", lambda name: {"kernels": kernels})
    assert tpu_static.stale("v5e", [true, floats]) == []
    assert "now w4a16" in tpu_static.stale("v5e", [true | {"program": "w4a16 of old"}])[0]
    kernels[true["program"]] = "0123"
    assert tpu_static.stale("v5e", [true, true]) == [f"{true['program']}: another kernel by now"]
