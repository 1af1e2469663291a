"""The rules that the static schedules led to: each is named by what it spares."""

import dataclasses

import pytest

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.heuristics import by_rules
from jaxquant.pallas_kernels.tpu.select import select

INT4 = MatmulProblem(16, 4096, 4096, "int4", group=128)


@pytest.mark.parametrize(
    ("rows", "group", "scale"),
    [(16, 128, "after"), (128, 128, "after"), (129, 128, "before"), (1024, 128, "before")]
    + [(16, 32, "after"), (17, 32, "before"), (32, 64, "after"), (33, 64, "before")],
)
def test_scales_meet_whichever_is_smaller(rows, group, scale):
    problem = dataclasses.replace(INT4, m=rows, group=group)
    assert by_rules(problem, CHIPS["v6e"]).scale == scale


@pytest.mark.parametrize(
    ("chip", "rows", "group", "scale"),
    [("v5e", 16, 32, "after"), ("v5e", 17, 32, "before"), ("v5e", 1, 16, "before")]
    + [("v6e", 1, 32, "before"), ("v7x", 1, 16, "before"), ("v6e", 16, 128, "after")],
)
def test_e2m1_is_scaled_in_bfloat16(chip, rows, group, scale):
    """Where there is arithmetic on it, few rows too; groups of 16 before the dot everywhere."""
    problem = MatmulProblem(rows, 4096, 4096, "table4", group=group, e2m1=True)
    config = by_rules(problem, CHIPS[chip])
    scaled_in = "bfloat16" if CHIPS[chip].has_bf16_vpu else "float32"
    assert (config.scale, config.scaled_in) == (scale, scaled_in)
    assert by_rules(INT4, CHIPS[chip]).scaled_in == "float32"


@pytest.mark.parametrize(
    ("chip", "rows", "reading"),
    [("v4", 16, "bits"), ("v4", 64, "bits"), ("v4", 256, "bits"), ("v5e", 16, "bits")]
    + [("v5e", 64, "cast"), ("v5p", 256, "cast"), ("v6e", 16, "cast"), ("v6e", 256, "staged")]
    + [("v7x", 16, "cast"), ("v7x", 1024, "staged")],
)
def test_codes_are_read_in_the_fewest_operations(chip, rows, reading):
    assert by_rules(dataclasses.replace(INT4, m=rows), CHIPS[chip]).reading == reading


@pytest.mark.parametrize(("k", "depth"), [(4096, 4096), (8192, 8192), (14336, 7168)])
def test_sums_stay_in_the_matrix_units(k, depth):
    """Many rows: as much of k in a block as fits, in equal parts."""
    for group in (128, k):
        problem = dataclasses.replace(INT4, m=1024, k=k, group=group)
        for chip in ("v6e", "v7x"):
            config = by_rules(problem, CHIPS[chip])
            whole = chip == "v7x" and config.scale == "before"
            assert config.bk == (k if whole else depth)
            assert config.vmem_limit_bytes <= CHIPS[chip].vmem_bytes * 0.9


@pytest.mark.parametrize(("k", "rows"), [(4096, 1024), (8192, 1024), (14336, 512)])
def test_v7x_takes_many_rows_of_few_columns(k, rows):
    """What spills does not compile there where XLA holds other arrays in VMEM."""
    config = by_rules(dataclasses.replace(INT4, m=4096, k=k), CHIPS["v7x"])
    assert (config.bm, config.bn, config.bk) == (rows, 512, k)


def test_codes_stay_in_hbm_where_xla_would_copy_them():
    for rows in (16, 1024):
        problem = dataclasses.replace(INT4, m=rows)
        kept = {name for name, chip in CHIPS.items() if by_rules(problem, chip).codes_in_hbm}
        assert kept == {"v7x"}


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_up_to_eight_rows_are_a_block_of_eight(chip):
    for rows, block in ((1, 8), (8, 8), (9, 16), (17, 32)):
        for change in ({}, {"group": 32}, {"codes": "int8", "group": 0}):
            problem = dataclasses.replace(INT4, m=rows, **change)
            assert by_rules(problem, CHIPS[chip]).bm == block


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v7x"])
def test_rows_of_a_byte_a_value_keep_all_of_k(chip):
    problem = MatmulProblem(1024, 14336, 4096, "int8", x_dtype="int8", x_scale=True)
    config = by_rules(problem, CHIPS[chip])
    assert config.bk == 14336
    assert config.vmem_limit_bytes <= CHIPS[chip].vmem_bytes * 0.9


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
@pytest.mark.parametrize(("k", "columns"), [(4096, 1024), (8192, 1024), (14336, 512)])
def test_rows_a_block_leave_registers_for_unpacking(chip, k, columns):
    for codes in ("int4", "int3", "int2"):
        config = by_rules(MatmulProblem(1024, k, 4096, codes, group=128), CHIPS[chip])
        assert (config.bm, config.bn, config.bk, config.scale) == (256, columns, k, "before")


def test_what_is_granted_leaves_room_for_what_xla_keeps_in_vmem():
    """v6e refused this one when its scratch was thought six bytes a weight: 107 MiB were asked."""
    problem = MatmulProblem(1024, 8192, 4096, "int4", group=128, x_dtype="int8", x_scale=True)
    config = by_rules(problem, CHIPS["v6e"])
    assert (config.bm, config.bn, config.bk) == (512, 1024, 8192)
    assert config.vmem_limit_bytes < 80 * 2**20


def test_few_rows_take_all_of_k_at_once():
    for k, columns in ((4096, 1024), (8192, 1024), (14336, 512)):
        config = by_rules(dataclasses.replace(INT4, k=k), CHIPS["v6e"])
        assert (config.bn, config.bk) == (columns, k)


@pytest.mark.parametrize(
    ("change", "stream"),
    [
        ({}, True),
        ({"m": 64}, False),
        ({"n": 4096 + 96}, False),
        ({"group": 32}, False),
        ({"k": 4160, "group": 160}, False),
        ({"k": 2048}, False),
        ({"codes": "int8"}, False),
    ],
    ids=str,
)
def test_who_fetches_the_codes(change, stream):
    problem = dataclasses.replace(INT4, **change)
    assert by_rules(problem, CHIPS["v6e"]).stream is stream
    assert not by_rules(problem, CHIPS["v5p"]).stream


def test_who_reads_int8_by_way_of_float32():
    """v4's own conversion takes four times as long."""
    problem = dataclasses.replace(INT4, codes="int8")
    assert [by_rules(problem, chip).reading for chip in CHIPS.values()] == ["bytes"] + 4 * ["cast"]
    assert "int8" in select(problem, "TPU v4", forced=False).name
    assert by_rules(dataclasses.replace(problem, group=96, k=96), CHIPS["v4"]).reading == "cast"


def test_who_cuts_x_into_integers():
    """Where three parts fit a register of int8; on v6e two. int3 is unpacked no sooner there."""
    most = {"v4": 0, "v5e": 8, "v5p": 8, "v6e": 16, "v7x": 0}
    for chip, rows in most.items():
        for codes in ("int8", "int4", "int3", "int2"):
            if chip == "v6e" and codes == "int3":
                continue
            for m in (1, 8, 9, 16, 17):
                problem = dataclasses.replace(INT4, m=m, codes=codes)
                assert (by_rules(problem, CHIPS[chip]).operand == "int8") == (m <= rows)
    for change in ({"codes": "int3"}, {"group": 32}):
        problem = dataclasses.replace(INT4, **change)
        assert by_rules(problem, CHIPS["v6e"]).operand == "bfloat16"


@pytest.mark.parametrize("codes", ["int2", "int3"])
def test_packed_codes_go_by_way_of_int4_where_it_is_converted_at_once(codes):
    problem = dataclasses.replace(INT4, codes=codes)
    readings = {name: by_rules(problem, chip).reading for name, chip in CHIPS.items()}
    many = dataclasses.replace(problem, m=1024)
    later = dict.fromkeys(("v6e", "v7x"), "pairs" if codes == "int2" else "nibbles")
    assert readings == dict.fromkeys(("v4", "v5e", "v5p"), "bits") | later
    assert {by_rules(many, CHIPS[name]).reading for name in later} == {"nibbles"}
    narrow = by_rules(problem, CHIPS["v7x"]).operand == "float8_e4m3fn"
    assert narrow == (codes == "int2")  # int3 would be bound by vector operations
