"""The pipeline that every quantized call goes through, and the evaluation of what it makes.

Called by `jaxquant.transform` (and so by every decorated model) and `jaxquant.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxquant.core import _compat
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.dispatch import Implementation, Place
from jaxquant.passes.elide_roundtrips import ElideRoundtrips
from jaxquant.passes.events import Event
from jaxquant.passes.fuse_epilogues import FuseEpilogues
from jaxquant.passes.fuse_siblings import FuseSiblings
from jaxquant.passes.insert_scales import InsertScales
from jaxquant.passes.lower_to_kernels import LowerToKernels
from jaxquant.passes.pass_manager import Pass
from jaxquant.passes.program import Program
from jaxquant.passes.share_activation_quant import ShareActivationQuant


def quantizing_passes(
    weights: Mapping[int, QTensor],
    *,
    strict: bool = False,
    on_event: Callable[[Event], None] | None = None,
    implementation: Implementation | None = None,
    place: Place | None = None,
) -> tuple[Pass, ...]:
    """The passes that make a quantized program of a float one.

    Args:
      weights: the program's inputs that are quantized, by number (see `InsertScales`).
      strict: raise `StrictError` where a weight would be dequantized.
      on_event: called with every decision about a weight.
      implementation: of all quantized products: "xla", "pallas", or None for the best.
      place: where the program will run; None for devices of the default kind.
    """
    return (
        InsertScales(weights, strict=strict, on_event=on_event),
        ShareActivationQuant(),
        ElideRoundtrips(),
        FuseSiblings(),
        FuseEpilogues(),
        LowerToKernels(place, implementation),
    )


def evaluate(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Runs a program's jaxpr on flat inputs, under whatever trace is open.

    Args:
      program: the program.
      inputs: arrays for the jaxpr's inputs (leaves of what `Program.flatten` gives).
    """
    jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
    return list(jax.core.eval_jaxpr(jaxpr, consts, *inputs))
