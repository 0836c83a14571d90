"""The `pixeldecoder` command: a file for each group of commands, options that they share, and `main`."""

import sys

try:
    from pixeldecoder.cli.main import entry_point, main
except KeyboardInterrupt:  # Ctrl-C before `main` can see it
    print("pixeldecoder: interrupted", file=sys.stderr)
    sys.exit(130)

__all__ = ["entry_point", "main"]
