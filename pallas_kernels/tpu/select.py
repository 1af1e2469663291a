"""Which TPU kernel a matrix product runs as, and why; or why none.

One of the platforms of `jaxquant.pallas_kernels.dispatch`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jaxquant.pallas_kernels.as_matrix import Kernel
from jaxquant.pallas_kernels.problem import PACKED, MatmulProblem, RaggedProblem, Unsupported
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip, chip_of
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.gated import choose_gated_config, gated_matmul
from jaxquant.pallas_kernels.tpu.heuristics import (
    AFTER_ROWS,
    DECODE_ROWS,
    choose_config,
    choose_ragged_config,
    fit,
)
from jaxquant.pallas_kernels.tpu.matmul import quantized_matmul
from jaxquant.pallas_kernels.tpu.quantize_rows import quantize_rows
from jaxquant.pallas_kernels.tpu.ragged import ragged_matmul
from jaxquant.pallas_kernels.tpu.siblings import choose_sibling_config, sibling_matmuls
from jaxquant.pallas_kernels.tpu.transposed import choose_transposed_config, transposed_matmul

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
    config = choose_config(problem, chip)
    return Kernel(
        f"pallas tpu {chip.name}: {problem.codes}, scale {_WHEN[config.scale]}",
        _why(problem, config),
        functools.partial(quantized_matmul, problem=problem, config=config),
        _quantizer(problem, config),
        together=functools.partial(_together, chip=chip),
        gated=functools.partial(_gated, chip=chip),
        finished=functools.partial(_finished, chip=chip),
        # What a kernel fetches itself is one weight's.
        batched=functools.partial(
            quantized_matmul, problem=problem, config=dataclasses.replace(config, stream=False)
        ),
    )


def _together(problems: Sequence[MatmulProblem], chip: Chip) -> Any:
    """`sibling_matmuls` for these."""
    config = choose_sibling_config(problems, chip)
    return functools.partial(
        sibling_matmuls, problems=tuple(problems), config=config, cores=chip.cores
    )


def _gated(problem: MatmulProblem, chip: Chip) -> Any:
    """`gated_matmul` for two weights of this problem."""
    config = choose_gated_config(problem, chip)
    return functools.partial(gated_matmul, problem=problem, config=config)


def _finished(problem: MatmulProblem, chip: Chip) -> Any:
    """`quantized_matmul` with an epilogue, by blocks as large as without one."""
    plain = dataclasses.replace(problem, bias=False, residual=False)
    config = fit(problem, chip, choose_config(plain, chip))
    if config is None:
        raise Unsupported(f"as large blocks do not fit the VMEM of {chip.name} with it")
    return functools.partial(quantized_matmul, problem=problem, config=config)


def select_transposed(problem: MatmulProblem, device_kind: str, forced: bool) -> Kernel:
    """The kernel for rows times the transpose of a weight: a gradient.

    Args:
      problem: of the product that it is a gradient of.
      device_kind: of the device.
      forced: a kernel is wanted also where XLA is the better choice.

    Raises:
      Unsupported: none fits, or XLA is better; says why.
    """
    chip = _chip(device_kind)
    if not (forced or chip.has_bf16_vpu):
        raise Unsupported(
            f"of a transposed weight XLA fuses conversion and scales into its dot on {chip.name}"
        )
    config = choose_transposed_config(problem, chip)

    def multiply(y: Any, codes: Any, scale: Any, zero: Any, *, interpret: Any, **_: Any) -> Any:
        return transposed_matmul(
            y, codes, scale, zero, problem=problem, config=config, interpret=interpret
        )

    return Kernel(
        f"pallas tpu {chip.name}: {problem.codes} transposed, scale before the dot",
        f"groups of {problem.group} along the result, {problem.m} rows: scales meet the weight, in"
        " blocks on the chip",
        multiply,
        batched=multiply,
    )


def select_ragged(problem: RaggedProblem, device_kind: str, forced: bool) -> Kernel:
    """The kernel for rows grouped by expert; its `multiply` takes `group_sizes` too.

    XLA is never the better choice: it reads all experts, and, but for int8 on both sides, writes
    them out in bfloat16 first.

    Args:
      problem: the product.
      device_kind: of the device.
      forced: of no influence.

    Raises:
      Unsupported: none fits; says why.
    """
    chip, rows = _chip(device_kind), problem.product
    config = choose_ragged_config(problem, chip)
    return Kernel(
        f"pallas tpu {chip.name}: {rows.codes} experts, scale {_WHEN[config.scale]}",
        f"{problem.experts} experts, {rows.m} rows in tiles of {config.bm}: codes are read where"
        " there are rows for them",
        functools.partial(ragged_matmul, problem=problem, config=config),
        _quantizer(rows, config),
    )


def _chip(device_kind: str) -> Chip:
    chip = chip_of(device_kind)
    if chip is None:
        raise Unsupported(f"{device_kind} is none of {', '.join(CHIPS)}")
    return chip


def _quantizer(problem: MatmulProblem, config: MatmulConfig) -> Any:
    if problem.m <= DECODE_ROWS:  # fewer rows are not worth a launch of their own
        return None
    return functools.partial(quantize_rows, parallel=config.parallel)


def _check_worth(problem: MatmulProblem, chip: Chip) -> None:
    fused = problem.codes not in (*PACKED, "table4") and not _int4(problem, chip)
    if problem.groups == 1 and fused:
        raise Unsupported("one scale a column: XLA fuses the conversion of codes into its own dot")
    if problem.m > AFTER_ROWS and chip.mxu_dtypes == ("bfloat16",):
        raise Unsupported(
            f"{problem.m} rows: kernels for more than {AFTER_ROWS} spill registers on {chip.name}"
            " and take longer than writing the weight out in bfloat16"
        )


def _int4(problem: MatmulProblem, chip: Chip) -> bool:
    """Whether int4 by int4 is worth a kernel with one scale a column: XLA's route takes int8.

    Where the matrix units take int4; at few rows on the other chips, which have no int8 either.
    """
    both = problem.x_dtype == problem.codes == "int4"
    return both and ("int4" in chip.mxu_dtypes or problem.m <= DECODE_ROWS)


def _why(problem: MatmulProblem, config: MatmulConfig) -> str:
    rows = f"groups of {problem.group}, {problem.m} rows"
    why = {
        "after": f"{rows}: scales meet each group's sums",
        "before": f"{rows}: scales meet the weight, in blocks on the chip",
        "end": f"one scale a column, {problem.codes} codes unpacked on the chip",
    }[config.scale]
    if problem.x_dtype == "int4" and config.operand != "int4":
        why += f"; int4 inputs are multiplied as {config.operand}"
    return why
