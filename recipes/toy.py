"""The paper's ablations, small: what steps, distillation, the gate and latents are worth, on 64 px crops.

    python recipes/toy.py --data TRAIN --validation EVAL --squeezenet squeezenet1_0.safetensors

Trains a teacher, the same without the gate (latents are added as they are), a prior without latents, and a 4-step
student, prints a table and asserts its order. The latents are the small image's own pixels, 2 x 2 to a cell, so that
what is measured is the decoder alone. Under 20 minutes on two CPU cores.
"""

import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import FlowMatchLCMScheduler
from PIL import Image

from pixeldecoder.evaluation.perceptual import SqueezeNetDistance
from pixeldecoder.flow import SampleRandom, add_noise
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import SUFFIXES, shrink, to_tensor
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.training.config import Data, Optimizer, Prior, Student, Teacher
from pixeldecoder.training.loop import train

SIZE = 64
NETWORK = dict(
    patch_size=8,
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=32,
    num_pixel_layers=1,
    pixel_dim=8,
    num_pixel_attention_heads=2,
    pixel_attention_head_dim=32,
    text_embed_dim=None,
    latent_channels=12,
    latent_downscale_factor=2,
    adapter_dim=64,
    adapter_padding_mode="replicate",
    injection_interval=1,
    per_channel_gate=False,
    inject_pixels=True,
    prediction_type="sample",
    rope_reference_size=SIZE,
)


@dataclass
class Config:
    data: Path
    """Folder of photos to train on."""
    validation: Path
    """Folder of photos to measure on."""
    squeezenet: Path
    """ImageNet SqueezeNet 1.0, .safetensors."""
    out: Path = Path("outputs/toy")
    seed: int = 0
    teacher_steps: int = 800
    prior_steps: int = 300
    student_steps: int = 300


def encode(image: torch.Tensor) -> torch.Tensor:
    """Image (B, 3, h, w) in [-1, 1] -> latents (B, 12, h / 2, w / 2) of about unit variance."""
    return 2 * F.pixel_unshuffle(image, 2)


def shrunk(source: Path, target: Path) -> Path:
    """Photos at a quarter of their size, so that 64 px show something."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(p for p in source.iterdir() if p.suffix in SUFFIXES):
        image = Image.open(path).convert("RGB")
        image = image.resize((image.width // 4, image.height // 4), Image.Resampling.BICUBIC)
        if min(image.size) >= SIZE:
            image.save(target / f"{path.stem}.png")
    return target


def main(config: Config) -> None:
    begun = time.time()
    torch.manual_seed(config.seed)
    photos = shrunk(config.data, config.out / "train")
    common = dict(
        data=Data(source=str(photos), resolution=SIZE, in_memory=True),
        batch_size=32,
        micro_batch_size=32,
        precision="float32",
        gradient_checkpointing=False,
        ema_decay=0.995,
        seed=config.seed,
        device="cpu",
        validate_every=10**9,
        checkpoint_every=10**9,
        tracker="none",
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, max_grad_norm=1.0),
    )
    network = PixelDecoderTransformer2DModel(**NETWORK)
    network.save_pretrained(config.out / "start")
    gateless = copy.deepcopy(network)
    for name, parameter in gateless.named_parameters():
        if "sigma_gate" in name:  # g = 1, and stays so: the sigmoid's gradient vanishes
            parameter.data.fill_(30.0 if name.endswith("bias") else -30.0 if name.endswith("log_alpha") else 0.0)
    gateless.save_pretrained(config.out / "start_gateless")
    PixelDecoderTransformer2DModel(**NETWORK | dict(latent_channels=None)).save_pretrained(config.out / "start_prior")

    def run(kind: type, name: str, **kwargs) -> Path:
        folder = config.out / name
        train(kind(output=folder / "run", export=folder / "exported", **common | kwargs))
        return folder / "exported"

    learned = dict(encoder="toy:encode", train="all", steps=config.teacher_steps)
    teacher = run(Teacher, "teacher", model=str(config.out / "start"), **learned)
    gateless = run(Teacher, "gateless", model=str(config.out / "start_gateless"), **learned)
    prior = run(Prior, "prior", model=str(config.out / "start_prior"), steps=config.prior_steps)
    slow = Optimizer(learning_rate=3e-5, weight_decay=0.0, warmup_steps=3, max_grad_norm=1.0)
    fast = Optimizer(learning_rate=2e-4, weight_decay=0.0, warmup_steps=0, max_grad_norm=None)
    student = run(
        Student,
        "student",
        model=str(teacher),
        encoder="toy:encode",
        steps=config.student_steps,
        batch_size=16,
        micro_batch_size=16,
        optimizer=slow,
        fake_score_optimizer=replace(fast, weight_decay=1e-3, max_grad_norm=1.0),
        discriminator_optimizer=fast,
        feature_blocks=(1, 3),
        ema_decay=0.5,
    )

    # What distillation starts from: the teacher's weights under the student's sampler.
    undistilled = config.out / "undistilled"
    weights = PixelDecoderTransformer2DModel.from_pretrained(teacher / "transformer")
    PixelDecoderPipeline(weights, FlowMatchLCMScheduler(shift=1.0)).save_pretrained(undistilled)

    truth = torch.cat([crops(path) for path in sorted(shrunk(config.validation, config.out / "eval").iterdir())])
    rows = {
        "teacher, 25 steps": measure(config, truth, teacher, 25),
        "teacher, 4 steps": measure(config, truth, teacher, 4),
        "teacher, 4 steps of the student's sampler": measure(config, truth, undistilled, 4),
        "student, 4 steps": measure(config, truth, student, 4),
        "teacher, 25 steps, sigma .6": measure(config, truth, teacher, 25, sigma=0.6),
        "no gate, 25 steps": measure(config, truth, gateless, 25),
        "no gate, 25 steps, sigma .6": measure(config, truth, gateless, 25, sigma=0.6),
        "without latents, 25 steps": measure(config, truth, prior, 25, with_latents=False),
    }
    means = {name: tuple(values.mean().item() for values in row) for name, row in rows.items()}
    print(f"\n{'':42} {'PSNR':>7} {'SqueezeNet distance':>20}   ({len(truth)} crops of {SIZE} px)")
    for name, (psnr, distance) in means.items():
        print(f"{name:42} {psnr:7.2f} {distance:20.4f}")
    print("differences, with their standard errors over the photos:")
    for one, other in (
        ("teacher, 25 steps", "no gate, 25 steps"),
        ("teacher, 25 steps, sigma .6", "no gate, 25 steps, sigma .6"),
        ("student, 4 steps", "teacher, 4 steps of the student's sampler"),
    ):
        photos = [(a - b).unflatten(0, (-1, 4)).mean(dim=1) for a, b in zip(rows[one], rows[other], strict=True)]
        psnr, distance = (f"{x.mean():.4f} +- {x.std() / len(x) ** 0.5:.4f}" for x in photos)
        print(f"{one} - {other}: PSNR {psnr}, distance {distance}")
    print(f"{(time.time() - begun) / 60:.1f} minutes, {torch.get_num_threads()} threads, seed {config.seed}")
    (config.out / "table.json").write_text(json.dumps(means, indent=1))

    psnr, distance = 0, 1
    assert means["student, 4 steps"][distance] < means["teacher, 4 steps"][distance], "distillation"
    gated, without = means["teacher, 25 steps, sigma .6"], means["no gate, 25 steps, sigma .6"]
    assert gated[psnr] > without[psnr], "the gate at sigma .6"
    assert means["teacher, 25 steps"][psnr] > gated[psnr], "clean latents"
    assert gated[psnr] > means["without latents, 25 steps"][psnr], "latents"


def crops(path: Path) -> torch.Tensor:
    """Four from each photo, (4, 3, 64, 64)."""
    photo = to_tensor(Image.open(path))
    height, width = (side - SIZE for side in photo.shape[-2:])
    corners = [(y * height // 3, x * width // 3) for y in (1, 2) for x in (1, 2)]
    return torch.cat([photo[..., y : y + SIZE, x : x + SIZE] for y, x in corners])


@torch.no_grad()
def measure(
    config: Config, truth: torch.Tensor, folder: Path, steps: int, sigma: float = 0.0, with_latents: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """PSNR and distance of each crop; the same noise for every decoder."""
    pipeline = PixelDecoderPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(truth), 16):
        batch = truth[start : start + 16]
        numbers = list(range(start, start + len(batch)))
        generator = [torch.Generator().manual_seed(n) for n in numbers]
        kwargs = dict(num_inference_steps=steps, generator=generator, output_type="pt")
        if with_latents:
            latents = encode(shrink(batch, 4))
            noise = SampleRandom(config.seed, numbers, "validation").normal(*latents.shape[1:])
            latents = add_noise(latents, noise, torch.full((len(batch),), sigma))
            kwargs |= dict(latents=latents, sigma=sigma)
        else:
            kwargs |= dict(height=SIZE, width=SIZE)
        images.append(pipeline(**kwargs).images * 2 - 1)
    decoded = torch.cat(images).float()
    psnr = 10 * torch.log10(4 / (decoded - truth).square().mean(dim=(1, 2, 3)))
    return psnr, SqueezeNetDistance(config.squeezenet)(decoded, truth).flatten()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
