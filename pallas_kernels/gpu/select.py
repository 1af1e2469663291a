"""Which GPU kernel a product runs as, and why; or why none.

One of the platforms of `jaxquant.pallas_kernels.dispatch` and of `ragged_dispatch`. What was timed
on the chip (`gpu.tables`) decides; where nothing was, rules do.
"""

from __future__ import annotations

import functools

from jaxquant.pallas_kernels.as_matrix import Kernel
from jaxquant.pallas_kernels.gpu import tables
from jaxquant.pallas_kernels.gpu.chips import CHIPS, Chip, chip_of
from jaxquant.pallas_kernels.problem import PACKED, MatmulProblem, RaggedProblem, Unsupported

_WHEN = {"end": "on the output", "after": "after the dot", "before": "before the dot"}


def select(problem: MatmulProblem, device_kind: str, forced: bool) -> Kernel:
    """The kernel for a product.

    Args:
      problem: the product.
      device_kind: of the device.
      forced: a kernel is wanted also where XLA is the better choice.

    Raises:
      Unsupported: none fits, or XLA is better; says why.
    """
    chip = _chip(device_kind)
    if not forced:
        _check_worth(problem, chip)
    # Imported here: with an older jax these modules cannot be.
    from jaxquant.pallas_kernels.gpu.heuristics import choose_config
    from jaxquant.pallas_kernels.gpu.matmul import quantized_matmul
    from jaxquant.pallas_kernels.gpu.quantize_rows import fits, quantize_rows

    config = choose_config(problem, chip)
    return Kernel(
        f"pallas gpu {chip.name}: {problem.codes}, scale {_WHEN[config.scale]}",
        _why(problem, chip),
        functools.partial(quantized_matmul, problem=problem, config=config),
        quantize_rows if fits(problem.k) else None,
        k_minor=True,
    )


def select_ragged(problem: RaggedProblem, device_kind: str, forced: bool) -> Kernel:
    """The kernel for rows grouped by expert; its `multiply` takes `group_sizes` too.

    Args:
      problem: the product.
      device_kind: of the device.
      forced: a kernel is wanted also where XLA was faster; where nothing was timed, kernels are
        taken: XLA's route writes every expert out in bfloat16.

    Raises:
      Unsupported: none fits, or XLA was faster; says why.
    """
    chip, product = _chip(device_kind), problem.product
    entry = tables.find(product, chip, experts=problem.experts)
    if not forced:
        _check_timed(entry, chip)
    # Imported here: with an older jax these modules cannot be.
    from jaxquant.pallas_kernels.gpu.quantize_rows import fits, quantize_rows
    from jaxquant.pallas_kernels.gpu.ragged import choose_ragged_config, ragged_matmul

    config = choose_ragged_config(problem, chip)
    return Kernel(
        f"pallas gpu {chip.name}: {product.codes} experts, scale {_WHEN[config.scale]}",
        _timed(entry, chip)
        or f"{problem.experts} experts, {product.m} rows in tiles of {config.bm}: codes are read"
        " where there are rows for them",
        functools.partial(ragged_matmul, problem=problem, config=config),
        quantize_rows if fits(product.k) else None,
        k_minor=True,
    )


def _chip(device_kind: str) -> Chip:
    chip = chip_of(device_kind)
    if chip is None:
        raise Unsupported(f"{device_kind} is none of {', '.join(CHIPS)}")
    if not has_mosaic_gpu():
        raise Unsupported("this jax has no Mosaic GPU that they could be written in: 0.11 has")
    return chip


@functools.cache
def has_mosaic_gpu() -> bool:
    """Whether this jax can compile the kernels, and interpret them."""
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError:
        return False
    return hasattr(mosaic_gpu, "InterpretGPUParams")


def _check_worth(problem: MatmulProblem, chip: Chip) -> None:
    entry = tables.find(problem, chip)
    _check_timed(entry, chip)
    if entry is None and problem.groups == 1 and problem.codes not in PACKED:
        raise Unsupported("one scale a column: XLA fuses the conversion of codes into its own dot")


def _check_timed(entry: tables.Entry | None, chip: Chip) -> None:
    """Raises Unsupported where XLA was faster than every kernel."""
    if entry is not None and entry.config is None:
        raise Unsupported(
            f"timed on {chip.name} at {entry.m} x {entry.k} x {entry.n}: XLA takes"
            f" {entry.xla_microseconds:g} us, the best kernel {entry.microseconds:g}"
        )


def _timed(entry: tables.Entry | None, chip: Chip) -> str:
    """Why a kernel that was timed is the choice; "" where none was."""
    if entry is None or entry.config is None:
        return ""
    return (
        f"timed on {chip.name} at {entry.m} x {entry.k} x {entry.n}: {entry.microseconds:g}"
        f" us, XLA takes {entry.xla_microseconds:g}"
    )


def _why(problem: MatmulProblem, chip: Chip) -> str:
    timed = _timed(tables.find(problem, chip), chip)
    if timed:
        return timed
    if problem.groups == 1:
        return f"one scale a column, {problem.codes} codes unpacked on the chip"
    return (
        f"groups of {problem.group}, {problem.m} rows: XLA would write the weight out in bfloat16"
    )
