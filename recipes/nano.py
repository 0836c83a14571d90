"""Photos in, the bundled nano weights out, one command for each stage:

    python recipes/nano.py encoder --data TRAIN --minutes 9
    python recipes/nano.py base --data TRAIN --minutes 12
    python recipes/nano.py cascade --data TRAIN --minutes 24
    python recipes/nano.py photo --data TRAIN --minutes 28
    python recipes/nano.py teacher --data TRAIN --minutes 5
    python recipes/nano.py student --data TRAIN --minutes 33 --terms.vsd 0
    python recipes/nano.py bundle --data EVAL

each with `--weights FOLDER`, where the networks that it learns from lie under their own names; for another latent space
than FLUX.1's, with `--latent-space flux2`, `sd3` or `sdxl`, and an `--out` of its own. Each writes its part under
`--out`, and goes on from its last checkpoint when it is called again, so that `--piece 9` cuts a stage into calls of
nine minutes. `baseline` writes the autoencoder as a folder to evaluate against. What came of it, what was tried, and
the minutes meant for a GPU are told in docs/nano.md.
"""

import copy
import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from diffusers import AutoencoderTiny, FlowMatchLCMScheduler
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from safetensors.torch import save_file
from teachers import EfficientNetLite, RealESRGAN, tiny_autoencoder
from torch import nn
from tqdm import tqdm

from pixeldecoder.autoencoders import encode, load_autoencoder
from pixeldecoder.evaluation.perceptual import SqueezeNetDistance
from pixeldecoder.evaluation.pixels import lab, phases
from pixeldecoder.files import write_folder, write_whole
from pixeldecoder.flow import STUDENT_TIMES, SampleRandom, add_noise, clean, noised, training_times
from pixeldecoder.models.adapter import LatentFeatures
from pixeldecoder.models.base import LatentDecoder
from pixeldecoder.models.discriminator import PixelDecoderDiscriminator
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import UNREADABLE, shrink, to_image, to_tensor
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.presets import NANO as NANO_FOLDER
from pixeldecoder.sources import Folder
from pixeldecoder.training import losses
from pixeldecoder.training.config import Conditioned, Data, Optimizer
from pixeldecoder.training.data import Batch
from pixeldecoder.training.degrade import Conditions
from pixeldecoder.training.loop import train
from pixeldecoder.training.network import build_network
from pixeldecoder.training.parts import Part, Terms, autocast, update

NANO = dict(
    patch_size=16, num_layers=4, num_attention_heads=4, attention_head_dim=64, text_embed_dim=None,
    num_pixel_layers=1, pixel_dim=8, num_pixel_attention_heads=2, pixel_attention_head_dim=32,
    latent_channels=16, latent_downscale_factor=8, scale=4, adapter_dim=160, num_adapter_layers=4,
    adapter_padding_mode="replicate", injection_interval=1, per_channel_gate=False, inject_pixels=True,
    base_dim=64, prediction_type="sample", rope_reference_size=512,
)  # fmt: skip
SPACES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("taef1", {}),
    "sd3": ("taesd3", {}),
    "sdxl": ("taesdxl", dict(latent_channels=4)),
    "flux2": ("taef2", dict(latent_channels=128, latent_downscale_factor=16, unpack_latents=True)),
}
"""Each latent space's small autoencoder, and in what its decoder differs."""
SMALLER = dict(num_layers=2, num_attention_heads=2, adapter_dim=64)
"""What the decoders of all spaces but FLUX.1's have, for 12 MB in bfloat16, with their encoder."""
CASCADE = 16
"""Side in latent cells of the crops whose picture by the autoencoder and Real-ESRGAN is kept."""
CELL = 32
"""Pixels of a photo to a latent cell."""
VARIED = {6: (0.35, 16 / 9), 8: (0.4, 1), 12: (0.2, 4 / 9), 16: (0.05, 1 / 4)}
"""Crops of the decoder: rotary angles change with the size, so that it must be varied."""


@dataclass(kw_only=True)
class Weights:
    """Of the terms of the photo's and the student's loss; 0: neither computed nor trained for."""

    pixel: float = 1.0
    perceptual: float = 1.0
    gan: float = 0.03
    spread: float = 0.5
    """1 is what the energy score, a proper one, takes back of the pixels' error (Gneiting and Raftery 2007, eq. 22)."""
    vsd: float = 0.1


@dataclass(kw_only=True)
class Config:
    """One call."""

    stage: tyro.conf.Positional[
        Literal["encoder", "base", "cascade", "photo", "teacher", "student", "bundle", "baseline"]
    ]
    data: Path = Path()
    """Folder of photos: to train on, or, to bundle, those of EVAL."""
    weights: Path
    """Folder of the latent space's taef1_encoder, taef1_decoder or taesd3_, taesdxl_, taef2_ (madebyollin, MIT),
    realesrgan_x4plus (BSD-3), squeezenet1_0 and efficientnet_lite0, all .safetensors."""
    latent_space: Literal["flux", "sd3", "sdxl", "flux2"] = "flux"
    """Whose latents it learns to decode."""
    minutes: float = 60.0
    """Of training, over all calls; the learning rates fall to nothing over them. On a CPU those that it computes."""
    piece: float = math.inf
    """Minutes until this call ends, with a checkpoint."""
    terms: Weights = field(default_factory=Weights)
    """What the terms of the last stages count."""
    crops: int = 180
    """How many the cascade's picture is made of, at about 5 s each on a CPU's thread."""
    out: Path = Path("outputs/nano")
    resolution: int = 512
    """Of the pictures to validate on; photos with a shorter side are left out."""
    batch_size: int | None = None
    """Crops of 256 px to a step; by default 8, on a GPU 32. Larger crops are fewer."""
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0


@dataclass(kw_only=True)
class Nano(Conditioned):
    """A stage's run. Most of the latents are clean: what noise costs there, they would pay."""

    noise_probability: float = 0.3
    own_encoder: str = ""
    """That of the first stage, beside the small autoencoder's."""
    cascade: str = ""
    """What of that stage is mixed into the teacher's base."""
    teacher: str = ""
    weights: Path = Path()
    """Folder of the networks it learns from."""
    crops: int = 180
    terms: Weights = field(default_factory=Weights)


def configure(config: Config) -> Nano:
    def made_by(stage: str) -> str:
        if not (config.out / stage).is_dir():
            raise ValueError(f"{config.stage}: no {config.out / stage}: run the {stage}'s stage first")
        return str(config.out / stage)

    stage, cpu = config.stage, config.device == "cpu" or not torch.cuda.is_available()
    starts = {"cascade": "base", "photo": "cascade", "teacher": "photo", "student": "teacher"}
    crops = config.batch_size or (8 if cpu else 32)
    return Nano(
        data=Data(source=str(config.data), resolution=config.resolution),
        encoder="nano" if stage == "encoder" else made_by("encoder"),  # of pictures to validate on
        own_encoder="" if stage in ("encoder", "base") else made_by("encoder"),
        model=made_by(starts[stage]) if stage in starts else "",
        cascade=made_by("cascade") if stage == "teacher" else "",
        teacher=made_by("teacher") if stage == "student" else "",
        latent_space=config.latent_space,
        output=config.out / f"{stage}_training",
        export=config.out / stage,
        minutes=config.minutes,
        piece=config.piece,
        steps=10**6,  # the minutes are over before
        batch_size=crops,
        micro_batch_size=crops,
        ema_decay={"encoder": 0.0, "base": 0.998}.get(stage, 0.995),
        # CPUs without instructions for bfloat16 are slower in it.
        precision="float32" if cpu and not torch.cpu._is_avx512_bf16_supported() else "bfloat16",
        compile=not cpu,
        device=config.device,
        seed=config.seed,
        log_every=50,
        validate_every=0 if stage == "encoder" else 500,  # no pipeline takes what it makes
        checkpoint_every=100,
        tracker="none",
        weights=config.weights,
        crops=config.crops,
        terms=config.terms,
        optimizer=Optimizer(
            learning_rate=3e-4 if stage == "photo" else 1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50,
            decay=0.95, max_grad_norm=1.0,
        ),
    )  # fmt: skip


def architecture(latent_space: str) -> dict[str, Any]:
    """Of the decoder of that space's latents."""
    return NANO | SPACES[latent_space][1] | ({} if latent_space == "flux" else SMALLER)


def autoencoder(config: Nano) -> AutoencoderTiny:
    """The small one of the latent space, whose latents are (B, C, H/8, W/8), FLUX.2's before they are packed."""
    return tiny_autoencoder(config.weights, SPACES[config.latent_space][0])


@dataclass
class Crops(Batch):
    """Parts of photos, and of the latents of the whole ones: these have seen what lies around."""

    latents: list[torch.Tensor]
    """Of each encoder, (B, C, H/32, W/32); FLUX.2's before they are packed."""
    inside: torch.Tensor
    """(B, 1, H/32, W/32): 0 in outermost cells whose latents depend on what was cut away, else 1."""
    cascade: torch.Tensor | None = None
    """What the autoencoder and Real-ESRGAN make of the latents, (B, 3, H, W) in [-1, 1], where that is learnt."""


class Photos:
    """All photos in memory, plain and mirrored, with what is computed of each once and kept in files.

    Args:
        encoders: by the files that keep the latents: a new encoder, which replaces its folder, makes them anew.
    """

    def __init__(self, source: Folder, encoders: dict[Path, nn.Module], device: torch.device):
        self.names, self.images = [], []
        for record in source.items:
            try:
                pixels = torch.from_numpy(np.array(record.open())).permute(2, 0, 1).to(device)
            except UNREADABLE as error:
                source.skipped.add(record.name, error)
                continue
            height, width = (side // CELL * CELL for side in pixels.shape[1:])
            pixels = pixels[:, :height, :width].contiguous()
            self.images += [pixels, pixels.flip(-1)]
            self.names += [record.name, f"{record.name}, mirrored"]
        if not self.images:
            raise ValueError(f"{source.folder}: no picture can be decoded")
        self.latents = []
        for path, encoder in encoders.items():
            encoder.eval().requires_grad_(False).to(device)
            self.latents.append(self.keep(path, lambda image, by=encoder: encode(by, shrink(image, 4))))

    def keep(self, path: Path, make: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """`make` of every picture (1, 3, H, W) in [-1, 1], in float16; from the file, if it is of the same pictures."""
        pictures = [f"{name}, {tuple(image.shape)}" for name, image in zip(self.names, self.images, strict=True)]
        kept = torch.load(path, weights_only=True) if path.exists() else None
        if kept is None or kept["pictures"] != pictures:
            images = tqdm(self.images, desc=str(path), dynamic_ncols=True)
            made = [make(image[None].float() / 127.5 - 1)[0].half().cpu() for image in images]
            kept = {"pictures": pictures, "made": made}
            write_whole(path, lambda file: torch.save(kept, file))
        return [tensor.to(image.device) for tensor, image in zip(kept["made"], self.images, strict=True)]

    def cascade(self, path: Path, count: int, seed: int, make: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple]:
        """The places of `count` crops of `CASCADE` cells and `make` of their latents, (3, H, W) of bytes; kept."""
        key = f"{count}, {seed}, {self.names}"
        kept = torch.load(path, weights_only=True) if path.exists() else None
        if kept is None or kept["of"] != key:
            places = self.places(CASCADE, count, Random(f"{seed}/cascade"))
            cuts = [self.latents[0][index][None, :, y : y + CASCADE, x : x + CASCADE] for index, y, x in places]
            made = [make(cut.float()) for cut in tqdm(cuts, desc=str(path), dynamic_ncols=True)]
            made = [(127.5 * image[0].clamp(-1, 1) + 127.5).round().to(torch.uint8).cpu() for image in made]
            kept = {"of": key, "made": list(zip(places, made, strict=True))}
            write_whole(path, lambda file: torch.save(kept, file))
        return kept["made"]

    def places(self, cells: int, count: int, rng: Random) -> list[tuple[int, int, int]]:
        """Squares of so many latent cells, picture, top and left, drawn by area; edges of a photo are met as often as
        its inside."""
        sizes = [latents.shape[1:] for latents in self.latents[0]]
        areas = [math.prod(size) if min(size) >= cells else 0 for size in sizes]
        drawn = rng.choices(range(len(sizes)), areas, k=count)
        return [
            (i, *(min(max(rng.randint(-1, side - cells + 1), 0), side - cells) for side in sizes[i])) for i in drawn
        ]

    def crops(self, cells: int, places: list[tuple[int, int, int]], samples: list[int], position: int) -> Crops:
        """Pictures and latents of squares of so many cells."""
        inside = torch.ones(len(places), 1, cells, cells, device=self.images[0].device)
        for mask, (index, y, x) in zip(inside, places, strict=True):
            height, width = self.latents[0][index].shape[1:]
            mask[:, 0] *= y == 0
            mask[:, -1] *= y + cells == height
            mask[:, :, 0] *= x == 0
            mask[:, :, -1] *= x + cells == width

        def cut(tensors: list[torch.Tensor], unit: int) -> torch.Tensor:
            parts = [tensors[n][:, unit * y :, unit * x :][:, : unit * cells, : unit * cells] for n, y, x in places]
            return torch.stack(parts).float()

        return Crops(
            image=cut(self.images, CELL) / 127.5 - 1,
            captions=[""] * len(places),
            names=[self.names[index] for index, *_ in places],
            samples=samples,
            position=position,
            latents=[cut(latents, 1) for latents in self.latents],
            inside=inside,
        )


class NanoStage:
    """What all stages share. One step moves every part, on crops of one size.

    Args:
        muon_rate: learning rate of the model's matrices.
        trained: the part of the model that trains, if it is not the whole.
    """

    crops: ClassVar = {8: (1.0, 1.0)}
    """Side of a crop in latent cells: its share of the steps, and crops to a batch, of `batch_size`."""
    conditions: Any = None

    def __init__(
        self,
        config: Nano,
        accelerator: Accelerator,
        model: ModelMixin,
        muon_rate: float,
        trained: nn.Module | None = None,
    ):
        self.config, self.accelerator, self.model = config, accelerator, model
        self.network = self.part(model if trained is None else trained, muon_rate)
        self.parts = {"network": self.network}

    def part(self, module: nn.Module, muon_rate: float) -> Part:
        module = module.to(memory_format=torch.channels_last).train()
        return Part(module, self.config.optimizer, self.config, self.accelerator, partial(Muon, muon_rate=muon_rate))

    def batches(self, source: Folder, position: int) -> Iterator[Crops]:
        config, processes = self.config, self.accelerator.num_processes
        if not isinstance(source, Folder):
            raise ValueError(f"data {config.data.source}: expected a folder of photos")
        source.require([(config.data.resolution,) * 2], CELL)
        kept = config.output.parent / f"latents_{SPACES[config.latent_space][0]}.pt"
        encoders: dict[Path, nn.Module] = {kept: autoencoder(config)}
        if config.own_encoder:
            own = load_autoencoder(config.own_encoder)
            encoders[Path(config.own_encoder) / "latents.pt"] = own.encoder  # before it packs them
        photos = Photos(source, encoders, self.accelerator.device)
        largest = max(min(latents.shape[1:]) for latents in photos.latents[0])
        sizes = {cells: size for cells, size in self.crops.items() if cells <= largest}
        shares = [share for share, _ in sizes.values()]
        for step in itertools.count(position):
            number = step * processes + self.accelerator.process_index
            rng = Random(f"{config.seed}/crops/{number}")
            cells = rng.choices(list(sizes), shares)[0]
            count = max(1, round(config.micro_batch_size * sizes[cells][1]))
            first = 4 * config.micro_batch_size * number  # no size has more crops and twins than that
            yield self.draw(photos, cells, list(range(first, first + count)), rng, step + 1)

    def draw(self, photos: Photos, cells: int, samples: list[int], rng: Random, position: int) -> Crops:
        return photos.crops(cells, photos.places(cells, len(samples), rng), samples, position)

    def model_update(self, step: int) -> int:
        return step

    def update(self, batches: list[Crops], step: int, progress: float) -> dict[str, float]:
        return update(
            self.parts, batches, lambda batch: self.losses(batch, progress), step, step, self.accelerator, progress
        )

    def pipeline(self, model: ModelMixin) -> ModelMixin | PixelDecoderPipeline:
        """Stages that end with a part of a decoder give it as it is."""
        return model

    def random(self, batch: Crops) -> SampleRandom:
        return SampleRandom(self.config.seed, batch.samples, "training", batch.image.device)


def units(layers: nn.Sequential) -> list[nn.Sequential]:
    """TAESD's residual blocks, each with what leads to it, and its last convolution."""
    found: list[list[nn.Module]] = [[]]
    for layer in layers:
        found[-1].append(layer)
        if isinstance(layer, AutoencoderTinyBlock):
            found.append([])
    return [nn.Sequential(*unit) for unit in found]


class Units(nn.Module):
    """A network as its units, `units(sigma)`; what each makes of the one before, or of an input of its own."""

    def __init__(self, network: nn.Module, units: Callable[[torch.Tensor | None], list[Callable]]):
        super().__init__()
        self.network, self.units = network, units

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor | None = None, given: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        made = []
        for index, unit in enumerate(self.units(sigma)):
            x = unit(x if given is None else given[index])
            made.append(x)
        return made


class ImitatorStage(NanoStage):
    """A network of TAESD's form learns from random numbers what the small autoencoder does: at first each of its units,
    from what that one's is given there, so that none waits for the ones before it; then all together.

    What comes at the end counts as much as all features."""

    alone: ClassVar = 0.5
    """Share of the stage in which units learn by themselves."""
    side: ClassVar = 32
    """Of the corner of an image that a unit learns from, in pixels."""
    taught: list[Callable[[torch.Tensor], torch.Tensor]]

    def imitation(self, x: torch.Tensor, sigma: torch.Tensor | None = None, noisy: torch.Tensor | None = None,
                  weight: torch.Tensor | float = 1.0, alone: bool = False) -> torch.Tensor:  # fmt: skip
        """Relative squared errors, summed.

        Args:
            noisy: x as the network gets it, by default as it is.
            weight: (B, 1, 1, 1), of samples.
        """
        given, wanted, seen = [], [], x if noisy is None else noisy
        with torch.no_grad(), autocast(x.device, self.network.autocast):
            for unit in self.taught:
                given.append(x[..., : self.side, : self.side])
                x = unit(x)
                wanted.append(unit(given[-1]) if alone else x)
        made = self.network(seen, sigma, given if alone else None)
        errors = [
            (weight * (a.float() - b.float()).square()).mean() / b.float().square().mean()
            for a, b in zip(made, wanted, strict=True)
        ]
        return sum(errors) + len(errors) * errors[-1]


class EncoderStage(ImitatorStage):
    """The small autoencoder's latents, of photos shrunk 4x."""

    crops: ClassVar = {8: (0.5, 2), 16: (0.5, 1)}

    def __init__(self, config: Nano, accelerator: Accelerator):
        taught, packed = autoencoder(config), config.latent_space == "flux2"
        model = TinyLatentEncoder(latent_channels=taught.config.latent_channels, packed=packed)
        super().__init__(config, accelerator, model, 0.015, Units(model, lambda sigma: units(model.encoder.layers)))
        self.taught = units(taught.encoder.to(accelerator.device, memory_format=torch.channels_last).layers)

    def losses(self, batch: Crops, progress: float) -> Terms:
        image = shrink(batch.image, 4).add(1).div(2)
        if progress < self.alone:
            return {"units": self.imitation(image, alone=True)}
        difference = self.network(image)[-1] - batch.latents[0]
        return {"latents": (batch.inside * difference.square()).mean() / batch.inside.mean()}


class DecoderStage(NanoStage):
    """What the stages of the decoder share: half of the latents are the small autoencoder's, half the own encoder's;
    noisy as eq. 6 or 7."""

    def __init__(self, config: Nano, accelerator: Accelerator, model: PixelDecoderTransformer2DModel, *args):
        super().__init__(config, accelerator, model, *args)
        self.conditions = Conditions(config, model, accelerator.device)

    def pipeline(self, model: PixelDecoderTransformer2DModel) -> PixelDecoderPipeline:
        space, size = self.config.latent_space, CELL * max(VARIED)
        return PixelDecoderPipeline(model, FlowMatchLCMScheduler(shift=1.0), latent_space=space, trained_size=size)

    def inputs(self, batch: Crops, random: SampleRandom) -> dict[str, torch.Tensor]:
        latents = batch.latents[0]
        if len(batch.latents) > 1:
            latents = torch.where(random.uniform(1, 1, 1) < 0.5, *batch.latents)
        sigma = self.config.max_sigma * random.uniform() * (random.uniform() < self.config.noise_probability)
        noisy = add_noise(latents, random.normal(*latents.shape[1:]), sigma, self.config.frame)
        return dict(latents=noisy, sigma=sigma)

    def packed(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As the network takes them, of which the base alone is given FLUX.2's latents unpacked."""
        if not self.model.config.unpack_latents:
            return inputs
        return inputs | dict(latents=F.pixel_unshuffle(inputs["latents"], 2))


def trunk(base: LatentDecoder, sigma: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The base's units up to the small image."""

    def first(i: int, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return base.stages[i][0](base.enter(i, x, bias))

    stages = [[partial(first, i, bias), *base.stages[i][1:]] for i, bias in enumerate(base.biases(sigma))]
    return [*itertools.chain(*stages), base.to_small]


class BaseStage(ImitatorStage, DecoderStage):
    """The base up to the small image. Noisy latents, of which it is told sigma, come in when its units have learnt
    alone; they are to give what the clean ones do."""

    crops: ClassVar = {8: (0.5, 2), 12: (0.3, 1), 16: (0.15, 1 / 2), 32: (0.05, 1 / 8)}
    # In small ones every pixel knows the border; what is far from it must be met as well.

    def __init__(self, config: Nano, accelerator: Accelerator):
        model = PixelDecoderTransformer2DModel(**architecture(config.latent_space))
        super().__init__(config, accelerator, model, 0.015, Units(model.base, partial(trunk, model.base)))
        taught = autoencoder(config).decoder.to(accelerator.device, memory_format=torch.channels_last)
        first, *others = units(taught.layers)
        self.taught = [lambda x: first(torch.tanh(x / 3) * 3), *others]

    def losses(self, batch: Crops, progress: float) -> Terms:
        random, latents = self.random(batch), batch.latents[0]
        if progress < self.alone:
            return {"units": self.imitation(latents, torch.zeros(len(latents), device=latents.device), alone=True)}
        sigma = self.config.max_sigma * random.uniform() * (random.uniform() < 0.4 * progress)
        noisy = add_noise(latents, random.normal(*latents.shape[1:]), sigma, self.config.frame)
        return {"features": self.imitation(latents, sigma, noisy, (1 - sigma)[:, None, None, None])}


class Judges:
    """How differently networks see two pictures, moved and shrunk at random: patches and a network's strides that
    always met in the same way would hide a pattern from it."""

    def __init__(self, config: Nano, device: torch.device):
        self.bfloat16 = config.precision == "bfloat16"
        self.squeezenet = SqueezeNetDistance(config.weights / "squeezenet1_0.safetensors", device)
        self.efficientnet = EfficientNetLite(config.weights / "efficientnet_lite0.safetensors", device)

    def __call__(
        self, image: torch.Tensor, truth: torch.Tensor, rng: Random
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]], torch.Tensor]:
        """The mean of SqueezeNet's distance of full-size pictures and that of one of both at any size; SqueezeNet's
        features of the full-size ones; the moved truth of these.

        Args:
            image: as many of each truth as there are, one after another."""
        whole = moved(image, truth, rng)
        seen = [self.features(self.squeezenet, x) for x in whole]
        scale = rng.choice([0.5, 0.6, 0.7, 0.85, 1.0])
        other = rng.choice([self.squeezenet, self.efficientnet, self.efficientnet])
        pair = [F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True) for x in moved(image, truth, rng)]
        again = [self.features(other, x) for x in pair]
        distances = [
            self.squeezenet.between(made, [repeated(y, x) for y, x in zip(real, made, strict=True)]).mean()
            for made, real in (seen, again)
        ]
        return sum(distances) / 2, seen, whole[1]

    def features(self, network: SqueezeNetDistance | EfficientNetLite, image: torch.Tensor) -> list[torch.Tensor]:
        with autocast(image.device, self.bfloat16):
            return [x.float() for x in network.features(image)]


def repeated(truth: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """For images of which there are several of each."""
    return truth.repeat(len(images) // len(truth), 1, 1, 1)


def moved(image: torch.Tensor, truth: torch.Tensor, rng: Random) -> list[torch.Tensor]:
    """Both without the same few rows and columns at the top and the left."""
    top, left = rng.randrange(32), rng.randrange(32)
    return [x[..., top:, left:] for x in (image, truth)]


class CascadeStage(DecoderStage):
    """What enlarges the base's features, which stay as they are: the cascade's picture, in which edges and letters are
    sharp, a function of the latents that can be learnt; with the photo's means of cells, so that colour and tone are
    the photo's."""

    crops: ClassVar = {8: (0.7, 1 / 2), 12: (0.3, 1 / 4)}

    def __init__(self, config: Nano, accelerator: Accelerator):
        model = build_network(config)
        base = model.base
        for learnt in (base.conv_in, base.sigma_embed, base.stages, base.convs, base.to_small):
            learnt.requires_grad_(False)
        super().__init__(config, accelerator, model, 0.01, base)
        self.judges, self.kept = Judges(config, accelerator.device), None

    def draw(self, photos: Photos, cells: int, samples: list[int], rng: Random, position: int) -> Crops:
        if self.kept is None:
            small = autoencoder(self.config).to(self.accelerator.device)
            upscaler = RealESRGAN(self.config.weights / "realesrgan_x4plus.safetensors", self.accelerator.device)

            def make(latents: torch.Tensor) -> torch.Tensor:
                with torch.no_grad(), autocast(latents.device, self.network.autocast):
                    image = small.decode(latents.to(self.accelerator.device)).sample
                    return upscaler(image.contiguous(memory_format=torch.channels_last)).float()

            path = self.config.output.parent / "cascade.pt"
            self.kept = photos.cascade(path, self.config.crops, self.config.seed, make)
        places, pictures = [], []
        for (index, y, x), picture in rng.choices(self.kept, k=len(samples)):
            down, right = (rng.randrange(CASCADE - cells + 1) for _ in range(2))
            places.append((index, y + down, x + right))
            area = picture[:, CELL * down : CELL * (down + cells), CELL * right : CELL * (right + cells)]
            pictures.append(area.float() / 127.5 - 1)
        target = torch.stack(pictures).to(self.accelerator.device)
        return replace(photos.crops(cells, places, samples, position), cascade=target)

    def losses(self, batch: Crops, progress: float) -> Terms:
        inputs, rng = self.inputs(batch, self.random(batch)), Random(f"{self.config.seed}/{batch.position}")
        assert batch.cascade is not None
        target = batch.cascade + means(batch.image - batch.cascade)
        image = self.network(**inputs).float()
        return {
            "pixel": 4 * (image - target).abs().mean(),
            "colour": 4 * means(image - target).abs().mean(),
            "perceptual": 2 * self.judges(image, target, rng)[0],
        }


def means(image: torch.Tensor) -> torch.Tensor:
    """Of latent cells, smoothly."""
    return F.interpolate(F.avg_pool2d(image, CELL), scale_factor=CELL, mode="bilinear")


def colour_error(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean distance of the means of 16 x 16 pixels in L*a*b*, where strong colours count less, about as CIEDE2000 has
    it, whose own slope has no bounds."""
    one, other = (lab(F.avg_pool2d(x, 16)) for x in (image, truth))
    chroma = other[:, 1:].norm(dim=1, keepdim=True)
    scale = torch.cat([torch.ones_like(chroma), *[1 + 0.03 * chroma] * 2], dim=1)
    return (((one - other) / scale).square().sum(dim=1) + 1e-2).sqrt().mean()


class Discriminator(nn.Module):
    """A head for each of SqueezeNet's four layers."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(PixelDecoderDiscriminator(channels) for channels in (96, 256, 512, 512))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        # Unit vectors in, about unit values out.
        return torch.cat([head((x * x.shape[1] ** 0.5,)) for head, x in zip(self.heads, features, strict=True)], dim=1)


class JudgedStage(DecoderStage):
    """A picture is learnt by its distance to the photo as networks see it, and from a discriminator, beside its pixels.

    The discriminator reads SqueezeNet's features, with a head for each of four layers, and its R1 has a weight of 5;
    the adversarial term warms up over a tenth of the stage. Adam (.5, .99) at 2e-4 moves the discriminator."""

    crops: ClassVar = {8: (0.8, 1 / 2), 16: (0.2, 1 / 8)}

    def __init__(self, config: Nano, accelerator: Accelerator, model: PixelDecoderTransformer2DModel, *args):
        super().__init__(config, accelerator, model, *args)
        self.judges = Judges(config, accelerator.device)
        if config.terms.gan:
            settings = Optimizer(
                learning_rate=2e-4, betas=(0.5, 0.99), weight_decay=0.0, warmup_steps=0, max_grad_norm=None
            )
            self.discriminator = self.parts["discriminator"] = Part(Discriminator(), settings, config, accelerator)

    def judged(self, image: torch.Tensor, batch: Crops, random: SampleRandom, rng: Random, progress: float) -> Terms:
        weights = self.config.terms
        distance, (made, real), truth = self.judges(image, batch.image, rng)
        error = image - repeated(batch.image, image)
        terms = {
            "pixel": 2 * weights.pixel * error.abs().mean(),
            "colour": 0.04 * weights.pixel * colour_error(image, repeated(batch.image, image)),
            "grid": 2 * weights.pixel * (phases(image, 16) - phases(batch.image, 16)).abs().mean(),
            "perceptual": 2 * weights.perceptual * distance,
        }
        if len(image) > len(batch.image):
            apart = [torch.linalg.vector_norm(torch.sub(*x.chunk(2)), dim=1).mean() for x in made]
            apart = weights.perceptual * sum(apart) / len(apart)
            apart = apart + weights.pixel * torch.sub(*image.chunk(2)).abs().mean()
            terms["spread"] = -weights.spread * apart
        if weights.gan:
            self.discriminator.module.requires_grad_(False)  # it judges here; gradients pass through it
            with autocast(image.device, self.network.autocast):
                judged = self.discriminator.module(made).float()
            self.discriminator.module.requires_grad_(True)
            terms["gan"] = min(1, 10 * progress) * weights.gan * losses.gan_student(judged)
            noisy = truth + 0.1 * random.normal(*truth.shape[1:])
            perturbed = self.judges.features(self.judges.squeezenet, noisy)
            # One pass for all three: a wrapper for many processes counts on one per update.
            joined = [torch.cat([x.detach() for x in maps]) for maps in zip(made, real, perturbed, strict=True)]
            sizes = len(image), len(truth), len(truth)
            fake_logits, real_logits, perturbed_logits = self.discriminator(joined).float().split(sizes)
            terms["discriminator"] = losses.gan_discriminator(fake_logits, real_logits)
            terms["r1"] = 5 * losses.approximate_r1(real_logits, perturbed_logits)
        return terms


class PhotoStage(JudgedStage):
    """The base again, from the photo itself."""

    def __init__(self, config: Nano, accelerator: Accelerator):
        model = build_network(config)
        super().__init__(config, accelerator, model, 0.0015, model.base)

    def losses(self, batch: Crops, progress: float) -> Terms:
        random, rng = self.random(batch), Random(f"{self.config.seed}/{batch.position}")
        image = self.network(**self.inputs(batch, random)).float()
        return self.judged(image, batch, random, rng, progress)


def on_base(config: Nano) -> PixelDecoderTransformer2DModel:
    """What a run starts from; its base stays as it is, and the rest learns what is missing."""
    model = build_network(config)
    model.base.requires_grad_(False)
    return model


def squared(error: torch.Tensor, patch: int = 16) -> torch.Tensor:
    """Mean square of each image, (B,), of its neighbours' differences, for edges, of those across patch borders, for
    seams, and of the means of patches, for colour."""
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    seams = across[..., patch - 1 :: patch], down[..., patch - 1 :: patch, :]
    terms = (error, across, down, *seams, 2 * F.avg_pool2d(error, patch))
    return sum(x.square().mean(dim=(1, 2, 3)) for x in terms)


class TeacherStage(DecoderStage):
    """On top of the base the rest learns by flow matching in x0: that of the velocity, weighted by t^2, lest the few
    small times rule.

    The base is half-way between its weights after the cascade's stage and after the photo's (network interpolation,
    arXiv 1809.00219, section 3.4): most of what the photo has taught, without the weave that came with it."""

    crops: ClassVar = VARIED

    def __init__(self, config: Nano, accelerator: Accelerator):
        model, cascade = on_base(config), build_network(replace(config, model=config.cascade))
        with torch.no_grad():
            for one, other in zip(model.base.parameters(), cascade.base.parameters(), strict=True):
                one.lerp_(other, 0.5)
        super().__init__(config, accelerator, model, 0.02)

    def losses(self, batch: Crops, progress: float) -> Terms:
        random, image = self.random(batch), batch.image
        inputs = self.packed(self.inputs(batch, random))
        # Half the times as for the 1024 px pictures that crops stand for, half the sampler's.
        steps = image.new_tensor(STUDENT_TIMES[:-1])[(4 * random.uniform()).long()]
        t = torch.where(random.uniform() < 0.5, steps, training_times(random, 1024, 1024)).clamp_min(0.02)
        x_t = noised(image, random.normal(*image.shape[1:]), t)
        return {"x0": squared(clean(x_t, self.network(x_t, 1000 * t, **inputs).sample, t) - image).mean()}


class StudentStage(JudgedStage):
    """After DMD2 (eq. 29 to 31), for a small teacher and a short time. What differs from it:

    - the discriminator reads SqueezeNet's features of the clean image, not the teacher's of the noised one;
    - the image's error and its distance as networks see it are losses, too; the variational one counts .1, not 1, and
      there is no text to guide by;
    - of each latents two images are made, from other noise, and what keeps them alike is taken back (`spread`), so that
      detail comes from the noise;
    - every update is the student's, the discriminator's and the fake score's at once, not one of six the student's;
    - the student's image comes from its own samples, from noise alone twice as often as from each later step;
    - the fake score learns by the squared error of the image (`squared`), at the student's own time and noise, not by
      flow matching;
    - Muon and AdamW, with warm-up and decay, move student and fake score, gradients cut to 1; the base is frozen."""

    crops: ClassVar = {cells: (share, crops / 4) for cells, (share, crops) in VARIED.items()}

    def __init__(self, config: Nano, accelerator: Accelerator):
        super().__init__(config, accelerator, on_base(config), 0.02)
        if config.terms.vsd:
            teacher = on_base(replace(config, model=config.teacher))
            self.fake_score = self.parts["fake_score"] = self.part(copy.deepcopy(teacher), 0.02)
            self.teacher = teacher.requires_grad_(False).to(accelerator.device, memory_format=torch.channels_last)

    def losses(self, batch: Crops, progress: float) -> Terms:
        random, rng = self.random(batch), Random(f"{self.config.seed}/{batch.position}")
        one, (height, width) = self.packed(self.inputs(batch, random)), batch.image.shape[2:]
        with autocast(batch.image.device, self.network.autocast):
            features = self.network.module.encode_latents(**one, height=height, width=width)
        inputs = {name: torch.cat([x, x]) for name, x in one.items()}
        twins = [n + i * len(batch.samples) for i in (1, 2) for n in batch.samples]
        noise = SampleRandom(self.config.seed, twins, "training", batch.image.device)
        known = dict(latent_features=twice(features), sigma=inputs["sigma"])
        image = self.student_image(batch, known, noise, rng.choices(range(4), (4, 2, 2, 2))[0])
        terms = self.judged(image, batch, random, rng, progress)
        if weight := self.config.terms.vsd:
            t = noise.normal().sigmoid().clamp(0.02, 0.99)
            x_t = noised(image.detach(), noise.normal(*image.shape[1:]), t)
            with torch.no_grad(), autocast(image.device, self.network.autocast):
                x0_teacher = clean(x_t, self.teacher(x_t, 1000 * t, **inputs).sample, t)
            x0_fake = clean(x_t, self.fake_score(x_t, 1000 * t, **inputs).sample, t)
            terms["vsd"] = weight * losses.vsd(image, x0_teacher, x0_fake)
            terms["fake_score"] = squared(x0_fake - image.detach()).mean()
        return terms

    def student_image(self, batch: Crops, known: dict, random: SampleRandom, last: int) -> torch.Tensor:
        """From its own samples up to a step."""
        x_t = random.normal(*batch.image.shape[1:])
        times = batch.image.new_tensor(STUDENT_TIMES)[:, None].expand(-1, len(x_t))
        with torch.no_grad():
            for now, following in itertools.pairwise(times[: last + 1]):
                x0 = clean(x_t, self.network(x_t, 1000 * now, **known).sample, now)
                x_t = noised(x0, random.normal(*x0.shape[1:]), following)
        return clean(x_t, self.network(x_t, 1000 * times[last], **known).sample, times[last])


def twice(features: LatentFeatures) -> LatentFeatures:
    def both(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else torch.cat([x, x])

    return LatentFeatures(*(tuple(map(both, x)) if isinstance(x, tuple) else both(x) for x in features))


class Muon(torch.optim.AdamW):
    """Muon for the convolutions and the matrices of attention and MLPs, AdamW for the rest, and for what makes the
    base's images: a step of Muon's size there is a change of colour that can be seen.

    In the minutes that a CPU has, Muon makes the difference: after three of them on one core the encoder and the
    adapter are where AdamW alone takes them in forty. It is written out here because PyTorch's orthogonalizes in
    bfloat16, which takes a CPU without such instructions ten times as long as everything else.
    """

    def __init__(self, module: nn.Module, settings: Optimizer, muon_rate: float):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        inner = [(name, p) for name, p in named if not re.search(r"(^|\.)to_(small|image)\.", name)]
        matrices = [p for name, p in inner if p.ndim == 4 or (p.ndim == 2 and re.search(r"\.(attn|mlp)\.", name))]
        others = [p for _, p in named if not any(p is matrix for matrix in matrices)]
        groups = [{"params": others}, {"params": matrices, "lr": muon_rate}]
        super().__init__(groups, settings.learning_rate, settings.betas, weight_decay=settings.weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        group = self.param_groups[1]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state |= {"momentum": torch.zeros_like(p), "step": torch.zeros(())}  # AdamW looks for its "step"
            momentum = state["momentum"].lerp_(p.grad, 0.1)
            update = orthogonal(p.grad.lerp(momentum, 0.9).flatten(1)).reshape(p.shape)
            p.mul_(1 - group["weight_decay"] * group["lr"])
            p.sub_(update, alpha=group["lr"] * max(1, len(p) / p[0].numel()) ** 0.5)
            p.grad = None  # which AdamW passes by
        super().step()


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with singular values of about 1, by Muon's quintic Newton-Schulz iteration."""
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x.float() if x.device.type == "cpu" else x.bfloat16()
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


SAMPLES = {
    "budgie": ("13_budgie-branch.jpg", (0, 0, 1024, 1024)),
    "colosseum": ("09_roman-colosseum.jpg", (0, 0, 1024, 1024)),
    "eggs": ("15_egg-basket.jpg", (0, 0, 1024, 1024)),
    "sign": ("10_kait-herzog-8242.jpg", (60, 120, 572, 632)),
}
"""The bundled photos, and what is cut out of them: left, top, right, bottom."""


def bundle(config: Config) -> None:
    """The pipeline's folder as it ships: FLUX.1's into the package, with a few photos that may be passed on, their
    latents for the demo, and what TAEF1's decoder makes of these; another space's to `--out`."""
    encoder = TinyLatentEncoder.from_pretrained(config.out / "encoder", torch_dtype=torch.bfloat16).eval()
    pipeline = PixelDecoderPipeline.from_pretrained(config.out / "student", encoder=encoder, torch_dtype=torch.bfloat16)
    pipeline.register_to_config(encoder_name=None)
    bundled = NANO_FOLDER if config.latent_space == "flux" else config.out / "nano"
    for part in ("transformer", "encoder", "samples"):
        shutil.rmtree(bundled / part, ignore_errors=True)
    pipeline.save_pretrained(bundled, max_shard_size="14MB")
    for path in bundled.rglob("*.json"):  # diffusers writes down where a part came from
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    if config.latent_space != "flux":
        return
    pipeline, taef1 = PixelDecoderPipeline.from_pretrained("nano"), tiny_autoencoder(config.weights, "taef1")
    folder = NANO_FOLDER / "samples"
    folder.mkdir()
    for name, (file, box) in SAMPLES.items():
        path = folder / f"{name}.webp"
        Image.open(config.data / file).convert("RGB").crop(box).save(path, quality=90)
        latents = pipeline.encode_image(shrink(to_tensor(Image.open(path)), 4))
        save_file({"latents": latents.contiguous()}, folder / f"{name}.safetensors")
        with torch.no_grad():
            decoded = taef1.decode(latents).sample.clamp(-1, 1)
        to_image(decoded).save(folder / f"{name}.taef1.webp", lossless=True)


STAGES = {
    "encoder": EncoderStage,
    "base": BaseStage,
    "cascade": CascadeStage,
    "photo": PhotoStage,
    "teacher": TeacherStage,
    "student": StudentStage,
}
NETWORKS = ("realesrgan_x4plus", "squeezenet1_0", "efficientnet_lite0")


def main(config: Config) -> None:
    tiny = SPACES[config.latent_space][0]
    for path in (config.weights / f"{name}.safetensors" for name in (f"{tiny}_encoder", f"{tiny}_decoder", *NETWORKS)):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    if config.stage == "bundle":
        bundle(config)
    elif config.stage != "baseline":
        train(configure(config), STAGES[config.stage])
    elif config.latent_space == "flux2":
        raise ValueError("baseline: taef2 has layers that diffusers' AutoencoderTiny lacks: there is no folder of it")
    elif not (config.out / tiny).exists():
        write_folder(config.out / tiny, tiny_autoencoder(config.weights, tiny).save_pretrained)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        raise SystemExit(str(error)) from None
