"""How one weight and one activation are quantized: the two leaves that recipes are made of.

`WeightScheme` says how a weight is stored, `ActScheme` what an op does with its input. Both are
frozen and hashable, so they may be static fields of a pytree, and both go through JSON. Nothing
here knows a model, an axis or a shape: which axes get scales follows from the use of a weight,
in `jaxquant.passes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from jaxquant.core.qtypes import get_qtype

Granularity = Literal["channel", "group", "tensor"]
ActGranularity = Literal["token", "tensor"]
Mode = Literal["dynamic", "static"]
WeightRange = Literal["absmax", "percentile", "mse"]
ActRange = Literal["absmax", "percentile"]

DEFAULT_GROUP_SIZE = 128


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """How a weight is stored.

    Attributes:
      qtype: name of a registered qtype, e.g. "int8", "int4", "nf4" (see `jaxquant.core.qtypes`).
      granularity: what one scale covers: "channel" (all contracted axes of one output channel),
        "group" (`group_size` neighbours along the contracted axis), or "tensor" (all of it; layer
        and expert axes always keep their own scales). When None it is "group" if a group size is
        given or if the qtype has one of its own, else "channel".
      group_size: number of weights that share a scale, for "group". When None, the qtype's own,
        else 128.
      symmetric: True for no zero point. Only integer types may be asymmetric.
      range: how the range of a block is chosen: "absmax", "percentile" or "mse".
      percentile: the percentile of the magnitudes that "percentile" clips at, in (0, 100].
      double_quant: True to quantize the scales themselves to 8 bits in blocks of 256.
      scale_dtype: dtype of the scales. Types that prescribe one (mxfp4, nvfp4) ignore it.
    """

    qtype: str = "int8"
    granularity: Granularity | None = None
    group_size: int | None = None
    symmetric: bool = True
    range: WeightRange = "absmax"
    percentile: float = 99.9
    double_quant: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        qtype = get_qtype(self.qtype)
        default = qtype.group_size or qtype.default_group_size
        if self.granularity is None:
            grouped = self.group_size is not None or default is not None
            object.__setattr__(self, "granularity", "group" if grouped else "channel")
        _choose("granularity", self.granularity, Granularity)
        _choose("range", self.range, WeightRange)
        _check_percentile(self.percentile)
        _choose("scale_dtype", self.scale_dtype, Literal["float32", "bfloat16", "float16"])
        if self.granularity == "group":
            size = self.group_size
            if size is not None and (type(size) is not int or size < 1):
                raise ValueError(f"group_size={size!r} must be an integer of at least 1")
            size = size or default or DEFAULT_GROUP_SIZE
            object.__setattr__(self, "group_size", size)
        elif self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size} has no meaning with granularity="
                f"{self.granularity!r}; leave it out or use granularity='group'"
            )
        if qtype.group_size is not None and self.group_size != qtype.group_size:
            given = f"granularity={self.granularity!r}, group_size={self.group_size}"
            raise ValueError(f"{self.qtype} has groups of {qtype.group_size}, not {given}")
        if not self.symmetric and (qtype.kind != "int" or qtype.bits == 1):
            raise ValueError(
                f"{self.qtype} has no zero point: symmetric=False is for int2, int3, int4 and int8"
            )

    def __str__(self) -> str:
        """A short name for tables, e.g. "int4 g128", "int8 channel asym mse"."""
        words = [self.qtype, f"g{self.group_size}" if self.granularity == "group" else ""]
        if self.granularity != "group":
            words[1] = str(self.granularity)
        if not self.symmetric:
            words.append("asym")
        if self.range != "absmax":
            words.append(self.range)
        if self.double_quant:
            words.append("dq")
        return " ".join(words)

    def to_json(self) -> dict[str, Any]:
        """The scheme as a JSON-able mapping of its fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; an unknown field is a ValueError."""
        return cls(**checked_fields(cls, data))


@dataclasses.dataclass(frozen=True)
class ActScheme:
    """What an op does with its input before it meets a quantized weight.

    Attributes:
      qtype: name of a qtype: "int8", "int4", "float8_e4m3" or "float8_e5m2".
      granularity: "token" (a scale for every row of contracted values) or "tensor".
      mode: "dynamic" (the range is taken from the values at hand) or "static" (taken once from
        calibration data and stored beside the weight; "tensor" only).
      range: how calibration chooses a static range: "absmax" or "percentile" ("static" only).
      percentile: the percentile of the magnitudes that "percentile" clips at, in (0, 100].
    """

    qtype: str = "int8"
    granularity: ActGranularity | None = None
    mode: Mode = "dynamic"
    range: ActRange = "absmax"
    percentile: float = 99.9

    def __post_init__(self) -> None:
        _choose("qtype", self.qtype, Literal["int8", "int4", "float8_e4m3", "float8_e5m2"])
        _choose("mode", self.mode, Mode)
        if self.granularity is None:
            object.__setattr__(self, "granularity", "tensor" if self.mode == "static" else "token")
        _choose("granularity", self.granularity, ActGranularity)
        _choose("range", self.range, ActRange)
        _check_percentile(self.percentile)
        if self.mode == "dynamic" and self.range != "absmax":
            raise ValueError(
                f"range={self.range!r} needs calibration data: use mode='static', or "
                "range='absmax' for a dynamic scale"
            )
        if self.mode == "static" and self.granularity != "tensor":
            raise ValueError(
                "a static activation scale is one number for the tensor: tokens are not known "
                "before they are seen. Use granularity='tensor' or mode='dynamic'"
            )

    def __str__(self) -> str:
        """A short name for tables, e.g. "int8 per token", "int8 static"."""
        if self.mode == "static":
            return f"{self.qtype} static"
        return f"{self.qtype} per {self.granularity}"

    def to_json(self) -> dict[str, Any]:
        """The scheme as a JSON-able mapping of its fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; an unknown field is a ValueError."""
        return cls(**checked_fields(cls, data))


def checked_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` as keyword arguments of the dataclass `cls`; unknown names are a ValueError."""
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {known}")
    return dict(data)


def check_type(name: str, value: object, expected: type, *, optional: bool = False) -> None:
    """Refuses a field of another type.

    Raises:
      TypeError: names the field, what was given and what it takes.
    """
    if not isinstance(value, expected) and not (optional and value is None):
        takes = f"{expected.__name__} or None" if optional else expected.__name__
        raise TypeError(f"{name}= takes {takes}, not {value!r}")


def _choose(name: str, value: object, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name}={value!r} must be one of {list(get_args(allowed))}")


def _check_percentile(value: float) -> None:
    if not 0 < value <= 100:
        raise ValueError(f"percentile={value} must lie in (0, 100]")
