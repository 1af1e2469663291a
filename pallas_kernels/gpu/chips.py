"""GPUs as data: what kernels are chosen by, and what figures are compared with.

Read by the choice of a kernel and its configuration, by the benchmarks and by their tables. A GPU
that is not listed has no kernels: XLA is used, and the plan says so.

Sources: bandwidth and dense tensor-core rates of the SXM parts from NVIDIA's "H100 Tensor Core GPU"
and "H200 Tensor Core GPU" datasheets; multiprocessors, L2 and shared memory from NVIDIA's "H100
Tensor Core GPU Architecture" whitepaper and the CUDA C++ programming guide's table of compute
capability 9.0 (227 KiB of shared memory a block). Peaks are the vendor's: no figure of ours is
compared with them, only with what `benchmarks/gpu.py` copies and multiplies on the chip at hand.
"""

from __future__ import annotations

import dataclasses

_TERA = 1e12
_GIGA = 1e9
_KIB = 2**10
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of GPU.

    Attributes:
      name: "H100" or "H200".
      device_kinds: what `jax.Device.device_kind` says.
      capability: CUDA's compute capability.
      multiprocessors: how many run at once.
      shared_bytes: shared memory that one block can have.
      registers: 32-bit registers of a multiprocessor.
      l2_bytes: second-level cache.
      hbm_bandwidth: bytes a second.
      bf16_flops: dense bfloat16 peak a second.
      eight_bit_ops: dense int8 and fp8 peak a second.
    """

    name: str
    device_kinds: tuple[str, ...]
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    registers: int
    l2_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    eight_bit_ops: float


def _hopper(name: str, device_kind: str, hbm_bandwidth: float) -> Chip:
    return Chip(
        name,
        (device_kind,),
        capability=(9, 0),
        multiprocessors=132,
        shared_bytes=227 * _KIB,
        registers=65536,
        l2_bytes=50 * _MIB,
        hbm_bandwidth=hbm_bandwidth,
        bf16_flops=989 * _TERA,
        eight_bit_ops=1979 * _TERA,
    )


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _hopper("H100", "NVIDIA H100 80GB HBM3", 3350 * _GIGA),
        _hopper("H200", "NVIDIA H200", 4800 * _GIGA),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device by its `device_kind`; None for one that is not listed."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip
    return None
