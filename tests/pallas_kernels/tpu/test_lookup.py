"""Values of 4-bit tables, bit by bit: every code, and values that arithmetic would not keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels.tpu import lookup, reading

TABLES = {
    "nf4": get_qtype("nf4").table,
    "special": (
        *(0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 2.0**-133),
        *(3.0e38, -3.0e38, 1 / 3, -1 / 3, 257.0, 1.0, -1.0, 0.1),
    ),
}
ROWS, COLUMNS = 128, 200  # two units; a register of columns and a part of one


def looked_up(way, table, codes):
    """bfloat16 values in the order of the reading, made in a kernel."""
    rows = lookup.table_bytes(table) if way == "bytes of table" else lookup.table_rows(table)

    def kernel(codes, table, out):
        if way == "bytes of table":
            out[...] = lookup.values_from_codes(codes[...], table)
        else:
            words = pltpu.bitcast(codes[...], jnp.uint32)
            out[...] = lookup.values_from_words(words, ROWS // 64, table)

    shape = jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)
    return jax.jit(pl.pallas_call(kernel, out_shape=shape, interpret=True))(codes, rows)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("way", ["table", "bytes of table"])
def test_values_are_those_of_the_table_in_bfloat16(way, table):
    columns = COLUMNS if way == "bytes of table" else 256
    codes = np.random.default_rng(0).integers(-8, 8, (ROWS, columns))
    values = np.asarray(TABLES[table], np.float32).astype(jnp.bfloat16)
    want = values[codes + 8]
    if way == "table":
        order = reading.source_row("table4", way, np.arange(ROWS))
        want = want[order]
    got = np.asarray(looked_up(way, TABLES[table], jnp.asarray(codes, jnp.int8).astype(jnp.int4)))
    assert set(codes.flat) == set(range(-8, 8))
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize("rows", [lookup.table_rows, lookup.table_bytes])
def test_a_table_has_16_values(rows):
    with pytest.raises(ValueError, match="has 16 values, not 15"):
        rows((1.0,) * 15)
