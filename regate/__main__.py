"""`python -m regate` is the command `regate`."""

from __future__ import annotations

import sys

from regate.cli import main

if __name__ == "__main__":
    sys.exit(main())
