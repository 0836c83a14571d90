"""A picture or a prompt in, its image by one method out: a decoder, or what people would use instead."""

import inspect
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors.torch import load_file

from pixeldecoder.autoencoders import decode, encode
from pixeldecoder.convert import read_reference
from pixeldecoder.errors import require
from pixeldecoder.files import read_json
from pixeldecoder.flow import Frame, SampleRandom, add_noise, student_times
from pixeldecoder.hub import hub_id, repository
from pixeldecoder.latents import SPACES
from pixeldecoder.loading import file_settings
from pixeldecoder.pictures import SUFFIXES, read, to_image, to_tensor
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.presets import HUB_REPOSITORY, NANO, PRESETS

BASELINES = ("bicubic", "lanczos", "vae", "upscale:FOLDER_OR_HUB_ID", "spandrel:FILE")


@dataclass(frozen=True)
class Setting:
    """One row of the tables: a method, and how it was used."""

    method: str
    """A decoder or a baseline."""
    steps: int | None = None
    """Sampling steps of a decoder; `None` for a baseline."""
    sigma: float | None = None
    """Noise level that the latents of pictures are given; `None` for what uses none, and for prompts."""
    told: float | None = None
    """Noise level that the decoder is told, if it is not the true one."""
    stop: str | None = None
    """Where the latent model stops, as `partly_denoise` takes it."""
    label: str = field(default="", compare=False)
    """How the tables call the method, if not by the last part of its path: another one has that name."""

    def labels(self) -> Iterator[str]:
        """Names of the method, each by one more part of its path."""
        kind, _, path = self.method.rpartition(":")
        if not self.method.startswith(("upscale:", "spandrel:")):
            kind, path = "", self.method
        if self.method == "vae":
            yield "VAE + bicubic"
        parts = Path(path).parts
        for count in range(1, len(parts) + 1):
            name = Path(*parts[-count:])
            yield f"VAE + {name.with_suffix('')}" if kind else str(name)
        yield self.method  # "." has no parts

    def __str__(self) -> str:
        parts = [
            self.label or next(self.labels()),
            None if self.steps is None else f"{self.steps} step{'s' * (self.steps != 1)}",
            None if self.sigma is None else f"sigma {self.sigma:g}",
            None if self.told is None else f"told {self.told:g}",
            None if self.stop is None else f"stop {self.stop}",
        ]
        return ", ".join(part for part in parts if part)


@dataclass
class Case:
    """One picture or prompt."""

    name: str
    caption: str
    truth: torch.Tensor | None = None
    """(1, 3, H, W) in [-1, 1]."""
    small: torch.Tensor | None = None
    """The truth, `scale` times smaller; for prompts, the latent model's own image."""

    @property
    def number(self) -> int:
        """What its noise depends on, so that other pictures in the folder do not matter."""
        return zlib.crc32(os.fsencode(self.name))

    @property
    def file(self) -> str:
        name = re.sub(rf"({'|'.join(SUFFIXES)})$", "", self.name)
        return f"{slug(name)[-60:]}-{self.number:08x}"


Method = Callable[[Case, Setting], tuple[torch.Tensor, float]]
"""An image (1, 3, H, W) in [-1, 1], and the seconds that it took from the latents on."""


class Workspace(NamedTuple):
    """What every method's images depend on."""

    output: Path
    """Folder of the evaluation."""
    prompts: bool
    seed: int
    scale: int
    device: str

    def noised(self, latents: torch.Tensor, case: Case, sigma: float, frame: Frame) -> torch.Tensor:
        noise = SampleRandom(self.seed, [case.number], "evaluation").normal(*latents.shape[1:]).to(latents)
        return add_noise(latents, noise, torch.tensor([sigma]), frame)

    def generator(self, case: Case) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + case.number)


def decoder_method(
    pipeline: PixelDecoderPipeline, encoder: Any, call_kwargs: dict[str, Any], workspace: Workspace
) -> Method:
    """`encoder`: makes the latents of pictures, `None`: the decoder's own."""
    pipeline.set_progress_bar_config(disable=True)
    frame = frame_of(pipeline.config.latent_space)

    def run(case: Case, setting: Setting) -> tuple[torch.Tensor, float]:
        if workspace.prompts:
            stored = load_file(latents_path(workspace.output, case, setting.stop))
            latents, sigma = stored["latents"], stored["sigma"].item()
        else:
            assert case.small is not None and setting.sigma is not None
            sigma = setting.sigma
            latents = workspace.noised(pipeline.encode_image(case.small, encoder), case, sigma, frame)
        result, seconds = _timed(
            lambda: pipeline(
                latents,
                prompt=case.caption,
                sigma=sigma if setting.told is None else setting.told,
                num_inference_steps=setting.steps,
                generator=workspace.generator(case),
                output_type="pt",
                **call_kwargs,
            )
        )
        return result.images.float() * 2 - 1, seconds

    return run


def baseline_method(name: str, vae: torch.nn.Module | None, frame: Frame, workspace: Workspace) -> Method:
    """`vae`: what makes and decodes latents of pictures, noised in this frame.

    Raises:
        ValueError: a model that cannot be loaded, or (later) one of another scale.
    """
    kind, _, model = name.partition(":")
    if kind in ("bicubic", "lanczos"):
        return lambda case, setting: _timed(lambda: _enlarge(case.small, workspace.scale, kind))
    upscaler: Callable[[torch.Tensor, Case], torch.Tensor] | None = None
    if kind == "upscale":
        upscaler = _upscale_pipeline(model, workspace)
    elif kind == "spandrel":
        upscaler = _spandrel(model, workspace.device)

    def larger(image: torch.Tensor, case: Case) -> torch.Tensor:
        if upscaler is None:
            return _enlarge(image, workspace.scale, "bicubic")
        large = upscaler(image, case)
        if large.shape[-1] != image.shape[-1] * workspace.scale:
            raise ValueError(
                f"baseline {name} makes images {large.shape[-1] / image.shape[-1]:g} times larger, the others "
                f"{workspace.scale} times: they do not fit in one table"
            )
        return large

    def run(case: Case, setting: Setting) -> tuple[torch.Tensor, float]:
        if workspace.prompts:
            own = to_tensor(read(latents_path(workspace.output, case)).flattened()).to(workspace.device)
            return _timed(lambda: larger(own, case))
        assert vae is not None and case.small is not None and setting.sigma is not None
        latents = workspace.noised(encode(vae, case.small), case, setting.sigma, frame)
        return _timed(lambda: larger(decode(vae, latents).float(), case))

    return run


class Facts(NamedTuple):
    """What must be known of a decoder before its turn comes."""

    scale: int
    frame: Frame
    steps: int
    """Sampling steps that it is made for."""
    student: bool

    def check(self, steps: int) -> None:
        """Raises ValueError for steps that it cannot take."""
        if self.student:
            student_times(steps)
        elif steps < 1:
            raise ValueError(f"a decoder takes at least 1 step, got {steps}")


def read_facts(name: str, load: Callable[[], PixelDecoderPipeline]) -> Facts:
    """A decoder's facts, where they can be had without its weights, which are loaded when its turn comes.

    Args:
        name: as for `PixelDecoderPipeline.from_pretrained`.
        load: called where nothing that is on this machine tells: it fetches the decoder, or says what is wrong.
    """
    path = NANO if name == "nano" else Path(os.path.expanduser(name))
    preset = PRESETS.get(name)
    if preset and not isinstance(try_to_load_from_cache(HUB_REPOSITORY, preset.filename), str):
        preset = None
    if preset:
        scale = preset.config.get("scale", 4)
        return Facts(scale, frame_of(preset.latent_space), preset.num_inference_steps, preset.distilled)
    try:
        if path.is_file():
            _, config = read_reference(path)
            settings = file_settings(path, None, is_prior=config["latent_channels"] is None)
            student = not isinstance(settings["scheduler"], DPMSolverMultistepScheduler)
            steps, frame = settings.get("default_num_inference_steps", 4), frame_of(settings.get("latent_space"))
            return Facts(config.get("scale", 4), frame, steps, student)
        files = ("model_index.json", "transformer/config.json")
        places = [
            path / file if path.is_dir() else str(try_to_load_from_cache(hub_id(name) or name, file)) for file in files
        ]
        index, config = (read_json(Path(place)) for place in places)
        student = index["scheduler"][1] != "DPMSolverMultistepScheduler"
        return Facts(config["scale"], frame_of(index["latent_space"]), index["default_num_inference_steps"], student)
    except (OSError, ValueError, LookupError, TypeError):
        pipeline = load()
    student = not isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    steps, space = pipeline.config.default_num_inference_steps, pipeline.config.latent_space
    return Facts(pipeline.transformer.config.scale, frame_of(space), steps, student)


def frame_of(latent_space: str | None) -> Frame:
    space = SPACES.get(latent_space or "")
    return space.frame if space else "flow"


def latents_path(output: Path, case: Case, stop: str | None = None) -> Path:
    """What the latent model made of a prompt: latents at a stop, or its own image at the end."""
    return output / "latents" / (f"{case.file}.png" if stop is None else f"{case.file}-{slug(stop)}.safetensors")


def slug(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name).strip("_.")


def _enlarge(small: torch.Tensor | None, scale: int, kind: str) -> torch.Tensor:
    assert small is not None
    if kind == "bicubic":
        return F.interpolate(small, scale_factor=scale, mode="bicubic").clamp(-1, 1)
    image = to_image(small)
    return to_tensor(image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS))


def _upscale_pipeline(name: str, workspace: Workspace) -> Callable[[torch.Tensor, Case], torch.Tensor]:
    pipe = DiffusionPipeline.from_pretrained(name if Path(name).exists() else repository(name)).to(workspace.device)
    pipe.set_progress_bar_config(disable=True)
    takes = inspect.signature(pipe.__call__).parameters
    if "image" not in takes:
        raise ValueError(f"baseline upscale:{name}: {type(pipe).__name__} takes no image")

    def larger(image: torch.Tensor, case: Case) -> torch.Tensor:
        text = {"prompt": case.caption} if "prompt" in takes else {}
        return to_tensor(pipe(image=to_image(image), generator=workspace.generator(case), **text).images[0])

    return larger


def _spandrel(name: str, device: str) -> Callable[[torch.Tensor, Case], torch.Tensor]:
    require("baseline spandrel", "iqa", "spandrel")
    from spandrel import ImageModelDescriptor, ModelLoader

    if not Path(name).is_file():
        raise ValueError(f"baseline spandrel:{name}: no such file")
    try:
        model = ModelLoader(device).load_from_file(name)
    except Exception as error:  # each of its architectures has errors of its own
        raise ValueError(f"baseline spandrel:{name}: no model that spandrel knows ({error})") from None
    if not isinstance(model, ImageModelDescriptor):
        raise ValueError(f"baseline spandrel:{name}: {type(model).__name__} does not make one image from one")
    model.eval()

    @torch.no_grad()
    def larger(image: torch.Tensor, case: Case) -> torch.Tensor:
        return model(image / 2 + 0.5).clamp(0, 1) * 2 - 1

    return larger


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begun
