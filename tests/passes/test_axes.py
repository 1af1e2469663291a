"""Provenance against brute force: every element of a value knows the indices it came from."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.core.blocks import divisors
from jaxquant.core.qtensor import make_qtensor
from jaxquant.core.structure import Unstructured
from jaxquant.passes import axes
from jaxquant.passes.op_use import axis_uses
from tests.passes.moves import execute, follow, moves, numbered, restructure


def predicted(origin, shape, axis):
    """Index along a parameter axis of each element, up to a constant."""
    total = np.zeros(shape, int)
    for dim, factors in enumerate(origin.dims):
        digits = np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        minor = 1
        for f in reversed(factors):
            if f.axis == axis:
                total = total + digits // minor % f.size * f.inner
            minor *= f.size
    return total


@settings(max_examples=400, deadline=None)
@given(moves())
def test_every_element_comes_from_where_the_origin_says(case):
    shape, chain = case
    try:
        origin, out = follow(axes.whole(0, shape), shape, chain)
    except Unstructured:
        return
    for dim, n in enumerate(out):
        assert origin.size(dim) == n
    for axis in range(len(shape)):
        truth = execute(np.indices(shape)[axis], chain)
        assert truth.shape == out
        assert len(np.unique(truth - predicted(origin, out, axis))) == 1


@settings(max_examples=200, deadline=None)
@given(moves())
def test_pieces_of_every_axis_multiply_to_its_length(case):
    shape, chain = case
    try:
        origin, _ = follow(axes.whole(0, shape), shape, chain)
    except Unstructured:
        return
    for use in axis_uses(origin, shape, lambda dim: "free"):
        assert np.prod([length for length, _ in use.parts]) == use.length


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=3), st.data())
def test_reshape_without_slices_always_follows_aligned_splits(shape, data):
    """Splitting axes and merging neighbours again never loses the way."""
    fine = tuple(p for n in shape for p in ((2, 2) if n == 4 else (n,)))
    merged, i = [], 0
    while i < len(fine):
        take = data.draw(st.integers(1, len(fine) - i))
        merged.append(int(np.prod(fine[i : i + take])))
        i += take
    chain = [("reshape", fine), ("reshape", tuple(merged)), ("reshape", tuple(shape))]
    origin, _ = follow(axes.whole(0, shape), shape, chain)
    assert origin.dims == axes.whole(0, shape).dims


@settings(max_examples=50, deadline=None)
@given(moves(), st.data())
def test_blocks_that_a_use_allows_survive_the_way(case, data):
    """Where the way can be followed, codes and scales can follow it, exactly."""
    shape, chain = case
    try:
        origin, out = follow(axes.whole(0, shape), shape, chain)
    except Unstructured:
        return
    roles = data.draw(st.lists(st.sampled_from(["contract", "free", "batch"]), min_size=len(out)))
    found = axis_uses(origin, shape, roles.__getitem__)
    blocks = [
        data.draw(st.sampled_from([n for n in divisors(use.contracted) if use.allows(n)]))
        for use in found
    ]
    for use in found:  # blocks along merged axes must nest
        if any(blocks[use.axis] > 1 and m >= 0 and blocks[m] < shape[m] for m in use.minors):
            return
    if any(major == -1 and blocks[minor] < shape[minor] for major, minor in origin.merges):
        return
    counts = [n // b for n, b in zip(shape, blocks, strict=True)]
    scale = jnp.arange(1, 1 + int(np.prod(counts)), dtype=jnp.float32).reshape(counts)
    w = make_qtensor(numbered(shape).astype(jnp.int8), scale, qtype="int8")
    expected = execute(np.asarray(w.dequantize()), chain)
    np.testing.assert_array_equal(restructure(w, chain).dequantize(), expected)


def uses(shape, chain, roles):
    origin, _ = follow(axes.whole(0, shape), shape, chain)
    return axis_uses(origin, shape, roles.__getitem__)


def test_heads_split_from_a_contracted_axis_limit_its_blocks():
    (use, _) = uses((512, 16), [("reshape", (8, 64, 16))], ["free", "contract", "free"])
    assert use.parts == ((8, "free"), (64, "contract"))
    assert (use.role, use.contracted, use.splits) == ("contract", 64, (64,))
    assert [b for b in (1, 32, 64, 96, 128) if use.allows(b)] == [1, 32, 64, 128]


def test_a_contracted_major_piece_gives_no_block():
    (use,) = uses((512,), [("reshape", (8, 64))], ["contract", "free"])
    assert (use.role, use.contracted) == ("free", 1)


def test_split_and_contracted_in_full_is_one_run():
    use, _ = uses((512, 16), [("reshape", (8, 64, 16))], ["contract", "contract", "free"])
    assert (use.parts, use.contracted, use.splits) == (((512, "contract"),), 512, (64,))


def test_a_slice_aligns_blocks_but_for_the_whole_axis():
    use, _ = uses((12, 2), [("slice", (0, 4, 12))], ["contract", "free"])
    assert use.align == 4
    assert [b for b in (1, 2, 3, 4, 6, 12) if use.allows(b)] == [1, 2, 4, 12]


def test_an_index_leaves_a_layer_axis():
    use, _ = uses((5, 4), [("slice", (0, 2, 3)), ("reshape", (4,))], ["contract"])
    assert (use.is_layer, use.parts) == (True, ((5, "layer"),))


@pytest.mark.parametrize(
    ("old", "new"), [((6, 4), (4, 6)), ((2, 3), (3, 2)), ((9, 2), (6, 3)), ((0, 2), (2, 0))]
)
def test_reshapes_across_the_grain_end_the_way(old, new):
    with pytest.raises(Unstructured):
        axes.reshape(axes.whole(0, old), old, new)


def test_a_slice_of_joined_parameters_keeps_the_ones_inside():
    first, second = axes.whole(0, (4, 3)), axes.shift(axes.whole(1, (4, 5)), 1, 3)
    assert axes.slice_dim(first, 1, 8, 3, 8, 1) is None
    cut = axes.slice_dim(second, 1, 8, 3, 8, 1)
    assert (cut.starts, cut.size(1)) == ((0, 0), 5)
    part = axes.slice_dim(second, 1, 8, 2, 6, 1)
    assert (part.starts, part.size(1)) == ((0, 1), 3)


def test_a_shard_counts_as_an_aligned_slice():
    origin = axes.shard_dim(axes.whole(0, (12, 4)), 0, 3)
    use, _ = axis_uses(origin, (12, 4), lambda dim: "contract")
    assert (origin.size(0), use.align, use.contracted) == (4, 4, 12)
    with pytest.raises(Unstructured):
        axes.shard_dim(axes.reshape(axes.whole(0, (3, 4)), (3, 4), (12,)), 0, 4)
