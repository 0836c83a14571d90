"""Real processes, a tiny image."""

import json
import math
import types

import numpy as np
import pytest
from matplotlib.figure import Figure

from pixeldecoder import benchmark
from pixeldecoder.benchmark import _baseline_maker, check_configuration
from pixeldecoder.charts import scale_log
from pixeldecoder.cli import main


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
    image = _baseline_maker({"device": "cpu", "size": 256}, name)()
    assert image.shape == (1, 3, 256, 256) and image.min() >= 0 and image.max() <= 1


def test_numbers_of_a_report(monkeypatch):
    """Medians of the timed runs, and how far an image is from the first configuration's."""

    class Worker:
        def __init__(self, task):
            self.process = types.SimpleNamespace(kill=lambda: None)
            self.value = {"float32": 0.0, "bfloat16": 0.1, "vae": 0.1}[task["configuration"]]
            self.times = iter([1.0, 5.0, 3.0])
            np.save(task["image"], np.full((1, 3, 4, 4), self.value, dtype=np.float32))

        def ask(self, what):
            return {"seconds": next(self.times)} if what == "run" else {"peak_memory": 7}

    monkeypatch.setattr(benchmark, "_Worker", Worker)
    report = benchmark.benchmark(["float32", "bfloat16", "vae"], [64], repeats=3, progress=lambda line: None)
    first, second, other = report["results"]
    for row in report["results"]:
        assert (row["seconds"], row["fastest"], row["slowest"], row["peak_memory"]) == (3.0, 1.0, 5.0, 7)
    assert first["psnr_to_first"] is None and first["largest_difference_to_first"] == 0
    assert second["psnr_to_first"] == pytest.approx(20, abs=1e-4)
    assert second["largest_difference_to_first"] == pytest.approx(0.1)
    assert other["psnr_to_first"] is None and other["largest_difference_to_first"] is None  # of other latents


def numbers(axis):
    """What is written at the ticks that are seen; it is where it says."""
    low, high = axis.get_view_interval()
    found = {}
    for place, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True):
        if low <= place <= high and text.get_text():
            found[place] = float(text.get_text().replace("\N{MINUS SIGN}", "-"))
    assert list(found.values()) == pytest.approx(list(found), rel=1e-4)
    return list(found.values())


@pytest.mark.parametrize(
    "values",
    [(0.58, 0.64), (0.9, 1.1), (1.45, 1.4501), (3, 9), (0.5, 0.5), (0.58, 4.6), (1, 300), (1e-3, 1e3), (1e-5, 1e9)],
)
def test_axes_have_numbers(values):
    axes = Figure().subplots()
    axes.plot(values, values, marker="o")
    for axis in (axes.xaxis, axes.yaxis):
        scale_log(axis)
        assert 3 <= len(numbers(axis)) <= 12
        assert axis.get_scale() == "log"


def test_plot(tmp_path, monkeypatch):
    """Time and memory of each configuration, with numbers on every axis, however alike they are."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    results = [
        {"configuration": name, "size": size, "seconds": seconds, "peak_memory": memory}
        for name, size, seconds, memory in (
            ("a", 256, 1.0, 0.60e9), ("b", 256, 1.2, 0.61e9), ("a", 512, 4.0, 0.62e9), ("b", 512, 5.0, 0.64e9),
        )
    ]  # fmt: skip
    report = {"decoder": "nano", "device": "CPU", "threads": 1, "results": results}
    benchmark.plot(report, tmp_path / "new" / "benchmark.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["benchmark.png"]
    time, memory = figures[0].axes
    assert [list(line.get_ydata()) for line in time.lines] == [[1.0, 4.0], [1.2, 5.0]]
    assert [list(line.get_ydata()) for line in memory.lines] == [[0.6, 0.62], [0.61, 0.64]]
    assert [text.get_text() for text in time.get_legend().get_texts()] == ["a", "b"]
    for axes in (time, memory):
        assert numbers(axes.xaxis) == [256, 512] and len(numbers(axes.yaxis)) >= 3


def test_startup(tmp_path, monkeypatch, capsys):
    """The CPU time of processes, and not of one that ends otherwise than it should."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "STARTUP", {("--help",): 0, ("upscale", "missing.png", "x.png"): 2})
    assert main(["benchmark", "--startup", "--repeats", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["pixeldecoder --help", "pixeldecoder upscale missing.png x.png"]
    assert all(0.01 < float(line.split()[-4]) < 60 and line.endswith(" s of CPU") for line in lines)
    monkeypatch.setattr(benchmark, "STARTUP", {("--help",): 2})
    assert main(["benchmark", "--startup", "--repeats", "1"]) == 2
    assert "pixeldecoder --help: exit code 0, expected 2" in capsys.readouterr().err
    assert main(["benchmark", "--startup", "--repeats", "0"]) == 2
    assert not list(tmp_path.iterdir())
