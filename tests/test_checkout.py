"""The tests test the checkout that they are in."""

import subprocess
import sys
from pathlib import Path

import pixeldecoder

ROOT = Path(__file__).parent.parent


def test_this_checkout_is_tested():
    child = subprocess.run(
        [sys.executable, "-c", "import pixeldecoder; print(pixeldecoder.__file__)"],
        capture_output=True, text=True, check=True, cwd="/",
    ).stdout  # fmt: skip
    assert Path(pixeldecoder.__file__).is_relative_to(ROOT / "src") and child.strip() == pixeldecoder.__file__
