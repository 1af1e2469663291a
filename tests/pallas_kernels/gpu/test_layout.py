"""Prepared weights, compiled for an H200: no program moves one, unprepared ones all are moved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_aot, gpu_layout

pytestmark = pytest.mark.skipif(
    not gpu_aot.available(),
    reason="JAX'S CUDA PLUGIN IS NOT INSTALLED: NOTHING IS COMPILED FOR GPU",
)


@pytest.fixture(scope="module")
def facts():
    environment = {**os.environ, **gpu_aot.ENVIRONMENT}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_layout"],
        env=environment,
        cwd=Path(gpu_layout.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(one["program"], one["codes"], one["prepared"]): one for one in found}


@pytest.mark.parametrize("codes", gpu_layout.SCHEMES)
@pytest.mark.parametrize("program", gpu_layout.PROGRAMS)
def test_a_prepared_weight_is_read_where_it_lies(facts, program, codes):
    ready, restored = (facts[program, codes, prepared] for prepared in (True, False))
    weights = len(gpu_layout.parameters(program))
    assert ready["kernels"] == restored["kernels"] == weights
    assert ready["moves"] == [] and ready["temporaries"] < ready["weight"]
    assert len(restored["moves"]) == weights and restored["temporaries"] >= restored["weight"]
    # On several devices each multiplies what it has: one sum for the weight whose rows are split.
    assert ready["gathers"] == 0 and ready["reduces"] == (program == "parallel")
