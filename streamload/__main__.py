"""The command line as ``python -m streamload``."""

from __future__ import annotations

import sys

from streamload.cli import main

if __name__ == "__main__":
    sys.exit(main())
