"""Values of 4-bit tables, bit by bit: every code, and values that arithmetic would not keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels.tpu import lookup

TABLES = {
    "nf4": get_qtype("nf4").table,
    "special": (
        *(0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 2.0**-133),
        *(3.0e38, -3.0e38, 1 / 3, -1 / 3, 257.0, 1.0, -1.0, 0.1),
    ),
}
ROWS, COLUMNS = 128, 200  # a register of columns and a part of one


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("reading", ["table", "bytes of table"])
def test_values_are_those_of_the_table_in_bfloat16(reading, table):
    codes = np.random.default_rng(0).integers(-8, 8, (ROWS, COLUMNS))
    values = np.asarray(TABLES[table], np.float32).astype(jnp.bfloat16)

    def kernel(codes, table, out):
        out[...] = lookup.table_values(reading, codes[...], table)

    shape = jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)
    stored = jnp.asarray(codes, jnp.int8).astype(jnp.int4)
    rows = lookup.table_rows(reading, TABLES[table])
    got = jax.jit(pl.pallas_call(kernel, out_shape=shape, interpret=True))(stored, rows)
    assert set(codes.flat) == set(range(-8, 8))
    bits = np.asarray(got).view(np.uint16)
    np.testing.assert_array_equal(bits, values[codes + 8].view(np.uint16))


def test_a_table_has_16_values():
    with pytest.raises(ValueError, match="has 16 values, not 15"):
        lookup.table_rows("table", (1.0,) * 15)
