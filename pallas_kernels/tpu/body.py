"""The body of the matmul kernel: one block of x times one block of codes.

Called for each step of the grids that `tpu.matmul` and `tpu.ragged` set up. `tpu.prepare` lays x
out as the reading of the codes wants it and sums its rows where zero points need that; one of
`_end`, `_after`, `_before` multiplies; `tpu.epilogue` finishes. What varies is static: the problem
and its config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu import e4m3, lookup, pairs, reading, split
from jaxquant.pallas_kernels.tpu.chunks import Chunks
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.epilogue import finish, scale_rows, widen, zero_rows
from jaxquant.pallas_kernels.tpu.prepare import Refs, add, corrections_of, dot, prepare, x_chunk
from jaxquant.pallas_kernels.tpu.reading import LANES, SHUFFLED, UNITS
from jaxquant.pallas_kernels.tpu.stream import PARTS

# "after" sums strips of so many elements at a time: 16 of the 64 registers.
_SUMS_IN_REGISTERS = 16 * 1024
_SUBLANES = 8  # rows of a register of 32 bits
_OVER_COLUMNS = ("codes", "scale", "zero_point", "bias", "gate", "residual", "out", "acc")


def _write(ref: Any, value: jax.Array) -> None:
    ref[...] = value


def _all_there(part: int) -> None:
    """Nothing to wait for: Pallas brought the whole block."""


def matmul_body(
    refs: Refs,
    problem: MatmulProblem,
    config: MatmulConfig,
    step: Any,
    new_rows: Any,
    write: Callable[[Any, jax.Array], None] = _write,
    await_part: Callable[[int], None] = _all_there,
) -> None:
    """One step of the grid, whose last axis runs over blocks of contracted values.

    Takes no indices of the grid itself: it may run under a condition.

    Args:
      refs: references by name. Inputs: x [bm, bk], codes, scale [groups, bn]; perhaps zero_point
        (as scale), table [8, 128], x_scale [bm, 1] or [1, bm], bias [1, bn], gate and residual
        [bm, bn]. Output: out [bm, bn]. Scratch: as `scratch_shapes` says.
      problem: the whole product.
      config: blocks and order.
      step: index of the block of contracted values.
      new_rows: whether the rows of x may be others than at the last step of the same core.
      write: `(out, values)` writes what is finished, some columns at a time.
      await_part: waits for one of `stream.PARTS` parts of the block of codes; called once for each.
    """
    cut = Chunks.make(problem, config)
    if {"laid_out", "offsets", "sums"} & refs.keys():
        # What is laid out stays in its scratch as long as the rows do.
        whole = cut.size * cut.count == problem.k

        @pl.when(new_rows if whole else True)
        def _() -> None:
            prepare(refs, problem, config, cut, step)

    starts = _strips(config, cut)
    for start, end in zip(starts, [*starts[1:], config.bn]):
        strip = dataclasses.replace(config, bn=end - start)
        waiting = _all_there if start else await_part
        _multiply_strip(_columns(refs, start, strip.bn), problem, strip, cut, step, write, waiting)


def _strips(config: MatmulConfig, cut: Chunks) -> list[int]:
    """First columns of strips whose sums fit in registers: partial sums of groups stay there.

    A last strip of 128 columns or fewer joins the one before it: Mosaic cannot load a row that is
    known at run time from so narrow a strip, unless it is the first.
    """
    if config.scale != "after":
        return [0]
    width = max(2 * LANES, _SUMS_IN_REGISTERS // (config.bm * cut.copies) // LANES * LANES)
    if cut.per_read > 1 or cut.parts > 1:  # what is read at once fills registers, too
        width = 2 * LANES
    starts = list(range(0, config.bn, width))
    if len(starts) > 1 and config.bn - starts[-1] <= LANES:
        starts.pop()
    return starts


def _columns(refs: Refs, start: int, width: int) -> Refs:
    """The same references, those over columns narrowed to a strip of them."""
    own = dict(refs)
    for name in _OVER_COLUMNS:
        if name in own:
            own[name] = own[name].at[:, start : start + width]
    return own


def _multiply_strip(
    refs: Refs,
    problem: MatmulProblem,
    config: MatmulConfig,
    cut: Chunks,
    step: Any,
    write: Callable[[Any, jax.Array], None],
    await_part: Callable[[int], None],
) -> None:
    if "words" in refs:
        words = pltpu.bitcast(refs["codes"][...], jnp.uint32)
        rows = words.shape[0]
        for c in range(config.bn // LANES):
            refs["words"][c * rows : (c + 1) * rows, :] = words[:, c * LANES : (c + 1) * LANES]
    if config.scale == "end":
        total = _end(refs, problem, config, cut)
    elif config.scale == "after":
        total = _after(refs, problem, config, cut, step, await_part)
    else:
        total = _before(refs, problem, config, cut, step)
    if "factor" in refs:
        total = total * widen(refs["factor"][...], config.bn)
    if "acc" not in refs:
        write(refs["out"], finish(total, refs, problem, config))
        return
    add(refs["acc"], total, step)

    @pl.when(step == problem.k // config.bk - 1)
    def _() -> None:
        write(refs["out"], finish(refs["acc"][...], refs, problem, config))


def _operand(
    refs: Refs, problem: MatmulProblem, config: MatmulConfig, cut: Chunks, chunk: int
) -> jax.Array:
    """The codes of one chunk as an operand: [size, bn], in the order of the reading.

    Where several chunks are read at once, of so many: [per_read * size, bn].
    """
    if problem.codes == "int3":
        rows = 3 * config.bk // 32
        strip = refs["words"].at[: config.bn // LANES * rows, :]
        return reading.operand_from_triples(strip, config.reading, config.operand, rows, chunk)
    start, size = chunk * cut.size, cut.size
    if config.reading in SHUFFLED:
        per_row = 4 if problem.codes == "int2" else 1
        block = refs["codes"][start // per_row : (start + size) // per_row, :]
        if config.reading == "pairs":
            return pairs.operand_from_pairs(block, config.operand)
        if config.reading in ("bits", "nibbles", "bytes"):
            kind = problem.codes, config.reading, config.operand
            return reading.operand_from_words(*kind, block)
        if config.reading == "e4m3":
            return e4m3.operands(block)
        words = pltpu.bitcast(block, jnp.uint32)
        return lookup.e2m1_from_words(words, size // UNITS[problem.codes])
    block = refs["codes"][start : start + size, :]
    if config.reading == "float4":
        return lookup.converted(block)
    if config.reading in ("table", "bytes of table"):
        return lookup.table_values(config.reading, block, refs["table"])
    return block.astype(config.operand)


def _end(refs: Refs, problem: MatmulProblem, config: MatmulConfig, cut: Chunks) -> jax.Array:
    total = None
    for c in range(cut.count):
        part = dot(x_chunk(refs, config, cut, c), _operand(refs, problem, config, cut, c))
        total = part if total is None else total + part
    assert total is not None
    return split.joined(total, problem, config)


def _after(
    refs: Refs,
    problem: MatmulProblem,
    config: MatmulConfig,
    cut: Chunks,
    step: Any,
    await_part: Callable[[int], None],
) -> jax.Array:
    bm, total, corrections = config.bm, None, corrections_of(problem, config)
    part_of = {i * cut.count // PARTS: i for i in range(PARTS)}
    first = step * config.bk // problem.group
    if cut.parts > 1 and config.bk == problem.k:
        first = 0  # known before the kernel runs: scales cost no vector operations (`scale_rows`)
    for c in range(0, cut.count, cut.per_group):
        part = None
        sums: dict[str, jax.Array] = {}
        for i in range(c, c + cut.per_group):
            if i in part_of:
                await_part(part_of[i])
            if i % cut.per_read == 0:
                read = _operand(refs, problem, config, cut, i // cut.per_read)
            at = i % cut.per_read * cut.size
            x = x_chunk(refs, config, cut, i)
            more = dot(x, read if cut.per_read == 1 else read[at : at + cut.size])
            part = more if part is None else part + more
            rows = slice(i * cut.stack * bm, (i + 1) * cut.stack * bm)
            for name in corrections:
                more = refs[name][rows, :]
                sums[name] = sums[name] + more if name in sums else more
        assert part is not None
        for g in range(cut.stack):
            row = pl.ds(first + c // cut.per_group * cut.stack + g, 1)
            own = split.rows_of(part, g, cut.stack, problem, config).astype(jnp.float32)
            for name, sum_ in sums.items():
                of_group = widen(sum_[g * bm : (g + 1) * bm, :], config.bn)
                if name == "sums":
                    of_group = of_group * zero_rows(refs, problem, config, row)
                own = split.without(own, of_group)
            own = own * scale_rows(refs, problem, config, row, own.shape[0])
            total = own if total is None else total + own
    assert total is not None
    return split.joined(total, problem, config)


def _rows_of_block(
    problem: MatmulProblem, config: MatmulConfig, cut: Chunks, step: Any
) -> list[Any]:
    """Where a block's scales are: in whole tiles if they fill some, else row by row."""
    if config.bk == problem.k:
        return [pl.ds(0, problem.groups)]
    if cut.groups % 8 == 0:
        return [pl.ds(pl.multiple_of(step * cut.groups, 8), cut.groups)]
    first = step * config.bk // problem.group
    return [pl.ds(first + g, 1) for g in range(cut.groups)]


def _before(
    refs: Refs, problem: MatmulProblem, config: MatmulConfig, cut: Chunks, step: Any
) -> jax.Array:
    chunks = [x_chunk(refs, config, cut, c) for c in range(cut.count)]
    return dot(jnp.concatenate(chunks, axis=1), scaled_block(refs, problem, config, cut, step))


def scaled_block(
    refs: Refs, problem: MatmulProblem, config: MatmulConfig, cut: Chunks, step: Any
) -> jax.Array:
    """A block of the weight [bk, bn], scaled: an operand, rows in the order of the reading.

    Args:
      refs: references by name: codes [bk, bn], scale [groups, bn]; perhaps zero_point and table.
      problem: the whole product.
      config: blocks and reading; scales come before the dot.
      cut: of the block.
      step: index of the block of contracted values.
    """
    rows = _rows_of_block(problem, config, cut, step)
    scale = _stacked([scale_rows(refs, problem, config, r) for r in rows])
    zero = None
    if problem.zero_point:
        zero = _stacked([zero_rows(refs, problem, config, r) for r in rows])
    parts = []
    for c in range(cut.count):
        w = _float_codes(refs, problem, config, cut, c)
        if config.reading == "bits":
            w = w - reading.offsets(problem.codes, *w.shape)
        if zero is not None:
            w = w - _spread(zero, problem, config, cut, c)
        parts.append(w * _spread(scale, problem, config, cut, c).astype(w.dtype))
    return jnp.concatenate(parts, axis=0).astype(config.operand)


def _stacked(rows: list[jax.Array]) -> jax.Array:
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows)


def _float_codes(
    refs: Refs, problem: MatmulProblem, config: MatmulConfig, cut: Chunks, chunk: int
) -> jax.Array:
    """The codes of one chunk [size, bn] as they are scaled, in the order of the reading."""
    if config.reading == "cast":
        return refs["codes"][chunk * cut.size : (chunk + 1) * cut.size, :].astype(jnp.float32)
    return _operand(refs, problem, config, cut, chunk).astype(config.scaled_in)


def _spread(
    part: jax.Array, problem: MatmulProblem, config: MatmulConfig, cut: Chunks, chunk: int
) -> jax.Array:
    """Scales or zero points of a block [groups, bn] over the rows of one chunk."""
    if part.shape[0] == 1:
        return part
    groups, size = cut.size // problem.group, cut.size
    if groups <= 1:
        at = chunk * size // problem.group
        return part[at : at + 1, :]
    own = part[chunk * groups : (chunk + 1) * groups, :]
    if config.reading not in SHUFFLED:
        spread = jnp.broadcast_to(own[:, None, :], (groups, problem.group, own.shape[1]))
        return spread.reshape(size, own.shape[1])
    order = reading.source_row(problem.codes, config.reading, np.arange(size)) // problem.group
    of_registers = [tuple(map(int, rows)) for rows in order.reshape(-1, _SUBLANES)]
    made = {groups: _over_register(own, groups) for groups in dict.fromkeys(of_registers)}
    return jnp.concatenate([made[groups] for groups in of_registers], axis=0)


def _over_register(part: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """[8, bn]: the rows of `part` that these numbers name; equal ones follow each other."""
    out = jnp.broadcast_to(part[groups[0] : groups[0] + 1, :], (_SUBLANES, part.shape[1]))
    row = lax.broadcasted_iota(jnp.int32, out.shape, 0)
    for i in range(1, _SUBLANES):
        if groups[i] != groups[i - 1]:
            out = jnp.where(row >= i, part[groups[i] : groups[i] + 1, :], out)
    return out
