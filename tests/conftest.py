"""The test world: eight host devices, a compilation cache, seeds that do not move.

The environment is set here, before anything imports jax; warnings are errors by pyproject.toml, and
what third parties emit is listed there.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAXQUANT_VERIFY", "1")  # every program of every test is checked in full
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("jaxquant", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("jaxquant")


def _cache_directory() -> Path:
    """A folder of the user's, apart for every jax version and every xdist worker (no races)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    return Path(base) / "jaxquant-tests" / f"jax-{jax.__version__}" / worker


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(_cache_directory()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees what a module compiled; without it a worker grows to several gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent
