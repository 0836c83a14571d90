"""Photos in, the bundled nano weights out, one command for each stage:

    python recipes/nano.py encoder --data TRAIN --minutes 8
    python recipes/nano.py base --data TRAIN --minutes 90
    python recipes/nano.py adapter --data TRAIN --minutes 44
    python recipes/nano.py teacher --data TRAIN --minutes 12
    python recipes/nano.py student --data TRAIN --minutes 34 --squeezenet squeezenet1_0.safetensors
    python recipes/nano.py polish --data TRAIN --minutes 84 --squeezenet squeezenet1_0.safetensors
    python recipes/nano.py bundle --data EVAL

each with `--taef1 taef1_encoder.safetensors` (`base` makes a decoder that `bundle` does not use yet). Each writes its
part under `--out`, and goes on from its own checkpoint when it is called again, so that `--piece 9` cuts a stage into
calls of nine minutes. `baseline` writes TAEF1 as a folder to evaluate against. What came of it, what was tried, and
the minutes meant for a GPU are told in docs/nano.md.
"""

import copy
import itertools
import math
import random
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderTiny, FlowMatchLCMScheduler
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pixeldecoder.evaluation.perceptual import SqueezeNetDistance
from pixeldecoder.files import to_tensor
from pixeldecoder.flow import STUDENT_TIMES, noised
from pixeldecoder.models.adapter import LatentFeatures
from pixeldecoder.models.discriminator import PixelDecoderDiscriminator
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import shrink
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.presets import NANO as NANO_FOLDER
from pixeldecoder.training import losses
from pixeldecoder.training.parts import autocast


@dataclass(kw_only=True)
class Config:
    """One training run."""

    stage: tyro.conf.Positional[
        Literal["encoder", "base", "adapter", "teacher", "student", "polish", "bundle", "baseline"]
    ]
    data: Path = Path()
    """Folder of photos: to train on, or, to bundle, those of EVAL."""
    taef1: Path
    """TAEF1 encoder (madebyollin/taef1, MIT), .safetensors, its decoder beside it."""
    minutes: float = 60.0
    """Of training, over all calls, loading excluded; the learning rates fall to nothing over them. On a CPU those that
    this process computes: other work on the machine costs the training nothing but patience."""
    piece: float = math.inf
    """Minutes until this call ends, its checkpoint written."""
    squeezenet: Path | None = None
    """ImageNet SqueezeNet 1.0, .safetensors, which the student's perceptual and adversarial terms look through."""
    out: Path = Path("outputs/nano")
    seed: int = 0
    batch_size: int | None = None
    """Crops of 256 px to a step; by default 8, on a GPU 32. Larger crops are fewer."""
    pixel_weight: float = 4.0
    perceptual_weight: float = 1.0
    gan_weight: float = 0.03
    vsd_weight: float = 0.1
    """Of the terms of the student's loss; 0: neither computed nor trained for."""
    compile: bool = torch.cuda.is_available()
    """Compile the decoder's blocks."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def crops(self) -> int:
        return self.batch_size or (8 if self.device == "cpu" else 32)

    def autocast(self) -> torch.autocast:
        """bfloat16, but on CPUs that have no instructions for it, which are slower in it."""
        return autocast(torch.device(self.device), self.device != "cpu" or torch.cpu._is_avx512_bf16_supported())

    def seconds(self) -> float:
        return time.process_time() / torch.get_num_threads() if self.device == "cpu" else time.time()


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
    """The encoder's, likewise, that this recipe trains first: what `upscale` decodes."""


TAEF1_ALONE = ("encoder", "base")
"""Stages that know no encoder but TAEF1's."""


@torch.no_grad()
def load_pairs(config: Config) -> list[Pair]:
    """Every photo twice, plain and mirrored, on the device; what is computed once is kept in `out`."""
    photos = []
    for photo in load_photos(config.data):
        height, width = (side // 32 * 32 for side in photo.shape[1:])
        crop = photo[:, :height, :width].to(config.device)
        photos += [crop.contiguous(), crop.flip(-1)]
    cache = config.out / ("encoder_pairs.pt" if config.stage in TAEF1_ALONE else "pairs.pt")
    known = torch.load(cache, weights_only=True) if cache.exists() else []
    if [small.shape for small, *_ in known] != [(3, p.shape[1] // 4, p.shape[2] // 4) for p in photos]:
        taef1 = load_taef1(config.taef1).to(config.device).to(memory_format=torch.channels_last)
        encoder = taef1.encoder
        if config.stage not in TAEF1_ALONE:
            encoder = TinyLatentEncoder.from_pretrained(config.out / "encoder").to(config.device).float().eval()
        known = []
        for index, photo in enumerate(photos):
            small = shrink(photo[None].float() / 127.5 - 1, 4)
            known.append(tuple(x[0].half().cpu() for x in (small, taef1.encoder(small), encoder(small))))
            if index % 200 == 0:
                print(f"latents of picture {index} of {len(photos)}", flush=True)
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(known, cache)
    return [Pair(photo, *(x.to(config.device) for x in rest)) for photo, rest in zip(photos, known, strict=True)]


def draw(pairs: list[Pair], cells: int, batch: int, rng: random.Random) -> list[tuple[Pair, int, int]]:
    """Pairs with the top and left latent cell of a crop, by area; edges of a photo are met as often as its inside."""
    pairs = [pair for pair in pairs if min(pair.latents.shape[1:]) >= cells]

    def place(length: int) -> int:
        return min(max(rng.randint(-1, length - cells + 1), 0), length - cells)

    chosen = rng.choices(pairs, weights=[pair.latents[0].numel() for pair in pairs], k=batch)
    return [(pair, place(pair.latents.shape[1]), place(pair.latents.shape[2])) for pair in chosen]


def run(config: Config, parts: dict[str, "torch.nn.Module | Optimizer"], step: Callable[..., dict[str, float]]) -> bool:
    """Call `step(progress, random)` until the stage's minutes are over, or this call's.

    Returns:
        Whether the stage is at its end. If not, its state is in its checkpoint.
    """
    path, done, spent = config.out / f"{config.stage}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=config.device, weights_only=True)
        done, spent = state["step"], state["minutes"]
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        print(f"from step {done}, {spent:.1f} min", flush=True)
    before, begun, log = spent, config.seconds(), defaultdict(list)
    while spent < config.minutes and spent - before < config.piece:
        torch.manual_seed(config.seed * 10**7 + done)
        for name, value in step(spent / config.minutes, random.Random(f"{config.seed}/{done}")).items():
            log[name].append(value)
        done, spent = done + 1, before + (config.seconds() - begun) / 60
        if done % 50 == 0:
            means = "  ".join(f"{name} {np.mean(values[-50:]):.4f}" for name, values in log.items())
            print(f"{spent:6.1f} min  step {done}  {means}", flush=True)
    state = {"step": done, "minutes": spent, "parts": {name: part.state_dict() for name, part in parts.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return spent >= config.minutes


def train_encoder(config: Config) -> None:
    """Mean squared distance to TAEF1's latents, on photos shrunk 4x."""
    torch.manual_seed(config.seed)
    pairs = load_pairs(config)
    model = TinyLatentEncoder().to(config.device, memory_format=torch.channels_last).train()
    optimizer = Optimizer(model, 0.015)

    def step(progress: float, rng: random.Random) -> dict[str, float]:
        image, target, mask = [], [], torch.ones(config.crops, 1, 8, 8)
        for index, (pair, top, left) in enumerate(draw(pairs, 8, config.crops, rng)):
            image.append(pair.small[:, 8 * top : 8 * top + 64, 8 * left : 8 * left + 64])
            target.append(pair.latents[:, top : top + 8, left : left + 8])
            # The outermost cells of a crop depend on what was cut away, unless the photo itself ends there.
            mask[index, :, 0] *= top == 0
            mask[index, :, -1] *= top + 8 == pair.latents.shape[1]
            mask[index, :, :, 0] *= left == 0
            mask[index, :, :, -1] *= left + 8 == pair.latents.shape[2]
        image, target = torch.stack(image).float(), torch.stack(target).float()
        mask = mask.to(config.device)
        difference = model(image.contiguous(memory_format=torch.channels_last)) - target
        error = (mask * difference.square()).sum() / (mask.sum() * target.shape[1])
        optimizer.step(error, progress)
        return {"RMS difference / RMS": (error.item() / target.square().mean().item()) ** 0.5}

    if run(config, {"model": model, "optimizer": optimizer}, step):
        model.to(torch.bfloat16).save_pretrained(config.out / "encoder")
        (config.out / "pairs.pt").unlink(missing_ok=True)  # of an earlier encoder


class BaseDecoder(torch.nn.Module):
    """Latents and their sigma to the small image: TAESD's shape (MIT), with a bias for sigma at every size.

    Args:
        latent_channels: C of the latents.
        dim: width of every convolution.
        num_blocks: residual blocks at 1/8, 1/4, 1/2 and 1/1 of the small image's size.
    """

    def __init__(self, latent_channels: int = 16, dim: int = 64, num_blocks: tuple[int, ...] = (3, 3, 3, 1)):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(latent_channels, dim, 3, padding=1)
        self.sigma_embed = torch.nn.Sequential(
            torch.nn.Linear(1, dim), torch.nn.SiLU(), torch.nn.Linear(dim, dim * len(num_blocks))
        )
        torch.nn.init.zeros_(self.sigma_embed[2].weight)
        torch.nn.init.zeros_(self.sigma_embed[2].bias)
        self.stages = torch.nn.ModuleList(
            torch.nn.Sequential(*(AutoencoderTinyBlock(dim, dim, "relu") for _ in range(count))) for count in num_blocks
        )
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in num_blocks[1:])
        self.to_small = torch.nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, C, h, w) and (B,) -> the small image (B, 3, 8h, 8w) in [-1, 1], and what each stage made on the way."""
        x = F.relu(self.conv_in(torch.tanh(latents / 3) * 3))
        biases = self.sigma_embed(sigma[:, None])[..., None, None].chunk(len(self.stages), dim=1)
        features = []
        for index, (stage, bias) in enumerate(zip(self.stages, biases, strict=True)):
            x = stage(x + bias)
            features.append(x)
            if index < len(self.convs):
                x = self.convs[index](F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.to_small(x).mul(2).sub(1), features


def taef1_features(decoder: torch.nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """TAEF1's picture in [-1, 1] and its features before each upsampling and at the end."""
    x, features, last = torch.tanh(latents / 3) * 3, [], None
    for layer in decoder.layers:
        if isinstance(layer, torch.nn.Upsample):
            features.append(x)
        last, x = x, layer(x)
    return x.mul(2).sub(1), [*features, last]


BASE_CELLS = {8: (0.5, 2), 12: (0.3, 1), 16: (0.15, 1 / 2), 32: (0.05, 1 / 8)}
"""Side of a crop in latent cells: its share of the steps, and crops to a batch, of `crops`. In small ones every pixel
knows the border; what is far from it must be met as well."""


def train_base(config: Config) -> None:
    """The small image, from what TAEF1's decoder makes after each of its stages: dense targets, learnt fast. Noisy
    latents come in as the stage goes on; they are to give what the clean ones do."""
    pairs = load_pairs(config)
    taef1 = load_taef1(config.taef1).decoder.to(config.device, memory_format=torch.channels_last)
    torch.manual_seed(config.seed)
    model = BaseDecoder().to(config.device, memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    largest = max(min(pair.latents.shape[1:]) for pair in pairs)
    sizes = {cells: share for cells, share in BASE_CELLS.items() if cells <= largest}
    optimizer = Optimizer(model, 0.015)

    def step(progress: float, rng: random.Random) -> dict[str, float]:
        cells = rng.choices(list(sizes), weights=[share for share, _ in sizes.values()])[0]
        drawn = draw(pairs, cells, max(1, round(config.crops * BASE_CELLS[cells][1])), rng)
        latents = torch.stack([pair.latents[:, y : y + cells, x : x + cells] for pair, y, x in drawn]).float()
        sigma = torch.rand(len(latents), device=latents.device) * 0.8
        sigma = sigma * (torch.rand_like(sigma) < 0.4 * progress)
        noisy = noised(latents, torch.randn_like(latents), sigma)
        with config.autocast():
            with torch.no_grad():
                target, wanted = taef1_features(taef1, latents.contiguous(memory_format=torch.channels_last))
            image, features = model(noisy.contiguous(memory_format=torch.channels_last), sigma)
        weight = (1 - sigma)[:, None, None, None]
        relative = [
            (weight * (x.float() - y.float()).square()).mean() / y.float().square().mean()
            for x, y in zip(features, wanted, strict=True)
        ]
        picture = (weight * (image.float() - target.float()).square()).mean()
        optimizer.step(sum(relative) + 20 * picture, progress)
        average.update_parameters(model)
        terms = {f"stage {index}": x.item() for index, x in enumerate(relative)}
        if not sigma.any():  # of [-1, 1]; the distance to TAEF1's picture, not to the photo
            terms["dB to TAEF1"] = 10 * math.log10(4 / picture.item())
        return terms

    if run(config, {"model": model, "average": average, "optimizer": optimizer}, step):
        state = {name: value.contiguous() for name, value in average.module.state_dict().items()}
        save_file(state, config.out / "decoder.safetensors")


NANO = dict(
    patch_size=16,
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=64,
    num_pixel_layers=1,
    pixel_dim=8,
    num_pixel_attention_heads=2,
    pixel_attention_head_dim=32,
    text_embed_dim=None,
    latent_channels=16,
    latent_downscale_factor=8,
    scale=4,
    adapter_dim=160,
    num_adapter_layers=4,
    adapter_padding_mode="replicate",
    injection_interval=1,
    per_channel_gate=False,
    inject_pixels=True,
    aux_rgb=True,
    aux_rgb_base=True,
    prediction_type="sample",
    rope_reference_size=512,
)
SIZES = {192: (0.35, 16 / 9), 256: (0.4, 1), 384: (0.2, 4 / 9), 512: (0.05, 1 / 4)}
"""Crop side in pixels: its share of the steps, and crops to a batch, of those of 256 px. Rotary angles change with the
size, so that it must be varied."""
TIME_SHIFT = 6 * (1024 / 2048) ** 0.5


def build(config: Config) -> PixelDecoderTransformer2DModel:
    torch.manual_seed(config.seed)
    return PixelDecoderTransformer2DModel(**NANO).to(config.device, memory_format=torch.channels_last)


@dataclass
class Crops:
    """What a step learns from, B pictures."""

    image: torch.Tensor
    """(B, 3, H, W) in [-1, 1]."""
    small: torch.Tensor
    latents: torch.Tensor
    """Noised to sigma, half of them TAEF1's, half the own encoder's."""
    sigma: torch.Tensor


def crops(pairs: list[Pair], size: int, batch: int, rng: random.Random) -> Crops:
    cells, drawn = size // 32, draw(pairs, size // 32, batch, rng)
    image = torch.stack([p.photo[:, 32 * y : 32 * y + size, 32 * x : 32 * x + size] for p, y, x in drawn])
    small = torch.stack([p.small[:, 8 * y : 8 * y + size // 4, 8 * x : 8 * x + size // 4] for p, y, x in drawn])
    latents = torch.stack([rng.choice((p.latents, p.own))[:, y : y + cells, x : x + cells] for p, y, x in drawn])
    latents = latents.float()
    # As eq. 6, but half of the latents are clean: the base, which nobody tells sigma, pays for noise.
    sigma = torch.rand(batch, device=latents.device) * 0.8 * (torch.rand(batch, device=latents.device) < 0.5)
    return Crops(image.float() / 127.5 - 1, small.float(), noised(latents, torch.randn_like(latents), sigma), sigma)


def any_size(pairs: list[Pair], config: Config, rng: random.Random) -> Crops:
    size = rng.choices(list(SIZES), weights=[share for share, _ in SIZES.values()])[0]
    return crops(pairs, size, max(1, round(config.crops * SIZES[size][1])), rng)


def squared(error: torch.Tensor, patch: int = 16) -> torch.Tensor:
    """Mean square of each image, (B,), of its neighbours' differences, for edges, of those across patch borders, for
    seams, and of the means of patches, for colour."""
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    seams = across[..., patch - 1 :: patch], down[..., patch - 1 :: patch, :]
    terms = (error, across, down, *seams, 2 * F.avg_pool2d(error, patch))
    return sum(x.square().mean(dim=(1, 2, 3)) for x in terms)


def train_adapter(config: Config) -> None:
    """The adapter learns to predict the small image, the base of what the decoder puts out: a mean image."""
    pairs, model = load_pairs(config), build(config)
    optimizer = Optimizer(model.adapter, 0.03)

    def step(progress: float, rng: random.Random) -> dict[str, float]:
        batch = crops(pairs, 256, config.crops, rng)
        with config.autocast():
            prediction = model.encode_latents(batch.latents, 256, 256).aux_rgb
        loss = ((1 - batch.sigma) * squared(prediction.float() - batch.small, 4)).mean()
        optimizer.step(loss, progress)
        return {"rgb": loss.item()}

    if run(config, {"model": model, "optimizer": optimizer}, step):
        state = {
            name: value.contiguous() for name, value in model.adapter.state_dict().items() if name.startswith(BASE)
        }
        save_file(state, config.out / "base.safetensors")


BASE = ("convs.", "aux_rgb_head.")
"""The adapter's parts that make the base. It stays as it is until it is polished: the rest learns what is missing."""


def freeze_base(model: PixelDecoderTransformer2DModel) -> None:
    for name, parameter in model.adapter.named_parameters():
        parameter.requires_grad_(not name.startswith(BASE))


def clean(
    model: PixelDecoderTransformer2DModel, noisy: torch.Tensor, t: torch.Tensor, batch: Crops, features: LatentFeatures
) -> torch.Tensor:
    """The image that the model sees at time t, (B,)."""
    velocity = model(noisy, 1000 * t, latent_features=features, sigma=batch.sigma).sample
    return noisy - t[:, None, None, None] * velocity.float()


def save(model: PixelDecoderTransformer2DModel, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size="14MB")


def train_teacher(config: Config) -> None:
    """On top of the adapter the rest learns by flow matching in x0; exported: the average."""
    pairs, model = load_pairs(config), build(config)
    model.adapter.load_state_dict(load_file(config.out / "base.safetensors"), strict=False)
    freeze_base(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = Optimizer(model, 0.02)
    if config.compile:
        model.compile_repeated_blocks(dynamic=False)

    def step(progress: float, rng: random.Random) -> dict[str, float]:
        batch = any_size(pairs, config, rng)
        # Half the times logit-normal, shifted as for the 1024 px pictures that crops stand for; half the sampler's.
        t = torch.randn(len(batch.image), device=config.device).sigmoid()
        t = TIME_SHIFT * t / (1 + (TIME_SHIFT - 1) * t)
        steps = t.new_tensor(rng.choices(STUDENT_TIMES[:-1], k=len(t)))
        t = torch.where(torch.rand_like(t) < 0.5, steps, t).clamp_min(0.02)
        with config.autocast():
            features = model.encode_latents(batch.latents, *batch.image.shape[2:], return_aux_rgb=True)
            base = F.interpolate(features.aux_rgb, scale_factor=4, mode="bicubic")
            image = clean(model, noised(batch.image, torch.randn_like(batch.image), t), t, batch, features)
        # Flow matching in x0: that of the velocity, weighted by t^2, lest the few small times rule.
        loss = squared(image - batch.image)
        optimizer.step(loss.mean(), progress)
        average.update_parameters(model)
        gain = 10 * torch.log10(F.mse_loss(base.float(), batch.image) / F.mse_loss(image.detach(), batch.image))
        return {"loss": loss.mean().item(), "dB over the base": gain.item()}

    if run(config, {"model": model, "average": average, "optimizer": optimizer}, step):
        save(average.module, config.out / "teacher")


def train_student(config: Config) -> None:
    """After DMD2 (eq. 29 to 31), for a small teacher and a short time. What differs from it:

    - the discriminator reads SqueezeNet's features of the clean image, not the teacher's of the noised one, with a head
      for each of four layers, and its R1 has a weight of 5, not 200;
    - the image's squared error (weight 4) and the distance of SqueezeNet's features (1) are losses, too; the
      adversarial term counts .03, not .05, and warms up over a tenth of the stage; the variational one .1, not 1, and
      there is no text to guide by;
    - every update is the student's, the discriminator's and the fake score's in turn, not one of six the student's;
    - the student's image comes from its own samples, from noise alone twice as often as from each later step;
    - the fake score learns by the squared error of the image (`squared`), at the student's own time and noise, not by
      flow matching;
    - Muon and AdamW, with warm-up and decay, move student and fake score, gradients cut to 1; Adam (.5, .99) at 2e-4
      the discriminator; the adapter's base is frozen.

    `student` starts from the teacher and leaves the base as it is; `polish` goes on from there and trains that, too."""
    if config.squeezenet is None:
        raise SystemExit(f"{config.stage}: expected --squeezenet squeezenet1_0.safetensors")
    pairs = load_pairs(config)
    teacher, student = (
        PixelDecoderTransformer2DModel.from_pretrained(config.out / "teacher", torch_dtype=torch.float32)
        .to(config.device, memory_format=torch.channels_last)
        .train()
        for _ in range(2)
    )
    fake = copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    freeze_base(fake)
    if config.stage == "student":
        freeze_base(student)
    else:
        if not (config.out / "student.pt").exists():
            raise SystemExit(f"polish: no student.pt in {config.out}; run the student's stage first")
        trained = torch.load(config.out / "student.pt", map_location=config.device, weights_only=True)
        student.load_state_dict(trained["parts"]["student"])
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    squeezenet = SqueezeNetDistance(config.squeezenet, config.device)
    discriminator = torch.nn.ModuleList(PixelDecoderDiscriminator(d, patch_logits=True) for d in (96, 256, 512, 512))
    discriminator.to(config.device)
    optimizer, fake_optimizer = Optimizer(student, 0.02), Optimizer(fake, 0.02)
    judge = torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.5, 0.99))
    if config.compile:
        for model in (student, fake, teacher):
            model.compile_repeated_blocks(dynamic=False)

    def logits(features: list[torch.Tensor]) -> torch.Tensor:
        # Unit vectors in, about unit values out; a mean for each layer.
        each = [head((x * x.shape[1] ** 0.5,)) for head, x in zip(discriminator, features, strict=True)]
        return torch.cat([x.mean(dim=1, keepdim=True) for x in each], dim=1)

    def step(progress: float, rng: random.Random) -> dict[str, float]:
        batch = any_size(pairs, config, rng)
        size, count = batch.image.shape[2:], len(batch.image)
        with config.autocast():
            features = student.encode_latents(batch.latents, *size)
            # From its own samples up to a random step.
            last, noisy = rng.choices(range(4), (4, 2, 2, 2))[0], torch.randn_like(batch.image)
            times = [t * torch.ones(count, device=config.device) for t in STUDENT_TIMES]
            with torch.no_grad():
                for now, following in itertools.pairwise(times[: last + 1]):
                    made = clean(student, noisy, now, batch, features)
                    noisy = noised(made, torch.randn_like(made), following)
            image = clean(student, noisy, times[last], batch, features)
        # Patches and SqueezeNet's strides of 16 px would always meet in the same way, which it can be fooled by.
        top, left = rng.randrange(16), rng.randrange(16)
        with torch.no_grad():
            real = squeezenet.features(batch.image[..., top:, left:])
        made = squeezenet.features(image[..., top:, left:])
        terms = {"pixel": config.pixel_weight * squared(image - batch.image).mean()}
        terms["perceptual"] = config.perceptual_weight * squeezenet.between(made, real).mean()
        if config.gan_weight:
            terms["gan"] = min(1, 10 * progress) * config.gan_weight * losses.gan_student(logits(made))
        if config.vsd_weight:
            t = torch.randn(count, device=config.device).sigmoid().clamp(0.02, 0.99)
            noisy = noised(image.detach(), torch.randn_like(image), t)
            with config.autocast(), torch.no_grad():
                x0_teacher, x0_fake = (
                    clean(model, noisy, t, batch, model.encode_latents(batch.latents, *size))
                    for model in (teacher, fake)
                )
            terms["vsd"] = config.vsd_weight * losses.vsd(image, x0_teacher, x0_fake)
        optimizer.step(sum(terms.values()), progress)
        average.update_parameters(student)
        if config.gan_weight:
            discriminator.zero_grad()
            critic = losses.gan_discriminator(logits([x.detach() for x in made]), real_logits := logits(real))
            shifted = batch.image[..., top:, left:]
            perturbed = logits(squeezenet.features(shifted + 0.1 * torch.randn_like(shifted)))
            critic = critic + 5 * losses.approximate_r1(real_logits, perturbed)
            critic.backward()
            judge.step()
            terms["discriminator"] = critic
        if config.vsd_weight:
            with config.autocast():
                x0 = clean(fake, noisy, t, batch, fake.encode_latents(batch.latents, *size))
            terms["fake_score"] = squared(x0 - image.detach()).mean()
            fake_optimizer.step(terms["fake_score"], progress)
        return {name: value.item() for name, value in terms.items()}

    parts = {"student": student, "average": average, "optimizer": optimizer, "discriminator": discriminator}
    if run(config, {**parts, "judge": judge, "fake": fake, "fake_optimizer": fake_optimizer}, step):
        save(average.module, config.out / ("student" if config.stage == "student" else "transformer"))


class Optimizer:
    """Muon for the convolutions and the matrices of attention and MLPs, AdamW for the rest.

    The learning rates warm up, then fall in a line. In the minutes that a CPU has, Muon makes the difference: after
    three of them on one core the encoder and the adapter are where AdamW alone takes them in forty. It is written out
    here because PyTorch's orthogonalizes in bfloat16, which takes a CPU without such instructions ten times as long as
    everything else.
    """

    def __init__(self, model: torch.nn.Module, muon_learning_rate: float, learning_rate: float = 1e-3):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for name, p in named if p.ndim == 4 or (p.ndim == 2 and re.search(r"\.(attn|mlp)\.", name))]
        self.others = [p for _, p in named if not any(p is weight for weight in self.weights)]
        self.momenta = [torch.zeros_like(weight) for weight in self.weights]
        self.adamw = torch.optim.AdamW(self.others, learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.steps, self.rates = 0, (muon_learning_rate, learning_rate)

    def step(self, loss: torch.Tensor, progress: float) -> None:
        """Progress of the stage is in [0, 1)."""
        self.steps += 1
        muon_rate, rate = (rate * min(1, self.steps / 50) * (1 - 0.95 * progress) for rate in self.rates)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.weights, *self.others], 1.0)
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        with torch.no_grad():
            for weight, momentum in zip(self.weights, self.momenta, strict=True):
                momentum.lerp_(weight.grad, 0.1)
                update = orthogonal(weight.grad.lerp(momentum, 0.9).flatten(1)).reshape(weight.shape)
                weight.mul_(1 - 0.01 * muon_rate)
                weight.sub_(update, alpha=muon_rate * max(1, len(weight) / weight[0].numel()) ** 0.5)
        for weight in (*self.weights, *self.others):
            weight.grad = None

    def state_dict(self) -> dict:
        return {"momenta": self.momenta, "adamw": self.adamw.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])
        self.steps = state["steps"]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with singular values of about 1, by Muon's quintic Newton-Schulz iteration."""
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x.float() if x.device.type == "cpu" else x.bfloat16()
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


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
    for part in ("transformer", "encoder"):
        shutil.rmtree(NANO_FOLDER / part, ignore_errors=True)
    pipeline.save_pretrained(NANO_FOLDER, max_shard_size="14MB")
    pipeline = PixelDecoderPipeline.from_pretrained("nano")
    folder = NANO_FOLDER / "samples"
    folder.mkdir(exist_ok=True)
    for name, file in SAMPLES.items():
        left, top = CROPS[name]
        photo = Image.open(config.data / file).convert("RGB").crop((left, top, left + 512, top + 512))
        photo.save(folder / f"{name}.webp", quality=95)
        latents = pipeline.encode_image(shrink(to_tensor(Image.open(folder / f"{name}.webp")), 4))
        save_file({"latents": latents.contiguous()}, folder / f"{name}.safetensors")


STAGES = {
    "encoder": train_encoder,
    "base": train_base,
    "adapter": train_adapter,
    "teacher": train_teacher,
    "student": train_student,
    "polish": train_student,
    "bundle": bundle,
    "baseline": baseline,
}

if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    for path in (config.taef1, config.taef1.with_name("taef1_decoder.safetensors"), config.squeezenet):
        if path is not None and not path.is_file():
            raise SystemExit(f"{path}: no such file")
    STAGES[config.stage](config)
