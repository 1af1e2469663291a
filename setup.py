"""Lists the packages; everything else about the build is in pyproject.toml.

The repository keeps two floors of the library at its top level, `passes/` and `pallas_kernels/`.
They are installed as `jaxquant.passes` and `jaxquant.pallas_kernels`, so that no generic name lands
in a user's site-packages. pyproject.toml can only list such packages one by one; here new
sub-packages are found.
"""

from setuptools import find_packages, setup

FLOORS_AT_TOP_LEVEL = ("passes", "pallas_kernels")


def packages() -> list[str]:
    """Returns the dotted names, as installed, of every package in the tree."""
    found = find_packages(include=["jaxquant", "jaxquant.*"])
    for top in FLOORS_AT_TOP_LEVEL:
        found += [f"jaxquant.{name}" for name in find_packages(include=[top, f"{top}.*"])]
    return found


setup(
    packages=packages(),
    package_dir={f"jaxquant.{top}": top for top in FLOORS_AT_TOP_LEVEL},
)
