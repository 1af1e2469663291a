"""The documents are true: examples run, links lead somewhere, tables are the measured ones."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import readme

_ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*_ROOT.glob("*.md"), *(_ROOT / "docs").glob("*.md")]


def test_readme_example_runs(tmp_path: Path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (_ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].shape == (32, 10)
    assert (tmp_path / "model-int4").is_dir()
    printed = capsys.readouterr().out
    assert "int4 g64" in printed
    assert "KL" in printed


def test_the_pass_of_the_documents_runs(capsys):
    blocks = re.findall(
        r"```python\n(.*?)```", (_ROOT / "docs" / "passes.md").read_text(), re.DOTALL
    )
    names: dict = {"__name__": "example"}
    for block in blocks[1:3]:
        exec(compile(block, "passes.md", "exec", dont_inherit=True), names)
    assert capsys.readouterr().out == "('x**2 of float32[2,16]',)\n"
    jaxpr = str(names["compiled"].jaxpr)
    assert "integer_pow" not in jaxpr and jaxpr.count(" square ") == 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_commands_of_the_readme_are_single_lines_that_ci_can_find():
    lines = (_ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv .venv && ")]
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/jaxquant demo")
    assert ".venv/bin/pytest" in commands[1]


def test_readme_shows_the_newest_results():
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    between = text.partition(readme.BEGIN)[2].partition(readme.END)[0]
    assert between.strip() == readme.render(readme.newest_results()).strip()


def test_no_path_of_a_machine_is_in_the_repository():
    listed = subprocess.run(
        [
            "git",
            "grep",
            "-nIE",
            r"/(root|home/[a-z]+|work|opt/[a-z]+)/",
            "--",
            ":!*.txt",
            ":!LICENSE",
        ],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode > 1:
        pytest.skip("not a git checkout")
    own = "tests/test_documents.py:"
    assert [line for line in listed.stdout.splitlines() if not line.startswith(own)] == []
