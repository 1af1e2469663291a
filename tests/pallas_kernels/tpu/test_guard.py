"""No kernel becomes slower by the TPU compiler's account: `benchmarks.tpu_guard` has the figures.

After a change that is meant to alter the schedules: `python -m benchmarks.tpu_guard`.
"""

import dataclasses

import pytest

from benchmarks import tpu_guard
from benchmarks.tpu_aot import Job, available, compiler, measure
from benchmarks.tpu_programs import program
from jaxquant.pallas_kernels.tpu.chips import CHIPS

pytestmark = pytest.mark.skipif(
    not available(),
    reason="THE TPU COMPILER IS NOT INSTALLED (pip install libtpu): NO SCHEDULE WAS COMPARED",
)


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_no_kernel_is_slower_than_its_record(chip):
    known = tpu_guard.records()
    same = known.get(compiler())
    now = tpu_guard.measured(CHIPS[chip])
    assert set(now) == {tpu_guard.where(chip, *kernel) for kernel in tpu_guard.KERNELS}
    if same is None:  # bounds relative to bfloat16, which the same compiler made
        found = {name: tpu_guard.gain_lost(figures, name, known) for name, figures in now.items()}
    else:
        found = {name: tpu_guard.worse(figures, same[name]) for name, figures in now.items()}
    hint = "if this is meant: python -m benchmarks.tpu_guard"
    assert {name: what for name, what in found.items() if what} == {}, hint


def test_a_worse_config_is_caught():
    """Smaller blocks and the compiler's own conversion of int4, which the rules avoid on v5e."""
    item = program(CHIPS["v5e"], "w4a16 g128", 16, 2048, 2048)
    fields = dataclasses.asdict(item.config) | {"reading": "cast", "bn": 256}
    jobs = [
        Job("now", item.job.maker, item.job.arguments),
        Job("worse", item.job.maker, item.job.arguments | {"config": fields}),
    ]
    got = {name: tpu_guard.figures(static) for name, static in measure(jobs, "v5e").items()}
    assert tpu_guard.worse(got["now"], got["now"]) == []
    assert any("cycles" in line for line in tpu_guard.worse(got["worse"], got["now"]))
    assert tpu_guard.worse(got["now"] | {"error": "no"}, got["now"])
    assert tpu_guard.worse(got["now"] | {"spills": 1000}, got["now"])


def test_a_lost_gain_is_caught():
    known = {"one": {"kernel": {"gain": 3.0}}, "another": {"kernel": {"gain": 2.0}}}
    assert tpu_guard.gain_lost({"gain": 1.6, "error": None}, "kernel", known) == []
    assert tpu_guard.gain_lost({"gain": 1.4, "error": None}, "kernel", known)
    assert tpu_guard.gain_lost({"gain": 9.0, "error": "does not compile"}, "kernel", known)
