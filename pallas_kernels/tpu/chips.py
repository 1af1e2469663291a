"""TPU chips as data: what the matrix units take, how much VMEM there is, how fast memory is.

Read by the choice of a kernel and its configuration, and by the static figures. Everything is per
TensorCore, as the compiler sees a device of one core; `cores` says how many of them a JAX device
has (v4 and v5p run as megacore). A chip that is not listed has no kernels: XLA is used, and the
plan says so.

Sources: peaks, memory bandwidth and core counts from Google Cloud's pages "TPU v4", "TPU v5e",
"TPU v5p", "TPU v6e" and "TPU7x" (docs.cloud.google.com/tpu/docs); VMEM and int8 support from JAX's
"TPU Hardware Reference" (docs.jax.dev, pallas/tpu/hardware). The clock is not published for every
chip: it is the bfloat16 peak over the multiply-adds a cycle that the compiler's own schedules
reach (4 x 128 x 128 up to v5, 4 x 256 x 256 from v6 on).
"""

from __future__ import annotations

import dataclasses

_TERA = 1e12
_GIGA = 1e9
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU, per TensorCore.

    Attributes:
      name: "v4", "v5e", "v5p", "v6e" or "v7x".
      device_kinds: what `jax.Device.device_kind` says.
      topology: a name that `jax.experimental.topologies` takes.
      cores: TensorCores a JAX device.
      vmem_bytes: vector memory.
      macs_per_cycle: bfloat16 multiply-adds the matrix units do in a cycle.
      bf16_flops: bfloat16 peak a second.
      hbm_bandwidth: bytes a second.
      mxu_dtypes: dtype names of operands the matrix units multiply natively (int4 and fp8 where
        that is no slower than bfloat16).
      has_bf16_vpu: vector arithmetic on bfloat16 without a detour through float32.
      gathers_sublanes: vectors are picked from by sublane, for each lane its own.
      gathers_bytes: likewise of bytes, four in each lane of a vector.
      converts_float4: the compiler converts float4_e2m1fn to bfloat16; others refuse the type.
      int4_to_float8: int4 becomes float8_e4m3fn in one vector operation for four codes a lane, and
        that is pushed into the matrix units at twice the rate of bfloat16.
      copies_operands: XLA copies operands of a kernel that fit to VMEM before it begins.
    """

    name: str
    device_kinds: tuple[str, ...]
    topology: str
    cores: int
    vmem_bytes: int
    macs_per_cycle: int
    bf16_flops: float
    hbm_bandwidth: float
    mxu_dtypes: tuple[str, ...]
    has_bf16_vpu: bool
    gathers_sublanes: bool = True
    gathers_bytes: bool = False
    converts_float4: bool = False
    int4_to_float8: bool = False
    copies_operands: bool = False

    @property
    def clock(self) -> float:
        """Cycles a second (see the module's docstring)."""
        return self.bf16_flops / (2 * self.macs_per_cycle)


_SMALL_MXU = 4 * 128 * 128
_LARGE_MXU = 4 * 256 * 256

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            ("TPU v4",),
            "v4:2x2x1",
            2,
            16 * _MIB,
            _SMALL_MXU,
            275 * _TERA / 2,
            1228 * _GIGA / 2,
            ("bfloat16",),
            False,
            gathers_sublanes=False,
        ),
        Chip(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            "v5e:2x2",
            1,
            128 * _MIB,
            _SMALL_MXU,
            197 * _TERA,
            819 * _GIGA,
            ("bfloat16", "int8", "int4"),
            False,
        ),
        Chip(
            "v5p",
            ("TPU v5", "TPU v5p"),
            "v5p:2x2x1",
            2,
            64 * _MIB,
            _SMALL_MXU,
            459 * _TERA / 2,
            2765 * _GIGA / 2,
            ("bfloat16", "int8", "int4"),
            False,
        ),
        Chip(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            "v6e:2x2",
            1,
            128 * _MIB,
            _LARGE_MXU,
            918 * _TERA,
            1638 * _GIGA,
            ("bfloat16", "int8", "int4", "float8"),
            True,
            gathers_bytes=True,
        ),
        Chip(
            "v7x",
            ("TPU7x", "TPU v7x"),
            "tpu7x:2x2x1",
            1,
            64 * _MIB,
            _LARGE_MXU,
            2307 * _TERA / 2,
            7380 * _GIGA / 2,
            ("bfloat16", "float8"),
            True,
            gathers_bytes=True,
            converts_float4=True,
            int4_to_float8=True,
            copies_operands=True,
        ),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device by its `device_kind`; None for one that is not listed."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip
    return None
