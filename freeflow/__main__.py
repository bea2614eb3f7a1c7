"""`python -m freeflow` is the same as `freeflow`."""

import sys

from freeflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
