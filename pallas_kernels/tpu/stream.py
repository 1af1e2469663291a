"""Codes that a kernel fetches itself, half a block at a time, one block ahead.

Called by `tpu.matmul` for a config that says `stream`. Pallas' own pipeline hands a step its whole
block, so that a product of few rows does nothing until the first one, some megabytes, is there.
Here the halves of a block arrive one after the other: the first is multiplied while the second is
on its way. Each wait keeps the matrix units from running ahead, so that more parts lose again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

PARTS = 2
_BUFFERS = 2


def scratch(rows: int, columns: int, dtype: Any) -> dict[str, Any]:
    """What the kernel needs of its own: two blocks of codes, and who says that they are there."""
    return {
        "fetched": pltpu.VMEM((_BUFFERS, rows, columns), dtype),
        "arrivals": pltpu.SemaphoreType.DMA((_BUFFERS, PARTS)),
    }


def fetch(
    refs: dict[str, Any], step: jax.Array, steps: int
) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Sets off the next block of codes; every column of one takes all rows there are.

    Args:
      refs: references by name: codes [rows, n] in HBM, and those of `scratch`.
      step: which block of columns this step multiplies, of `steps`, one after the other.
      steps: how many there are; they divide n.

    Returns:
      The references with this step's codes [rows, columns] in place of all, and a function that
      waits for one of their `PARTS` parts: each must be waited for once.
    """
    codes, fetched, arrivals = refs["codes"], refs["fetched"], refs["arrivals"]
    _, rows, width = fetched.shape
    part = rows // PARTS

    def copy(block: Any, i: int) -> Any:
        columns = pl.ds(pl.multiple_of(block * width, width), width)
        own = pl.ds(i * part, part)
        slot = lax.rem(block, _BUFFERS)
        return pltpu.make_async_copy(
            codes.at[own, columns], fetched.at[slot, own], arrivals.at[slot, i]
        )

    @pl.when(step == 0)
    def set_off_first() -> None:
        for i in range(PARTS):
            copy(step, i).start()

    @pl.when(step + 1 < steps)
    def set_off_next() -> None:
        for i in range(PARTS):
            copy(step + 1, i).start()

    here = refs | {"codes": fetched.at[lax.rem(step, _BUFFERS)]}
    return here, lambda i: copy(step, i).wait()
