"""How glibc keeps the memory of this process; elsewhere nothing happens."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of malloc.h."""


def keep_freed_memory() -> None:
    """From now on: glibc returns large blocks to the system, which has to clear the next ones. A training step frees
    and takes the same again, and would spend a tenth of its time on that."""
    _mallopt({_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30})


def one_heap() -> None:
    """From now on: glibc has a heap for each thread that comes, and each keeps the gaps between what lives on in it. A
    server's threads come and go, and what it holds would creep up for hours."""
    _mallopt({_ARENA_MAX: 1})


def trim() -> None:
    """Give the gaps back to the system."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


def _mallopt(options: dict[int, int]) -> None:
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, value in options.items():
            mallopt(option, value)
