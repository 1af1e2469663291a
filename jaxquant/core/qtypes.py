"""The storage formats a weight can have, one frozen `QType` each, in a registry by name.

Used by every floor that must know how codes stand for numbers: encoding, kernels, plans, files.
A qtype says nothing about scales' layout (that follows from shapes, see `QTensor.block_shape`)
and nothing about what happens to activations. No arrays are made here.

Grids. A code stands for the real number `value(code)`; a weight is
`(value(code) - zero_point) * scale`.

* int8, int4, int3: value = code. Symmetric quantization uses -127..127, -7..7, -3..3;
  asymmetric uses all codes (-128..127, -8..7, -4..3).
* int2, int1: the odd grid, codes {-3, -1, 1, 3} and {-1, 1}, so that symmetric quantization
  uses every code (plain two's complement would leave one of four unused). There is no zero
  code: a block of zeros has scale 0 when it is symmetric.
* float8_e4m3 (fn: no infinities, largest 448), float8_e5m2 (largest 57344): value = code.
* nf4: codes are int4, value = table[code + 8] (QLoRA, arXiv 2305.14314, appendix E).
* mxfp4, nvfp4: codes are int4 whose four bits *are* the E2M1 float's bits, so that hardware
  and other libraries' files need no translation; value = table[code + 8]. (OCP
  Microscaling Formats 1.0; NVFP4 has an E4M3 scale per 16 and one float32 scale on top.)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# index = code + 8: codes -8..-1 are the bit patterns 1000..1111, sign and magnitude.
_FP4 = tuple(-v for v in _E2M1) + _E2M1


@dataclasses.dataclass(frozen=True)
class QType:
    """How codes are stored and what numbers they stand for.

    Attributes:
      name: key in the registry.
      bits: bits a code takes where the device stores it densely.
      kind: "int" (uniform grid), "float" (an 8-bit float dtype), "table" (16 values).
      storage: dtype name of the stored codes; "uint8" for packed types, whose unpacked
        codes are int8.
      qmin: smallest code of the whole grid (ints) or smallest value (floats, tables).
      qmax: largest code (ints) or largest value (floats, tables). Symmetric integer
        quantization uses -qmax..qmax.
      step: distance of neighbouring integer codes: 1, or 2 on the odd grids of int2 and int1.
      packed: codes are bit-packed along one axis by `jaxquant.pallas_kernels.packing`.
      table: for kind "table", the value of code c is table[c + 8].
      group_size: group length the format prescribes (mxfp4 32, nvfp4 16), else None.
      default_group_size: group length to take where a recipe names none, or None.
      scale_dtype: scale dtype the format prescribes (mxfp4: float8_e8m0fnu), else None.
      scale_qtype: name of the qtype the scale itself is stored in (nvfp4), else None.
    """

    name: str
    bits: int
    kind: Literal["int", "float", "table"]
    storage: str
    qmin: float
    qmax: float
    step: int = 1
    packed: bool = False
    table: tuple[float, ...] | None = None
    group_size: int | None = None
    default_group_size: int | None = None
    scale_dtype: str | None = None
    scale_qtype: str | None = None

    @property
    def asymmetric(self) -> bool:
        """Whether the type can carry a zero point (integers only)."""
        return self.kind == "int"

    @property
    def unpacked_storage(self) -> str:
        """Dtype name of codes that are not bit-packed."""
        return "int8" if self.packed else self.storage

    def __repr__(self) -> str:
        """The name: everything else follows from it."""
        return f"QType({self.name!r})"


def _table(name: str, table: tuple[float, ...], **kwargs: object) -> QType:
    return QType(name, 4, "table", "int4", min(table), max(table), table=table, **kwargs)  # type: ignore[arg-type]


_REGISTRY: dict[str, QType] = {
    q.name: q
    for q in (
        QType("int8", 8, "int", "int8", -128, 127),
        QType("int4", 4, "int", "int4", -8, 7),
        QType("int3", 3, "int", "uint8", -4, 3, packed=True),
        QType("int2", 2, "int", "uint8", -3, 3, step=2, packed=True),
        QType("int1", 1, "int", "uint8", -1, 1, step=2, packed=True),
        QType("float8_e4m3", 8, "float", "float8_e4m3fn", -448.0, 448.0),
        QType("float8_e5m2", 8, "float", "float8_e5m2", -57344.0, 57344.0),
        _table("nf4", _NF4, default_group_size=64),
        _table(
            "mxfp4",
            _FP4,
            group_size=32,
            default_group_size=32,
            scale_dtype="float8_e8m0fnu",
        ),
        _table("nvfp4", _FP4, group_size=16, default_group_size=16, scale_qtype="float8_e4m3"),
    )
}


def qtype_names() -> tuple[str, ...]:
    """The names `get_qtype` knows, widest type first."""
    return tuple(_REGISTRY)


def get_qtype(name: str | QType) -> QType:
    """Looks a qtype up by name; a QType is returned as it is.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.
    """
    if isinstance(name, QType):
        return name
    try:
        return _REGISTRY[name]
    except KeyError:
        raise ValueError(f"unknown qtype {name!r}; known qtypes: {', '.join(_REGISTRY)}") from None
