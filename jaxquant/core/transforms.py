"""What a recipe asks of the float model before it is quantized: the transforms it may name.

`Smooth` and `Rotate` change weights and keep the float function (docs/transforms.md). They are
plain data, like the rest of a recipe: `ptq` carries them out, `explain` says beforehand what comes
of them, and checkpoints store them as JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from jaxquant.core.schemes import check_type, checked_fields

Unfoldable = Literal["leave", "refuse", "multiply"]


@dataclasses.dataclass(frozen=True)
class Smooth:
    """SmoothQuant: outliers of activations go into the weights that read them.

    Xiao et al. 2022 (arXiv:2211.10438). Needs calibration data.

    Attributes:
      alpha: the migration strength: 0 looks at the weights only, 1 at the activations only.
      unfoldable: what to do with weights whose input no parameter can be divided for: "leave" them
        as they are, "refuse" with an error, or "multiply": the factors are stored with the
        quantized weight, and its input is multiplied by them at every call.
    """

    alpha: float = 0.5
    unfoldable: Unfoldable = "leave"

    kind: ClassVar[str] = "smooth"

    def __post_init__(self) -> None:
        """Checks the options."""
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float):
            raise TypeError(f"alpha= takes a number, not {self.alpha!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be between 0 and 1")
        check_unfoldable(self.unfoldable)


@dataclasses.dataclass(frozen=True)
class Rotate:
    """QuaRot: what weights read is rotated, so that no channel has outliers.

    Ashkboos et al. 2024 (arXiv:2404.00456).

    Attributes:
      stream: rotate the residual stream, by parameters alone.
      heads: rotate the features that attention passes from values to the output projection.
      unfoldable: what to do with weights whose input parameters alone cannot rotate: "leave" them
        as they are, "refuse" with an error, or "multiply": their input is multiplied by a Hadamard
        matrix at every call, which the quantized weight says.
      seed: of the matrices and signs.
    """

    stream: bool = True
    heads: bool = True
    unfoldable: Unfoldable = "leave"
    seed: int = 0

    kind: ClassVar[str] = "rotate"

    def __post_init__(self) -> None:
        """Checks the options."""
        check_type("stream", self.stream, bool)
        check_type("heads", self.heads, bool)
        check_unfoldable(self.unfoldable)
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must be an integer of at least 0")
        if not (self.stream or self.heads or self.unfoldable == "multiply"):
            raise ValueError(
                "nothing is left to rotate: stream=False, heads=False and "
                f"unfoldable={self.unfoldable!r}"
            )


Transform = Smooth | Rotate
_KINDS: dict[str, type[Smooth] | type[Rotate]] = {cls.kind: cls for cls in (Smooth, Rotate)}


def check_unfoldable(value: object) -> None:
    """Refuses an unknown way to deal with what cannot be folded.

    Raises:
      ValueError: names what there is.
    """
    if value not in get_args(Unfoldable):
        raise ValueError(f"unfoldable={value!r} must be one of {list(get_args(Unfoldable))}")


def transform_to_json(transform: Transform) -> dict[str, Any]:
    """The transform as a JSON-able mapping: its kind and its fields."""
    return {"kind": transform.kind, **dataclasses.asdict(transform)}


def transform_from_json(data: Mapping[str, Any]) -> Transform:
    """The inverse of `transform_to_json`.

    Raises:
      ValueError: an unknown kind or field.
    """
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if kind not in _KINDS:
        raise ValueError(f"a transform's kind is one of {sorted(_KINDS)}, not {kind!r}")
    cls = _KINDS[kind]
    return cls(**checked_fields(cls, {k: v for k, v in data.items() if k != "kind"}))
