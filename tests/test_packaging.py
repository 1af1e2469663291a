"""What a user gets by `pip install`: every module and data file, under the right names, typed.

Types are checked here as well, on the installed copy: a type checker does not follow setuptools'
package-dir, so in the source tree it would not see jaxquant.passes at all.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax
import pytest

import jaxquant
from tests import floors


def run(*command: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def sources(repository: Path) -> dict[str, Path]:
    """Installed path -> file, for every file of the library that git does not ignore."""
    roots = {"jaxquant": "jaxquant"}
    roots |= {path: name.replace(".", "/") for name, path in floors.DIRECTORY.items()}
    listed = run(
        *("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *roots),
        cwd=repository,
    )
    if listed.returncode:  # an sdist, or a copy without its history
        files = [p for root in roots for p in (repository / root).rglob("*") if p.is_file()]
        names = [str(p.relative_to(repository)) for p in files if "__pycache__" not in p.parts]
    else:
        names = [name for name in listed.stdout.split("\n") if name]
    found = {}
    for name in names:
        top, _, rest = name.partition("/")
        if Path(name).name != "ruff.toml" and (repository / name).is_file():
            found[f"{roots[top]}/{rest}"] = repository / name
    return found


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory) -> Path:
    """A wheel, built from a copy of the sources so that no build folder is left behind."""
    out = tmp_path_factory.mktemp("wheel")
    tree = out / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repository / name, tree)
    for name in ("jaxquant", "passes", "pallas_kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(repository / name, tree / name, ignore=ignore)
    pip = (sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--quiet")
    flags = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(out))
    result = run(*pip, *flags, str(tree))
    assert result.returncode == 0, result.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """The wheel's files, laid out as in site-packages."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_the_tree_and_nothing_else(repository: Path, wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    files = {name: data for name, data in packed.items() if ".dist-info/" not in name}
    expected = sources(repository)
    assert sorted(files) == sorted(expected)
    assert [name for name, path in expected.items() if files[name] != path.read_bytes()] == []
    assert {name.partition("/")[0] for name in files} == {"jaxquant"}


def test_wheel_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        text = archive.read(info).decode()
    assert "License-Expression: Apache-2.0" in text
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "jaxquant/py.typed" in names
    for extra in ("tpu", "cuda", "io", "demo", "colab", "bench", "test"):
        assert f"Provides-Extra: {extra}\n" in text


def test_versions_agree(repository: Path):
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert jaxquant.__version__ == project["version"]


def test_every_public_name_exists_and_is_known_to_type_checkers(repository: Path):
    tree = ast.parse((repository / "jaxquant/__init__.py").read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "`import x as x` marks a re-export"
            typed[alias.name] = node.module
    assert typed == jaxquant._EXPORTS
    assert set(jaxquant.__all__) == {*typed, "__version__"}
    for name, module in typed.items():
        assert getattr(jaxquant, name) is getattr(importlib.import_module(module), name)
    assert set(typed) <= set(dir(jaxquant))
    with pytest.raises(AttributeError, match="quantise"):
        _ = jaxquant.quantise


def test_import_is_light():
    code = "import sys, jaxquant; print(*sorted({'jax', 'flax', 'orbax'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code).stdout.strip() == ""


def mypy(repository: Path, installed: Path) -> subprocess.CompletedProcess[str]:
    options = ("--config-file", str(repository / "pyproject.toml"), "--no-error-summary")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    flags = ("--python-version", version, "--cache-dir", str(installed / ".mypy_cache"))
    return run(
        *(sys.executable, "-m", "mypy", *options, *flags, "jaxquant"),
        cwd=installed,
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax's annotations differ: newest only")
def test_types(repository: Path, installed: Path):
    """One run over the library, and one over a planted error in a floor from the top level."""
    clean = mypy(repository, installed)
    assert clean.returncode == 0, clean.stdout + clean.stderr

    planted = installed / "jaxquant/passes/planted.py"
    lines = ("from jaxquant.core.qtypes import get_qtype", "", "bits: str = get_qtype('int4').bits")
    planted.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        result = mypy(repository, installed)
    finally:
        planted.unlink()
    assert result.returncode == 1
    assert "jaxquant/passes/planted.py:3" in result.stdout, result.stdout
    assert "[assignment]" in result.stdout
