"""`python -m pixeldecoder` is the `pixeldecoder` command."""

from pixeldecoder.cli import entry_point

entry_point()
