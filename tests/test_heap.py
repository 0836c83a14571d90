import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys, threading
from pixeldecoder import heap

getattr(heap, sys.argv[1])()
held = []
barrier = threading.Barrier(5)
threads = [threading.Thread(target=lambda: (held.append(bytes(3000)), barrier.wait())) for _ in range(4)]
for thread in threads:
    thread.start()
barrier.wait()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("call", ["one_heap", "trim"])
def test_threads_share_one_heap(call):
    """By glibc's own account; otherwise each of four has its own."""
    told = subprocess.run([sys.executable, "-c", SCRIPT, call], capture_output=True, text=True, check=True).stdout
    heaps = told.count("<heap nr=")
    assert heaps == 1 if call == "one_heap" else heaps > 1
