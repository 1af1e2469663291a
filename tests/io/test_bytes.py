"""Bytes on disk of codes that do not compress, and memory while they are written and read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import io
from tests.io.trees import random_qtensor

SHAPE = (2048, 2048)


@pytest.mark.parametrize(
    ("qtype", "group", "most"),
    [
        ("int8", SHAPE[0], 0.51),
        ("int4", 128, 0.28),
        ("nf4", 64, 0.29),
        ("mxfp4", 32, 0.28),
        ("nvfp4", 16, 0.29),
        ("int3", 64, 0.23),
        ("int2", 64, 0.16),
        ("int1", 64, 0.10),
        ("float8_e4m3", SHAPE[0], 0.51),
    ],
)
def test_bytes_against_bf16(qtype, group, most, tmp_path):
    """All files of the checkpoint, scales and metadata included, over two bytes a weight."""
    weight = random_qtensor(qtype, SHAPE, group)
    io.save(tmp_path / "c", {"w": weight})
    files = [f for f in (tmp_path / "c").rglob("*") if f.is_file()]
    measured = sum(f.stat().st_size for f in files)
    assert measured == io.inspect(tmp_path / "c").disk_bytes
    ratio = measured / (2 * np.prod(SHAPE))
    print(f"\n{qtype} in groups of {group}: {ratio:.3f}")  # the table in docs/checkpoints.md
    assert ratio <= most
    # No more than one part in fifty, and what Orbax writes about a few arrays, beyond the bits.
    assert measured <= 1.02 * weight.nbytes + 40_000


_MEASURE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxquant import io

def memory(name):
    status = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+) kB", status)[1]) / 1024

path, mode, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
io.save(path + "-warm", {"x": jnp.ones(1 << 17, jnp.int8)}, overwrite=True)
io.restore(path + "-warm")
if mode == "save":
    tree = {}
    for i in range(size // 8):
        bits = np.random.default_rng(i).integers(-128, 128, (8, 1 << 20), np.int8)
        tree[str(i)] = jax.device_put(bits)
    jax.block_until_ready(tree)
    del bits
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = memory("VmRSS")
if mode == "save":
    io.save(path, tree)
else:
    tree = io.restore(path)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
def test_peak_memory(tmp_path):
    """Saving takes at most one copy more; restoring the result and never a float copy.

    What Orbax holds while it reads depends on how its threads run: up to 144 MiB were seen here for
    64 MiB of result. A float32 copy of these codes would be 256 MiB beside it.
    """
    size = 64  # MiB

    def measure(mode):
        command = [sys.executable, "-c", _MEASURE, str(tmp_path / "c"), mode, str(size)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return float(done.stdout)

    assert measure("save") <= 1.25 * size
    assert measure("restore") <= 3 * size


def test_scales_keep_their_dtype(tmp_path):
    weight = random_qtensor("int4", (64, 8), 32).replace(scale=jnp.ones((2, 8), jnp.bfloat16))
    io.save(tmp_path / "c", weight)
    assert io.restore(tmp_path / "c").scale.dtype == jnp.bfloat16
