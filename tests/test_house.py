"""Imports run one way, and whoever turns one round is told."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lint(root: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_imports_run_one_way():
    result = lint(ROOT)
    assert result.returncode == 0 and "2 kept, 0 broken" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("hub.py", "import pixeldecoder.presets", "- .presets -> .hub (1 import)"),  # side by side, but a circle
        ("models/layers.py", "from pixeldecoder.models import transformer", "(1 import)"),  # within a room
        (
            "files.py",
            "def late():\n    from pixeldecoder import pipeline",
            "pixeldecoder.files -> pixeldecoder.pipeline",
        ),
        ("training/losses.py", "import pixeldecoder.evaluation", "not allowed to import pixeldecoder.evaluation"),
        ("new.py", "", "- pixeldecoder.new"),  # no line of the contract has it
    ],
)
def test_a_circle_is_found(file, line, told, tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "src" / "pixeldecoder" / file).open("a") as source:
        source.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1 and told in result.stdout, result.stdout
