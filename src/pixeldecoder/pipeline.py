"""Latents in, an image 4 or 8 times larger than their autoencoder's out: `PixelDecoderPipeline`."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchLCMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pixeldecoder.latents import SPACES, ImageEncoder, add_noise, encode, unreachable
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.presets import HUB_REPOSITORY, PRESETS, RELEASED_LICENSE, find_preset
from pixeldecoder.text import PromptEncoder, encode_prompts

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
        )
        self.prompt_encoder = PromptEncoder()
        self.image_processor = VaeImageProcessor(do_resize=False)

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
        known = find_preset(path, preset)
        transformer = PixelDecoderTransformer2DModel.from_single_file(path, preset, torch_dtype, **overrides)
        if known is None:
            return cls(transformer, FlowMatchLCMScheduler(shift=1.0))
        _print_license(known.name, RELEASED_LICENSE)
        return cls(
            transformer,
            FlowMatchLCMScheduler(shift=1.0) if known.distilled else teacher_scheduler(),
            default_num_inference_steps=known.num_inference_steps,
            default_guidance_scale=known.guidance_scale,
            latent_space=known.latent_space,
            license=RELEASED_LICENSE,
        )

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

        Returns:
            `ImagePipelineOutput`, or a tuple of the images.

        Raises:
            ValueError: inputs that do not fit the network; the message says what was expected and what came.
        """
        config = self.transformer.config
        device = self._execution_device
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type is {output_type!r}: expected "pil", "np" or "pt"')
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: expected some of ['image'], got {sorted(unknown)}")
        if latents is not None:
            latents, height, width = self._check_latents(latents)
            batch = len(latents)
        elif config.latent_channels is not None:
            raise ValueError(f"expected latents of shape (B, {config.latent_channels}, h, w), got none")
        else:
            height, width = self._check_size(height, width)
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

        # Sampling works in float32 whatever the dtype of the network (method: Sampling).
        image = randn_tensor((batch, 3, height, width), generator=generator, device=device, dtype=torch.float32)
        features = None
        if latents is not None:
            features = self.transformer.encode_latents(latents.to(device), height, width)
        scheduler = self._set_times(num_inference_steps, sigmas, height, width, device)
        step_kwargs = {} if isinstance(scheduler, DPMSolverMultistepScheduler) else {"generator": generator}

        def velocity(time: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
            output = self.transformer(image, time, text, sigma=sigma, latent_features=features, return_dict=False)
            return output[0].float()

        with self.progress_bar(total=len(scheduler.timesteps)) as progress:
            for step, timestep in enumerate(scheduler.timesteps):
                # Not `timestep`, which DPM-Solver++ rounds to an integer.
                time = 1000 * scheduler.sigmas[step]
                v = velocity(time, embeds)
                if guide:  # on text alone: the latents are present in both
                    v_u = velocity(time, negative)
                    v = v_u + guidance_scale * (v - v_u)
                image = scheduler.step(v, timestep, image, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    image = (callback_on_step_end(self, step, timestep, {"image": image}) or {}).get("image", image)
                progress.update()

        images = self.image_processor.postprocess(image.clamp(-1, 1), output_type=output_type)
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
        latents = self.encode_image(image, encoder)
        if sigma > 0:
            noise = randn_tensor(latents.shape, generator=noise_generator, device=latents.device, dtype=latents.dtype)
            space = SPACES.get(self.config.latent_space or "")
            latents = add_noise(latents, noise, levels, space.frame if space else "flow")
        output_type = kwargs.pop("output_type", "pil")
        scale = self.transformer.config.scale
        images = self(latents, sigma=float(levels), output_type="pt", **kwargs).images
        images = images[..., : image.height * scale, : image.width * scale]
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return ImagePipelineOutput(images=VaeImageProcessor.numpy_to_pil(images) if output_type == "pil" else images)

    def _check_latents(self, latents: torch.Tensor) -> tuple[torch.Tensor, int, int]:
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
        cell = config.scale * config.latent_downscale_factor
        height, width = (side * cell for side in latents.shape[-2:])
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"latents of {tuple(latents.shape[-2:])} make an image of {height} x {width} pixels, which patches of "
                f"{config.patch_size} do not tile: pad them to multiples of {config.patch_size // cell}"
            )
        return latents, height, width

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
