"""Where and with what a measurement was made.

For: :mod:`jaxquant.evaluate.report`. A report makes no claim about any other platform, so it says
which one it is about.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import pathlib
import platform
import shlex
import sys

import jax


def describe_environment(command: str | None = None) -> dict[str, str]:
    """Collects platform, devices, versions, time and command as text, in the order to show them.

    Args:
      command: what was run; None for the process's own arguments.
    """
    devices = jax.devices()
    return {
        "platform": jax.default_backend(),
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "processor": _processor(),
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "flax": _version("flax"),
        "jaxquant": _version("jaxquant"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "measured": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(sys.argv) if command is None else command,
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
