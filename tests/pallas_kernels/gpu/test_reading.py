"""What lanes hold: the register path of the GPU kernels, followed lane by lane without a GPU.

Interpret mode does not know registers. Here the words that each thread of a warpgroup loads, by
Mosaic GPU's own description of the layout, go through the same masks, and are put where the PTX
manual says that wgmma takes the elements of a matrix in registers from.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("THIS JAX HAS NO MOSAIC GPU: NO REGISTER WAS FOLLOWED", allow_module_level=True)

from jax.experimental.mosaic import gpu as mgpu  # noqa: E402

from jaxquant.pallas_kernels import packing  # noqa: E402
from jaxquant.pallas_kernels.gpu import (  # noqa: E402
    layouts,
    reading,
    reading_packed,
    reading_table,
)
from jaxquant.pallas_kernels.gpu.config import GpuConfig  # noqa: E402

ROWS, COLUMNS = 128, 256
THREADS = range(128)


def where(layout, shape, register, thread):
    """The element of an array that a thread's register begins with."""
    index = list(register)
    sizes = layout.tiled_tiling_shape

    def spread(number, dims):
        for dim in reversed(dims):
            size = sizes[dim] if isinstance(dim, int) else dim.times
            if isinstance(dim, int):
                index[dim] = number % size
            number //= size

    spread(thread // 32, layout.warp_dims)
    spread(thread % 32, layout.lane_dims)
    assert len(index) == len(layout.registers_shape(shape))
    return layout.tiling.untile_indices(tuple(index))


def wgmma_element(thread, register, part, itemsize):
    """Row and column of A's element [64, 32 / itemsize] in one of a thread's four registers.

    From the PTX manual's figures for wgmma .m64nNk16 and .m64nNk32, A in registers.
    """
    warp, lane = divmod(thread, 32)
    group, of_group = divmod(lane, 4)
    row = 16 * warp + group + 8 * (register % 2)
    per = 4 // itemsize
    return row, 4 * per * (register // 2) + per * of_group + part


@pytest.mark.parametrize("layout", [mgpu.WGMMA_LAYOUT, mgpu.WGMMA_LAYOUT_8BIT])
def test_mosaic_and_the_manual_agree(layout):
    itemsize = 2 if layout == mgpu.WGMMA_LAYOUT else 1
    shape = (64, 32 // itemsize)
    registers = list(np.ndindex(layout.registers_shape(shape)))
    assert len(registers) == 4
    for thread in THREADS:
        for number, register in enumerate(registers):
            want = wgmma_element(thread, number, 0, itemsize)
            assert where(layout, shape, register, thread) == want


CASES = [
    ("int4", "bfloat16"),
    ("int4", "int8"),
    ("float8_e4m3fn", "bfloat16"),
    ("float8_e5m2", "bfloat16"),
]


@pytest.mark.parametrize(("codes", "operand"), CASES)
def test_every_lane_feeds_the_right_codes(codes, operand):
    config = GpuConfig(16, 64, 128, 2, 1, "after", "bits", operand)
    words_of = reading.words_of(codes, config)
    values = every_code(codes)
    array = np.random.default_rng(0).choice(values, (ROWS, COLUMNS))
    stored = reading.stored(jnp.asarray(array, jnp.dtype(codes)), codes, config)
    words = np.asarray(stored)
    planes = reading.planes_of(words, codes, config)
    dtype = jnp.dtype(operand)
    parts = 4 // dtype.itemsize
    layout = reading.WORDS.to_mgpu()
    target = mgpu.WGMMA_LAYOUT if dtype.itemsize == 2 else mgpu.WGMMA_LAYOUT_8BIT
    matrix = np.full((ROWS, COLUMNS), np.nan)
    for register in np.ndindex(layout.registers_shape(words.shape)):
        for plane, numbers in enumerate(planes):
            place = reading.place_of(register, plane, len(planes))
            for thread in THREADS:
                row, word = where(layout, words.shape, register, thread)
                to_row, column = where(target, matrix.shape, place, thread)
                assert row == to_row
                held = numbers[row : row + 1, word].view(dtype).astype(np.float64)
                matrix[row, column : column + parts] = held
    got = (matrix - words_of.offset) * words_of.factor
    want = reading.arrange(jnp.asarray(array, jnp.float32), codes, config)
    np.testing.assert_array_equal(got, np.asarray(want))
    # And so for a part of the columns, as the body takes them; and in interpret mode.
    one = np.asarray(reading.convert(jnp.asarray(words), codes, config, interpret=True))
    np.testing.assert_array_equal(one.astype(np.float64), matrix)


def every_code(codes):
    if codes == "int4":
        return np.arange(-8, 8)
    every = np.arange(256).astype(np.uint8).view(jnp.dtype(codes)).astype(np.float64)
    return every[np.isfinite(every)]


# Exact in bfloat16, and all different.
TABLE = tuple(float(v) for v in (2 * np.arange(16) - 15) / 16)


def packed_case(codes):
    """Random codes' values [ROWS, COLUMNS], how they are stored, and the planes made of that."""
    rng = np.random.default_rng(1)
    if codes == "table4":
        array = rng.integers(-8, 8, (ROWS, COLUMNS))
        stored = jnp.asarray(array, jnp.int4)
        make = lambda words: reading_table.planes(  # noqa: E731
            words, reading_table.pairs(TABLE), interpret=True
        )
        return np.asarray(TABLE)[array + 8], stored, make
    bits = int(codes[-1])
    array = (
        rng.integers(-4, 4, (ROWS, COLUMNS))
        if bits == 3
        else 2 * rng.integers(0, 4, (ROWS, COLUMNS)) - 3
    )
    stored = packing.pack(jnp.asarray(array.T, jnp.int8), bits, 0).T
    make = lambda words: reading_packed.planes(  # noqa: E731
        words, bits, reading_packed.MAGIC, interpret=True
    )
    return array, stored, make


@pytest.mark.parametrize("codes", ["int2", "int3", "table4"])
def test_every_lane_feeds_the_right_values_of_packed_codes_and_tables(codes):
    """As above; words of int3 reach their lanes by `deal`, which has a test of its own."""
    config = GpuConfig(16, 64, 128, 2, 1, "after", "bits")
    values, array, make = packed_case(codes)
    words = reading.stored(array, codes, config)
    planes = [np.asarray(plane) for plane in make(words)]
    affine = [(1.0, 0.0)] * 4 if codes == "table4" else reading_packed.affine(int(codes[-1]))
    layout, target = layouts.WORDS.to_mgpu(), mgpu.WGMMA_LAYOUT
    matrix = np.full((ROWS, COLUMNS), np.nan)
    for register in np.ndindex(layout.registers_shape(planes[0].shape)):
        for plane, (numbers, (factor, summand)) in enumerate(zip(planes, affine, strict=True)):
            place = reading.place_of(register, plane, len(planes))
            for thread in THREADS:
                row, word = where(layout, planes[0].shape, register, thread)
                to_row, column = where(target, matrix.shape, place, thread)
                assert row == to_row
                held = numbers[row : row + 1, word].view(jnp.bfloat16).astype(np.float64)
                matrix[row, column : column + 2] = held * factor + summand
    want = reading.arrange(jnp.asarray(values, jnp.float32), codes, config)
    np.testing.assert_array_equal(matrix, np.asarray(want))


@pytest.mark.parametrize("byte", range(4))
def test_a_look_up_is_in_the_lane_s_own_bank(byte):
    """Of words at random: the entry of the byte, and no two lanes of a warp in the same bank."""
    pairs = np.asarray(reading_table.pairs(TABLE))
    words = np.random.default_rng(byte).integers(0, 2**32, 1000, np.uint32)
    shift = reading_table.row_shift(byte)
    rows = (words >> shift if shift > 0 else words << -shift) & reading_table.ROW_MASK
    for lane in range(32):
        at = rows | lane
        assert (at % reading_table.BANKS == lane).all()
        np.testing.assert_array_equal(pairs.reshape(-1)[at], pairs[(words >> 8 * byte) & 255, lane])


def test_three_words_a_lane_are_dealt_to_it():
    """`reading_packed.deal` moves registers only: what it names stays in the thread that has it."""
    words, threes = layouts.WORDS.to_mgpu(), layouts.WORDS_BY_THREE.to_mgpu()
    for register in np.ndindex(words.registers_shape((ROWS, 8))):
        for i in range(3):
            own = (*register[:-1], i, register[-1])
            for thread in THREADS:
                row, word = where(words, (ROWS, 8), register, thread)
                assert where(threes, (ROWS, 24), own, thread) == (row, 3 * word + i)


@pytest.mark.parametrize("groups", [2, 4])
def test_lanes_have_the_scales_of_their_groups(groups):
    """`reading.spread_by_lane`, by the order in which it takes registers."""
    scales, operand = layouts.scales_by_lane(groups).to_mgpu(), mgpu.WGMMA_LAYOUT
    shape = (ROWS, 16)
    sources = list(np.ndindex(scales.registers_shape((groups, ROWS))))
    for register in np.ndindex(operand.registers_shape(shape)):
        source = sources[2 * register[0] + register[4]]
        for thread in THREADS:
            row, column = where(operand, shape, register, thread)
            lane = column // 2 % layouts.LANES
            want = (lane * groups // layouts.LANES, row)
            assert where(scales, (groups, ROWS), source, thread) == want
