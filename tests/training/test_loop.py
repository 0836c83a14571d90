"""Runs: overfitting, resumption, checkpoints, export, LoRA, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conftest import TINY
from families import save_gemma
from pixeldecoder import PixelDecoderPipeline, PixelDecoderTransformer2DModel
from pixeldecoder.cli import main
from pixeldecoder.training import losses
from pixeldecoder.training.checkpoints import Checkpoints
from pixeldecoder.training.config import Data, Lora, Optimizer, Prior, write_yaml
from pixeldecoder.training.loop import train
from pixeldecoder.training.parts import TrainingError
from pixeldecoder.training.teacher import RepaTarget
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
        steps=500,
        batch_size=8,
        micro_batch_size=8,
        noise_probability=0.0,
        latent_dropout=0.0,
        ema_decay=0.98,
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20, max_grad_norm=1.0),
        log_every=100,
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
    last = Checkpoints(config, {}).existing()[-1]
    reached = int(last.name.removeprefix("step_"))
    assert partial[0].stem in (last.name, f"step_{reached + 1:08}")  # nothing but the step being written is lost
    resumed = weights(train(replace(config, steps=reached + 2)))
    whole = weights(train(replace(config, steps=reached + 2, checkpoint_every=1000, output=tmp_path / "whole")))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_checkpoints_rotate_and_hold_their_configuration(teacher):
    last = train(replace(teacher, steps=6, checkpoint_every=1))
    assert [p.name for p in Checkpoints(teacher, {}).existing()] == ["step_00000005", "step_00000006"]
    assert "averaging:encode" in (last / "config.yaml").read_text()
    assert json.loads((last / "progress.json").read_text())["position"] == 6
    assert (teacher.output / "curves.png").exists()


def test_full_disk(teacher, tmp_path):
    """A file size limit ends a write in the middle, as a full disk does; the older checkpoint stays whole."""
    train(replace(teacher, steps=2))
    arguments, environment = command(replace(teacher, steps=4, checkpoint_every=4), tmp_path)
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *arguments]
    result = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(r"could not write .*step_00000004.*; the last checkpoint is .*step_00000002\n", result.stderr)
    assert [p.name for p in (teacher.output / "checkpoints").iterdir()] == ["step_00000002"]
    weights(teacher.output / "checkpoints" / "step_00000002")


def test_nan_stops_with_the_batch_named(teacher, monkeypatch):
    train(replace(teacher, steps=2))
    sound = losses.flow_matching
    monkeypatch.setattr(losses, "flow_matching", lambda *args: sound(*args) * float("nan"))
    with pytest.raises(TrainingError, match=r"step 2 is not finite, in the batch of \d.png, \d.png; .*step_00000002"):
        train(teacher)
    assert [p.name for p in Checkpoints(teacher, {}).existing()] == ["step_00000002"]


def test_export_and_validation(teacher, student, tmp_path):
    teacher = replace(teacher, latent_space="sdxl")
    assert teacher.frame == "variance-preserving" and student.frame == "flow"
    train(replace(teacher, export=tmp_path / "exported"))
    config = PixelDecoderPipeline.from_pretrained(tmp_path / "exported").config
    assert config.latent_space == "sdxl" and config.trained_size == 64
    # The picture: bicubic, three sigmas and the original in a row for each of four images.
    from PIL import Image

    assert Image.open(teacher.output / "validation" / "step_00000004.png").size == (5 * 64, 4 * 64)
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
    prior = PixelDecoderTransformer2DModel(**ARCHITECTURE | dict(latent_channels=None, aux_rgb_base=False))
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
        (dict(data=Data(source="nowhere")), "data.source nowhere"),
    ],
)
def test_bad_configuration(teacher, change, message):
    if "data" in change:
        change["data"].resolution = 64
    with pytest.raises(ValueError, match=message):
        train(replace(teacher, **change))


def test_resolution_that_patches_do_not_divide(teacher):
    teacher.data.resolution = 72
    with pytest.raises(ValueError, match="72"):
        train(teacher)


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
    assert main(["train", "teacher", "--config", str(tmp_path / "run.yaml"), "--steps", "1"]) == 0
    assert capsys.readouterr().out.strip().endswith("step_00000001")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "teacher", "--stepz", "1"])
    assert exit_.value.code == 2
    assert main(["train", "teacher", "--recipe", "huge"]) == 2
    assert "expected paper or nano" in capsys.readouterr().err
