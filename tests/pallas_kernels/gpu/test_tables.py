"""Tables of timed configs: which entry serves a product, and that nothing else is believed."""

import dataclasses
import json

import pytest

from jaxquant.pallas_kernels.gpu import select, tables
from jaxquant.pallas_kernels.gpu.chips import CHIPS
from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem, Unsupported

CONFIG = GpuConfig(16, 64, 128, 4, 2, "after", "cast")
PROBLEM = MatmulProblem(16, 4096, 4096, "int4", group=128)


def entry(m=16, k=4096, n=4096, kernel=2.0, xla=6.0, config=CONFIG, kind=None, **changes):
    problem = dataclasses.replace(PROBLEM, m=m, k=k, n=n, **changes)
    return tables.entry_of(problem, config, kernel, xla, **kind or {})


ENTRIES = (
    entry(m=1),
    entry(m=16, config=dataclasses.replace(CONFIG, split_k=4)),
    entry(m=2048, kernel=9.0),
    entry(m=64, n=16384),
    entry(codes="int8", group=4096, m=8),
    entry(m=16, zero_point=True),
    entry(m=128, k=2048, n=768, kind={"experts": 128}),
    entry(m=16384, k=2048, n=768, kernel=9.0, kind={"experts": 128}),
    entry(m=16, codes="int8", x_dtype="int8", group=4096, kind={"outliers": 64}),
)


def find(kind=None, **changes):
    return tables.nearest(dataclasses.replace(PROBLEM, **changes), ENTRIES, **kind or {})


def test_rows_go_to_the_next_entry():
    assert [find(m=m).m for m in (1, 2, 16, 17, 2048, 5000)] == [1, 16, 16, 2048, 2048, 2048]
    assert find(m=2).config.split_k == 4
    assert find(m=2048).config is None  # XLA was faster


def test_shapes_go_to_the_nearest_entry():
    assert find(k=4096, n=8192, m=1).n in (4096, 16384)  # as far from both
    assert find(n=11008).n == 16384
    assert find(n=5120).n == 4096
    assert find(k=4096, n=40000) is None
    assert find(k=16384, n=16384) is None


def test_formats_are_not_mixed():
    assert find(group=64) is None
    assert find(zero_point=True).zero_point
    assert find(codes="int8", group=4096).group == 0  # a scale a column, whatever k is
    assert find(codes="int8", group=5120, k=5120).codes == "int8"
    assert find(x_dtype="int8", x_scale=True) is None


def test_experts_and_outliers_have_entries_of_their_own():
    shape, many = {"k": 2048, "n": 768}, {"experts": 128}
    assert find(**shape) is None
    assert find(many, m=100, **shape).m == 128 and find(many, m=129, **shape).config is None
    assert find({"experts": 64}, m=100, **shape).experts == 128
    assert find({"experts": 16}, m=100, **shape) is None
    integers = {"codes": "int8", "x_dtype": "int8", "group": 4096, "x_scale": True}
    assert find(**integers) is None and find({"outliers": 128}, **integers) is None
    assert find({"outliers": 64}, **integers).outliers == 64


def test_a_table_is_read_as_it_was_written():
    text = tables.render(ENTRIES, "H200", {"jax": "0.12"})
    assert tables.parse(text, "here", "H200") == ENTRIES
    assert json.loads(text)["environment"] == {"jax": "0.12"}
    assert tables.parse(tables.render((), "H100", {}), "here", "H100") == ()


def damaged(change):
    data = json.loads(tables.render(ENTRIES, "H200", {}))
    change(data)
    return json.dumps(data)


DAMAGES = [
    ("not json at all", "is no JSON"),
    ("[" * 100000, "is no JSON"),
    ("[]", "a table has exactly chip, entries, environment, version"),
    (damaged(lambda d: d.pop("chip")), "a table has exactly"),
    (damaged(lambda d: d.update(extra=1)), "a table has exactly"),
    (damaged(lambda d: d.update(version=2)), "version 2; this jaxquant reads 1"),
    (damaged(lambda d: d.update(chip="H100")), "is of the chip 'H100', not 'H200'"),
    (
        damaged(lambda d: d["entries"].append(3)),
        f"entry {len(ENTRIES)}: Entry has exactly the fields",
    ),
    (damaged(lambda d: d["entries"][1].pop("m")), "entry 1: Entry has exactly"),
    (damaged(lambda d: d["entries"][1].update(m=True)), "entry 1: m must be of type int, not True"),
    (damaged(lambda d: d["entries"][1].update(m=0)), "entry 1: m = 0 cannot be"),
    (damaged(lambda d: d["entries"][1].update(experts=-1)), "experts = -1 cannot be"),
    (damaged(lambda d: d["entries"][1].update(codes="int5")), "codes = 'int5' cannot be"),
    (damaged(lambda d: d["entries"][1].update(microseconds="1")), "microseconds must be of type"),
    (damaged(lambda d: d["entries"][1].update(microseconds=float("nan"))), "= nan cannot be"),
    (damaged(lambda d: d["entries"][1].update(xla_microseconds=1.0)), "XLA was faster"),
    (damaged(lambda d: d["entries"][0].update(config=None)), "XLA was faster"),
    (damaged(lambda d: d["entries"][0]["config"].update(bm="16")), "bm must be of type int"),
    (damaged(lambda d: d["entries"][0]["config"].update(scale="late")), "scale is one of 'end'"),
    (damaged(lambda d: d["entries"][0]["config"].update(more=1)), "GpuConfig has exactly"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGES, ids=[m for _, m in DAMAGES])
def test_a_damaged_table_says_where(text, message):
    with pytest.raises(tables.TableError, match="table.json") as error:
        tables.parse(text, "table.json", "H200")
    assert message in str(error.value)


def test_the_tables_that_ship_are_sound():
    for chip in CHIPS:
        for one in tables.table(chip):
            assert one.microseconds > 0


def test_what_was_timed_decides(monkeypatch):
    monkeypatch.setattr(select, "has_mosaic_gpu", lambda: True)
    monkeypatch.setattr(tables, "table", lambda chip: ENTRIES)
    grouped = RaggedProblem(dataclasses.replace(PROBLEM, m=16384, k=2048, n=768), 128)
    with pytest.raises(Unsupported, match="timed on H200 at 16384 x 2048 x 768: XLA takes 6 us"):
        select.select_ragged(grouped, "NVIDIA H200", forced=False)
    with pytest.raises(Unsupported, match="timed on H200 at 2048 x 4096 x 4096: XLA takes 6 us"):
        select.select(dataclasses.replace(PROBLEM, m=2048), "NVIDIA H200", forced=False)
