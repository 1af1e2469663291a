"""The two ways a command ends badly, and their exit codes."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2


class UsageError(Exception):
    """The command line asks for something that does not exist or make sense (exit code 2)."""
