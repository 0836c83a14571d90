"""The `pixeldecoder` command: a file for each group of commands, options that they share, and `main`."""

from pixeldecoder.cli.main import entry_point, main

__all__ = ["entry_point", "main"]
