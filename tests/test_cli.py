"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.cli import main
from jaxquant.cli.trees import differences

FACTORY = """
    import jax, jax.numpy as jnp, numpy as np
    from flax import linen as nn, nnx

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6)(nn.relu(nn.Dense(32)(x)))

    class Twin(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 6, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    X = np.linspace(-1, 1, 5 * 16, dtype=np.float32).reshape(5, 16)
    DATA = {"first": [X], "second": [X[::-1] ** 3]}

    def linen():
        variables = Net().init(jax.random.key(0), X)
        return dict(model=Net(), variables=variables, example=(X,), data=DATA, calibration=[X])

    def bare():
        return dict(model=Net(), example=(X,), data=DATA)

    def twin():
        return dict(model=Twin(nnx.Rngs(0)), example=(X,), data=DATA)

    def function():
        def predict(params, x):
            return x @ params["w"]
        w = jax.random.normal(jax.random.key(0), (16, 6))
        return dict(model=predict, variables={"w": w}, example=(X,), data=DATA)

    def number():
        return 7

    def wrong(name, value):
        return lambda: {**linen(), name: value}

    array_example, a_class = wrong("example", X), wrong("model", Net)
    array_calibration, array_slice = wrong("calibration", X), wrong("data", {"first": X})
    listed_data = wrong("data", [X])

    def incomplete():
        return dict(model=Net())

    def misspelt():
        return dict(model=Net(), example=(X,), dta=DATA)

    def failing():
        raise RuntimeError("no such data")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a user's module in it."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "project_models.py").write_text(textwrap.dedent(FACTORY))
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch) -> Path:
    """An empty working directory, with the user's module importable."""
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_json(capsys, *args: str) -> tuple[int, dict]:
    """Runs a command with --json; its standard output must be one JSON object."""
    code = main([*args, "--json"])
    return code, json.loads(capsys.readouterr().out)


COMMANDS = ("demo", "explain", "quantize", "inspect", "compare")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(capsys, command: str):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:\n  jaxquant" in text
    assert "--json" in text


def test_main_help_lists_commands_and_exit_codes(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [c for c in COMMANDS if f"\n    {c}" not in text] == []
    assert "exit codes" in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"jaxquant {jq.__version__}"


def test_help_imports_no_framework():
    code = (
        "import sys; from jaxquant.cli import main; main(['--help']);"
        "sys.exit(bool({'jax', 'flax', 'orbax', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "COMMAND"),
        (("nonsense",), "invalid choice"),
        (("quantize",), "--out"),
        (("compare", "--batches", "0"), "not positive"),
        (("explain", "--recipe", "w5"), "unknown recipe 'w5'"),
        (("explain", "--recipe", "missing.json"), "missing.json"),
        (("demo", "--recipes", "w8a8", "w8a8"), "given twice"),
        (("inspect", "nowhere"), "no checkpoint at nowhere"),
        (("compare", "--quantized", "nowhere"), "no checkpoint at nowhere"),
        (("explain", "--checkpoint", "x"), "give --model"),
        (("explain", "--model", "project_models"), "module:factory"),
        (("explain", "--model", "no_such_module:f"), "no_such_module"),
        (("explain", "--model", "project_models:nothing"), "no function nothing"),
        (("explain", "--model", "project_models:number"), "returned a int"),
        (("explain", "--model", "project_models:incomplete"), "lacks example"),
        (("explain", "--model", "project_models:misspelt"), "unknown dta"),
        (("quantize", "--model", "project_models:bare", "--out", "o"), "no variables"),
        (("explain", "--model", "project_models:array_example"), "example is a tuple of arguments"),
        (("explain", "--model", "project_models:a_class"), "give an instance, such as Net(...)"),
        (("explain", "--model", "project_models:array_calibration"), "calibration is an array"),
        (("explain", "--model", "project_models:array_slice"), "slice 'first' of data is an array"),
        (("explain", "--model", "project_models:listed_data"), "data is a mapping from"),
        (("compare", "--html", "no/such/page.html"), "--html no/such/page.html: there is no such"),
    ],
)
def test_wrong_command_lines_exit_with_two(here, capsys, args: tuple[str, ...], message: str):
    assert main(args) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert output.out == ""


def test_errors_on_the_way_are_one_line_and_exit_with_one(here, capsys):
    args = ["explain", "--model", "project_models:failing"]
    assert main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("jaxquant explain: RuntimeError: no such data\n")
    assert "Traceback" not in error
    assert run_json(capsys, *args) == (
        1,
        {"ok": False, "failures": ["RuntimeError: no such data"]},
    )
    with pytest.raises(RuntimeError, match="no such data"):
        main([*args, "--debug"])


def test_demo_leaves_foreign_folders_alone(here, capsys):
    (here / "mine").mkdir()
    for name in ("thesis.tex", "report.json"):
        (here / "mine" / name).write_text("x")
    assert main(["demo", "--out", "mine"]) == 2
    (here / "mine" / ".jaxquant-demo").write_text("w8a8\nreport.html")
    assert main(["demo", "--out", "mine"]) == 2  # an earlier demo's, but not this report.json
    assert "report.json is in the way" in capsys.readouterr().err
    assert {p.name for p in (here / "mine").iterdir()} == {
        *("thesis.tex", "report.json", ".jaxquant-demo")
    }


@pytest.mark.parametrize("factory", ["linen", "bare", "twin", "function"])
def test_explain(here, capsys, factory: str):
    args = ("explain", "--model", f"project_models:{factory}", "--recipe", "w8a16")
    code, plan = run_json(capsys, *args)
    assert code == 0
    assert plan["ok"] is True
    assert main(args) == 0
    assert "int8" in capsys.readouterr().out


def test_strict_lists_what_would_not_run_quantized(here, capsys):
    args = ("explain", "--model", "project_models:function", "--strict")
    assert run_json(capsys, *args)[0] == 0
    recipe = jq.Recipe("nothing", (jq.Rule("none", weight=jq.WeightScheme(), optional=True),))
    (here / "nothing.json").write_text(json.dumps(recipe.to_json()))
    code, plan = run_json(capsys, *args, "--recipe", "nothing.json")
    assert code == 1
    assert "w (dot): float" in plan["failures"][0]


@pytest.mark.parametrize("factory", ["linen", "twin", "function"])
def test_quantize_inspect_compare(here, capsys, factory: str):
    model = ("--model", f"project_models:{factory}")
    code, made = run_json(capsys, "quantize", *model, "--recipe", "w8a16", "--out", "q8")
    assert code == 0
    qtypes = [row["qtype"] for row in made["rows"] if row["qtype"]]
    assert qtypes == ["int8"] * (1 if factory == "function" else 2)
    assert made["recipe"]["name"] == "w8a16"

    assert main(["quantize", *model, "--out", "q8"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["quantize", *model, "--recipe", "w8a16", "--out", "q8", "--overwrite"]) == 0
    capsys.readouterr()

    code, seen = run_json(capsys, "inspect", "q8")
    assert (code, seen["verified"], seen["nbytes"]) == (0, True, made["nbytes"])

    args = ("compare", *model, "--quantized", "q8", "--recipes", "w4a16")
    code, report = run_json(capsys, *args, "--max-kl", "1")
    assert code == 0
    by_name = {result["name"]: result["overall"] for result in report["recipes"]}
    assert set(by_name) == {"q8", "w4a16"}
    kl = {name: quality["divergence"]["mean"]["value"] for name, quality in by_name.items()}
    assert 0 < kl["q8"] < kl["w4a16"] < 1

    limit = (kl["q8"] + kl["w4a16"]) / 2
    code, report = run_json(capsys, *args, "--max-kl", str(limit), "--no-latency")
    assert code == 1
    assert [line.split(":")[0] for line in report["failures"]] == ["w4a16"]

    assert main([*args, "--html", "page.html", "--min-agreement", "1.1", "--no-latency"]) == 1
    assert "FAILED: q8" in capsys.readouterr().out
    assert "<html" in (here / "page.html").read_text()


def test_float_checkpoint_of_ones_own_model(here, capsys, project: Path):
    import project_models

    variables = project_models.linen()["variables"]
    jq.save(here / "float", variables)
    model = ("--model", "project_models:bare", "--checkpoint", "float")
    code, report = run_json(capsys, "compare", *model, "--recipes", "w8a8", "--no-latency")
    assert code == 0
    assert report["recipes"][0]["name"] == "w8a8"


def test_recipe_from_a_file(here, capsys):
    recipe = jq.get_recipe("w8a16").with_rules(jq.Rule("Dense_1/**", skip=True), name="mine")
    (here / "mine.json").write_text(json.dumps(recipe.to_json()))
    args = ("quantize", "--model", "project_models:linen", "--recipe", "mine.json", "--out", "q")
    code, made = run_json(capsys, *args)
    assert (code, made["recipe"]["name"]) == (0, "mine")
    quantized = {row["path"] for row in made["rows"] if row["qtype"]}
    assert quantized == {"Dense_0/kernel"}
    (here / "mine.json").write_text("{}")
    assert main(list(args)) == 2


def test_inspect_finds_altered_data(here, capsys):
    w = np.random.default_rng(0).integers(-127, 128, (1024, 1024)).astype(np.int8)
    jq.save(here / "q", {"w": jnp.asarray(w)})
    assert main(["inspect", "q"]) == 0
    largest = max(
        (p for p in (here / "q").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["inspect", "q"]) == 1
    assert "jaxquant inspect: " in capsys.readouterr().err
    assert main(["inspect", "q", "--no-verify"]) == 0


def test_demo(here, capsys):
    args = ("demo", "--recipes", "w8a8", "w2a16", "--batches", "1", "--no-latency")
    code, result = run_json(capsys, *args)
    assert (code, result["ok"]) == (0, True)
    assert [r["name"] for r in result["report"]["recipes"]] == ["w8a8", "w2a16"]
    sizes = {name: record["disk_bytes"] for name, record in result["checkpoints"].items()}
    assert sizes["w2a16"] < sizes["w8a8"]
    assert all(record["differences"] == [] for record in result["checkpoints"].values())
    assert "<html" in (here / "jaxquant-demo" / "report.html").read_text()
    jq.inspect(here / "jaxquant-demo" / "w2a16")


def test_second_demo_replaces_the_first(here, capsys, monkeypatch):
    (here / "jaxquant-demo" / "w1a16").mkdir(parents=True)
    (here / "jaxquant-demo" / "notes.txt").write_text("mine")
    (here / "jaxquant-demo" / ".jaxquant-demo").write_text("w1a16\nreport.json")
    assert main(["demo", "--recipes", "w8a16", "--batches", "1", "--no-latency"]) == 0
    text = capsys.readouterr().out
    assert "w8a16" in text
    assert "equal" in text
    assert {p.name for p in (here / "jaxquant-demo").iterdir()} == {
        *("w8a16", "report.html", "report.json", "notes.txt", ".jaxquant-demo")
    }


def test_differences_sees_every_bit():
    tree = {"a": jnp.arange(4, dtype=jnp.int4), "b": (jnp.array([jnp.nan, 0.0]), None)}
    assert differences(tree, {"a": jnp.arange(4, dtype=jnp.int4), "b": tree["b"]}) == []
    assert differences(tree, {**tree, "a": jnp.arange(4, dtype=jnp.int8)}) == ["a"]
    assert differences(tree, {**tree, "b": (jnp.array([jnp.nan, -0.0]), None)}) == ["b/0"]
    assert differences(tree, {"a": tree["a"]}) == ["the tree's structure"]


def test_a_recipe_file_with_transforms(here: Path, capsys):
    """explain says it, quantize does it, inspect shows it, and compare runs it."""
    recipe = jq.get_recipe("w8a8").with_transforms(jq.Smooth(unfoldable="multiply"), name="mine")
    Path("recipe.json").write_text(json.dumps(recipe.to_json()))
    model = ("--model", "project_models:linen")
    code, found = run_json(capsys, "explain", *model, "--recipe", "recipe.json")
    rows = {tuple(row["weights"]): row for row in found["transforms"]}
    assert code == 0
    assert rows[("Dense_1/kernel",)]["status"] == "multiply"  # it is called first
    assert rows[("Dense_0/kernel",)]["into"] == ["Dense_1/bias", "Dense_1/kernel"]
    assert main(["quantize", *model, "--recipe", "recipe.json", "--out", "q"]) == 0
    text = capsys.readouterr().out
    assert "recipe mine with Smooth(alpha=0.5, unfoldable='multiply')" in text
    assert "factors, then int8 per token" in text
    code, found = run_json(capsys, "compare", *model, "--quantized", "q")
    assert code == 0 and found["recipes"][0]["name"] == "q"
    bare = ("--model", "project_models:function")  # which has no calibration batches
    assert main(["quantize", *bare, "--recipe", "recipe.json", "--out", "r"]) == 1
    assert "give batches of data as calibration=" in capsys.readouterr().err
