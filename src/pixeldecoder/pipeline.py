"""Latents in, an image 4 or 8 times larger than their autoencoder's out: `PixelDecoderPipeline`."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchLCMScheduler
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pixeldecoder.convert import check_arguments, pipeline_settings
from pixeldecoder.latents import SPACES, ImageEncoder, add_noise, encode, unreachable
from pixeldecoder.models.adapter import LatentFeatures
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.plan import plan
from pixeldecoder.presets import HUB_REPOSITORY, PRESETS, RELEASED_LICENSE, find_preset, sampled_like
from pixeldecoder.text import PromptEncoder, encode_prompts
from pixeldecoder.tiling import tiled_velocity

logger = logging.get_logger(__name__)

NANO = Path(__file__).parent / "weights" / "nano"
_ONE = (type(None), str, torch.Generator)
STUDENT_TIMES = (0.999, 0.866, 0.634, 0.342, 0.0)


class PixelDecoderPipeline(DiffusionPipeline, SanaLoraLoaderMixin):  # the mixin knows only "transformer", as we need
    """Decodes latents with a pixel diffusion model (PiD, arXiv 2605.23902).

    LoRA as elsewhere in diffusers: `load_lora_weights`, `set_adapters(name, strength)`, `fuse_lora`.

    Args:
        transformer: the network.
        scheduler: `FlowMatchLCMScheduler(shift=1)` samples a student as released (SDE);
            `FlowMatchEulerDiscreteScheduler(shift=1)` without fresh noise (ODE); `teacher_scheduler()` a network that
            is not distilled.
        text_encoder, tokenizer: Gemma-2, for networks with text, if it is to be saved and moved with them.
        encoder: image to normalised latents, if images are to be encoded here.
        default_num_inference_steps, default_guidance_scale: what the network was made for.
        latent_space: whose latents it decodes, a key of `pixeldecoder.latents.SPACES`, if that is known: weights do not
            tell "flux", "sd3" and "qwenimage" apart.
        license: of the weights, which is printed once when they are loaded.
        trained_size: side in pixels of the largest square image that the network is made for; larger ones are tiled.

    Attributes:
        prompt_encoder: `PromptEncoder`, for prompts where there is no `text_encoder`: Gemma-2 from the Hub, loaded at
            the first prompt. Replace it to have it cached, quantised or elsewhere.
    """

    model_cpu_offload_seq = "text_encoder->encoder->transformer"
    _optional_components = ["text_encoder", "tokenizer", "encoder"]
    _callback_tensor_inputs = ["image"]

    def __init__(
        self,
        transformer: PixelDecoderTransformer2DModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        encoder: TinyLatentEncoder | None = None,
        default_num_inference_steps: int = 4,
        default_guidance_scale: float = 1.0,
        latent_space: str | None = None,
        license: str | None = None,
        trained_size: int | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            encoder=encoder,
        )
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            latent_space=latent_space,
            license=license,
            trained_size=trained_size,
        )
        self.prompt_encoder = PromptEncoder()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "PixelDecoderPipeline":
        """Load "nano" (bundled), a released name (from the Hub), a checkpoint file, a folder or a Hub id.

        Args:
            pretrained_model_name_or_path: see above; released names are the keys of `pixeldecoder.presets.PRESETS`.
            kwargs: `torch_dtype`, and whatever diffusers' `from_pretrained` takes. For a checkpoint file also
                `preset=` (a released name) and arguments of the model that its tensors do not tell.

        Raises:
            ValueError: a name that is none of these, or a file that is no checkpoint.
        """
        name = str(pretrained_model_name_or_path)
        if name in PRESETS:
            from huggingface_hub import hf_hub_download

            try:
                path = hf_hub_download(HUB_REPOSITORY, PRESETS[name].filename)
            except OSError as error:
                raise unreachable(f"{HUB_REPOSITORY}/{PRESETS[name].filename}", error) from None
            return cls.from_single_file(path, preset=name, **kwargs)
        if Path(name).is_file():
            return cls.from_single_file(name, **kwargs)
        if name != "nano" and not Path(name).is_dir() and name.count("/") != 1:
            raise ValueError(
                f'no decoder "{name}": expected "nano", a folder, a checkpoint file, a Hub id (owner/name) or one of '
                f"the released names {', '.join(PRESETS)}"
            )
        try:
            pipeline = super().from_pretrained(NANO if name == "nano" else name, **kwargs)
        except OSError as error:
            if name == "nano" or Path(name).is_dir():
                raise
            raise unreachable(name, error) from None
        if pipeline.config.license:
            _print_license(name, pipeline.config.license)
        return pipeline

    @classmethod
    def from_single_file(
        cls, path: str | Path, preset: str | None = None, torch_dtype: torch.dtype | None = None, **overrides
    ) -> "PixelDecoderPipeline":
        """Load a checkpoint in the reference's format; see `PixelDecoderTransformer2DModel.from_single_file`."""
        transformer = PixelDecoderTransformer2DModel.from_single_file(path, preset, torch_dtype, **overrides)
        settings: dict[str, Any] = {} if preset else pipeline_settings(path)
        if settings:
            check_arguments(cls, settings, path)
        else:
            known = find_preset(path, preset)
            like = known or sampled_like(path, is_prior=transformer.adapter is None)
            if like is None:
                logger.warning(f"{path}: nothing tells how it is sampled: taken for a student of 1 to 4 steps")
            distilled = like is None or like.distilled
            settings["scheduler"] = FlowMatchLCMScheduler(shift=1.0) if distilled else teacher_scheduler()
            if like is not None:
                settings["default_num_inference_steps"] = like.num_inference_steps
                settings["default_guidance_scale"] = like.guidance_scale
            if known is not None:
                settings |= dict(latent_space=known.latent_space, trained_size=known.trained_size)
                settings["license"] = RELEASED_LICENSE
        if settings.get("license"):
            _print_license(str(path), settings["license"])
        return cls(transformer, **settings)

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        sigma: float | Sequence[float] | torch.Tensor = 0.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image",),
        tile_size: int | Literal["auto"] | None = "auto",
        tile_overlap: int | None = None,
        chunk_size: int | None = None,
        max_memory: int | str | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Decode latents.

        Args:
            latents: normalised latents (B, C, h, w) or (C, h, w), as the latent diffusion model denoises them: not what
                its autoencoder's `decode` takes. `None` for a prior, which makes images from text alone.
            prompt, negative_prompt: one, or one for each image; ignored by a network without text.
            sigma: noise level of the latents in [0, 1], one, or one for each image: 0 for finished latents,
                `scheduler.sigmas[K]` for latents taken from a flow model after K steps.
            num_inference_steps: 1 to 4 for a student; by default what the decoder was made for.
            guidance_scale: on text alone; 1 runs the network once a step.
            generator: of all noise, initial and in between; a list gives each image its own, and then the same image
                as when it is decoded alone, and makes as many images of a prior without text.
            prompt_embeds, negative_prompt_embeds: (B or 1, T, Dt), in place of prompts.
            sigmas: times in (0, 1], falling, in place of the student's own; the last step ends at 0.
            height, width: of a prior's image in pixels; with latents the size follows from theirs.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1].
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"image": x})`, x unclamped
                (B, 3, H, W); an "image" in the dictionary that it returns replaces x.
            tile_size: side in pixels of the tiles in which the velocity is predicted, at every step on one canvas of
                noise; `None` for the whole image at once. "auto" tiles what is larger than the network is made for, or
                than the memory allows.
            tile_overlap: pixels that neighbouring tiles share, by default 64.
            chunk_size: patches that the network works on at a time, apart from attention; by default what suits the
                device and the memory.
            max_memory: bytes, or a string such as "6GB", that all of it may take; by default what is free.

        Returns:
            `ImagePipelineOutput`, or a tuple of the images.

        Raises:
            ValueError: inputs that do not fit the network, or an image that does not fit the memory; the message says
                what was expected and what came.
        """
        config = self.transformer.config
        device = self._execution_device
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type is {output_type!r}: expected "pil", "np" or "pt"')
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: expected some of ['image'], got {sorted(unknown)}")
        if latents is not None:
            latents = self._check_latents(latents)
            batch = len(latents)
            cell = config.scale * config.latent_downscale_factor
            size = latents.shape[-2] * cell, latents.shape[-1] * cell
            # Patches of several cells: pad to whole ones, and crop the image.
            cells = config.patch_size // math.gcd(cell, config.patch_size)
            padding = [-side % cells for side in latents.shape[-2:]]
            latents = F.pad(latents, (0, padding[1], 0, padding[0]), mode="replicate")
            height, width = (side * cell for side in latents.shape[-2:])
        elif config.latent_channels is not None:
            raise ValueError(f"expected latents of shape (B, {config.latent_channels}, h, w), got none")
        else:
            height, width = size = self._check_size(height, width)
            several = next((given for given in (prompt_embeds, prompt, generator) if not isinstance(given, _ONE)), [0])
            batch = len(several)
        sigma = self._check_sigma(sigma, batch, device)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"expected one generator, or one for each of {batch} images, got {len(generator)}")
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        guide = guidance_scale != 1 and config.text_embed_dim is not None
        embeds = self._prompt_embeds(prompt, prompt_embeds, batch, "prompt")
        if guide:
            negative = self._prompt_embeds(negative_prompt or "", negative_prompt_embeds, batch, "negative_prompt")

        layout = plan(
            self.transformer, height, width, batch, 0 if embeds is None else embeds.shape[1], tile_size=tile_size,
            tile_overlap=tile_overlap, chunk_size=chunk_size, max_memory=max_memory,
            trained_size=self.config.trained_size, device=device,
        )  # fmt: skip

        _tell_plan(str(layout))

        # Sampling works in float32 whatever the dtype of the network (method: Sampling).
        image = randn_tensor((batch, 3, height, width), generator=generator, device=device, dtype=torch.float32)
        features = None
        if latents is not None:
            features = self.transformer.encode_latents(latents.to(device), height, width)
        rotary = self.transformer.image_rotary(layout.tiles.height, layout.tiles.width, device)
        scheduler = self._set_times(num_inference_steps, sigmas, height, width, device)

        def velocity(
            image: torch.Tensor, features: LatentFeatures | None, time: torch.Tensor, text: torch.Tensor | None
        ) -> torch.Tensor:
            return self.transformer(
                image, time, text, sigma=sigma, latent_features=features, chunk_size=layout.chunk_size,
                image_rotary_emb=rotary, return_dict=False,
            )[0].float()  # fmt: skip

        def guided(image: torch.Tensor, features: LatentFeatures | None) -> torch.Tensor:
            v = velocity(image, features, time, embeds)
            if not guide:
                return v
            v_u = velocity(image, features, time, negative)  # without text alone: the latents are present in both
            return v_u + guidance_scale * (v - v_u)

        aux_pixels = config.patch_size // config.scale
        with self.progress_bar(total=len(scheduler.timesteps) * layout.tiles.count) as progress:
            for step, timestep in enumerate(scheduler.timesteps):
                # Not `timestep`, which DPM-Solver++ rounds to an integer.
                time = 1000 * scheduler.sigmas[step]
                if layout.tiled:
                    v = tiled_velocity(
                        guided, image, features, layout.tiles, config.patch_size, aux_pixels, progress.update
                    )
                else:
                    v = guided(image, features)
                    progress.update()
                if isinstance(scheduler, FlowMatchLCMScheduler):
                    image = lcm_step(v, image, scheduler.sigmas[step], scheduler.sigmas[step + 1], generator)
                else:
                    image = scheduler.step(v, timestep, image, return_dict=False)[0]
                del v
                if callback_on_step_end is not None:
                    image = (callback_on_step_end(self, step, timestep, {"image": image}) or {}).get("image", image)

        del features
        image = image[..., : size[0], : size[1]]
        images = postprocess(image, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode_image(self, image: Image.Image | torch.Tensor, encoder: ImageEncoder | None = None) -> torch.Tensor:
        """Image -> normalised latents.

        Args:
            image: a picture, or a tensor (B, 3, H, W) in [-1, 1]; sides that are no multiples of a latent cell are
                padded by repeating the edge.
            encoder: of the decoder's latent space, from `pixeldecoder.latents.load_image_encoder`; by default the
                pipeline's own.

        Returns:
            Latents (B, C, ceil(H / f), ceil(W / f)).

        Raises:
            ValueError: no encoder, one of another latent space or for other sizes, or an image of less than 16 px.
        """
        config = self.transformer.config
        own = self.encoder
        if encoder is None and own is not None:
            encoder = lambda x: encode(own, x.to(own.device, own.dtype)).float()  # noqa: E731
        if encoder is None:
            known = SPACES.get(self.config.latent_space or "")
            example = f', such as load_image_encoder("{known.encoder}")' if known else ""
            raise ValueError(f"this decoder has no encoder of its own: give one for its latent space{example}")
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
        height, width = image.shape[-2:]
        if min(height, width) < 16:
            raise ValueError(f"expected an image of at least 16 x 16 pixels, got {width} x {height}")
        cell = config.latent_downscale_factor
        image = F.pad(image, (0, -width % cell, 0, -height % cell), mode="replicate")
        latents = encoder(image.to(self._execution_device))
        expected = (len(image), config.latent_channels, *(side // cell for side in image.shape[-2:]))
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"of an image of {width} x {height} pixels the encoder makes latents {tuple(latents.shape)}, but the "
                f"decoder expects {expected}: it is of another latent space, or for images of one size only"
            )
        return latents

    def upscale(
        self,
        image: Image.Image,
        sigma: float = 0.0,
        noise_generator: torch.Generator | None = None,
        encoder: ImageEncoder | None = None,
        **kwargs,
    ) -> ImagePipelineOutput:
        """Encode an image and decode it larger.

        Args:
            image: a picture of at least 16 x 16 pixels.
            sigma: how much noise, in [0, 1], is really added to the latents, in the frame of their space; more of it
                invents more.
            noise_generator: of that noise alone, so that another sigma leaves the sampler's noise as it is.
            encoder: as in `encode_image`.
            kwargs: for `__call__`.

        Returns:
            As `__call__`, the image exactly `scale` times the size of the input.
        """
        levels = self._check_sigma(sigma, 1, torch.device("cpu"))
        cell, scale = self.transformer.config.latent_downscale_factor, self.transformer.config.scale
        layout = {
            key: kwargs[key] for key in ("tile_size", "tile_overlap", "chunk_size", "max_memory") if key in kwargs
        }
        height, width = (-(-side // cell) * cell * scale for side in (image.height, image.width))
        # What does not fit is refused before the image is encoded.
        plan(
            self.transformer, height, width, trained_size=self.config.trained_size, device=self._execution_device,
            **layout,
        )  # fmt: skip
        latents = self.encode_image(image, encoder)
        if sigma > 0:
            noise = randn_tensor(latents.shape, generator=noise_generator, device=latents.device, dtype=latents.dtype)
            space = SPACES.get(self.config.latent_space or "")
            latents = add_noise(latents, noise, levels, space.frame if space else "flow")
        images = self(latents, sigma=float(levels), **kwargs).images
        height, width = image.height * scale, image.width * scale
        if isinstance(images, list):
            images = [picture.crop((0, 0, width, height)) for picture in images]
        else:
            images = images[:, :height, :width] if isinstance(images, np.ndarray) else images[..., :height, :width]
        return ImagePipelineOutput(images=images)

    def _check_latents(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.transformer.config
        if config.latent_channels is None:
            raise ValueError("this network is a text-to-image prior: it takes no latents")
        latents = latents[None] if latents.ndim == 3 else latents
        if latents.ndim != 4 or latents.shape[1] != config.latent_channels or not latents.numel():
            raise ValueError(
                f"expected latents of shape (B, {config.latent_channels}, h, w), got {tuple(latents.shape)}: this "
                "decoder is for another latent space, or the latents are packed or unpacked differently"
            )
        if not latents.isfinite().all():
            raise ValueError(
                f"expected finite latents, {int((~latents.isfinite()).sum())} of {latents.numel()} values are NaN or "
                "infinite: the model that made them overflowed; try bfloat16 or float32 there"
            )
        return latents

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        patch = self.transformer.config.patch_size
        if not height or not width or height % patch or width % patch or min(height, width) < patch:
            raise ValueError(f"expected height and width in pixels, multiples of {patch}, got {height} x {width}")
        return height, width

    @staticmethod
    def _check_sigma(sigma: float | Sequence[float] | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
        values = torch.as_tensor(sigma, dtype=torch.float32, device=device)
        if values.ndim > 1 or values.numel() not in (1, batch):
            raise ValueError(f"expected one sigma, or one for each of {batch} images, got shape {tuple(values.shape)}")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"expected sigma in [0, 1], got {values.tolist()}")
        return values.reshape(-1).expand(batch)

    def _prompt_embeds(
        self, prompt: str | list[str] | None, embeds: torch.Tensor | None, batch: int, name: str
    ) -> torch.Tensor | None:
        width = self.transformer.config.text_embed_dim
        if width is None:
            return None
        if embeds is None:
            if prompt is None:
                raise ValueError(f"this decoder reads text: expected {name} or {name}_embeds (B, T, {width}), got none")
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if self.text_encoder is None or self.tokenizer is None:
                embeds = self.prompt_encoder(prompts, self._execution_device)
            else:
                embeds = encode_prompts(prompts, self.tokenizer, self.text_encoder)
        if embeds.ndim != 3 or embeds.shape[2] != width or len(embeds) not in (1, batch):
            raise ValueError(f"expected {name}_embeds of shape (1 or {batch}, T, {width}), got {tuple(embeds.shape)}")
        return embeds.to(self._execution_device).expand(batch, -1, -1)

    def _set_times(
        self, steps: int | None, sigmas: Sequence[float] | None, height: int, width: int, device: torch.device
    ) -> SchedulerMixin:
        """The scheduler, set to the teacher's or the student's times."""
        steps = steps if steps is not None else len(sigmas) if sigmas else self.config.default_num_inference_steps
        scheduler = self.scheduler
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            if sigmas is not None or steps < 1:
                raise ValueError(f"DPM-Solver++ takes a number of steps, at least 1, got {steps=} and {sigmas=}")
            shift = 6 * math.sqrt(math.sqrt(height * width) / 2048)
            scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, flow_shift=shift)
            scheduler.set_timesteps(steps, device=device)
        else:
            times = list(sigmas) if sigmas is not None else student_times(steps)
            if len(times) != steps or sorted(times, reverse=True) != times or not all(0 < t <= 1 for t in times):
                raise ValueError(f"expected {steps} falling sigmas in (0, 1], got {times}")
            scheduler.set_timesteps(sigmas=times, device=device)
        scheduler.set_begin_index(0)
        return scheduler


def postprocess(image: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list[Image.Image]:
    """Image (B, 3, H, W) in [-1, 1] -> "pt", "np" or "pil", as diffusers' `VaeImageProcessor`, with one copy."""
    image = (image * 0.5).add_(0.5).clamp_(0, 1)
    if output_type == "pt":
        return image
    if output_type == "np":
        return image.cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in image.mul_(255).round_().to(torch.uint8)]


def lcm_step(
    velocity: torch.Tensor,
    image: torch.Tensor,
    t: torch.Tensor,
    t_next: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
) -> torch.Tensor:
    """x0 = x - t v, then (1 - t') x0 + t' noise (method: Sampling), overwriting the velocity.

    The same numbers as `FlowMatchLCMScheduler.step`, whose seven tensors as large as the image would be the peak of a
    tiled decode; here are three.
    """
    noise = randn_tensor(image.shape, generator=generator, device=image.device, dtype=torch.float32)
    return velocity.mul_(-t).add_(image).mul_(1 - t_next).add_(noise.mul_(t_next))


@functools.cache
def _tell_plan(text: str) -> None:
    """Once for each size and process."""
    logger.info(text)


@functools.cache
def _print_license(name: str, license: str) -> None:
    """Once for each checkpoint and process."""
    logger.warning(f"{name}: {license}")


def student_times(steps: int) -> list[float]:
    """The distilled student's times for 1 to 4 steps, without the closing 0 (method: Sampling)."""
    if not 1 <= steps <= 4:
        raise ValueError(f"a distilled decoder takes 1 to 4 steps, got {steps}: more is not what it learned")
    if steps == 1:
        return [1.0]
    return [STUDENT_TIMES[i] for i in np.linspace(0, 4, steps + 1).round().astype(int)[:-1]]


def teacher_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M on the flow schedule; the pipeline sets its shift by the image size."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
