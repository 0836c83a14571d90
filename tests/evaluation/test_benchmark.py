"""Real processes, a tiny image."""

import json
import math

import pytest

from pixeldecoder.cli import main
from pixeldecoder.evaluation.benchmark import _baseline_run, check_configuration


def test_benchmark(tmp_path, capsys):
    configurations = ["oracle:decoder", "float32+whole", "float32+tile=64+chunk=16"]
    arguments = ["--sizes", "128", "--repeats", "2", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["benchmark", "--configs", *configurations, *arguments]) == 0
    report = json.loads((tmp_path / "benchmark.json").read_text())
    oracle, whole, tiled = report["results"]
    assert [oracle["configuration"], whole["configuration"], tiled["configuration"]] == configurations
    assert oracle["largest_difference_to_first"] == 0 and whole["largest_difference_to_first"] < 1e-5
    assert 25 < tiled["psnr_to_first"] < (whole["psnr_to_first"] or math.inf)  # none: the very same
    assert whole["tiles"] == 1 and tiled["tiles"] == 9
    for row in report["results"]:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"] and 1e8 < row["peak_memory"] < 5e9
    assert whole["floor_seconds"] > 0 and whole["tflop"] == whole["tflop_whole"]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "tile=64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "float64"], "'float64' is unknown: expected parts of float32"),
        (["--sizes", "0"], "sizes and repeats of at least 1"),
        (["--sizes", "100", "--configs", "float32"], "size 100: expected a multiple of 32"),
        (["--sizes", "64", "--configs", "nowhere:decoder"], "No module named 'nowhere'"),
    ],
)
def test_bad_benchmark(arguments, message, tmp_path, capsys):
    assert main(["benchmark", *arguments, "--device", "cpu", "--output", str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_configurations():
    assert check_configuration("bfloat16+whole+compile+int8") == ["bfloat16", "whole", "compile", "int8"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "upscaler"])
def test_baselines(name):
    image = _baseline_run({"device": "cpu", "size": 256}, name)()
    assert image.shape == (1, 3, 256, 256) and image.min() >= 0 and image.max() <= 1
