"""`Plan`: what a recipe makes of a model, for people (a table) and for programs (JSON).

Made by `make_plan`, shown by `jaxquant.explain` and the command line. Plain frozen data: a plan
keeps no array and no jaxpr alive. How it is drawn is in `plan_view`.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult

from jaxquant.passes import plan_view

Status = Literal["quantized", "dequantized", "float"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One operation, or a parameter that no operation could use quantized.

    Attributes:
      path: path of the module, "" for the root or where none is known.
      cls: name of the module's class, or None.
      kind: op kind (see `jaxquant.core.recipe.OP_KINDS`), or "other".
      param: path of the parameter; None for a product of two activations.
      param_shape: its shape.
      x_shape: shape of the other operand.
      out_shape: shape of the result.
      rule: the rule that decided.
      qtype: how the parameter is stored; None if it stays float.
      granularity: what one scale covers.
      weight: the scheme in short, e.g. "int4 g128".
      block_shape: neighbours along each axis that share a scale.
      act: what is done with the other operand, "" for nothing.
      status: "quantized"; "dequantized": the op runs in float on a dequantized copy; or "float".
      lowering: what the op becomes, e.g. "xla: int8 dot".
      why: the reason for that choice.
      reason: why it is not quantized, or what else there is to say.
      bytes_before: bytes of the float parameter; 0 without one.
      bytes_after: bytes of what is stored, scales included.
      counts: whether this row counts these bytes (a tied parameter has several rows).
      source: the user's source line.
    """

    path: str
    cls: str | None
    kind: str
    status: Status
    param: str | None = None
    param_shape: tuple[int, ...] | None = None
    x_shape: tuple[int, ...] | None = None
    out_shape: tuple[int, ...] | None = None
    rule: str = ""
    qtype: str | None = None
    granularity: str | None = None
    weight: str = ""
    block_shape: tuple[int, ...] | None = None
    act: str = ""
    lowering: str = ""
    why: str = ""
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    counts: bool = False
    source: str = ""


@dataclasses.dataclass(frozen=True)
class ObserverSize:
    """What one statistic of one operand takes.

    Attributes:
      path: the operand, or "" for the counter of batches.
      statistic: its name.
      shape: shape of its value, layers included.
      bytes: bytes of its state on the device.
    """

    path: str
    statistic: str
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class TransformRow:
    """What one transform of the recipe does to the input of some weights.

    Attributes:
      transform: "smooth" or "rotate".
      weights: the weights that read the input.
      status: "folded" into parameters; "multiply": an operation on the input at every call, stored
        with the weights; "left" as it is; or "refused": `ptq` raises.
      into: the other parameters that change.
      reason: what makes that possible, or why it is not.
    """

    transform: str
    weights: tuple[str, ...]
    status: Literal["folded", "multiply", "left", "refused"]
    into: tuple[str, ...] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All operations of a model under a recipe, in the order of the program.

    Attributes:
      recipe: the recipe's name.
      rows: the operations; parameters that none could use quantized come last.
      notes: remarks on the whole.
      observers: what calibration would take on the device, where that was asked for.
      transforms: what the recipe's transforms do to the input of every weight that is multiplied.
    """

    recipe: str
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()
    observers: tuple[ObserverSize, ...] = ()
    transforms: tuple[TransformRow, ...] = ()

    @property
    def observer_bytes(self) -> int:
        """Bytes of all statistics that calibration would keep on the device."""
        return sum(size.bytes for size in self.observers)

    @property
    def totals(self) -> dict[str, Any]:
        """Counts of ops and parameters, and bytes.

        Returns:
          ``ops`` by status, ``parameters`` and ``quantized_parameters``, ``bytes_before`` and
          ``bytes_after`` of all parameters and, with the prefix ``quantized_``, of those that are
          quantized; ``ratio`` is after by before of the latter (None if there are none).
        """
        own = [row for row in self.rows if row.counts]
        quantized = [row for row in own if row.qtype is not None]
        before, after = (_sum(quantized, name) for name in ("bytes_before", "bytes_after"))
        ops = collections.Counter(row.status for row in self.rows if row.kind != "other")
        return {
            "ops": {status: ops[status] for status in ("quantized", "dequantized", "float")},
            "parameters": len(own),
            "quantized_parameters": len(quantized),
            "bytes_before": _sum(own, "bytes_before"),
            "bytes_after": _sum(own, "bytes_after"),
            "quantized_bytes_before": before,
            "quantized_bytes_after": after,
            "ratio": after / before if before else None,
        }

    def where(self, **fields: Any) -> list[PlanRow]:
        """The rows whose fields have these values, e.g. ``plan.where(status="float")``."""
        return [row for row in self.rows if all(getattr(row, k) == v for k, v in fields.items())]

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON-able mapping; tuples become lists."""
        return {
            "recipe": self.recipe,
            "totals": self.totals,
            "rows": [_plain(row) for row in self.rows],
            "transforms": [_plain(row) for row in self.transforms],
            "notes": list(self.notes),
            "observers": [
                {**dataclasses.asdict(size), "shape": list(size.shape)} for size in self.observers
            ],
        }

    def __str__(self) -> str:
        """The table as text, 120 columns wide."""
        return plan_view.text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from plan_view.parts(self)


def _plain(row: PlanRow | TransformRow) -> dict[str, Any]:
    fields = dataclasses.asdict(row)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _sum(rows: list[PlanRow], name: str) -> int:
    return sum(getattr(row, name) for row in rows)
