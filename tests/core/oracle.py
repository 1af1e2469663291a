"""A second, slow reading of a QTensor in numpy, which shares no code with the library."""

from __future__ import annotations

import numpy as np

from jaxquant.core.qtensor import QTensor

NF4 = (
    "-1 -.6961928 -.52507305 -.39491749 -.28444138 -.18477343 -.09105004 0"
    " .0795803 .1609302 .2461123 .33791524 .44070983 .562617 .72295684 1"
)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LOWEST_AND_STEP = {3: (-4, 1), 2: (-3, 2), 1: (-1, 2)}


def unpacked_codes(w: QTensor) -> np.ndarray:
    """Codes of the logical shape; packed ones are read from the bit stream of each 8."""
    codes = np.asarray(w.codes)
    if w.packed_axis is None:
        return codes
    bits, axis = w.qtype.bits, w.packed_axis
    stream = np.unpackbits(np.moveaxis(codes, axis, -1), axis=-1, bitorder="little")
    digits = stream.reshape(*stream.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    lowest, step = LOWEST_AND_STEP[bits]
    return np.moveaxis(lowest + step * digits[..., : w.packed_length], -1, axis)


def dequantize(w: QTensor, dtype: type = np.float32) -> np.ndarray:
    """(values - zero_point) * scale, every operation in `dtype`."""
    codes = unpacked_codes(w)
    if w.qtype.name == "nf4":
        table = np.array(w.qtype.table, dtype)
        np.testing.assert_allclose(table, [float(v) for v in NF4.split()], atol=1e-7)
        values = table[codes.astype(int) + 8]
    elif w.qtype.kind == "table":
        bits = codes.astype(int) & 15
        values = np.where(bits >= 8, -1.0, 1.0).astype(dtype) * np.array(E2M1, dtype)[bits & 7]
    else:
        values = codes.astype(dtype)
    if w.zero_point is not None:
        values = values - spread(np.asarray(w.zero_point).astype(dtype), w.shape)
    scale = dequantize(w.scale, dtype) if isinstance(w.scale, QTensor) else np.asarray(w.scale)
    return values * spread(scale.astype(dtype), w.shape)


def spread(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One value a block, repeated to `shape`."""
    for axis, n in enumerate(shape):
        part = np.repeat(part, n // part.shape[axis], axis=axis)
    return part
