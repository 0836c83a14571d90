"""Runs: overfitting, resumption, checkpoints, export, LoRA, bad input."""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from conftest import TINY
from families import save_gemma
from pixeldecoder import PixelDecoderPipeline, PixelDecoderTransformer2DModel, TinyLatentEncoder, files
from pixeldecoder.autoencoders import load_image_encoder
from pixeldecoder.cli import main
from pixeldecoder.execution import image_encoder
from pixeldecoder.pictures import to_image
from pixeldecoder.plan import measured_peak
from pixeldecoder.training import data as data_module
from pixeldecoder.training import log, loop, losses, validate
from pixeldecoder.training.checkpoints import Checkpoints
from pixeldecoder.training.config import Data, Lora, Optimizer, Prior, read_yaml, write_yaml
from pixeldecoder.training.data import bucket_sizes, load_source
from pixeldecoder.training.loop import train
from pixeldecoder.training.parts import TrainingError
from pixeldecoder.training.teacher import RepaTarget
from pixeldecoder.training.validate import load_validation
from training.conftest import ARCHITECTURE, write_photos

TESTS = Path(__file__).parents[1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, folder / "all.pt")
    flat = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, below in value.items():
                walk(f"{name}/{key}", below)
        elif isinstance(value, torch.Tensor):
            flat[name] = value

    walk("", torch.load(folder / "all.pt", weights_only=True))
    return flat


def psnrs(config) -> list[dict]:
    lines = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "psnr_bicubic" in line]


def test_overfits_eight_crops(teacher, tmp_path):
    """The whole path, from a folder to decodes: a small network learns eight crops by heart."""
    config = replace(
        teacher,
        data=Data(source=str(write_photos(tmp_path / "eight", 8, (64, 64))), resolution=64, workers=1),
        steps=700,
        batch_size=8,
        micro_batch_size=8,
        noise_probability=0.0,
        latent_dropout=0.0,
        ema_decay=0.98,
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20, max_grad_norm=1.0),
        log_every=100,
        validate_every=700,
        checkpoint_every=1000,
    )
    train(config)
    assert psnrs(config)[-1]["psnr_sigma_0.0"] > 30


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_resuming_equals_not_stopping(stage, request, tmp_path):
    config = request.getfixturevalue(stage)
    whole = weights(train(replace(config, output=tmp_path / "whole")))
    train(replace(config, steps=2, output=tmp_path / "parts"))
    parts = weights(train(replace(config, output=tmp_path / "parts")))
    assert whole.keys() == parts.keys() and any("exp_avg" in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(3) == 1


def command(config, tmp_path) -> tuple[list[str], dict]:
    """The command line of a run, and the environment in which it finds the tests' encoder."""
    write_yaml(config, tmp_path / "run.yaml")
    stage = ["distill"] if type(config).__name__ == "Student" else ["train", type(config).__name__.lower()]
    arguments = [sys.executable, "-m", "pixeldecoder", *stage, "--config", str(tmp_path / "run.yaml")]
    if getattr(config, "encoder", ""):  # code, which no file names
        arguments += ["--encoder", config.encoder]
    # As many threads as here, so that sums come out the same to the bit.
    threads = str(torch.get_num_threads())
    return arguments, os.environ | {"OMP_NUM_THREADS": threads}


def test_killed_while_it_writes_a_checkpoint(teacher, tmp_path):
    config = replace(teacher, steps=400, checkpoint_every=1, keep_checkpoints=2)
    arguments, environment = command(config, tmp_path)
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, deadline = config.output / "checkpoints", time.time() + 120
    # Killed while a partial folder is there, after two whole ones.
    while time.time() < deadline and process.poll() is None:
        if len(list(folder.glob("step_*[0-9]"))) >= 2 and (partial := list(folder.glob("*.partial"))):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    last = Checkpoints(config).existing()[-1]
    reached = int(last.name.removeprefix("step_"))
    assert partial[0].stem in (last.name, f"step_{reached + 1:08}")  # nothing but the step being written is lost
    resumed = weights(train(replace(config, steps=reached + 2)))
    whole = weights(train(replace(config, steps=reached + 2, checkpoint_every=1000, output=tmp_path / "whole")))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_checkpoints_rotate_and_hold_their_configuration(teacher):
    last = train(replace(teacher, steps=6, checkpoint_every=1))
    assert [p.name for p in Checkpoints(teacher).existing()] == ["step_00000005", "step_00000006"]
    assert "averaging:encode" in (last / "config.yaml").read_text()
    assert json.loads((last / "progress.json").read_text())["position"] == 6
    assert (teacher.output / "curves.png").exists()


def test_full_disk(teacher, tmp_path):
    """A file size limit ends a write in the middle, as a full disk does; the older checkpoint stays whole."""
    teacher.precision = "bfloat16"
    train(replace(teacher, steps=2))
    arguments, environment = command(replace(teacher, steps=4, checkpoint_every=4), tmp_path)
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *arguments]
    result = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert re.search(r"could not write .*step_00000004.*; the last checkpoint is .*step_00000002\n", result.stderr)
    assert [p.name for p in (teacher.output / "checkpoints").iterdir()] == ["step_00000002"]
    weights(teacher.output / "checkpoints" / "step_00000002")


def test_nan_stops_with_the_batch_named(teacher, monkeypatch):
    train(replace(teacher, steps=2))
    sound = losses.flow_matching
    monkeypatch.setattr(losses, "flow_matching", lambda *args: sound(*args) * float("nan"))
    with pytest.raises(TrainingError, match=r"step 2 is not finite, in the batch of \d.png, \d.png; .*step_00000002"):
        train(teacher)
    assert [p.name for p in Checkpoints(teacher).existing()] == ["step_00000002"]


def test_export_and_validation(teacher, student, tmp_path):
    teacher = replace(teacher, latent_space="sdxl", validate_every=4)
    assert teacher.frame == "variance-preserving" and student.frame == "flow"
    train(replace(teacher, export=tmp_path / "exported"))
    config = PixelDecoderPipeline.from_pretrained(tmp_path / "exported").config
    assert config.latent_space == "sdxl" and config.trained_size == 64
    # The picture: bicubic, three sigmas and the original, their names above them, in a row for each of four images.
    picture = Image.open(teacher.output / "validation" / "step_00000004.png")
    assert picture.size == (5 * 64, 20 + 4 * 64)
    for column in range(5):
        darkest, brightest = picture.crop((64 * column, 0, 64 * column + 64, 20)).convert("L").getextrema()
        assert darkest < 64 and brightest == 255
    originals = {picture.crop((256, y, 320, y + 64)).tobytes() for y in range(20, 276, 64)}
    batch = load_validation(teacher, PixelDecoderTransformer2DModel(**ARCHITECTURE), load_source(teacher), "cpu")
    assert originals == {to_image(image[None]).tobytes() for image in batch.image}
    # The logged values are the means of the rows' PSNRs.
    (logged,) = psnrs(teacher)
    pixels = torch.from_numpy(np.array(picture)[20:]).double().reshape(4, 64, 5, 64, 3)
    error = (pixels - pixels[:, :, 4:]).square().mean(dim=(1, 3, 4))
    for column, name in enumerate(("psnr_bicubic", "psnr_sigma_0.0", "psnr_sigma_0.4", "psnr_sigma_0.8")):
        assert logged[name] == pytest.approx((10 * (255**2 / error[:, column]).log10()).mean().item(), abs=0.05)
    assert set(psnrs(teacher)[-1]) == {"step", "psnr_bicubic"} | {f"psnr_sigma_{s}" for s in (0.0, 0.4, 0.8)}
    made = train(replace(student, model=str(tmp_path / "exported"), architecture=None, export=tmp_path / "four"))
    assert made.name == "step_00000004"
    pipeline = PixelDecoderPipeline.from_pretrained(tmp_path / "four")
    assert pipeline.config.default_num_inference_steps == 4
    state = weights(made)
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, state.get(f"/average/{name}", state[f"/student/{name}"]))
    images = pipeline(torch.randn(1, 16, 2, 2), output_type="pt").images
    assert images.shape == (1, 3, 64, 64)


def test_validation_has_its_interval(teacher, monkeypatch):
    """And can be turned off; the last step has none of its own."""
    steps = []
    monkeypatch.setattr(loop.Log, "validation", lambda log, step, *_: steps.append(step))
    train(replace(teacher, steps=5, validate_every=2))
    assert steps == [2, 4]
    monkeypatch.setattr(loop, "load_validation", None)  # is not even loaded
    train(replace(teacher, steps=1, validate_every=0, output=teacher.output / "never"))


def test_validation_in_little_memory(teacher, monkeypatch, tmp_path):
    """It does not depend on what is free, which differs between steps and processes, nor on the micro batch."""
    config = replace(teacher, steps=1, batch_size=4, micro_batch_size=4, validate_every=1)
    train(config)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    train(replace(config, micro_batch_size=1, output=tmp_path / "little"))
    (plenty,), (little,) = psnrs(config), psnrs(replace(config, output=tmp_path / "little"))
    assert little == pytest.approx(plenty, abs=1e-3)


@pytest.mark.parametrize(
    "stage, space, keep",
    [("teacher", None, (0.6, 0.2)), ("student", None, (0.6, 0.2)), ("teacher", "sdxl", (0.84**0.5, 0.6))],
)
def test_validation_tells_the_pipeline_sigma(stage, space, keep, request, monkeypatch):
    config = replace(request.getfixturevalue(stage), steps=1, validate_every=1, micro_batch_size=1, latent_space=space)
    told, seeds = [], []
    plain = PixelDecoderPipeline.__call__

    def spy(self, latents, sigma, **kwargs):
        told.append((sigma, latents))
        seeds.extend(generator.initial_seed() for generator in kwargs["generator"])
        return plain(self, latents, sigma=sigma, **kwargs)

    monkeypatch.setattr(PixelDecoderPipeline, "__call__", spy)
    train(config)
    assert [sigma for sigma, _ in told] == [0.0] * 4 + [0.4] * 4 + [0.8] * 4
    assert seeds == 3 * [0, 1, 2, 3]  # each picture's own, at every sigma
    # The latents are what they are said to be: keep z + sigma noise, of one noise, in the frame of their space.
    clean, some, more = (torch.cat([z for _, z in told[n : n + 4]]) for n in (0, 4, 8))
    torch.testing.assert_close((some - keep[0] * clean) / 0.4, (more - keep[1] * clean) / 0.8, atol=1e-5, rtol=1e-5)


def test_a_failing_validation_does_not_end_a_run(teacher, monkeypatch, capsys):
    """The weights are the trained ones afterwards, not the average."""
    config = replace(teacher, steps=3, validate_every=1)
    whole = weights(train(replace(config, validate_every=0, output=config.output / "without")))

    def fails(self, *args, **kwargs):
        assert not self.transformer.training
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(PixelDecoderPipeline, "__call__", fails)
    training = []
    sound = loop.TeacherStage.update
    monkeypatch.setattr(
        loop.TeacherStage, "update", lambda stage, *args: training.append(stage.model.training) or sound(stage, *args)
    )
    with_failures = weights(train(config))
    assert all(training) and [n for n in whole if not torch.equal(whole[n], with_failures[n])] == []
    assert "step 2: no validation: CUDA out of memory. Tried to allocate 2 GiB\n" in capsys.readouterr().err


def test_psnr_is_the_mean_over_images():
    truth = torch.zeros(2, 3, 4, 4)
    images = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])  # 20 and 40 dB, of 2 from -1 to 1
    assert validate.mean_psnr(images, truth) == pytest.approx(30, abs=1e-3)


def test_validation_is_not_counted_as_training_time(teacher, monkeypatch):
    """Neither by the bar nor in samples per second."""
    clock = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    logged = loop.Log(teacher, Accelerator(cpu=True), 0)
    bar = loop.tqdm(total=10, disable=False, mininterval=0)
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = clock[0]

    def making():
        clock[0] += 100
        return {"grid": Image.new("RGB", (8, 8)), "psnr_sigma_0.0": 20.0}

    for step in (1, 2):
        clock[0] += 2
        bar.update()
        logged.validation(step, bar, making)
    assert bar.format_dict["elapsed"] == 4
    logged.add(2, {"velocity": 1.0}, bar, 8)
    bar.close()
    lines = [json.loads(line) for line in (teacher.output / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["samples_per_second"] == pytest.approx(8 / 4)


def test_log_lines_are_means_over_their_steps(teacher, monkeypatch):
    """Of the terms, and samples over time, of the whole batch; the last step has a line, too."""
    clock = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])

    def update(stage, batches, step, progress):
        clock[0] += 3
        return {"velocity": float(step)} | ({"gan": 7.0} if step == 1 else {})

    monkeypatch.setattr(loop.TeacherStage, "update", update)
    train(replace(teacher, steps=3, log_every=2, batch_size=4))
    first, last = [json.loads(line) for line in (teacher.output / "log.jsonl").read_text().splitlines()]
    assert (first["step"], first["velocity"], first["gan"]) == (2, 0.5, 7.0) and "gan" not in last
    assert (last["step"], last["velocity"]) == (3, 2.0)
    assert first["samples_per_second"] == last["samples_per_second"] == pytest.approx(4 / 3)


def test_validation_pictures_share_a_shape(teacher, tmp_path):
    """Four of the shape that most have, whatever comes first; none is enlarged."""
    write_photos(tmp_path / "mixed" / "tall", 2, (100, 130))
    write_photos(tmp_path / "mixed" / "wide", 5, (160, 90))
    write_photos(tmp_path / "mixed" / "tiny", 5, (40, 40))
    data = replace(teacher.data, validation=tmp_path / "mixed", resolution=96, max_aspect_ratio=2.0)
    model = PixelDecoderTransformer2DModel(**ARCHITECTURE)
    batch = load_validation(replace(teacher, data=data), model, load_source(teacher), "cpu")
    assert batch.names == [f"wide/{n}.png" for n in range(4)] and batch.image.shape == (4, 3, 64, 128)
    data = replace(data, resolution=192)
    with pytest.raises(ValueError, match=r"mixed: too small for --data.resolution 192: all 12 pictures; give .* 64,"):
        load_validation(replace(teacher, data=data), model, load_source(teacher), "cpu")


@pytest.mark.parametrize(
    "change, differs",
    [
        (dict(seed=5, encoder="nano"), "seed: 0 -> 5; encoder: 'averaging:encode' -> 'nano'"),
        (dict(optimizer=Optimizer(learning_rate=2e-3, warmup_steps=1)), "optimizer.learning_rate: 0.001 -> 0.002"),
        (dict(max_sigma=0.5), "max_sigma: 0.8 -> 0.5"),
        (dict(batch_size=4), "batch_size: 2 -> 4"),
    ],
)
def test_going_on_with_other_settings_is_refused(teacher, change, differs):
    """And nothing is touched."""
    train(replace(teacher, steps=2))
    before = {path: path.read_bytes() for path in teacher.output.rglob("*") if path.is_file()}
    for steps in (2, 4):
        with pytest.raises(TrainingError) as error:
            train(replace(teacher, steps=steps, **change))
        assert f"{teacher.output} holds a run with other settings ({differs})" in str(error.value)
    assert before == {path: path.read_bytes() for path in teacher.output.rglob("*") if path.is_file()}


def test_a_folder_may_be_written_in_another_way(teacher):
    train(replace(teacher, steps=1))
    last = train(replace(teacher, steps=2, data=replace(teacher.data, source=f"{teacher.data.source}/")))
    assert last.name == "step_00000002"


def _emptied(checkpoint: Path) -> None:
    (checkpoint / "progress.json").write_text("")


def _without_progress(checkpoint: Path) -> None:
    (checkpoint / "progress.json").unlink()


def _of_an_earlier_version(checkpoint: Path) -> None:
    (checkpoint / "progress.json").write_text('{"step": 1, "position": 1, "architecture": {}}')


def _truncated(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.distcp"):
        os.truncate(path, path.stat().st_size // 3)


def _overwritten(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _with_code(checkpoint: Path) -> None:
    metadata = checkpoint / ".metadata"
    metadata.write_bytes(pickle.dumps((Touches(checkpoint.parents[1] / "ran"), pickle.loads(metadata.read_bytes()))))


def _with_code_for_a_number(checkpoint: Path) -> None:
    """A learning rate's place holds it."""
    path, payload = checkpoint / ".metadata", io.BytesIO()
    metadata = pickle.loads(path.read_bytes())
    torch.save(Touches(checkpoint.parents[1] / "ran"), payload)
    place = next(info for index, info in metadata.storage_data.items() if index.fqn.endswith("lr"))
    with (checkpoint / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), len(payload.getvalue())
        file.write(payload.getvalue())
    path.write_bytes(pickle.dumps(metadata))


DAMAGE = {
    _with_code: "which no checkpoint needs: it may be an attack",
    _with_code_for_a_number: "cannot be read",
    _emptied: "progress.json: damaged",
    _without_progress: "progress.json: damaged (No such file or directory)",
    _of_an_earlier_version: "progress.json does not tell stage, samples",
    _truncated: "cannot be read",
    _overwritten: "cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(teacher, tmp_path, damage, caplog):
    config = replace(teacher, checkpoint_every=1, keep_checkpoints=2)
    damage(train(replace(config, steps=3)))
    kept = train(replace(config, steps=4))
    (told,) = [line for line in caplog.messages if "going on from" in line]
    assert "step_00000003" in told and DAMAGE[damage] in told and told.endswith("going on from step_00000002")
    assert not (config.output / "ran").exists()
    # Nothing is lost but the time: the steps come again, and are the same.
    resumed, whole = weights(kept), weights(train(replace(config, steps=4, output=tmp_path / "whole")))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert [path.name for path in Checkpoints(config).existing()] == ["step_00000003", "step_00000004"]
    steps = [json.loads(line)["step"] for line in (config.output / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_without_another(teacher, damage):
    damage(train(replace(teacher, steps=1)))
    with pytest.raises(TrainingError, match="no older checkpoint to go on from: give another output folder") as error:
        train(teacher)
    assert DAMAGE[damage] in str(error.value) and "\n" not in str(error.value)
    assert not (teacher.output / "ran").exists()


@pytest.mark.parametrize("name", ["output", "export"])
def test_outputs_that_cannot_be_are_told_at_once(teacher, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="file is not a folder"):
        train(replace(teacher, **{name: tmp_path / "file"}))
    assert not (teacher.output).exists() and (tmp_path / "file").read_text() == "kept"


def test_going_on_with_another_stage_is_refused(teacher, student):
    train(replace(teacher, steps=1))
    with pytest.raises(TrainingError, match=r"step_00000001 is a teacher's, not a student's"):
        train(replace(student, output=teacher.output))


def test_going_on_says_from_where_and_with_what(teacher, capsys, tmp_path):
    train(replace(teacher, steps=2))
    assert "going on" not in capsys.readouterr().err
    teacher.output.rename(tmp_path / "moved")
    config = replace(teacher, output=tmp_path / "moved", log_every=3, keep_checkpoints=1)
    train(config)
    line = f"{config.output}: going on from step 2 of 4; steps: 2 -> 4; log_every: 1 -> 3; keep_checkpoints: 2 -> 1\n"
    assert line in capsys.readouterr().err
    assert read_yaml(config.output / "config.yaml", type(config)()) == config
    # A finished run is exported by the same command with --export, and its record stays.
    record = (config.output / "config.yaml").read_bytes()
    assert train(replace(config, steps=3, export=tmp_path / "exported")).name == "step_00000004"
    assert "nothing to train at step 4 of 3; export: None -> " in capsys.readouterr().err
    assert (tmp_path / "exported" / "model_index.json").exists()
    assert (config.output / "config.yaml").read_bytes() == record


def test_another_micro_batch_goes_on_at_the_same_pictures(teacher, tmp_path):
    whole = weights(train(replace(teacher, output=tmp_path / "whole")))
    train(replace(teacher, steps=2))
    parts = weights(train(replace(teacher, micro_batch_size=1)))
    for name in whole:
        if name.startswith("/network/"):
            torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-4)


def test_interrupted(teacher, monkeypatch, capsys):
    sound = loop.TeacherStage.update
    stops = iter([1, 3])

    def update(stage, batches, step, progress):
        if step == stop:
            raise KeyboardInterrupt
        return sound(stage, batches, step, progress)

    monkeypatch.setattr(loop.TeacherStage, "update", update)
    goes_on = f"stopped: the same command goes on from {teacher.output}/checkpoints/step_00000002\n"
    for line in ("stopped before the first checkpoint\n", goes_on):
        stop = next(stops)
        with pytest.raises(KeyboardInterrupt):
            train(teacher)
        assert line in capsys.readouterr().err


def test_interrupted_while_it_writes_a_checkpoint(teacher, monkeypatch):
    """DCP hands on whatever happens in it as an error of its own."""

    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(teacher)
    assert list((teacher.output / "checkpoints").iterdir()) == []


def test_a_run_of_minutes_in_pieces(teacher, monkeypatch, tmp_path):
    """It is exported at its end alone; the learning rates fall over all of it."""
    clock, seen = [0.0], []
    monkeypatch.setattr(loop, "seconds", lambda device: clock[0])
    sound = loop.TeacherStage.update

    def update(stage, batches, step, progress):
        clock[0] += 60
        seen.append((step, progress))
        return sound(stage, batches, step, progress)

    monkeypatch.setattr(loop.TeacherStage, "update", update)
    config = replace(teacher, steps=100, minutes=4, piece=3, export=tmp_path / "exported")
    assert train(config).name == "step_00000003" and not config.export.exists()
    assert train(config).name == "step_00000004" and config.export.exists()
    assert seen == [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75)]


TORN = [b'{"step": 3, "velo', b'{"step": 3, "a": {"b": 1}', b"\0" * 40, b"\xff\xfe", b"[1]", b"{}", b'{"step": "x"}']


@pytest.mark.parametrize("torn", TORN)
def test_a_log_line_cut_short(teacher, torn, capsys):
    train(replace(teacher, steps=2))
    path = teacher.output / "log.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    log.plot(path, teacher.output / "curves.png")
    train(replace(teacher, steps=3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert f"{path}: left out 1 damaged line\n" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_an_exported_decoder_knows_its_size_and_space(stage, request, tmp_path):
    config = replace(request.getfixturevalue(stage), steps=1, latent_space="flux", export=tmp_path / "exported")
    train(config)
    exported = PixelDecoderPipeline.from_pretrained(config.export)
    assert (exported.config.trained_size, exported.config.latent_space) == (64, "flux")


def test_an_exported_decoder_knows_its_encoder(teacher, tmp_path, capsys):
    """nano's goes with it; of another it has the name."""
    train(replace(teacher, steps=1, encoder="nano", export=tmp_path / "nano"))
    photo = write_photos(tmp_path / "small", 1, (24, 16)) / "0.png"
    picture = tmp_path / "picture.png"
    assert main(["upscale", str(photo), str(picture), "--decoder", str(tmp_path / "nano"), "--device", "cpu"]) == 0
    assert Image.open(picture).size == (96, 64)
    nano = load_image_encoder("nano")
    exported = PixelDecoderPipeline.from_pretrained(tmp_path / "nano")
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert exported.config.encoder_name == "nano" and torch.equal(exported.encode_image(image), nano(image))
    exported.encoder = None  # as in a file of the reference's format, which keeps the name
    assert torch.equal(image_encoder("auto", exported)(image), nano(image))

    encoder = tmp_path / "encoder"
    TinyLatentEncoder(channels=8, num_blocks=(0, 0, 0, 1)).save_pretrained(encoder)
    train(replace(teacher, steps=1, encoder=str(encoder), export=tmp_path / "named", output=tmp_path / "b"))
    exported = PixelDecoderPipeline.from_pretrained(tmp_path / "named")
    assert exported.encoder is None and exported.config.encoder_name == str(encoder)
    assert torch.equal(image_encoder("auto", exported)(image), load_image_encoder(str(encoder))(image))
    encoder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"was trained with the encoder {encoder}"):
        image_encoder("auto", exported)
    # A file must not have modules imported.
    exported.register_to_config(encoder_name="averaging:encode")
    with pytest.raises(ValueError, match="give --encoder averaging:encode"):
        image_encoder("auto", exported)


@pytest.mark.parametrize("part", ["backbone", "adapter"])
def test_lora(teacher, tmp_path, part):
    model = PixelDecoderTransformer2DModel(**ARCHITECTURE)
    torch.nn.init.normal_(model.proj_out.weight)
    model.save_pretrained(tmp_path / "model")
    config = replace(
        teacher,
        architecture=None,
        model=str(tmp_path / "model"),
        lora=Lora(rank=4, part=part),
        export=tmp_path / "lora",
        ema_decay=0.0,
    )
    state = weights(train(config))
    trained = [name for name in state if name.startswith("/average/")]
    assert trained and all("lora" in name for name in trained)
    # The file, loaded into the pipeline, gives what was trained; its strength goes down to nothing.
    pipeline = PixelDecoderPipeline(PixelDecoderTransformer2DModel.from_pretrained(tmp_path / "model"), scheduler())
    pipeline.set_progress_bar_config(disable=True)

    def decode():
        generator = torch.Generator().manual_seed(0)
        return pipeline(torch.ones(1, 16, 2, 2), generator=generator, output_type="pt").images

    plain = decode()
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="photos")
    loaded = pipeline.transformer.state_dict()
    for name in trained:
        ours = name.removeprefix("/average/").replace(".default.", ".photos.")
        assert torch.equal(loaded[ours], state[name])
    full = decode()
    pipeline.set_adapters("photos", 0.5)
    half = decode()
    pipeline.set_adapters("photos", 0.0)
    assert torch.equal(decode(), plain)
    assert 0 < (half - plain).abs().mean() < (full - plain).abs().mean()


def scheduler():
    from diffusers import FlowMatchLCMScheduler

    return FlowMatchLCMScheduler(shift=1.0)


def test_teacher_takes_all_but_its_adapter_from_a_prior(teacher, tmp_path):
    (tmp_path / "architecture.json").write_text(json.dumps(ARCHITECTURE | dict(base_dim=None)))  # as released decoders
    prior = PixelDecoderTransformer2DModel(**ARCHITECTURE | dict(latent_channels=None, base_dim=None))
    torch.nn.init.normal_(prior.proj_out.weight)
    prior.save_pretrained(tmp_path / "prior")
    made = weights(train(replace(teacher, model=str(tmp_path / "prior"), train="adapter")))
    for name, tensor in prior.state_dict().items():
        assert torch.equal(made[f"/network/{name}"], tensor)
    assert made["/network/adapter.heads.0.weight"].abs().sum() > 0


@pytest.mark.parametrize("memory", ["int8", "offload"])
def test_teacher_that_takes_less_memory(student, memory):
    """Where the losses are not the whole teacher's, they are those of its rounded features."""

    def first_loss(config):
        train(replace(config, gradient_checkpointing=False))
        lines = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
        return next(line["discriminator"] for line in lines if "discriminator" in line)

    plain = first_loss(student)
    saving = first_loss(replace(student, output=student.output.with_name(memory), teacher_memory=memory))
    if memory == "offload":
        assert saving == plain
    else:
        assert saving != plain and saving == pytest.approx(plain, rel=0.1)


def test_rollout_and_bfloat16(student):
    train(replace(student, student_input="rollout", precision="bfloat16", steps=6))
    values = [json.loads(line) for line in (student.output / "log.jsonl").read_text().splitlines()]
    assert {"vsd", "gan", "fake_score", "discriminator", "r1"} <= {name for line in values for name in line}


def dinov2(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    return folder


def test_prior_with_captions_and_repa(teacher, tmp_path):
    save_gemma(tmp_path / "gemma")
    (tmp_path / "prior.json").write_text(json.dumps(TINY | dict(latent_channels=None)))
    (tmp_path / "photos" / "0.txt").write_text("a cat")
    config = Prior(
        **{name: value for name, value in vars(teacher).items() if name in Prior.__dataclass_fields__}
        | dict(
            architecture=tmp_path / "prior.json",
            text_encoder=str(tmp_path / "gemma"),
            repa_weight=0.5,
            repa_encoder=str(dinov2(tmp_path / "dinov2")),
            repa_block=1,
            export=tmp_path / "exported",
            steps=2,
        )
    )
    train(config)
    line = json.loads((config.output / "log.jsonl").read_text().splitlines()[0])
    assert 0 < line["repa"] < 1 and line["velocity"] > 0
    exported = PixelDecoderPipeline.from_pretrained(tmp_path / "exported").config
    assert (exported.default_num_inference_steps, exported.default_guidance_scale) == (50, 2.75)


def test_repa_s_projector_and_what_its_encoder_sees(tmp_path):
    """Four patches of 16 px are four of the encoder's 14: a bicubic reduction, as it is."""
    network = PixelDecoderTransformer2DModel(**TINY | dict(latent_channels=None, num_attention_heads=3))
    config = Prior(repa_encoder=str(dinov2(tmp_path)), repa_block=1, precision="float32", device="cpu")
    target = RepaTarget(config, network, Accelerator(cpu=True))
    shapes = [tuple(layer.weight.shape) for layer in target.projector.module if hasattr(layer, "weight")]
    assert shapes == [(48, 48), (16, 48)]
    seen = []
    target.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    target.loss(torch.randn(1, 48, 4, 4), image).backward()
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (torch.nn.functional.interpolate((image + 1) / 2, (56, 56), mode="bicubic") - mean) / std
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model="", architecture=None), "expected `model`"),
        (dict(encoder=""), "encoder: expected what turns pictures into latents"),
        (dict(encoder="nowhere:encode"), "module:function"),
        (dict(batch_size=3), "batch_size 3: expected a multiple of micro_batch_size x processes, 2 x 1"),
        (dict(data=Data(source="")), "data.source: expected a folder"),
        (dict(data=Data(source="nowhere/")), "data.source nowhere/: no such folder"),
        (dict(data=Data(source=__file__)), "test_loop.py: expected a folder, or .tar shards"),
        (dict(architecture=None, model="docs/none"), "docs/none.*: no such folder or file .from the Hub: hub"),
        (dict(architecture=None, model="elsewhere/none"), "^elsewhere/none could not be loaded from https://hugg"),
    ],
)
def test_bad_configuration(teacher, change, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "data" in change:
        change["data"].resolution = 64
    with pytest.raises(ValueError, match=message):
        train(replace(teacher, **change))


def test_resolution_that_patches_do_not_divide(teacher):
    """It is to blame, not the encoder, whose latents do not fit either."""
    teacher.data.resolution, teacher.encoder = 72, "nano"
    with pytest.raises(ValueError, match=r"data.resolution 72: expected a multiple of 32, .* for example 64"):
        train(teacher)


def test_pictures_that_do_not_fit_in_memory(teacher, monkeypatch):
    teacher.data.in_memory = True
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=6 * 96 * 96 * 3))
    with pytest.raises(ValueError, match=r"data.in_memory: 6 pictures take 0.0 GB, .* give --data.no-in-memory"):
        train(teacher)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=7 * 96 * 96 * 3))
    train(teacher)


def test_what_is_left_out_is_counted_and_named(teacher, capsys):
    write_photos(Path(teacher.data.source) / "small", 4, (63, 80))
    (Path(teacher.data.source) / "broken.png").write_bytes(b"no picture")
    train(replace(teacher, steps=1))
    assert "5 pictures could not be used: broken.png, small/0.png, small/1.png, ...\n" in capsys.readouterr().err
    reasons = json.loads((teacher.output / "skipped.json").read_text())
    assert reasons["small/3.png"] == "63 x 80 px, which is too small for --data.resolution 64" and len(reasons) == 5


def test_encoder_of_another_latent_space(teacher, tmp_path):
    (tmp_path / "architecture.json").write_text(json.dumps(ARCHITECTURE | dict(latent_channels=4)))
    with pytest.raises(ValueError, match=r"gives latents \(1, 16, 2, 2\), the network expects \(1, 4, 2, 2\)"):
        train(teacher)


def test_checkpoint_of_another_architecture(teacher, tmp_path):
    train(replace(teacher, steps=2))
    (tmp_path / "architecture.json").write_text(json.dumps(ARCHITECTURE | dict(adapter_dim=16)))
    with pytest.raises(TrainingError, match=r"another architecture \(other adapter_dim\)"):
        train(teacher)


def test_architecture_with_an_unknown_argument(teacher, tmp_path):
    (tmp_path / "architecture.json").write_text(json.dumps(ARCHITECTURE | dict(adapter_dimension=16)))
    with pytest.raises(ValueError, match="got adapter_dimension"):
        train(teacher)


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz: 3", "stepz: Unexpected keyword argument"),
        ("data: {resolutio: 64}", "data.resolutio: Unexpected keyword argument"),
        ("steps: many", "steps: Input should be a valid integer"),
        ("- 1", "expected keys and values, got list"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_bad_yaml(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "teacher", "--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_command_line_overrides_the_file(teacher, tmp_path, capsys):
    write_yaml(teacher, tmp_path / "run.yaml")
    words = ["train", "teacher", "--config", str(tmp_path / "run.yaml"), "--encoder", teacher.encoder]
    assert main([*words, "--steps", "1"]) == 0
    assert capsys.readouterr().out.strip().endswith("step_00000001")
    assert main(["train", "teacher", "--stepz", "1"]) == 2
    assert main(["train", "teacher", "--recipe", "huge"]) == 2
    assert "expected paper or nano" in capsys.readouterr().err


def test_the_average_forgets_as_configured(teacher):
    """At once: it is the network."""
    state = weights(train(replace(teacher, steps=2, ema_decay=0.0)))
    averaged = [name for name in state if name.startswith("/average/")]
    assert averaged and all(torch.equal(state[n], state[n.replace("average", "network", 1)]) for n in averaged)


def test_fresh_weights_follow_from_the_seed(teacher, monkeypatch):
    found = []

    def load(self, parts, *args):
        found.append(parts["network"].module.patch_embed.weight.detach().clone())
        raise TrainingError("enough")

    monkeypatch.setattr(Checkpoints, "load", load)
    for seed in 3, 3, 4:
        torch.manual_seed(len(found))
        with pytest.raises(TrainingError, match="enough"):
            train(replace(teacher, seed=seed))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_charts(teacher):
    """Every logged value, at the step it was logged at; settings that are no numbers or words are left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(teacher, steps=4, log_every=2, tracker="tensorboard"))
    (events,) = (
        found
        for path in teacher.output.rglob("events.out.tfevents.*")
        if "velocity" in (found := EventAccumulator(str(path)).Reload()).Tags()["scalars"]
    )
    lines = [json.loads(line) for line in (teacher.output / "log.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in events.Scalars("velocity")] == [
        (line["step"], pytest.approx(line["velocity"], rel=1e-5)) for line in lines
    ]


def test_curves(tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda axes, *xy: drawn.append(xy))
    lines = [{"step": 1, "a": 5.0}, {"step": 2, "a": 4.0, "b": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    log.plot(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert drawn == [([1, 2], [5.0, 4.0]), ([2], [1.0])] and (tmp_path / "curves.png").exists()


def test_memory_of_the_process_is_in_bytes():
    import psutil

    now = psutil.Process().memory_info().rss
    assert now / 2 < measured_peak(torch.device("cpu")) < 50 * now


@pytest.mark.parametrize("in_memory", [False, True])
def test_settings_reach_the_batches(teacher, in_memory, monkeypatch):
    given = {}
    for name in "batches", "batches_in_memory":
        monkeypatch.setattr(data_module, name, lambda *a, name=name, **k: given.update(name=name, args=a[1:], **k))
    data = replace(teacher.data, in_memory=in_memory, workers=3, max_aspect_ratio=4.0, resolution=128)
    config = replace(teacher, data=data, seed=7, micro_batch_size=5, batch_size=10)
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=2, num_processes=3)
    source = load_source(config)
    source.require = lambda *args: given.update(required=args)
    data_module.load_batches(config, PixelDecoderTransformer2DModel(**ARCHITECTURE), source, accelerator, 11)
    assert (given["seed"], given["rank"], given["world_size"], given["start"]) == (7, 2, 3, 11)
    sizes = [(128, 128)] if in_memory else bucket_sizes(128, 32, 4.0)
    assert given["required"] == (sizes, 32)
    assert given["args"] == (128 if in_memory else sizes, 5) and given.get("workers") == (None if in_memory else 3)
    assert given["name"] == ("batches_in_memory" if in_memory else "batches")


def test_validation_pictures_are_the_first_that_can_be_read(teacher, tmp_path):
    """Their middles or corners, the same each time, in [-1, 1], with their captions; without a folder of their own
    they are trained on."""
    folder = write_photos(tmp_path / "own", 6, (96, 96))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    (folder / "2.txt").write_text("two")
    config = replace(teacher, data=replace(teacher.data, validation=folder))
    model = PixelDecoderTransformer2DModel(**ARCHITECTURE)
    found, again = (load_validation(config, model, load_source(config), "cpu") for _ in range(2))
    assert found.names == ["0.png", "2.png", "3.png", "4.png"] and found.captions == ["", "two", "", ""]
    assert torch.equal(found.image, again.image) and found.samples == [0, 1, 2, 3]
    assert found.image.min() >= -1 and found.image.max() <= 1 and found.image.min() < -0.5 and found.image.max() > 0.5
    source = load_source(teacher)
    trained_on = load_validation(teacher, model, source, "cpu")
    first = [record.name for record, _ in zip(source.records(teacher.seed), range(4), strict=False)]
    assert trained_on.names == first


def test_repa_compares_patches_with_patches(tmp_path):
    """The encoder's class token, which comes first, is left out; the projection of a token is a token."""
    network = PixelDecoderTransformer2DModel(**TINY | dict(latent_channels=None))
    config = Prior(repa_encoder=str(dinov2(tmp_path)), repa_block=1, precision="float32", device="cpu")
    target = RepaTarget(config, network, Accelerator(cpu=True))
    made = torch.randn(2, 1 + 12, 16)
    target.encoder.forward = lambda pixels: SimpleNamespace(last_hidden_state=made)
    target.projector = lambda tokens: tokens[..., :16]
    features = made[:, 1:].transpose(1, 2).unflatten(2, (3, 4)).repeat(1, 2, 1, 1)
    image = torch.zeros(2, 3, 48, 64)
    assert target.loss(features, image).item() == pytest.approx(0, abs=1e-6)
    assert target.loss(-features, image).item() == pytest.approx(2, abs=1e-6)
    with pytest.raises(ValueError, match="repa_block 4: the network has blocks 0 to 3"):
        RepaTarget(replace(config, repa_block=4), network, Accelerator(cpu=True))


def test_what_a_run_killed_at_its_end_has_left(teacher):
    """Goes, though nothing is left to train or to write."""
    train(teacher)
    left = teacher.output / f".00000000.{files._machine():08x}.4194303.png"
    left.touch()
    files._SWEPT.clear()  # as in another process
    train(teacher)
    assert not left.exists()
