"""Parses, runs one command, prints its outcome, and turns errors into one line and an exit code.

Only the standard library is imported here; a command's own module brings what it needs, so that
`--help` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence

from jaxquant.cli.errors import FAILED, USAGE, UsageError
from jaxquant.cli.outcome import Outcome
from jaxquant.cli.parser import build_parser

_PLAIN_WIDTH = 120  # of tables in files and pipes, which have no width of their own
_MODULES = {
    "demo": "jaxquant.cli.demo",
    "explain": "jaxquant.cli.commands",
    "quantize": "jaxquant.cli.commands",
    "inspect": "jaxquant.cli.commands",
    "compare": "jaxquant.cli.commands",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program's name; the process's own by default.

    Returns:
      The exit code: 0 done, 1 a check failed or an error on the way, 2 a wrong command line.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message
        return int(stop.code or 0)
    if args.debug:
        return _print(args, _command(args.command)(args))
    try:
        outcome = _command(args.command)(args)
    except UsageError as error:
        return _fail(args, USAGE, str(error))
    except KeyboardInterrupt:
        return _fail(args, 130, "interrupted")
    except Exception as error:  # noqa: BLE001 - the border of the program: a line, not a traceback
        reason = str(error).strip() or "no message"
        return _fail(args, FAILED, f"{type(error).__name__}: {reason}", hint=True)
    return _print(args, outcome)


def _command(name: str) -> Callable[[argparse.Namespace], Outcome]:
    return getattr(importlib.import_module(_MODULES[name]), name)


def _print(args: argparse.Namespace, outcome: Outcome) -> int:
    if args.json:
        verdict = {"ok": not outcome.failures, "failures": list(outcome.failures)}
        sys.stdout.write(json.dumps({**outcome.data, **verdict}, allow_nan=False) + "\n")
        return outcome.exit_code
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    for item in outcome.shown:
        console.print(item, highlight=False, markup=False) if isinstance(item, str) else (
            console.print(item)
        )
    for failure in outcome.failures:
        console.print(Text(f"FAILED: {failure}", style="bold red"))
    return outcome.exit_code


def _fail(args: argparse.Namespace, code: int, message: str, *, hint: bool = False) -> int:
    if args.json:
        report = {"ok": False, "failures": [message]}
        sys.stdout.write(json.dumps(report) + "\n")
    suffix = "\n(--debug shows the traceback)" if hint else ""
    sys.stderr.write(f"jaxquant {args.command}: {message}{suffix}\n")
    return code
