"""The tree in the committed checkpoint `format1`, and how to write it.

``python -m tests.io.fixture DIRECTORY`` writes the tree, ``--check`` reads one: so that what one
pair of Python and jax versions writes can be read by another. The committed one was written by
format version 1 with jax 0.10.2 and is never rewritten: as long as `test_format.py` passes, the
checkpoints that users have can be read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import freeze

from jaxquant import io
from jaxquant.core.qtensor import make_qtensor
from jaxquant.core.qtypes import get_qtype, qtype_names
from jaxquant.core.recipe import ActScheme, Rule
from jaxquant.pallas_kernels import packing

PATH = Path(__file__).parent / "format1"


def _codes(shape, dtype) -> jax.Array:
    """Codes that any version of any library computes alike."""
    size = int(np.prod(shape))
    values = (np.arange(size) * 37 + 11) % 256
    if dtype == "int4":
        return jnp.asarray((values % 16 - 8).reshape(shape), jnp.int4)
    raw = values.astype(np.uint8)
    if dtype.startswith("float8"):
        raw &= 0x3F  # finite
    return jnp.asarray(raw.view(jnp.dtype(dtype)).reshape(shape))


def tree() -> dict[str, Any]:
    """Every qtype and every container of format version 1."""
    rule = Rule("**", op="attention", act=ActScheme("int8"))
    scale = jnp.asarray([[0.5, 1.0, 2.0], [0.25, 1.5, 3.0]], jnp.float32)
    weights = {}
    for name in qtype_names():
        q = get_qtype(name)
        codes = _codes((packing.packed_size(16, q.bits), 3) if q.packed else (16, 3), q.storage)
        packed = {"packed_axis": 0, "packed_length": 16} if q.packed else {}
        part: Any = scale.astype(q.scale_dtype or jnp.float32)
        if q.scale_qtype:
            part = make_qtensor(
                _codes((2, 3), get_qtype(q.scale_qtype).storage),
                jnp.full((1, 1), 0.75),
                qtype=q.scale_qtype,
            )
        weights[name] = make_qtensor(codes, part, qtype=name, dtype=jnp.bfloat16, **packed)
    static = make_qtensor(
        _codes((16, 3), "int8"),
        scale,
        scale - 1,
        jnp.full((1, 1), 0.125),
        qtype="int8",
        act=ActScheme("int8", mode="static"),
        op_rules=(rule,),
    )
    return {
        "params": {"weights": weights, "a/b.c": static},
        "frozen": freeze({"box": nn.Partitioned(weights["int4"], ("data", None))}),
        "logical": nn.LogicallyPartitioned(jnp.ones((2,)), ("x",), rules=(("x", "data"),)),
        "sequence": [(None, True, -3, 0.1, 1 + 2j, "text", b"bytes"), [], {}, ()],
        "numpy": np.arange(4, dtype=np.int64),
        "scalar": np.float32(0.1),
        "key": jax.random.wrap_key_data(jnp.asarray([1, 2], jnp.uint32), impl="threefry2x32"),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "uint4": jnp.asarray([1, 15], jnp.uint4),
        7: jnp.asarray([1.5, -2.0], jnp.bfloat16),
    }


METADATA = {"why": "format stability", "list": [1, None, True]}


def check(path: Path) -> None:
    """Reads a checkpoint that `main` wrote and compares it with the tree."""
    from tests.io.trees import assert_same

    assert_same(io.restore(path), tree())
    info = io.inspect(path)
    assert info.recipe is not None and info.recipe.name == "w4a16_g128"
    assert info.metadata == METADATA


def main() -> None:
    """Writes or checks the fixture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--check", action="store_true", help="read instead of write")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.directory)
    else:
        io.save(arguments.directory, tree(), recipe="w4a16_g128", metadata=METADATA)


if __name__ == "__main__":
    main()
