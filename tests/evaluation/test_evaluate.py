"""`pixeldecoder evaluate`, `compare` and `judge` on tiny real components: pictures, shards, prompts, bad input."""

import base64
import csv
import gc
import http.server
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from PIL import Image

from conftest import TINY, TINY_NANO, tiny_model, tiny_pipeline
from families import build, clip, tokenizer
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.cli import main
from pixeldecoder.convert import export_reference_state_dict, folder_to_reference
from pixeldecoder.evaluation import methods, study
from pixeldecoder.evaluation.judge import _uri, verdicts
from pixeldecoder.evaluation.methods import Case, Facts, Setting, Workspace, read_facts
from pixeldecoder.evaluation.metrics import METRICS, find_metrics
from pixeldecoder.evaluation.report import write_report
from pixeldecoder.evaluation.results import image_path
from pixeldecoder.evaluation.tables import interval
from pixeldecoder.presets import PRESETS, Preset
from pixeldecoder.sampler import teacher_scheduler
from pixeldecoder.sources import Shards

CROP = 128


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A decoder, an autoencoder, and five pictures, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_pipeline().save_pretrained(folder / "decoder")
    torch.manual_seed(0)
    AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    for index in range(5):
        path = folder / "photos" / ("deep" if index == 4 else "") / f"photo {index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(index).save(path)
    return folder


def photo(seed: int, side: tuple[int, int] = (144, 160)) -> Image.Image:
    noise = np.random.RandomState(seed).rand(9, 10, 3)
    return Image.fromarray((noise * 255).astype("uint8")).resize(side[::-1], Image.Resampling.BICUBIC)


def evaluate(parts, output, *args, source="photos", decoders=("decoder",)):
    names = [str(parts / name) for name in decoders]
    return main(
        ["evaluate", str(parts / source), "--output", str(output), "--decoders", *names, "--device", "cpu",
         "--dtype", "float32", *map(str, args)]
    )  # fmt: skip


def table(output: Path) -> list[dict[str, str]]:
    """Without what differs from run to run."""
    with (output / "results.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def common(parts):
    return ["--crop", CROP, "--baselines", "bicubic", "vae", "--vae", parts / "vae", "--sigmas", "0", "0.4"]


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    assert evaluate(parts, output, *common(parts), "--steps", 1, 2, "--as-if-clean") == 0
    return output


def test_table_and_report(parts, finished):
    rows = table(finished)
    kinds = {(Path(r["method"]).name, r["steps"], r["sigma"], r["told"]) for r in rows}
    decoder = {("decoder", s, *t) for s in "12" for t in (("0.0", ""), ("0.4", ""), ("0.4", "0.0"))}
    assert kinds == decoder | {("bicubic", "", "", ""), ("vae", "", "0.0", ""), ("vae", "", "0.4", "")}
    assert len(rows) == 5 * len(kinds)
    assert {(r["seed"], r["crop"], r["scale"]) for r in rows} == {("0", str(CROP), "4")}
    by = {(Path(r["method"]).name, r["steps"], r["sigma"], r["told"], r["image"]): r for r in rows}
    name = "deep/photo 4.png"
    # What the decoder is told matters, so does the noise; and every number is that of the image on disk.
    values = [by["decoder", "2", *k, name]["psnr"] for k in (("0.0", ""), ("0.4", ""), ("0.4", "0.0"))]
    assert len(set(values)) == 3
    row = by["bicubic", "", "", "", name]
    image = np.array(Image.open(finished / "images" / "bicubic" / f"{row['file']}.png")) / 255
    truth = np.array(Image.open(parts / "photos" / name))[8:136, 16:144] / 255
    assert float(row["psnr"]) == pytest.approx(-10 * np.log10(np.square(image - truth).mean()), abs=1e-3)
    report = (finished / "report.md").read_text()
    for text in ("5 images", "decoder, 2 steps, sigma 0.4, told 0", "Texture in flat regions", "worst of decoder", "["):
        assert text in report
    for kind, number in (("worst", 3), ("best", 2)):  # by PSNR, the first headline that is there
        titles = [line for line in report.splitlines() if line.startswith(f"**{kind} of decoder, 1 step, sigma 0:")]
        values = [float(title.split("**:")[0].rsplit(" ", 1)[1]) for title in titles]
        assert len(values) == number and values == sorted(values, reverse=kind == "best")
    pictures = list((finished / "pictures").iterdir())
    assert pictures and all(f"pictures/{path.name}" in report for path in pictures)
    page = (finished / "report.html").read_text()
    assert "data:image/webp;base64," in page and "<svg" in page


def test_more_of_it_is_added(parts, finished, tmp_path, monkeypatch, capsys):
    """Metrics and settings come to what is there, which stays, and nothing that is there is made again."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    before = table(output)
    made = []
    monkeypatch.setattr(study, "decoder_method", lambda *args: made.append(args))
    for steps in ((), ("--metrics", "psnr", "border")):
        assert evaluate(parts, output, *common(parts), "--steps", 1, 2, "--as-if-clean", *steps) == 0
    assert not made
    assert table(output) == before
    monkeypatch.undo()
    capsys.readouterr()
    arguments = ["--crop", CROP, "--baselines", "lanczos", "--limit", 2]  # --vae need not come again
    assert evaluate(parts, output, *arguments, "--steps", 3, "--metrics", "psnr") == 0
    there, added, *_ = capsys.readouterr().out.splitlines()
    assert (
        f"{output} holds bicubic; VAE + bicubic, sigma 0; " in there and "decoder, 2 steps, sigma 0.4, told 0" in there
    )
    assert added == "this run adds lanczos; decoder, 3 steps, sigma 0"
    rows = table(output)
    assert [row for row in rows if row["steps"] != "3" and row["method"] != "lanczos"] == before
    new = [row for row in rows if row not in before]
    assert len(new) == 2 * 2 and all(row["psnr"] and not row["ssim"] for row in new)  # --limit 2, --metrics psnr
    report = (output / "report.md").read_text()
    labels = [line.split(" | ")[0].strip("| ") for line in report.splitlines() if line.startswith("| ")]
    settings = list(dict.fromkeys(Setting(*settings_of(row)) for row in rows))
    assert [label for label in labels if label not in ("", "---")][: len(settings)] == list(map(str, settings))
    assert [s.steps for s in settings] == sorted((s.steps for s in settings), key=lambda steps: steps or 0)
    assert "lanczos: 2 of 5 images" in report and "bicubic: 5 of" not in report
    assert evaluate(parts, output, *common(parts), "--seed", "1") == 2  # would be another evaluation
    assert evaluate(parts, output, *arguments, "--vae", "another") == 2
    assert f"with vae {parts / 'vae'}, not another" in capsys.readouterr().err.splitlines()[-1]
    # More metrics of images that are there; and what an interrupted run left, whose settings no table had yet, stays.
    content = json.loads((output / "study.json").read_text())
    content["settings"] = [setting for setting in content["settings"] if setting["method"] != "lanczos"]
    (output / "study.json").write_text(json.dumps(content))
    monkeypatch.setattr(study, "decoder_method", lambda *args: made.append(args))
    assert evaluate(parts, output, *arguments[:2], "--baselines", "bicubic", "--limit", 2, "--steps", 3) == 0
    assert not made
    filled = [row for row in table(output) if row["steps"] == "3"]
    assert len(filled) == 2 and all(row["psnr"] and row["ssim"] for row in filled)
    assert [row for row in table(output) if row["steps"] != "3"] == [row for row in rows if row["steps"] != "3"]


def settings_of(row):
    numbers = (float(row[name]) if row[name] else None for name in ("sigma", "told"))
    return row["method"], int(row["steps"]) if row["steps"] else None, *numbers, row["stop"] or None


def test_best_is_told_of_equal_images_alone(parts, tmp_path):
    """Bicubic is worse than Lanczos on the same pictures; on fewer it is not compared, however good it is there."""
    output = tmp_path / "out"
    shutil.copytree(parts / "photos", tmp_path / "photos")
    arguments = ["--metrics", "psnr", "texture", "border"]

    def row(method):
        report = (output / "report.md").read_text().split("## Fidelity")[1]
        return next(line for line in report.splitlines() if line.startswith(f"| {method} |"))

    assert evaluate(tmp_path, output, *arguments, "--baselines", "bicubic", decoders=()) == 0
    assert "**" not in row("bicubic")  # against nobody
    assert evaluate(tmp_path, output, *arguments, "--baselines", "lanczos", "--limit", 1, decoders=()) == 0
    assert "**" not in row("bicubic") + row("lanczos")
    assert evaluate(tmp_path, output, *arguments, "--baselines", "lanczos", decoders=()) == 0
    assert ("**" in row("bicubic")) != ("**" in row("lanczos"))
    texture = (output / "report.md").read_text().split("## Colour, spectrum, texture")[1].split("##")[0]
    assert "Texture, dB → 0" in texture and "**" not in texture  # noise, too, may have the right amount


def test_noise_is_a_matter_of_picture_and_seed(tmp_path):
    def made(name, seed):
        workspace, case = Workspace(tmp_path, False, seed, 4, "cpu"), Case(name, "")
        noise = workspace.noised(torch.zeros(1, 4, 8, 8), case, 1.0, "flow")
        return torch.stack([noise, torch.randn(1, 4, 8, 8, generator=workspace.generator(case))])

    one = made("a.png", 0)
    assert torch.equal(made("a.png", 0), one) and one.std() == pytest.approx(1, abs=0.1)
    different = [*one, *made("b.png", 0), *made("a.png", 1)]
    for a, b in itertools.combinations(different, 2):
        assert (a * b).mean().abs() < 0.3  # independent


def test_options_arrive(parts, finished, tmp_path):
    """Of the decoder's call, and of the table: an image differs, and there are as many as asked for."""
    for name, *options in (("tile", "--tile", 64), ("seed", "--seed", 1)):
        output = tmp_path / name
        arguments = ["--crop", CROP, "--steps", 1, "--metrics", "psnr", "--baselines", "--limit", 1]
        assert evaluate(parts, output, *arguments, *options) == 0
        (row,) = table(output)
        pair = [folder / "images" / "decoder_1_step_sigma_0" / f"{row['file']}.png" for folder in (output, finished)]
        assert pair[0].read_bytes() != pair[1].read_bytes()


def test_decoders_of_one_name(parts, finished, tmp_path):
    """Each has its own folder and row; that of a folder that is gone on with keeps its name."""
    other = tmp_path / "other" / "decoder"
    pipeline = PixelDecoderPipeline.from_pretrained(parts / "decoder")
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    pipeline.save_pretrained(other)
    arguments = ("--crop", CROP, "--limit", 1, "--steps", 1, "--metrics", "psnr", "--baselines")
    for names, output in (("decoder", str(other)), tmp_path / "both"), ((str(other),), tmp_path / "alone"):
        assert evaluate(parts, output, *arguments, decoders=names) == 0
    one, two = table(tmp_path / "both")
    (alone,) = table(tmp_path / "alone")
    assert [row["method"] for row in (one, two)] == [str(parts / "decoder"), str(other)]
    assert two["psnr"] == alone["psnr"] != one["psnr"]
    folders = {"decoder_1_step_sigma_0", "other_decoder_1_step_sigma_0"}
    assert {path.name for path in (tmp_path / "both" / "images").iterdir()} == folders | {"truth"}
    report = (tmp_path / "both" / "report.md").read_text()
    assert "| decoder, 1 step, sigma 0 |" in report and "| other/decoder, 1 step, sigma 0 |" in report
    shutil.copytree(finished, tmp_path / "more")
    before = [{**row} for row in table(finished)]
    assert evaluate(parts, tmp_path / "more", *common(parts), "--steps", 1, decoders=(str(other),)) == 0
    after = table(tmp_path / "more")
    assert [row for row in after if row["method"] != str(other)] == before and len(after) > len(before)


def test_each_decoder_is_loaded_once_and_alone(parts, tmp_path, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(parts / "decoder", tmp_path / name)
    loaded = []
    stock = PixelDecoderPipeline.from_pretrained.__func__

    def from_pretrained(cls, name, **kwargs):
        gc.collect()
        assert all(pipeline() is None for _, pipeline in loaded)
        pipeline = stock(cls, name, **kwargs)
        loaded.append((Path(name).name, weakref.ref(pipeline)))
        return pipeline

    monkeypatch.setattr(PixelDecoderPipeline, "from_pretrained", classmethod(from_pretrained))
    arguments = ["--crop", CROP, "--limit", 1, "--steps", 1, 2, "--metrics", "psnr"]
    names = (str(tmp_path / "a"), str(tmp_path / "b"))
    assert evaluate(parts, tmp_path / "out", *arguments, decoders=names) == 0
    assert [name for name, _ in loaded] == ["a", "b"]
    assert len(table(tmp_path / "out")) == 5
    loaded.clear()
    assert evaluate(parts, tmp_path / "out", *arguments, decoders=names) == 0
    assert not loaded  # nothing to do


@pytest.mark.parametrize("student", [True, False])
def test_facts_of_a_folder(tmp_path, student):
    pipeline = tiny_pipeline(**TINY_NANO | {"scale": 8, "patch_size": 32})
    pipeline.register_to_config(latent_space="sdxl", default_num_inference_steps=3)
    pipeline.scheduler = pipeline.scheduler if student else teacher_scheduler()
    pipeline.save_pretrained(tmp_path)
    facts = read_facts(str(tmp_path), pytest.fail)
    assert facts == Facts(8, "variance-preserving", 3, student)
    assert read_facts("nowhere", lambda: pipeline) == facts  # by loading it
    facts.check(4)
    for steps in (0, 5) if student else (0,):
        with pytest.raises(ValueError, match=f"got {steps}"):
            facts.check(steps)


def test_facts_of_checkpoints(tmp_path, monkeypatch):
    name = "PiD_v1pt5_res2kto4k_sr4x_official_qwenimage_undistilled"
    monkeypatch.setattr(methods, "try_to_load_from_cache", lambda *args: "there.pth")
    assert read_facts(name, pytest.fail) == Facts(4, "flow", 25, False)
    monkeypatch.setattr(methods, "try_to_load_from_cache", lambda *args: None)
    pipeline = tiny_pipeline()
    assert read_facts(name, lambda: pipeline) == Facts(4, "flow", 4, True)  # fetched, to see that it can be
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "sdxl", {"adapter_dim": 32, "scale": 8}, False, 7, 1.0))
    for file, expected in (("tiny.pth", (8, "variance-preserving", 7, False)), ("other.pth", (8, "flow", 4, True))):
        torch.save(export_reference_state_dict(tiny_model().state_dict()), tmp_path / file)
        assert read_facts(str(tmp_path / file), pytest.fail) == expected


@pytest.mark.parametrize("student", [True, False])
def test_facts_of_a_file_are_those_of_its_folder(tmp_path, student, monkeypatch):
    pipeline = tiny_pipeline(**TINY | {"scale": 8})
    pipeline.register_to_config(latent_space="sdxl", default_num_inference_steps=2 if student else 25)
    pipeline.scheduler = pipeline.scheduler if student else teacher_scheduler()
    pipeline.save_pretrained(tmp_path / "folder")
    folder_to_reference(tmp_path / "folder", tmp_path / "mine.safetensors")
    expected = Facts(8, "variance-preserving", 2 if student else 25, student)
    for name in ("folder", "mine.safetensors"):
        assert read_facts(str(tmp_path / name), pytest.fail) == expected
    # What the file tells goes before its name.
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "flux", {"adapter_dim": 32, "scale": 4}, not student, 7, 1.0))
    (tmp_path / "mine.safetensors").rename(tmp_path / "tiny.safetensors")
    assert read_facts(str(tmp_path / "tiny.safetensors"), pytest.fail) == expected
    # Tensors alone: the name tells how they are sampled.
    torch.save(export_reference_state_dict(tiny_model().state_dict()), tmp_path / "my_teacher.pth")
    assert read_facts(str(tmp_path / "my_teacher.pth"), pytest.fail)[1:] == ("flow", 25, False)


def test_killed_and_resumed(parts, finished, tmp_path):
    """A process killed in the middle, and its torn last line, leave what gives the same table."""
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "pixeldecoder", "evaluate", parts / "photos", "--output", output, "--decoders",
        parts / "decoder", "--device", "cpu", "--dtype", "float32", *common(parts), "--steps", 1, 2, "--as-if-clean",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    rows = output / "rows-0.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if rows.exists() and rows.read_bytes().count(b"\n") >= 18:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = rows.read_bytes().count(b"\n")
    assert 18 <= done < 45 and not (output / "results.csv").exists()
    rows.write_bytes(rows.read_bytes()[:-30])
    assert evaluate(parts, output, *common(parts), "--steps", 1, 2, "--as-if-clean") == 0
    assert table(output) == table(finished)


def test_two_processes(parts, finished, tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "pixeldecoder",
        "evaluate", parts / "photos", "--output", output, "--decoders", parts / "decoder", "--device", "cpu",
        "--dtype", "float32", *common(parts), "--steps", 1, 2, "--as-if-clean",
    ]  # fmt: skip
    threads = str(torch.get_num_threads())  # sums round differently with more
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert {path.name for path in output.glob("rows-*.jsonl")} == {"rows-0.jsonl", "rows-1.jsonl"}
    assert table(output) == table(finished)


def test_shards_and_unreadable_pictures(parts, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for index in range(3):
            buffer = io.BytesIO()
            photo(index).save(buffer, format="png")
            data = buffer.getvalue()[: 2000 if index == 1 else None]
            info = tarfile.TarInfo(f"{index}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    output = tmp_path / "out"
    assert evaluate(tmp_path, output, "--metrics", "psnr", "fid", "hps", source="set.tar", decoders=()) == 0
    assert {row["image"].rsplit(":", 1)[1] for row in table(output)} == {"0", "2"}
    assert {row["crop"] for row in table(output)} == {""}  # whole, but for what is no full cell of 64 x 64
    for row in table(output):
        truth = Image.open(output / "images" / "truth" / f"{row['file']}.png")
        index = int(row["image"].rsplit(":", 1)[1])
        assert np.array_equal(np.array(truth), np.array(photo(index))[8:136, 16:144])
    report = (output / "report.md").read_text()
    assert "set.tar:1: not readable" in report and "hps: skipped: for prompts alone" in report


def test_shards_are_walked_twice(parts, tmp_path, monkeypatch):
    """To count them, and to cut the truths out, whatever the number of methods; then to count them."""
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for index in range(3):
            archive.add(parts / "photos" / f"photo {index}.png", f"{index}.png")
    walks = []
    once = Shards.once
    monkeypatch.setattr(Shards, "once", lambda self: walks.append(1) or once(self))
    arguments = ["--baselines", "bicubic", "lanczos", "--metrics", "psnr", "--limit", 2]
    for expected in (2, 3):
        assert evaluate(tmp_path, tmp_path / "out", *arguments, source="set.tar", decoders=()) == 0
        assert len(walks) == expected
    assert len(table(tmp_path / "out")) == 2 * 2  # --limit 2


@pytest.fixture
def pyiqa(monkeypatch):
    """A stand-in with metrics of both modes, one that breaks, and one that compares folders."""

    def create_metric(name, device):
        def metric(image, truth=None):
            assert image.min() >= 0 and image.max() <= 1
            if name == "moody":
                raise AssertionError("not today")
            return (image.mean() if truth is None else (image - truth).abs().mean())[None]

        metric.metric_mode = configs[name]["metric_mode"]
        return metric

    configs = {
        "brightness": {"metric_mode": "NR"},
        "distance": {"metric_mode": "FR", "lower_better": True},
        "moody": {"metric_mode": "NR"},
        "fid_dinov2": {"metric_mode": "NR", "lower_better": True},
    }
    package, modules = types.ModuleType("pyiqa"), types.ModuleType("pyiqa.default_model_configs")
    package.create_metric, modules.DEFAULT_CONFIGS = create_metric, configs
    monkeypatch.setitem(sys.modules, "pyiqa", package)
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", modules)


def test_whatever_pyiqa_has(parts, tmp_path, pyiqa, monkeypatch, capsys):
    output = tmp_path / "out"
    names = ["brightness", "distance", "moody", "fid_dinov2", "psnr"]
    arguments = ["--baselines", "bicubic", "lanczos", "--metrics", *names]
    assert evaluate(parts, output, *arguments, decoders=()) == 0
    printed = capsys.readouterr().out
    assert "skipped fid_dinov2: pyiqa computes it of folders" in printed
    assert "moody of photo 0.png: AssertionError: not today" in printed
    for row in table(output):
        paths = (output / "images" / name / f"{row['file']}.png" for name in (row["method"], "truth"))
        image, truth = (np.array(Image.open(path)) / 255 for path in paths)
        assert float(row["brightness"]) == pytest.approx(image.mean(), abs=1e-5)
        assert float(row["distance"]) == pytest.approx(np.abs(image - truth).mean(), abs=1e-5)
        assert row["moody"] == ""
    assert [metric.name for metric in find_metrics(["all", "brightness"], {})] == [*METRICS, "brightness"]
    for name in ("pyiqa", "pyiqa.default_model_configs"):
        monkeypatch.setitem(sys.modules, name, None)  # the report is made where it is not installed
    write_report(output)
    report = (output / "report.md").read_text()
    assert "| | brightness ↑ | distance ↓ | moody ↑ |" in report
    assert evaluate(parts, output, "--metrics", "brightness", decoders=()) == 2
    assert 'no metric "brightness"' in capsys.readouterr().err
    assert evaluate(parts, output, "--baselines", "bicubic", "--metrics", "lpips", "hps", decoders=()) == 0
    printed = capsys.readouterr().out
    assert "skipped lpips: needs pyiqa: pip install 'pixeldecoder[iqa]'" in printed
    assert len([name for name in ("brightness", "distance", "psnr") if name in table(output)[0]]) == 3


def test_what_memory_was_too_small_for_is_measured_by_the_next_run(parts, tmp_path, monkeypatch):
    errors = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("not enough memory")]
    errors += [RuntimeError("too small"), None]
    asked = []

    def score(image, truth, prompt):
        asked.append(image)
        if len(asked) <= len(errors) and (error := errors[len(asked) - 1]):
            raise error
        return 0.5

    monkeypatch.setitem(METRICS, "psnr", replace(METRICS["psnr"], load=lambda device, weights: score))
    for expected, calls in (["", "", "", "", "0.5"], 5), (["0.5", "0.5", "0.5", "", "0.5"], 8):
        assert evaluate(parts, tmp_path, "--baselines", "bicubic", "--metrics", "psnr", decoders=()) == 0
        assert [row["psnr"] for row in table(tmp_path)] == expected and len(asked) == calls


class MeanDistance:
    """In place of FID, whose network must be fetched: how far the means of the pictures are apart."""

    def __init__(self):
        self.values = {True: [], False: []}

    def to(self, device):
        return self

    def reset(self):
        self.values[False] = []

    def update(self, pictures, real):
        assert pictures.dtype == torch.uint8 and pictures.shape[1:] == (3, 256, 256)
        self.values[real] += list(pictures.float())

    def compute(self):
        assert len(self.values[True]) == len(self.values[False])
        return (torch.stack(self.values[True]).mean() - torch.stack(self.values[False]).mean()).abs()


def test_metrics_of_all_pictures_together(tmp_path, monkeypatch):
    for name in ("fid", "patch_fid"):
        stand_in = replace(METRICS[name], load=lambda device, weights: MeanDistance)
        monkeypatch.setitem(METRICS, name, stand_in)
    output = tmp_path / "out"
    (tmp_path / "photos").mkdir()
    for index in range(2):
        photo(index, (512, 256)).save(tmp_path / "photos" / f"{index}.png")

    def run(*args):
        assert evaluate(tmp_path, output, "--scale", 2, "--metrics", *args, decoders=()) == 0
        return json.loads((output / "study.json").read_text())["sets"]

    def mean(name):
        return np.mean([np.array(Image.open(path)) for path in (output / "images" / name).iterdir()])

    found = run("patch_fid", "--baselines", "bicubic", "lanczos")
    assert list(found) == ["patch_fid"]
    for name in ("bicubic", "lanczos"):
        assert found["patch_fid"][name] == pytest.approx(abs(mean(name) - mean("truth")), abs=1e-3)
    assert found["patch_fid"]["bicubic"] != found["patch_fid"]["lanczos"]
    # It goes on to hold while there are as many pictures, and no longer.
    assert run("psnr", "--baselines", "bicubic") == found
    photo(2, (512, 256)).save(tmp_path / "photos" / "2.png")
    assert run("psnr", "--baselines", "bicubic") == {}
    assert "## All pictures together" not in (output / "report.md").read_text()
    assert run("patch_fid", "--baselines", "bicubic", "lanczos")["patch_fid"].keys() == {"bicubic", "lanczos"}
    (tmp_path / "photos" / "2.png").unlink()
    # Of whole pictures: of fewer pictures than the others' it would be another quantity, and is left out.
    shutil.rmtree(output)
    found = run("fid", "--crop", 256, "--baselines", "bicubic")
    assert run("fid", "--crop", 256, "--baselines", "lanczos", "--limit", 1) == found
    assert json.loads((output / "study.json").read_text())["skipped"] == {}
    report = (output / "report.md").read_text().split("## All pictures together")[1]
    assert "| bicubic | – |" not in report and "| lanczos | – |" in report


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "torchmetrics"])
def test_missing_extra(parts, finished, tmp_path, package, monkeypatch, capsys):
    """One line that says what to install, before anything is done."""
    monkeypatch.setitem(sys.modules, package, None)
    photo = str(parts / "photos" / "photo 0.png")
    commands = {
        "evaluate": ["evaluate", str(parts / "photos"), "--output", str(tmp_path / "out")],
        "compare": ["compare", photo, photo, "--output", str(tmp_path / "page.html")],
        "judge": ["judge", str(finished), "--url", "http://localhost:1/v1", "--model", "x"],
    }
    if package == "torchmetrics":
        del commands["judge"]
    if package == "matplotlib":
        del commands["compare"]
    for command, arguments in commands.items():
        assert main(arguments) == 2
        wanted = f"pixeldecoder: {command} needs {package}: pip install 'pixeldecoder[evaluate]'"
        assert capsys.readouterr().err.splitlines() == [wanted]
    assert not list(tmp_path.iterdir())


def test_missing_extra_of_shards(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert evaluate(parts, tmp_path / "out", source="set.tar") == 2
    assert "evaluate needs webdataset: pip install 'pixeldecoder[evaluate]'" in capsys.readouterr().err


def test_damaged_pictures_are_made_anew(parts, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    wanted = {path: path.read_bytes() for path in sorted((output / "images").rglob("*.png"))}
    kinds = [b"", b"no picture", "half", "flipped"]
    for path, kind in zip(list(wanted)[:: len(wanted) // len(kinds)], kinds, strict=False):
        data = wanted[path]
        half = len(data) // 2
        damaged = {"half": data[:half], "flipped": data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]}
        path.write_bytes(damaged.get(kind, kind))
    truth = next(path for path in wanted if path.parent.name == "truth")
    truth.write_bytes(wanted[truth][:-20])
    assert evaluate(parts, output, *common(parts), "--steps", 1, 2, "--as-if-clean") == 0
    assert {path: path.read_bytes() for path in wanted} == wanted
    assert table(output) == table(finished)


def test_names_that_are_not_utf8(parts, tmp_path):
    (tmp_path / "photos").mkdir()
    try:
        photo(0).save(tmp_path / "photos" / os.fsdecode(b"a\xff.png"))
    except OSError:
        pytest.skip("this file system has no such names")
    assert evaluate(parts, tmp_path / "out", "--crop", 64, "--baselines", "bicubic", source=tmp_path / "photos") == 0
    for name in "report.html", "report.md", "results.csv":
        assert "a\\udcff.png" in (tmp_path / "out" / name).read_text().replace("\\\\", "\\")


def test_damaged_lines_are_left_out(parts, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    rows = output / "rows-0.jsonl"
    lines = rows.read_bytes().splitlines()
    good = json.loads(lines[-1])
    wrong = [
        {"image": 5}, {"file": "../../x"}, {"seconds": "soon"}, {"psnr": [1]}, {"psnr": math.nan}, {"steps": "two"},
        {"method": None}, {"stop": {}}, {"sigma": "0"}, {"told": True, "sigma": []},
    ]  # fmt: skip
    damaged = [json.dumps(good | change).encode() for change in wrong]
    damaged += [b"5", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"unreadable": 5}', lines[-1][:40], b""]
    rows.write_bytes(b"\n".join([*lines[:-1], *damaged]) + b"\n")
    assert evaluate(parts, output, *common(parts), "--steps", 1, 2, "--as-if-clean") == 0
    assert table(output) == table(finished)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"{}", b"[]", b"5", b'{"identity": []}', b'{"identity": {}}', "settings", "sets", "better"],
)
def test_damaged_study(parts, finished, tmp_path, content, capsys):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    path = output / "study.json"
    if isinstance(content, str):
        study = json.loads(path.read_text())
        content = json.dumps(study | {content: {"settings": [{"method": 5}]}.get(content, {"psnr": "x"})}).encode()
    path.write_bytes(content)
    for command in (["judge", str(output), "--url", "http://localhost:1/v1", "--model", "x"], None):
        code = main(command) if command else evaluate(parts, output, *common(parts))
        assert code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{path}: not what an evaluation writes" in error and len(error) < 600


@pytest.fixture(scope="module")
def upscalers(tmp_path_factory):
    """diffusers' upscale pipelines, with and without a prompt, and a model that spandrel would load."""
    folder = tmp_path_factory.mktemp("upscalers")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8,) * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        in_channels=7, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=8,
        cross_attention_dim=32, num_class_embeds=1000, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    StableDiffusionUpscalePipeline(
        vae=vae, text_encoder=clip(), tokenizer=tokenizer(), unet=unet,
        low_res_scheduler=DDPMScheduler(), scheduler=DDIMScheduler(prediction_type="v_prediction"),
    ).save_pretrained(folder / "prompt")  # fmt: skip
    return folder


def test_bad_input(parts, finished, tmp_path, capsys):
    def complaint(*args, **kwargs):
        assert evaluate(parts, kwargs.pop("output", tmp_path / "bad"), *args, **kwargs) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (parts / "empty").mkdir(exist_ok=True)
    (parts / "empty.txt").write_text("\n")
    eight = tmp_path / "eight"
    tiny_pipeline(**TINY_NANO | {"scale": 8, "patch_size": 32}).save_pretrained(eight)
    assert "no usable picture" in complaint(source="empty")
    assert "no such folder" in complaint(source="nowhere")
    assert "a prompt in each line" in complaint("--model", "x", "--baselines", "vae", source="empty.txt")
    assert "is 160 x 144 pixels, smaller than the crop of 192" in complaint("--crop", 192)
    assert "expected a multiple of 64" in complaint("--crop", 100)
    assert "decoder 4x, " in (text := complaint(decoders=("decoder", str(eight)))) and "8x: evaluate them" in text
    assert 'no metric "musik": expected all, psnr' in complaint("--metrics", "musik")
    assert 'no baseline "lanczos3": expected one of bicubic' in complaint("--baselines", "lanczos3")
    assert "needs an autoencoder" in complaint("--baselines", "vae")
    assert "sigma 1.5: expected a noise level in [0, 1]" in complaint("--sigmas", "1.5")
    assert "1 to 4 steps, got 8" in complaint("--steps", 8)
    assert "nothing to evaluate" in complaint("--baselines", decoders=())
    assert "limit 0: expected at least 1" in complaint("--limit", 0)
    assert "scale 0: expected at least 1" in complaint("--scale", 0, decoders=())
    (parts / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "latin.txt: expected text in UTF-8" in complaint("--model", "x", "--baselines", "vae", source="latin.txt")
    (parts / "torn").mkdir(exist_ok=True)
    photo(0).save(parts / "torn" / "photo.png")
    (parts / "torn" / "photo.png").write_bytes((parts / "torn" / "photo.png").read_bytes()[:2000])
    assert "no picture can be read, such as photo.png: " in complaint(source="torn", output=tmp_path / "torn")
    assert "no such file" in complaint("--weights", "squeezenet", tmp_path / "none")
    assert not (tmp_path / "bad" / "images").exists()
    assert "holds an evaluation with crop 128, not 64" in complaint("--crop", 64, output=finished)


def test_prompts(parts, tmp_path):
    """A latent model stopped at several places, its own images as the baseline."""
    pipe, _ = build("Z-Image")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red boat\n\na lighthouse at dusk, 35 mm\n")
    arguments = json.dumps({"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16})
    output = tmp_path / "out"

    def run(*args):
        names = [str(parts / "decoder"), "--source"]
        return main(
            ["evaluate", str(tmp_path / "prompts.txt"), "--output", str(output), "--decoders", names[0], "--model",
             str(tmp_path / "model"), "--pipeline-args", arguments, "--device", "cpu", "--dtype", "float32",
             "--baselines", "vae", *args]
        )  # fmt: skip

    assert run("--stops", "2", "4", "--metrics", "border", "psnr") == 0
    rows = table(output)
    assert [(Path(r["method"]).name, r["stop"]) for r in rows[::2]] == [("vae", ""), ("decoder", "2"), ("decoder", "4")]
    assert {r["image"] for r in rows} == {"a red boat", "a lighthouse at dusk, 35 mm"}
    assert len(list((output / "latents").glob("*.safetensors"))) == 4
    for row in rows:
        setting = Setting(row["method"], int(row["steps"]) if row["steps"] else None, stop=row["stop"] or None)
        assert Image.open(image_path(output, setting, row["file"])).size == (256, 256)
    assert "psnr: skipped: for pictures alone" in (output / "report.md").read_text()
    latents = {path: path.read_bytes() for path in sorted((output / "latents").iterdir())}
    assert len(latents) == 2 * 3
    for path, content in latents.items():
        path.write_bytes(content[:-10])
    assert run("--stops", "2", "4", "--metrics", "border", "psnr") == 0
    assert {path: path.read_bytes() for path in latents} == latents and table(output) == rows
    assert run("--baselines", "bicubic") == 2


def test_upscale_baseline(parts, upscalers, tmp_path, capsys):
    output = tmp_path / "out"
    baseline = f"upscale:{upscalers / 'prompt'}"
    vae = ["--vae", parts / "vae", "--crop", 128, "--metrics", "psnr", "--limit", 1]
    assert evaluate(parts, output, "--baselines", baseline, *vae, decoders=()) == 0
    assert [row["method"] for row in table(output)] == [baseline]
    assert "VAE + prompt, sigma 0" in (output / "report.md").read_text()
    capsys.readouterr()
    assert evaluate(parts, tmp_path / "no", "--baselines", "spandrel:none.pth", *vae, decoders=()) == 2
    assert "baseline spandrel" in capsys.readouterr().err


def test_a_baseline_of_another_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "_upscale_pipeline", lambda *args: lambda image, case: image.repeat(1, 1, 4, 4))
    case = Case("a boat", "a boat")
    photo(0, (16, 16)).save(tmp_path / "boat.png")
    monkeypatch.setattr(methods, "latents_path", lambda *args: tmp_path / "boat.png")
    for scale in (4, 2):
        make = methods.baseline_method("upscale:x", None, "flow", Workspace(tmp_path, True, 0, scale, "cpu"))
        if scale == 4:
            assert make(case, Setting("upscale:x"))[0].shape == (1, 3, 64, 64)
        else:
            with pytest.raises(ValueError, match="makes images 4 times larger, the others 2 times"):
                make(case, Setting("upscale:x"))


def test_interval_is_the_bootstrap_of_the_mean():
    values = np.random.RandomState(0).normal(3, 2, 400)
    low, high = interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)  # the central limit theorem
    assert interval(np.array([2.0])) == (2.0, 2.0)


def test_compare(parts, tmp_path, capsys):
    a, b = parts / "photos" / "photo 0.png", parts / "photos" / "photo 1.png"
    assert main(["compare", str(a), str(b), "--output", str(tmp_path / "page.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ms_ssim of photo 1.png: " in lines[0]  # too small for its five scales
    printed = dict(line.split() for line in lines[1:-1])
    expected = -10 * np.log10(np.square(np.array(Image.open(a)) / 255 - np.array(Image.open(b)) / 255).mean())
    assert float(printed["psnr"]) == pytest.approx(expected, abs=1e-3)
    assert (tmp_path / "page.html").read_text().count("data:image/webp") == 3
    shutil.copy(b, tmp_path / a.name)
    assert (
        main(["compare", str(a), str(tmp_path / a.name), "--output", str(tmp_path / "page.html"), "--overwrite"]) == 0
    )
    page = (tmp_path / "page.html").read_text()  # two files of one name are two pictures
    assert page.count("data:image/webp") == 3 and f'"{tmp_path / a.name}": "data:' in page
    capsys.readouterr()
    assert main(["compare", str(a), str(tmp_path / "none.png")]) == 2
    assert capsys.readouterr().err == f"pixeldecoder: {tmp_path / 'none.png'}: no such file\n"
    photo(0, (64, 64)).save(tmp_path / "small.png")
    assert main(["compare", str(a), str(tmp_path / "small.png")]) == 2
    assert "one size, got 160 x 144 and 64 x 64" in capsys.readouterr().err


def test_verdicts():
    """Counted by hand: a win, a win and a tie, a contradiction, a tie, and three that say nothing."""
    given = {
        "1": ("first", "second"), "2": ("second", "tie"), "3": ("first", "first"), "4": ("tie", "tie"),
        "5": (None, "first"), "6": ("first", None), "7": (None, None),
    }  # fmt: skip
    answers = [
        {"model": "m", "image": image, "first": first, "second": second, "answer": answer}
        for image, pair in given.items()
        for (first, second), answer in zip((("a", "b"), ("b", "a")), pair, strict=True)
    ]
    for order in (answers, [answers[0], *answers[:0:-1]]):
        (found,) = verdicts(order).values()
        assert sorted(found["score"]) == [0.5, 0.5, 0.5, 1]
        assert found["contradiction"].sum() == 1 and found["unanswered"].sum() == 3
    assert verdicts(answers[:1])["a", "b"]["unanswered"].sum() == 1  # not yet asked in the other order
    swapped = [answer for answer in answers if answer["image"] == "1"][::-1]
    assert verdicts(swapped)["b", "a"]["score"] == [0]


def test_enlarged_by_more_than_a_straight_line():
    """Both kernels overshoot at an edge, Lanczos twice; what leaves the range is cut off."""
    edge = torch.where(torch.arange(16) < 8, -0.5, 0.5).expand(1, 3, 16, 16)
    bicubic, lanczos = (methods._enlarge(edge, 4, kind) for kind in ("bicubic", "lanczos"))
    for large in (bicubic, lanczos):
        assert large.shape == (1, 3, 64, 64) and large.max() > 0.52
        assert methods._enlarge(2 * edge, 4, "bicubic").abs().max() == 1
    assert (bicubic[0, 0, 0, 32:] < 0.499).sum() < (lanczos[0, 0, 0, 32:] < 0.499).sum()


def test_the_judge_sees_the_middle_as_it_is():
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (1100, 1300, 3), dtype=np.uint8))
    seen = Image.open(io.BytesIO(base64.b64decode(_uri(picture).removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.array(seen), np.array(picture)[38:1062, 138:1162])


class Judge(http.server.BaseHTTPRequestHandler):
    """Prefers the brighter image, unless both are alike or it was told to be stubborn; every request is kept."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if self.server.broken_after is not None and len(self.server.requests) > self.server.broken_after:
            self.send_error(500)
            return
        images = [
            np.array(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))).mean()
            for part in body["messages"][0]["content"]
            if part["type"] == "image_url"
        ]
        difference = images[0] - images[1]
        answer = (
            "tie" if abs(difference) < 1 else "first" if difference > 0 or body["model"] == "stubborn" else "second"
        )
        text = f"The first and the second differ.\n**{answer.title()}**"
        if body["model"] == "shy" or (body["model"] == "forgetful" and len(self.server.requests) % 2):
            text = "I cannot say."
        content = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.requests, server.broken_after = [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_judge(parts, tmp_path, server, monkeypatch, capsys):
    output = tmp_path / "out"
    vae = ["--vae", parts / "vae", "--baselines", "bicubic", "lanczos", "vae", "--metrics", "psnr"]
    assert evaluate(parts, output, *vae, decoders=()) == 0
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # of the Hub, not of this server
    url = f"http://127.0.0.1:{server.server_port}/v1"

    def run(*args, model="brightness"):
        return main(["judge", str(output), "--url", url, "--model", model, *args])

    server.broken_after = 7
    assert run() == 2
    assert f"the judge at {url} does not answer" in capsys.readouterr().err
    server.broken_after = None
    assert run() == 0
    # Three pairs, five images, both orders; the seven answers from before were not asked again.
    assert len(server.requests) == 30 + 1
    path, key, body = server.requests[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sesame", "brightness")
    orders = [
        [part["text"] for part in r[2]["messages"][0]["content"] if part["type"] == "text"] for r in server.requests
    ]
    assert all(texts[1:] == ["The first:", "The second:"] and "prompt" not in texts[0] for texts in orders)
    report = (output / "report.md").read_text()
    assert "Preferred by brightness" in report
    assert "| bicubic against lanczos | 0.500 [0.500, 0.500] | 0 | 5 | 0 | 0 | 0 |" in report
    answers = [json.loads(line) for line in (output / "judge.jsonl").read_text().splitlines()]
    means = {
        name: np.array([np.array(Image.open(p)).mean() for p in sorted((output / "images" / name).iterdir())])
        for name in ("bicubic", "VAE_bicubic_sigma_0")
    }
    brighter = (means["bicubic"] > means["VAE_bicubic_sigma_0"]).mean()
    assert verdicts(answers)["bicubic", "VAE + bicubic, sigma 0"]["score"].mean() == brighter
    # Whoever always says the same place has no preference.
    assert run("--settings", "bicubic", "VAE + bicubic, sigma 0", model="stubborn") == 0
    assert (
        "| bicubic against VAE + bicubic, sigma 0 | 0.500 [0.500, 0.500] | 0 | 5 | 0 | 5 | 0 |"
        in (output / "report.md").read_text()
    )
    # Whoever says nothing is in the table, too, be it in one order alone.
    for model in ("shy", "forgetful"):
        server.requests.clear()
        assert run("--settings", "bicubic", "lanczos", model=model) == 0
        assert "answers are neither first, second nor tie" in capsys.readouterr().err
        section = (output / "report.md").read_text().split(f"Preferred by {model}")[1]
        assert "| bicubic against lanczos | – | 0 | 0 | 0 | 0 | 5 |" in section
    # A damaged answer is asked for again, an undamaged one is not.
    path = output / "judge.jsonl"
    content = path.read_bytes()
    line = json.loads(content.splitlines()[0])
    others = [line | {"answer": "maybe"}, line | {"image": 5}, {"answer": "tie"}, [], 5]
    damaged = content.splitlines(keepends=True)[1:] + [json.dumps(other).encode() + b"\n" for other in others]
    path.write_bytes(b"".join(damaged) + b"\xff\n{")
    server.requests.clear()
    assert run() == 0 and len(server.requests) == 1
    assert run("--limit", "1") == 0 and len(server.requests) == 1
    study = (output / "study.json").read_text()  # of prompts the judge is told
    (output / "study.json").write_text(study.replace(str(parts / "photos"), "prompts.txt"))
    assert run("--limit", "1", model="another") == 0
    prompt = server.requests[-1][2]["messages"][0]["content"][0]["text"]
    assert 'Here are two versions of one picture, made for the prompt "deep/photo 4.png". Which' in prompt
    (output / "study.json").write_text(study)
    assert run("--settings", "bicubic", "nobody") == 2 and "no setting ['nobody']" in capsys.readouterr().err
    assert main(["judge", str(tmp_path), "--url", url, "--model", "x"]) == 2
    assert "expected the folder of a finished evaluation" in capsys.readouterr().err
    assert main(["judge", str(output), "--url", "localhost:8000/v1", "--model", "x"]) == 2
    assert "localhost:8000/v1: expected http:// or https://" in capsys.readouterr().err
    assert run("--limit", "0") == 2 and "limit 0: expected at least 1" in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    assert run(model="another") == 2
    assert "does not answer" in capsys.readouterr().err
