"""`python -m v4sdk`."""

from __future__ import annotations

from v4sdk.cli import main

if __name__ == "__main__":
    main()
