"""What the rewriter decides, as events, and the interpreter that tells them.

The rules of `rewrite_moves` and `rewrite_products` report through this; `explain` and users listen
with ``on_event``. Nothing happens silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxquant.passes.interpreter import Context, Interpreter, Site, Weight


@dataclasses.dataclass(frozen=True)
class Event:
    """One decision of the rewriter.

    Attributes:
      site: place of the equation (see `interpreter.Context`).
      names: its scope names, outermost first.
      primitive: name of the original primitive.
      path: the parameter concerned; "" for a product of two activations.
      action: "quantized" or "dequantized".
      lowering: what the op becomes, e.g. "xla: int8 dot".
      reason: why.
      source: the user's source line.
    """

    site: Site
    names: tuple[str, ...]
    primitive: str
    path: str
    action: str
    lowering: str
    reason: str
    source: str


class Reporter(Interpreter):
    """An interpreter with a listener.

    Args:
      on_event: called with every `Event`; None for no listener.
    """

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self._on_event = on_event

    @property
    def has_listener(self) -> bool:
        """Whether anybody wants to know of decisions."""
        return self._on_event is not None

    def report(self, ctx: Context, path: str, action: str, lowering: str, reason: str) -> None:
        """Tells the listener of a decision about the equation of ``ctx``."""
        if self._on_event is not None:
            self._on_event(
                Event(
                    ctx.site, ctx.names, str(ctx.eqn.primitive), path, action, lowering,
                    reason, ctx.source,
                )
            )  # fmt: skip


def report_quantized(ctx: Context, weight: Weight, describe: Callable[[], tuple[str, str]]) -> None:
    """Reports a quantized op; its lowering and reason are worked out only if somebody listens."""
    interpreter = ctx.interpreter
    assert isinstance(interpreter, Reporter)
    if interpreter.has_listener:
        interpreter.report(ctx, weight.path, "quantized", *describe())
