"""A weight with an input factor or turn stands for what it was made of, wherever it is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core import structure
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.qtensor import QTensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.rotations import hadamard, largest_hadamard
from jaxquant.core.structure import Unstructured
from jaxquant.core.turns import InputTurn, UnmetInputError, input_of

KEY = jax.random.key(0)


def made(shape, axis, *, factor=True, size=0, inner=1, blocks=None):
    """(weight, its QTensor): the codes hold H^T (w / factor), so that w is what it stands for."""
    w = np.asarray(jax.random.normal(KEY, shape))
    numbers = [1] * len(shape)
    numbers[axis] = shape[axis]
    f = 2.0 ** np.random.default_rng(0).integers(-2, 3, numbers) if factor else np.ones(numbers)
    inside = jnp.asarray(w / f)
    turn = None
    if size:
        turn = InputTurn(axis - len(shape), size, inner)
        inside = turn.matrix.apply(inside, axis, inner)
    blocks = blocks or [n if a == axis else 1 for a, n in enumerate(shape)]
    q = quantize_array(inside, "int8", tuple(blocks))
    q = q.replace(input_factor=jnp.asarray(f, jnp.float32) if factor else None, input_turn=turn)
    return w, q.validate()


CASES = [{}, {"size": 12}, {"size": 4, "inner": 3}, {"factor": False, "size": 24}]


@pytest.mark.parametrize("how", CASES)
def test_it_stands_for_the_weight_and_multiplies_the_input(how):
    w, q = made((24, 5), 0, **how)
    np.testing.assert_allclose(q.dequantize(), w, atol=0.08 * np.abs(w).max())
    np.testing.assert_allclose(jq.dequantize({"w": q})["w"], q.dequantize())
    x = jax.random.normal(jax.random.key(1), (3, 24))
    got = quantized_dot_general(x, q, (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(got, x @ q.dequantize(), rtol=1e-4, atol=1e-4)
    left = quantized_dot_general(x, q, (((0,), (1,)), ((), ())), weight_side="lhs")
    np.testing.assert_allclose(left, (x @ q.dequantize()).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", CASES)
@pytest.mark.parametrize(
    "move",
    [
        lambda s, w: s.transpose(w, (2, 0, 1)),
        lambda s, w: s.reshape(w, (4, 24, 6, 1)),
        lambda s, w: s.reshape(w, (2, 2, 24, 6)),
        lambda s, w: s.slice(w, (1, 0, 2), (3, 24, 6)),
        lambda s, w: s.rev(w, (2,)),
        lambda s, w: s.expand_dims(w, (0, 2)),
        lambda s, w: s.squeeze(s.slice(w, (1, 0, 0), (2, 24, 6)), (0,)),
        lambda s, w: s.dynamic_slice(w, (jnp.int32(1), 0, 0), (1, 24, 6)),
        lambda s, w: s.concatenate([w, w], 2) if w.input_factor is None else w,
        lambda s, w: s.concatenate([w, w], 0) if w.input_factor is None else w,
    ],
)  # fmt: skip
def test_moves_keep_what_it_stands_for(how, move):
    _, q = made((4, 24, 6), 1, **how)
    moved = move(structure, q)
    assert isinstance(moved, QTensor)
    want = move(_Floats, QTensorOfFloats(q.dequantize(), q.input_factor))
    np.testing.assert_allclose(moved.validate().dequantize(), want.values, rtol=1e-5, atol=1e-6)


class QTensorOfFloats:
    """The float array, with as much of a QTensor as the moves above look at."""

    def __init__(self, values, factor):
        self.values, self.input_factor = values, factor


class _Floats:
    """`structure` for floats."""

    @staticmethod
    def _on(fn):
        return lambda w, *args: QTensorOfFloats(fn(w.values, *args), w.input_factor)

    transpose = _on(jnp.transpose)
    reshape = _on(jnp.reshape)
    slice = _on(jax.lax.slice)
    rev = _on(jax.lax.rev)
    expand_dims = _on(jnp.expand_dims)
    squeeze = _on(jax.lax.squeeze)
    dynamic_slice = _on(jax.lax.dynamic_slice)

    @staticmethod
    def concatenate(ws, axis):
        return QTensorOfFloats(jnp.concatenate([w.values for w in ws], axis), None)


@pytest.mark.parametrize(
    "move",
    [
        lambda w: structure.reshape(w, (4, 4, 6, 6)),
        lambda w: structure.rev(w, (1,)),
        lambda w: structure.slice(w, (0, 0, 0), (4, 12, 6)),
        lambda w: structure.dynamic_slice(w, (0, jnp.int32(1), 0), (4, 12, 6)),
        lambda w: structure.concatenate([w, w], 1),
    ],
)
def test_what_would_cut_a_turned_axis_is_refused(move):
    with pytest.raises(Unstructured):
        move(made((4, 24, 6), 1, factor=False, size=12)[1])


def test_factors_survive_splits_and_merges_of_their_axis():
    _, q = made((24, 6), 0)
    for shape in ((4, 6, 6), (2, 3, 4, 6), (12, 12)):
        moved = structure.reshape(q, shape)
        np.testing.assert_allclose(moved.dequantize(), q.dequantize().reshape(shape), rtol=1e-6)
    back = structure.reshape(structure.reshape(q, (4, 6, 6)), (24, 6))
    assert back.input_factor.shape == (24, 1)


def test_the_wrong_axis_and_bad_fields_are_named():
    _, q = made((24, 6), 0, size=8)
    x = jnp.ones((3, 6))
    with pytest.raises(UnmetInputError, match="axis 0, which this product does not sum"):
        quantized_dot_general(x, q, (((1,), (1,)), ((), ())))
    with pytest.raises(UnmetInputError, match="turned along axis -2"):
        input_of(x, None, q.input_turn, (None, 1))
    with pytest.raises(ValueError, match="invariant 9.*input_factor shape"):
        q.replace(input_factor=jnp.ones((7, 1))).validate()
    with pytest.raises(ValueError, match="invariant 10.*runs of 16"):
        q.replace(input_turn=InputTurn(-2, 16)).validate()
    with pytest.raises(ValueError, match="no Hadamard matrix of 6 rows"):
        q.replace(input_turn=InputTurn(-2, 6)).validate()


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 28, 64, 128, 384, 1344])
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(size):
    matrix = hadamard(size).matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-12)


def test_the_largest_hadamard_divides():
    assert [largest_hadamard(n) for n in (1, 7, 6, 12, 18, 100, 1536, 4304)] == [
        1, 1, 2, 12, 2, 20, 1536, 16,
    ]  # fmt: skip
