"""A decoder of about 100 M parameters on your own pictures, for one GPU with 24 GB.

    python recipes/base.py teacher --data photos/
    python recipes/base.py student --data photos/ --out outputs/base
    python recipes/base.py memory

The teacher learns by flow matching, the student from it by DMD2; each goes on from its last checkpoint when it is
called again. They are meant to take about a day; that was not measured on a GPU yet. `memory` counts what an update of
each takes: 7.2 and 11.9 GB of tensors. The latents are FLUX.1's, by TAEF1 (MIT) or the autoencoder that `--encoder`
names. Then:

    pixeldecoder upscale small.png large.png --decoder outputs/base/student
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from nano import NANO

from pixeldecoder.training.config import Data, Optimizer, Run, Student, Teacher
from pixeldecoder.training.loop import train

NETWORK = NANO | dict(
    num_layers=8,
    num_attention_heads=10,
    num_pixel_layers=2,
    num_pixel_attention_heads=8,
    pixel_attention_head_dim=64,
    adapter_dim=320,
    num_adapter_layers=6,
    injection_interval=2,
)


@dataclass(kw_only=True)
class Config:
    stage: tyro.conf.Positional[Literal["teacher", "student", "memory"]]
    data: str = ""
    """Folder of pictures, or WebDataset shards."""
    encoder: str = "madebyollin/taef1"
    """Folder or Hub id of a diffusers autoencoder with FLUX.1's latents, or "nano"."""
    out: Path = Path("outputs/base")
    resolution: int = 512
    batch_size: int = 32
    micro_batch_size: int = 8
    """Pictures at a time; fewer take less memory."""
    steps: int | None = None
    """By default 60,000 of the teacher, 12,000 of the student."""
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0


def configure(config: Config, stage: str) -> Run:
    config.out.mkdir(parents=True, exist_ok=True)
    common = dict(
        data=Data(source=config.data, resolution=config.resolution),
        encoder=config.encoder,
        latent_space="flux",
        output=config.out / f"{stage}_training",
        export=config.out / stage,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        gradient_checkpointing=False,
        compile=config.device == "auto",
        device=config.device,
        precision="bfloat16" if config.device == "auto" else "float32",
        seed=config.seed,
    )
    if stage == "teacher":
        architecture = config.out / "network.json"
        architecture.write_text(json.dumps(NETWORK, indent=1))
        optimizer = Optimizer(learning_rate=3e-4, warmup_steps=1000, max_grad_norm=1.0)
        steps = config.steps or 60_000
        return Teacher(architecture=architecture, train="all", optimizer=optimizer, steps=steps, **common)
    optimizer = Optimizer(learning_rate=2e-5, weight_decay=0.0, warmup_steps=200, max_grad_norm=1.0)
    return Student(
        model=str(config.out / "teacher"),
        optimizer=optimizer,
        fake_score_optimizer=replace(optimizer, weight_decay=1e-3, warmup_steps=0),
        discriminator_optimizer=replace(optimizer, warmup_steps=0, max_grad_norm=None),
        feature_blocks=(3, 7),
        ema_decay=0.995,  # of 2,000 updates of the student's own
        steps=config.steps or 12_000,
        **common,
    )


def memory(config: Config) -> None:
    from training_memory import Config as Counting
    from training_memory import one

    print("| stage (counted) | pictures | peak memory |\n|---|---|---|")
    for stage in ("teacher", "student"):
        run = replace(configure(config, stage), model="", architecture=config.out / "network.json", compile=False)
        peak, _ = one(run, config.resolution, Counting())
        print(f"| {stage} | {config.micro_batch_size} of {config.resolution} px | {peak / 1e9:.1f} GB |", flush=True)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    if config.stage == "memory":
        memory(config)
    else:
        train(configure(config, config.stage))
