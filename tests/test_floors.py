"""Imports run strictly downward, and the linter knows it too.

The walk below reads every module's syntax tree, so that an import inside a function, or under
TYPE_CHECKING, counts as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import floors


def modules(repository: Path) -> Iterator[tuple[str, str, Path]]:
    """Yields (package of the house, module's name as installed, file)."""
    for package in floors.packages():
        root = repository / floors.directory(package)
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield package, ".".join((package, *parts)).removesuffix(".__init__"), path


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def violation(package: str, module: str, name: str) -> str | None:
    """Says why `module` of `package` must not import `name`; None if it may."""
    top = name.partition(".")[0]
    if top in ("passes", "pallas_kernels"):
        return f"imports {name}: say jaxquant.{top}"
    compat = f"{module}.".startswith("jaxquant.core._compat.")
    if f"{name}.".startswith("jax._src.") and not compat:
        return f"imports {name}: only jaxquant.core._compat may"
    if top in floors.BANNED_BELOW.get(package, ()):
        return f"imports {name}: this floor must not know {top}"
    if top == "jaxquant" and not any(
        f"{name}.".startswith(f"{other}.") for other in floors.allowed(package)
    ):
        return f"imports {name}: not below {package}"
    return None


def test_imports_run_strictly_downward(repository: Path):
    found = []
    seen = set()
    for package, module, path in modules(repository):
        seen.add(package)
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            reason = violation(package, module, name)
            if reason:
                found.append(f"{path.relative_to(repository)}:{line} {reason}")
    assert not found, "\n".join(found)
    assert seen == set(floors.packages()), "a package of the house has no module"


@pytest.mark.parametrize(
    ("package", "line", "bad"),
    [
        ("jaxquant.core", "import jaxquant.passes.program", True),
        ("jaxquant.core", "from jaxquant import passes", True),
        ("jaxquant.core", "from jaxquant import ptq", True),
        ("jaxquant.core", "import jaxquant", True),
        ("jaxquant.core", "from jax._src import core", True),
        ("jaxquant.passes", "import pallas_kernels.reference", True),
        ("jaxquant.io", "from jaxquant.evaluate import compare", True),
        ("jaxquant.models", "from jaxquant.core import qtensor", True),
        ("jaxquant.pallas_kernels", "def f():\n    import flax.linen", True),
        ("jaxquant.core", "from jaxquant.pallas_kernels import packing", False),
        ("jaxquant.io", "from jaxquant.algorithms.ptq import ptq", False),
        ("jaxquant.frontends", "from flax import nnx", False),
    ],
)
def test_the_check_itself(package: str, line: str, bad: bool):
    names = [name for _, name in imported(ast.parse(line))]
    assert bool([n for n in names if violation(package, f"{package}.x", n)]) is bad


@pytest.mark.parametrize("package", floors.packages())
def test_linter_knows_the_floors(repository: Path, package: str):
    config = repository / floors.directory(package) / "ruff.toml"
    lint = tomllib.loads(config.read_text(encoding="utf-8"))["lint"]
    assert tuple(lint["flake8-tidy-imports"]["banned-api"]) == floors.banned(package)


def ruff(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def test_repository_is_clean_under_the_linter(repository: Path):
    result = ruff("check", "--no-cache", "--output-format", "concise", ".", cwd=repository)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("jaxquant/core/planted.py", "from jaxquant.passes import program"),
        ("pallas_kernels/planted.py", "from jaxquant.core import qtensor"),
        ("passes/planted.py", "import jax._src.core"),
        ("tests/planted.py", "import passes.program"),
    ],
)
def test_linter_catches_a_planted_import(repository: Path, file: str, line: str):
    args = ("check", "--no-cache", "--select", "TID251", "--stdin-filename", file, "-")
    result = ruff(*args, cwd=repository, input=f"{line}\n")
    assert result.returncode == 1, result.stderr
    assert "TID251" in result.stdout
