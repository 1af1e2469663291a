"""The arguments of every command. Only argparse is imported, so that --help is instant."""

from __future__ import annotations

import argparse
import textwrap
from importlib import metadata

_DEMO_RECIPES = ("w8a8", "w8a16", "w4a16_g64", "nf4", "w3a16", "w2a16")

_TARGET = """
By default the command works on the small language model that ships with jaxquant. For a model of
your own give --model module:factory, where factory() returns a mapping with these entries:

  model        a Flax module (Linen or NNX), or a function of (parameters, *arguments)
  example      tuple of example arguments, to trace the model with
  variables    Linen variables or the function's parameters (not needed with --checkpoint, or NNX)
  calibration  list of batches (optional; recipes with static ranges or Smooth need it)
  data         mapping from slice name to a list of batches (for `compare`; a batch is one array,
               a tuple of positional arguments, or a mapping of keyword arguments)
  metrics      mapping from name to fn(outputs, batch), one number an example (optional)
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser; the chosen command's name is in `command`."""
    parser = argparse.ArgumentParser(
        prog="jaxquant",
        description="Quantize JAX models, and measure what that costs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_examples(
            "jaxquant demo",
            "jaxquant explain --recipe w4a16_g64",
            "jaxquant quantize --recipe w8a8 --out shipped-w8a8",
            "jaxquant inspect shipped-w8a8",
            "jaxquant compare --quantized shipped-w8a8 --max-kl 0.05",
        )
        + "\n\nexit codes:\n  0  done\n  1  a check or comparison failed, or an error on the way\n"
        "  2  the command line is wrong",
    )
    parser.add_argument("--version", action="version", version=f"jaxquant {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _demo(commands)
    _explain(commands)
    _quantize(commands)
    _inspect(commands)
    _compare(commands)
    return parser


def _demo(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "demo",
        "quantize the shipped model with several recipes and measure each",
        "Quantizes the trained language model that ships with jaxquant with several recipes, "
        "compares each with the float model slice by slice, saves and restores every one, checks "
        "that what comes back is equal bit by bit, prints a table and writes an HTML report. "
        "Needs no network.",
        examples=("jaxquant demo", "jaxquant demo --recipes w8a8 w4a16_g32 --out /tmp/demo"),
    )
    command.add_argument(
        *("--recipes", "-r"),
        nargs="+",
        default=list(_DEMO_RECIPES),
        metavar="RECIPE",
        help=f"presets or JSON files (default: {' '.join(_DEMO_RECIPES)})",
    )
    command.add_argument(
        "--out",
        default="jaxquant-demo",
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    _batches(command)


def _explain(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "explain",
        "show what a recipe would do to every op, and why",
        "Prints the plan of a recipe: every op with its class, shapes, parameter, scheme, "
        "lowering and bytes, and every op that stays float with the reason. Computes nothing but "
        "shapes.",
        target=True,
        examples=(
            "jaxquant explain",
            "jaxquant explain --recipe w4a16_g64 --json",
            "jaxquant explain --model my_project.model:quantizable --recipe recipe.json",
        ),
    )
    _recipe(command)
    command.add_argument(
        "--strict",
        action="store_true",
        help="fail if a weight is dequantized before use, or left float though no rule skips it",
    )


def _quantize(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "quantize",
        "quantize a model and save it",
        "Quantizes the weights by round-to-nearest under a recipe and saves them with Orbax. The "
        "checkpoint describes itself: jaxquant.restore needs no template.",
        target=True,
        examples=(
            "jaxquant quantize --recipe w4a16_g64 --out shipped-w4",
            "jaxquant quantize --model my_project.model:quantizable --checkpoint float --out w8a8",
        ),
    )
    _recipe(command)
    command.add_argument("--out", required=True, metavar="DIR", help="the checkpoint to write")
    command.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def _inspect(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "inspect",
        "show what a checkpoint holds and verify its checksums",
        "Prints a checkpoint's format, recipe, qtypes, shapes and bytes. Unless told otherwise "
        "it also reads every leaf and verifies its checksum; altered data means exit code 1.",
        examples=("jaxquant inspect shipped-w4", "jaxquant inspect shipped-w4 --no-verify --json"),
    )
    command.add_argument("checkpoint", metavar="CKPT", help="a directory written by jaxquant.save")
    command.add_argument(
        "--no-verify", dest="verify", action="store_false", help="read the metadata only"
    )


def _compare(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "compare",
        "measure a quantized model beside its float one",
        "Compares quality (KL divergence, agreement, loss; means, tails, by slice), device bytes "
        "and latency of quantized models with the float model. With limits, a model beyond one "
        "of them means exit code 1.",
        target=True,
        examples=(
            "jaxquant compare --recipes w8a8 w4a16_g64",
            "jaxquant compare --quantized shipped-w4 --max-kl 0.05 --min-agreement 0.95",
            "jaxquant compare --recipes w8a8 --html report.html",
        ),
    )
    command.add_argument(
        *("--recipes", "-r"),
        nargs="+",
        default=[],
        metavar="RECIPE",
        help="quantize with these presets or JSON files (default without --quantized: w8a8)",
    )
    command.add_argument(
        *("--quantized", "-q"),
        nargs="+",
        default=[],
        metavar="CKPT",
        help="checkpoints of quantized variables, as `jaxquant quantize` writes them",
    )
    command.add_argument(
        "--max-kl", type=float, metavar="NATS", help="limit of the mean KL divergence"
    )
    command.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="least share of equal top-1 predictions",
    )
    command.add_argument("--html", metavar="FILE", help="also write the report as one HTML page")
    _batches(command)


def _command(
    commands: argparse._SubParsersAction,
    name: str,
    summary: str,
    description: str,
    *,
    examples: tuple[str, ...],
    target: bool = False,
) -> argparse.ArgumentParser:
    """A command with what all of them share."""
    text = textwrap.fill(description, 96) + (f"\n{_TARGET}" if target else "")
    command = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=_examples(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    if target:
        command.add_argument("--model", metavar="MODULE:FACTORY", help="a model of your own")
        command.add_argument(
            "--checkpoint", metavar="DIR", help="its float variables, as written by jaxquant.save"
        )
    return command


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        *("--recipe", "-r"),
        metavar="RECIPE",
        help="a preset's name or a JSON file (default: the decorator's, else w8a8)",
    )


def _batches(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batches", type=_positive, metavar="N", help="use at most N batches of every slice"
    )
    command.add_argument(
        "--no-latency", dest="latency", action="store_false", help="measure no times"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _version() -> str:
    return metadata.version("jaxquant")
