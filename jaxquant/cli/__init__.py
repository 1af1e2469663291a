"""F6: the command line. `main` is the `jaxquant` script; see `jaxquant --help`."""

from __future__ import annotations

from jaxquant.cli.main import main

__all__ = ["main"]
