"""SIGKILL and SIGTERM at random moments: outputs whole or absent, and a rerun that ends as if nothing had been."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from families import z_image
from training.conftest import ARCHITECTURE, write_photos

FAST = ["--device", "cpu", "--dtype", "float32", "--steps", "1"]
VOLATILE = {"seconds", "samples_per_second", "memory_gb", "memory", "created", "time", "made_by"}


def decode(things, here):
    return ["decode", things / "latents", "out", "--decoder", things / "decoder", *FAST]


def upscale(things, here):
    return ["upscale", things / "photos", "out", "--decoder", things / "decoder", *FAST]


def encode(things, here):
    return ["encode", things / "photos", "out", "--device", "cpu"]


def convert(things, here):
    return ["convert", things / "with-text", "out/a.safetensors"]


def convert_back(things, here):
    if not (here.parent / "a.safetensors").exists():
        from pixeldecoder.convert import folder_to_reference

        folder_to_reference(things / "with-text", here.parent / "a.safetensors")
    return ["convert", here.parent / "a.safetensors", "out/decoder"]


def generate(things, here):
    if not (here.parent / "model").exists():
        torch.manual_seed(0)
        z_image().save_pretrained(here.parent / "model")
    return [
        "generate", "a cat", "out/a.png", "--model", here.parent / "model", "--decoder", things / "decoder", "--height",
        32, "--width", 48, "--latent-steps", 2, "--latent-guidance-scale", 0, "--stop-at", 1, "--save-latents",
        "out/z.safetensors", "--overwrite", *FAST,
    ]  # fmt: skip


def evaluate(things, here):
    return [
        "evaluate", things / "photos", "--output", "out", "--decoders", things / "decoder", "--encoder", "nano",
        "--metrics", "psnr", "--sigmas", 0.0, "--device", "cpu", "--dtype", "float32", "--steps", 1,
    ]  # fmt: skip


def export(things, here):
    return ["export", things / "decoder", "out/onnx", "--format", "pt2"]


def train(things, here):
    path = here.parent / "architecture.json"
    path.write_text(json.dumps(ARCHITECTURE))
    if not (here.parent / "photos").exists():
        write_photos(here.parent / "photos")
    settings = {
        "data": {"source": str(here.parent / "photos"), "resolution": 64, "max_aspect_ratio": 1.0, "workers": 1},
        "architecture": str(path), "output": "out/run", "encoder": "nano", "train": "all", "steps": 4, "batch_size": 2,
        "micro_batch_size": 2, "precision": "float32", "device": "cpu", "validate_every": 0, "checkpoint_every": 1,
        "log_every": 1, "tracker": "none", "export": "out/decoder",
    }  # fmt: skip
    (here.parent / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["train", "teacher", "--config", here.parent / "run.yaml"]


def distill(things, here):
    train(things, here)
    settings = yaml.safe_load((here.parent / "run.yaml").read_text()) | {"feature_blocks": [1], "student_every": 2}
    del settings["train"]
    (here.parent / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["distill", "--config", here.parent / "run.yaml"]


def content(folder: Path) -> dict[str, object]:
    """What outputs hold, by their names; raises if one is not whole. Hidden and partial ones are none."""
    held: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or any(part.startswith(".") or part.endswith(".partial") for part in Path(name).parts):
            continue
        if path.suffix in (".png", ".jpg", ".webp"):
            held[name] = np.asarray(Image.open(path)).tobytes()
        elif path.suffix == ".safetensors":
            held[name] = {key: value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.suffix == ".json":
            held[name] = None if json.loads(path.read_text()) is None else ""
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
            held[name] = [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]
        else:
            held[name] = ""
    return held


def temporaries(folder: Path) -> list[Path]:
    hidden = (path for path in folder.rglob(".*") if path.name != ".metadata")  # a checkpoint's
    return [*hidden, *folder.rglob("*.partial")]


def outputs(held: dict[str, object]) -> dict[str, object]:
    """What a command is for; logs, their curves with seconds in them, and checkpoints have tests of their own."""
    kinds = (".png", ".safetensors", ".pt2")
    return {name: held[name] for name in held if Path(name).suffix in kinds and not name.endswith("curves.png")}


def check(zygote, things, here, command, number: int, kills: int, seed: int) -> int:
    """How many runs were killed and made good by another."""
    words = command(things, here)
    begun = time.monotonic()
    code, _, error = zygote.run(here, *words)
    spent = time.monotonic() - begun
    assert code == 0, error
    expected = outputs(content(here / "out"))
    assert expected
    rng = random.Random(seed)
    for _ in range(kills):
        shutil.rmtree(here / "out")
        run = zygote.start(here, *words)
        time.sleep(spent * rng.random())
        run.kill(number)
        held = outputs(content(here / "out"))
        checkpoints = {name for name in held if "checkpoints" in name}
        assert {name: held[name] for name in held.keys() - checkpoints}.items() <= expected.items()
        done = command is convert or command is convert_back or command is export
        if not (done and held):  # they replace nothing
            code, _, error = zygote.run(here, *words)
            assert code == 0, error
        assert outputs(content(here / "out")) == expected
        assert not temporaries(here / "out")
    return kills


KILLS = int(os.environ.get("PIXELDECODER_KILLS", "10"))
"""Of each command by each signal."""


@pytest.mark.parametrize(("command", "number"), [(encode, signal.SIGKILL), (convert, signal.SIGTERM)])
def test_killed_once(zygote, things, here, command, number):
    assert check(zygote, things, here, command, number, 1, 7) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    "command", [decode, upscale, encode, generate, evaluate, convert, convert_back, export, train, distill]
)
def test_killed_at_random(zygote, things, here, command, number):
    assert check(zygote, things, here, command, number, KILLS, 1) == KILLS
