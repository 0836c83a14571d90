"""Small photo folders and runs of seconds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import TINY_NANO
from pixeldecoder.training.config import Data, Optimizer, Student, Teacher

ARCHITECTURE = TINY_NANO | dict(num_layers=2, patch_size=8, rope_reference_size=64)


def write_photos(folder: Path, count: int = 6, size: tuple[int, int] = (96, 96)) -> Path:
    """Smooth coloured noise, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        small = np.random.RandomState(index).randint(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def teacher(tmp_path) -> Teacher:
    """From scratch, float32, 4 steps."""
    (tmp_path / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    return Teacher(
        data=Data(source=str(write_photos(tmp_path / "photos")), resolution=64, max_aspect_ratio=1.0, workers=1),
        architecture=tmp_path / "architecture.json",
        output=tmp_path / "teacher",
        encoder="averaging:encode",
        train="all",
        steps=4,
        batch_size=2,
        micro_batch_size=2,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=1),
        precision="float32",
        device="cpu",
        validate_every=0,
        checkpoint_every=2,
        log_every=1,
        tracker="none",
    )


@pytest.fixture
def student(teacher, tmp_path) -> Student:
    """From the teacher's architecture."""
    common = {name: getattr(teacher, name) for name in vars(teacher) if name in Student.__dataclass_fields__}
    return replace(
        Student(**common),
        output=tmp_path / "student",
        fake_score_optimizer=teacher.optimizer,
        discriminator_optimizer=replace(teacher.optimizer, max_grad_norm=None),
        student_every=2,
        feature_blocks=(1,),
    )
