"""Tables of configs: what is shipped is valid and used; what is broken is refused."""

import dataclasses
import json

import pytest

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu import heuristics, table
from jaxquant.pallas_kernels.tpu.chips import CHIPS

ENTRY = {
    "codes": "int4",
    "x_dtype": "bfloat16",
    "group": 128,
    "rows": 16,
    "columns": 4096,
    "depth": 4096,
    "bm": 16,
    "bn": 384,
    "bk": 2048,
    "scale": "after",
    "reading": "cast",
    "operand": "bfloat16",
    "gain": 1.5,
}


def text(*entries):
    return json.dumps({"entries": list(entries)})


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_shipped_entries_are_what_is_chosen(chip):
    for entry in table.load(chip).values():
        problem = MatmulProblem(
            entry.rows, entry.depth, entry.columns, entry.codes, entry.x_dtype, entry.group
        )
        config = heuristics.choose_config(problem, CHIPS[chip])
        names = ("bm", "bn", "bk", "scale", "reading", "operand")
        assert {n: getattr(config, n) for n in names} == {n: getattr(entry, n) for n in names}
        assert config != heuristics.by_rules(problem, CHIPS[chip])
        assert entry.gain > 1


def test_an_entry_serves_its_bucket_and_nothing_else(monkeypatch):
    entries = table.parse(text(ENTRY), "a table")
    monkeypatch.setattr(table, "load", lambda chip: entries if chip == "v6e" else {})
    problem, v6e = MatmulProblem(5, 4096, 3072, "int4", group=128), CHIPS["v6e"]
    for served in (problem, dataclasses.replace(problem, n=7680)):
        config = heuristics.choose_config(served, v6e)
        assert (config.bm, config.bn, config.bk, config.reading) == (8, 384, 2048, "cast")
    others = [
        dataclasses.replace(problem, m=17),
        dataclasses.replace(problem, k=8192),
        dataclasses.replace(problem, group=64),
        dataclasses.replace(problem, codes="int8"),
    ]
    for other in others:
        assert heuristics.choose_config(other, v6e) == heuristics.by_rules(other, v6e)
    assert heuristics.choose_config(problem, CHIPS["v5e"]) == heuristics.by_rules(
        problem, CHIPS["v5e"]
    )


def test_blocks_that_do_not_divide_k_are_left_to_the_rules(monkeypatch):
    entry = ENTRY | {"group": 96, "reading": "bits"}
    entries = table.parse(text(entry), "a table")
    monkeypatch.setattr(table, "load", lambda chip: entries)
    problem = MatmulProblem(16, 96 * 3, 512, "int4", group=96)
    chosen = heuristics.choose_config(problem, CHIPS["v6e"])
    assert chosen == heuristics.by_rules(problem, CHIPS["v6e"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 17}, "rows is one of"),
        ({"codes": "int5"}, "codes is one of"),
        ({"scale": "later"}, "scale is one of"),
        ({"reading": "guess"}, "reading is one of"),
        ({"bm": 8}, "bm is a multiple of 16"),
        ({"bn": 100.0}, "bn is a multiple of 128"),
        ({"bk": -128}, "bk is a multiple of 128"),
        ({"bk": 0}, "bk is a multiple of 128"),
        ({"group": -32}, "group is a multiple of 32"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_broken_entry_is_refused(change, message):
    with pytest.raises(ValueError, match=f"a table, entry 1: .*{message}"):
        table.parse(text(ENTRY | {"rows": 64}, ENTRY | change), "a table")


def test_missing_fields_and_repetition():
    with pytest.raises(ValueError, match="entry 0: .*gain"):
        table.parse(text({k: v for k, v in ENTRY.items() if k != "gain"}), "a table")
    with pytest.raises(ValueError, match="entry 1: there is one"):
        table.parse(text(ENTRY, ENTRY), "a table")
