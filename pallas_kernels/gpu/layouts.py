"""Where a warpgroup keeps words of codes, and their scales, in its registers.

Used by the readings of codes. wgmma's operand [64, k] from registers is four warps of 16 rows; four
lanes share a row (and the one 8 below). These layouts give the same lanes the same rows, so that
what a lane loads is what it feeds to the tensor cores.
"""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 4  # that share a row

# Words [64, w]: lane t of the four holds words t, t + 4, t + 8, ...
WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)

# Words [64, w]: lane t holds words 3t, 3t + 1, 3t + 2 of each 12.
WORDS_BY_THREE = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 12), (16, 12), (8, 12), (3,), (1,))),
    warp_dims=(-8,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)


def scales_by_lane(groups: int) -> Any:
    """Scales [groups, 64] of rows where lane t holds values of group t * groups / 4 only."""
    copies = () if groups == LANES else (plgpu.Replicated(LANES // groups),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((groups, 64), (groups, 16), (groups, 8), (1,))),
        warp_dims=(-6,),
        lane_dims=(-2, -3, *copies),
        vector_dim=-1,
    )
