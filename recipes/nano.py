"""Photos in, the bundled nano weights out: first the encoder, then the decoder.

    python recipes/nano.py encoder --data TRAIN --minutes 8 --batch-size 8 --muon-learning-rate 0.015
    python recipes/nano.py adapter --data TRAIN --minutes 12 --batch-size 4 --muon-learning-rate 0.03
    python recipes/nano.py decoder --data TRAIN --minutes 10 --muon-learning-rate 0.01 --learning-rate 5e-4
    python recipes/nano.py bundle --data EVAL

each with `--taef1 taef1_encoder.safetensors`. Each writes its part under `--out`. What came of it is measured by

    python recipes/nano.py baseline
    pixeldecoder evaluate EVAL --crop 512 --baselines bicubic vae --vae outputs/nano/taef1
"""

import json
import math
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderTiny, FlowMatchLCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pixeldecoder.files import to_tensor
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import NANO as NANO_FOLDER
from pixeldecoder.pipeline import STUDENT_TIMES, PixelDecoderPipeline


@dataclass(kw_only=True)
class Config:
    """One training run."""

    stage: tyro.conf.Positional[Literal["encoder", "adapter", "decoder", "bundle", "baseline"]]
    data: Path = Path()
    """Folder of photos: to train on, or, to bundle, those of EVAL."""
    taef1: Path
    """TAEF1 encoder (madebyollin/taef1, MIT), .safetensors, its decoder beside it."""
    minutes: float = 60.0
    """Wall time of training, loading excluded."""
    out: Path = Path("outputs/nano")
    seed: int = 0
    batch_size: int = 4
    """Crops to a step of the encoder's training and of the adapter's alone; the whole decoder's are in SIZES."""
    compile: bool = True
    """Compile the decoder's blocks."""
    muon_learning_rate: float = 0.02
    """Of convolutions and of the matrices of attention and MLPs."""
    learning_rate: float = 1e-3
    """Of everything else, by AdamW."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def load_taef1(path: Path) -> AutoencoderTiny:
    """The published files' keys are not diffusers': no `encoder.layers.`, and the decoder has a clamp more."""
    taef1 = AutoencoderTiny(latent_channels=16)
    state = {f"encoder.layers.{key}": tensor for key, tensor in load_file(path).items()}
    for key, tensor in load_file(path.with_name("taef1_decoder.safetensors")).items():
        index, rest = key.split(".", 1)
        state[f"decoder.layers.{int(index) - 1}.{rest}"] = tensor
    taef1.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return taef1.eval().requires_grad_(False)


def baseline(config: Config) -> None:
    """TAEF1 as a diffusers folder, which `pixeldecoder evaluate --vae` takes."""
    load_taef1(config.taef1).save_pretrained(config.out / "taef1")


def load_photos(folder: Path) -> list[torch.Tensor]:
    """Every readable picture of at least 256 px as uint8 (3, H, W)."""

    def load(path: Path) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()

    paths = sorted(p for p in folder.iterdir() if p.suffix in {".webp", ".png", ".jpg", ".jpeg"})
    with ThreadPoolExecutor() as pool:
        photos = [p for p in pool.map(load, paths) if min(p.shape[1:]) >= 256]
    if not photos:
        raise SystemExit(f"no picture of at least 256 px in {folder}")
    return photos


def downscale(image: torch.Tensor, factor: int) -> torch.Tensor:
    """Bicubic, antialiased, clamped (method: LQ image)."""
    return F.interpolate(image, scale_factor=1 / factor, mode="bicubic", antialias=True).clamp(-1, 1)


@dataclass
class Pair:
    """One photo, or its mirror image, with the latents of its 4x smaller self."""

    photo: torch.Tensor
    """(3, H, W) uint8, H and W multiples of 32."""
    small: torch.Tensor
    """(3, H/4, W/4) float16 in [-1, 1]."""
    latents: torch.Tensor
    """(16, H/32, W/32) float16, TAEF1's, of the whole picture: a crop of them has seen what lies around it."""
    own: torch.Tensor
    """The bundled encoder's, likewise: what `upscale` decodes."""


@torch.no_grad()
def load_pairs(config: Config) -> list[Pair]:
    """Every photo twice, plain and mirrored; the latents are computed once and kept in `out`."""
    photos, pairs = load_photos(config.data), []
    cache = config.out / f"latents_{len(photos)}.pt"
    known = torch.load(cache, weights_only=True) if cache.exists() else None
    taef1 = load_taef1(config.taef1).to(config.device).to(memory_format=torch.channels_last)
    encoder = None
    if config.stage != "encoder":
        encoder = TinyLatentEncoder.from_pretrained(config.out / "encoder").to(config.device).float().eval()
    for index, photo in enumerate(photos):
        height, width = (side // 32 * 32 for side in photo.shape[1:])
        for mirror in (False, True):
            crop = photo[:, :height, :width].flip(-1) if mirror else photo[:, :height, :width]
            small = downscale(crop[None].to(config.device).float() / 127.5 - 1, 4)
            latents = known[2 * index + mirror] if known else taef1.encoder(small)[0].half().cpu()
            own = encoder(small)[0].half().cpu() if encoder else latents
            pairs.append(Pair(crop.contiguous(), small[0].half().cpu(), latents, own))
        if index % 100 == 0:
            print(f"latents of photo {index} of {len(photos)}", flush=True)
    if not known:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save([pair.latents for pair in pairs], cache)
    return pairs


def draw(pairs: list[Pair], cells: int, batch: int, rng: random.Random) -> list[tuple[Pair, int, int]]:
    """Pairs with the top and left latent cell of a crop, by area; edges of a photo are met as often as its inside."""

    def place(length: int) -> int:
        return min(max(rng.randint(-1, length - cells + 1), 0), length - cells)

    chosen = rng.choices(pairs, weights=[pair.latents[0].numel() for pair in pairs], k=batch)
    return [(pair, place(pair.latents.shape[1]), place(pair.latents.shape[2])) for pair in chosen]


def train_encoder(config: Config) -> None:
    """Mean squared distance to TAEF1's latents, on photos shrunk 4x."""
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    pairs = load_pairs(config)
    known = (config.out / "encoder").exists()
    model = TinyLatentEncoder.from_pretrained(config.out / "encoder") if known else TinyLatentEncoder()
    model.to(config.device, memory_format=torch.channels_last).train()
    optimizer = Optimizer(model, config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(pairs)} pictures", flush=True)
    start, step, log = time.time(), 0, []
    while (progress := (time.time() - start) / (60 * config.minutes)) < 1:
        image, target, mask = [], [], torch.ones(config.batch_size, 1, 8, 8)
        for index, (pair, top, left) in enumerate(draw(pairs, 8, config.batch_size, rng)):
            image.append(pair.small[:, 8 * top : 8 * top + 64, 8 * left : 8 * left + 64])
            target.append(pair.latents[:, top : top + 8, left : left + 8])
            # The outermost cells of a crop depend on what was cut away, unless the photo itself ends there.
            mask[index, :, 0] *= top == 0
            mask[index, :, -1] *= top + 8 == pair.latents.shape[1]
            mask[index, :, :, 0] *= left == 0
            mask[index, :, :, -1] *= left + 8 == pair.latents.shape[2]
        image, target = (torch.stack(x).to(config.device).float() for x in (image, target))
        mask = mask.to(config.device)
        difference = model(image.contiguous(memory_format=torch.channels_last)) - target
        error = (mask * difference.square()).sum() / (mask.sum() * target.shape[1])
        optimizer.step(error, progress)
        log.append((error.item() / target.square().mean().item()) ** 0.5)
        step += 1
        if step % 100 == 0:
            minutes = (time.time() - start) / 60
            print(f"{minutes:6.1f} min  step {step}  RMS difference / RMS {np.mean(log[-100:]):.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(config.out / "encoder")
    (config.out / "encoder" / "training.json").write_text(
        json.dumps({"steps": step, "final": float(np.mean(log[-100:])), "config": vars(config)}, default=str, indent=1)
    )


NANO = dict(
    patch_size=8,
    num_layers=2,
    num_attention_heads=3,
    attention_head_dim=64,
    num_pixel_layers=1,
    pixel_dim=16,
    num_pixel_attention_heads=2,
    pixel_attention_head_dim=32,
    text_embed_dim=None,
    latent_channels=16,
    latent_downscale_factor=8,
    scale=4,
    adapter_dim=96,
    num_adapter_layers=6,
    adapter_padding_mode="replicate",
    injection_interval=1,
    per_channel_gate=False,
    inject_pixels=True,
    aux_rgb=True,
    aux_rgb_base=True,
    prediction_type="sample",
    rope_reference_size=512,
)
SIZES = {192: (0.4, 4), 256: (0.4, 2), 384: (0.15, 1), 512: (0.05, 1)}
"""Crop side in pixels: its share of the steps, and crops to a batch. Rotary angles change with the size, so that it
must be varied."""
TIME_SHIFT = 6 * (1024 / 2048) ** 0.5


def latent_batch(
    pairs: list[Pair], size: int, batch: int, rng: random.Random, device: str
) -> tuple[list[tuple[Pair, int, int]], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the crops are, their small images, their latents noised to sigma, and sigma."""
    crops = draw(pairs, size // 32, batch, rng)
    small = torch.stack([p.small[:, 8 * y : 8 * y + size // 4, 8 * x : 8 * x + size // 4] for p, y, x in crops])
    latents = torch.stack(
        [rng.choice((p.latents, p.own))[:, y : y + size // 32, x : x + size // 32] for p, y, x in crops]
    )
    small, latents = small.to(device).float(), latents.to(device).float()
    # Noising (method: Training): with probability .75 sigma ~ U(0, .8), else clean.
    sigma = torch.rand(batch, device=device) * 0.8 * (torch.rand(batch, device=device) < 0.75)
    return crops, small, torch.lerp(latents, torch.randn_like(latents), sigma[:, None, None, None]), sigma


def rgb_loss(prediction: torch.Tensor, small: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Squared error of pixels and of neighbours' differences, samples by (1 - sigma).

    As the base of the output the prediction must be a mean image; the differences are there for edges and seams.
    """
    error = prediction - small
    return ((1 - sigma) * (squared(error) + squared(error.diff(dim=-1)) + squared(error.diff(dim=-2)))).mean()


def squared(error: torch.Tensor) -> torch.Tensor:
    """Mean square of each image, (B,)."""
    return error.square().mean(dim=(1, 2, 3))


def train_adapter(config: Config) -> None:
    """The adapter learns to predict the small image, the base of what the decoder puts out."""
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    pairs = load_pairs(config)
    model = PixelDecoderTransformer2DModel(**NANO).to(config.device, memory_format=torch.channels_last)
    optimizer = Optimizer(model.adapter, config)
    begun, step, log = time.time(), 0, []
    while (progress := (time.time() - begun) / (60 * config.minutes)) < 1:
        _, small, latents, sigma = latent_batch(pairs, 256, config.batch_size, rng, config.device)
        loss = rgb_loss(model.encode_latents(latents, 256, 256).aux_rgb, small, sigma)
        optimizer.step(loss, progress)
        step += 1
        log.append(loss.item())
        if step % 100 == 0:
            print(f"{(time.time() - begun) / 60:6.1f} min  step {step}  rgb {np.mean(log[-100:]):.5f}", flush=True)
    state = {name: value.contiguous() for name, value in model.adapter.state_dict().items()}
    save_file(state, config.out / "adapter.safetensors")


def train_decoder(config: Config) -> None:
    """On top of the adapter the rest learns by flow matching; exported: the average."""
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    pairs = load_pairs(config)
    model = PixelDecoderTransformer2DModel(**NANO).to(config.device, memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(pairs)} pictures", flush=True)
    model.adapter.load_state_dict(load_file(config.out / "adapter.safetensors"))

    # What makes the base stays as it is: the rest learns what is missing in it.
    for module in (model.adapter.convs, model.adapter.aux_rgb_head):
        module.requires_grad_(False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = Optimizer(model, config)
    if config.compile:
        model.compile_repeated_blocks(dynamic=False)
    begun, step, errors = time.time(), 0, {t: [] for t in STUDENT_TIMES[:-1]}
    while (progress := (time.time() - begun) / (60 * config.minutes)) < 1:
        size = rng.choices(list(SIZES), weights=[share for share, _ in SIZES.values()])[0]
        crops, _, latents, sigma = latent_batch(pairs, size, SIZES[size][1], rng, config.device)
        image = torch.stack([p.photo[:, 32 * y : 32 * y + size, 32 * x : 32 * x + size] for p, y, x in crops])
        image = image.to(config.device).float() / 127.5 - 1
        # Half the times logit-normal, shifted as for the 1024 px pictures that crops stand for; half the sampler's.
        t = torch.randn(len(image), device=config.device).sigmoid()
        t = TIME_SHIFT * t / (1 + (TIME_SHIFT - 1) * t)
        steps = torch.tensor(rng.choices(STUDENT_TIMES[:-1], k=len(image)), device=config.device)
        is_step = torch.rand(len(image), device=config.device) < 0.5
        t = torch.where(is_step, steps, t)
        features = model.encode_latents(latents, size, size)
        base = F.interpolate(features.aux_rgb, scale_factor=4, mode="bicubic")
        # While sampling in few steps the network sees its own soft pictures noised, not real ones: half of either.
        clean = torch.where(torch.rand(len(image), 1, 1, 1, device=config.device) < 0.5, base, image)
        noisy = torch.lerp(clean, torch.randn_like(image), t[:, None, None, None])
        velocity = model(noisy, 1000 * t, latent_features=features, sigma=sigma).sample
        # Flow matching in x0: that of the velocity, weighted by t^2, lest the few small times rule.
        error = noisy - t[:, None, None, None] * velocity - image
        per_image = squared(error)
        optimizer.step((per_image + squared(error.diff(dim=-1)) + squared(error.diff(dim=-2))).mean(), progress)
        average.update_parameters(model)
        step += 1
        gains = squared(base - image) / per_image.detach()
        for time_step, gain in zip(t[is_step].tolist(), gains[is_step].tolist(), strict=True):
            errors[min(errors, key=lambda known: abs(known - time_step))].append(10 * math.log10(gain))
        if step % 100 == 0:
            gain = "  ".join(f"{np.mean(e[-100:]):+.2f}" for e in errors.values() if e)
            minutes = (time.time() - begun) / 60
            print(f"{minutes:6.1f} min  step {step}  dB over the base at the sampler's times {gain}", flush=True)
    shutil.rmtree(config.out / "transformer", ignore_errors=True)
    average.module.to(torch.bfloat16).save_pretrained(config.out / "transformer", max_shard_size="14MB")
    record = {"steps": step, "config": vars(config)}
    (config.out / "transformer" / "training.json").write_text(json.dumps(record, default=str, indent=1))


class Optimizer:
    """Muon for the convolutions and the matrices of attention and MLPs, AdamW for the rest.

    The learning rates warm up, then fall in a line. In the minutes that a CPU has, Muon makes the difference: after
    three of them on one core the encoder and the adapter are where AdamW alone takes them in forty.
    """

    def __init__(self, model: torch.nn.Module, config: Config):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for name, p in named if p.ndim == 4 or (p.ndim == 2 and re.search(r"\.(attn|mlp)\.", name))]
        others = [p for _, p in named if not any(p is weight for weight in self.weights)]
        # Muon takes matrices only: views on the memory of the weights, which lie channels last.
        self.matrices = [torch.nn.Parameter(as_matrix(weight.data)) for weight in self.weights]
        assert all(m.data_ptr() == w.data_ptr() for m, w in zip(self.matrices, self.weights, strict=True))
        self.muon = torch.optim.Muon(self.matrices, config.muon_learning_rate, weight_decay=0.01, momentum=0.9)
        self.adamw = torch.optim.AdamW(others, config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.steps = 0

    def step(self, loss: torch.Tensor, progress: float) -> None:
        """Progress of the run is in [0, 1)."""
        self.steps += 1
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group.setdefault("full_lr", group["lr"])
                group["lr"] = group["full_lr"] * min(1, self.steps / 50) * (1 - 0.95 * progress)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.weights, *self.adamw.param_groups[0]["params"]], 1.0)
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad, weight.grad = as_matrix(weight.grad), None
        for optimizer in (self.muon, self.adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.ndim == 2 else weight.movedim(1, -1).flatten(1)


SAMPLES = {"budgie": "13_budgie-branch.jpg", "face": "kodim15.png", "sign": "10_kait-herzog-8242.jpg"}
CROPS = {"budgie": (352, 32), "face": (168, 0), "sign": (60, 120)}
"""Left and top of the 512 px crop of each bundled sample."""


def bundle(config: Config) -> None:
    """The pipeline's folder as it ships, with a few photos that may be passed on and their latents for the demo."""
    encoder = TinyLatentEncoder.from_pretrained(config.out / "encoder", torch_dtype=torch.bfloat16).eval()
    transformer = PixelDecoderTransformer2DModel.from_pretrained(config.out / "transformer", torch_dtype=torch.bfloat16)
    pipeline = PixelDecoderPipeline(
        transformer, FlowMatchLCMScheduler(shift=1.0), encoder=encoder, latent_space="flux", trained_size=max(SIZES)
    )
    pipeline.save_pretrained(NANO_FOLDER, max_shard_size="14MB")
    pipeline = PixelDecoderPipeline.from_pretrained("nano")
    folder = NANO_FOLDER / "samples"
    folder.mkdir(exist_ok=True)
    for name, file in SAMPLES.items():
        left, top = CROPS[name]
        photo = Image.open(config.data / file).convert("RGB").crop((left, top, left + 512, top + 512))
        photo.save(folder / f"{name}.webp", quality=95)
        latents = pipeline.encode_image(downscale(to_tensor(Image.open(folder / f"{name}.webp")), 4))
        save_file({"latents": latents.contiguous()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    stages = {
        "encoder": train_encoder,
        "adapter": train_adapter,
        "decoder": train_decoder,
        "bundle": bundle,
        "baseline": baseline,
    }
    stages[config.stage](config)
