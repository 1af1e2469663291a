"""The floors of the house, as data; tests/test_floors.py holds the code to them.

A module may import its own floor's package and the floors below it. Two packages on one floor do
not import each other.
"""

from __future__ import annotations

FLOORS: tuple[tuple[str, ...], ...] = (
    ("jaxquant.pallas_kernels",),
    ("jaxquant.core",),
    ("jaxquant.passes",),
    ("jaxquant.frontends",),
    ("jaxquant.algorithms",),
    ("jaxquant.evaluate", "jaxquant.io"),
)
"""Lowest first. Above them: jaxquant/__init__.py, the command line, tests, benchmarks."""

STAND_ALONE = "jaxquant.models"
"""Plain Flax models, as a user would write them: they import nothing of jaxquant."""

DIRECTORY = {"jaxquant.pallas_kernels": "pallas_kernels", "jaxquant.passes": "passes"}
"""Where a package lies in the repository, if not where its name says."""

ALWAYS_BANNED = ("jax._src", "passes", "pallas_kernels")

BANNED_BELOW = {
    # The ground floor takes plain arrays: it knows JAX and nothing else.
    "jaxquant.pallas_kernels": ("chex", "flax", "optax", "orbax"),
    # Frameworks are met first by the frontends; checkpoints only by io.
    "jaxquant.core": ("flax", "optax", "orbax"),
    "jaxquant.passes": ("flax", "optax", "orbax"),
    "jaxquant.frontends": ("optax", "orbax"),
    "jaxquant.algorithms": ("orbax",),
}


def packages() -> tuple[str, ...]:
    """Every package that has a place in the house."""
    return tuple(name for floor in FLOORS for name in floor) + (STAND_ALONE,)


def directory(package: str) -> str:
    """The package's folder in the repository."""
    return DIRECTORY.get(package, package.replace(".", "/"))


def allowed(package: str) -> frozenset[str]:
    """The packages of this library that `package` may import, itself included."""
    below: set[str] = {package}
    if package != STAND_ALONE:
        for floor in FLOORS:
            if package in floor:
                break
            below.update(floor)
    return frozenset(below)


def banned(package: str) -> tuple[str, ...]:
    """What ruff refuses in `package`: the rest of the house, and what its floor must not know."""
    rest = tuple(name for name in packages() if name not in allowed(package))
    own = (*rest, "jaxquant.cli")
    return (*ALWAYS_BANNED, *own, *BANNED_BELOW.get(package, ()))
