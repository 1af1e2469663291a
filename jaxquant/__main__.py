"""`python -m jaxquant`: the command line."""

import sys

from jaxquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
