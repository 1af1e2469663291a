"""What a command hands back to `main`, which prints it as a table or as JSON."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from jaxquant.cli.errors import FAILED, OK


def say(line: str) -> None:
    """Tells the user on standard error what is being done; --json leaves standard output alone."""
    sys.stderr.write(f"{line} ...\n")
    sys.stderr.flush()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A command's result.

    Attributes:
      data: what `--json` prints, without "ok" and "failures".
      shown: what is printed otherwise: strings and rich renderables.
      failures: the checks that failed, one line each; any means exit code 1.
    """

    data: dict[str, Any]
    shown: tuple[Any, ...]
    failures: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or 1 if a check failed."""
        return FAILED if self.failures else OK
