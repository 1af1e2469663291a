"""The formats that the GPU's matmul kernels are compiled for: fields of a problem by name.

Beside each what wgmma's sums and operands are, which the compiled kernel must have. Read by the
tests and by `benchmarks.gpu_static`; plain data, so that any jax can import it.
"""

from __future__ import annotations

from typing import Any

_INT8 = {"x_dtype": "int8", "x_scale": True}
_FP8 = {"x_dtype": "float8_e4m3fn", "x_scale": True}
_EPILOGUE = {"bias": True, "gate": True, "residual": True}
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "w4a16 g128": ({"codes": "int4", "group": 128, **_EPILOGUE}, "f32.bf16.bf16"),
    "w4a16 g64 zero": ({"codes": "int4", "group": 64, "zero_point": True}, "f32.bf16.bf16"),
    "w4a16 g32": ({"codes": "int4", "group": 32}, "f32.bf16.bf16"),
    "w4a16": ({"codes": "int4"}, "f32.bf16.bf16"),
    "w8a16 g128": ({"codes": "int8", "group": 128}, "f32.bf16.bf16"),
    "w8a8": ({"codes": "int8", **_INT8}, "s32.s8.s8"),
    "w8a8 g128 zero": ({"codes": "int8", "group": 128, "zero_point": True, **_INT8}, "s32.s8.s8"),
    "w8a8 g64": ({"codes": "int8", "group": 64, **_INT8}, "s32.s8.s8"),
    "w4a8 g64 zero": ({"codes": "int4", "group": 64, "zero_point": True, **_INT8}, "s32.s8.s8"),
    "w4a8 g128": ({"codes": "int4", "group": 128, **_INT8}, "s32.s8.s8"),
    "w4a8 zero": ({"codes": "int4", "zero_point": True, **_INT8}, "s32.s8.s8"),
    "fp8": ({"codes": "float8_e4m3fn", **_FP8, **_EPILOGUE}, "f32.e4m3.e4m3"),
    "bf16 x fp8 g128": ({"codes": "float8_e4m3fn", "group": 128}, "f32.bf16.bf16"),
    "bf16 x e5m2": ({"codes": "float8_e5m2"}, "f32.bf16.bf16"),
    "w3a16 g64": ({"codes": "int3", "group": 64}, "f32.bf16.bf16"),
    "w3a16 g128 zero": ({"codes": "int3", "group": 128, "zero_point": True}, "f32.bf16.bf16"),
    "w2a16 g64": ({"codes": "int2", "group": 64, **_EPILOGUE}, "f32.bf16.bf16"),
    "w2a16 g32 zero": ({"codes": "int2", "group": 32, "zero_point": True}, "f32.bf16.bf16"),
    "w2a16": ({"codes": "int2"}, "f32.bf16.bf16"),
    "nf4 g64": ({"codes": "table4", "group": 64}, "f32.bf16.bf16"),
    "mxfp4": ({"codes": "table4", "group": 32}, "f32.bf16.bf16"),
}
