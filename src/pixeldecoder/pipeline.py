"""Latents in, an image 4 or 8 times larger than their autoencoder's out: `PixelDecoderPipeline`."""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pixeldecoder.autoencoders import ImageEncoder, encode
from pixeldecoder.calls import Call, CallsMixin, Interrupted
from pixeldecoder.flow import add_noise
from pixeldecoder.latents import SPACES, normalise, unpack_tokens
from pixeldecoder.loading import LoadedPipeline
from pixeldecoder.models.adapter import LatentFeatures
from pixeldecoder.models.encoder import TinyLatentEncoder
from pixeldecoder.models.finite import first_not_finite
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import read, to_tensor
from pixeldecoder.plan import Limits, Plan, encode_in_tiles, plan, within_memory
from pixeldecoder.sampler import Velocity, check_steps, sample, set_times
from pixeldecoder.text import PromptEncoder, encode_prompts

logger = logging.get_logger(__name__)

OVERSHOOT = 1.5
"""What a sharp resize may make of a picture in [-1, 1]."""
_ONE = (type(None), str, torch.Generator)
_TEXTS = ("latent_space", "license", "default_negative_prompt", "encoder_name")


class PixelDecoderPipeline(LoadedPipeline, CallsMixin, SanaLoraLoaderMixin):  # which knows only "transformer"
    """Decodes latents with a pixel diffusion model (PiD, arXiv 2605.23902).

    LoRA as elsewhere in diffusers: `load_lora_weights`, `set_adapters(name, strength)`, `fuse_lora`. One pipeline may
    be called from several threads at a time.

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
        default_negative_prompt: what guidance leads away from where no negative prompt is given.
        encoder_name: what made the latents in training, as `pixeldecoder.autoencoders.load_image_encoder` takes it; the
            command uses it where there is no `encoder`.

    Attributes:
        guidance_scale, num_timesteps, interrupt: of the running call. As in diffusers, a callback may set
            `pipe._guidance_scale`, for the next steps, and `pipe._interrupt = True`: the call then returns the image as
            far as it is. Set by another thread than a call's, they reach all that run.
        prompt_encoder: `PromptEncoder`, for prompts where there is no `text_encoder`: Gemma-2 from the Hub, loaded at
            the first prompt. Replace it to have it cached, quantised or elsewhere.
    """

    model_cpu_offload_seq = "text_encoder->encoder->transformer"
    _optional_components = ["text_encoder", "tokenizer", "encoder"]
    _callback_tensor_inputs = ["image", "x0"]

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
        default_negative_prompt: str = "",
        encoder_name: str | None = None,
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
            default_negative_prompt=default_negative_prompt,
            encoder_name=encoder_name,
        )
        for name in ("default_num_inference_steps", "trained_size", *_TEXTS):  # which a stranger's file may say
            value, kind = self.config[name], "a text" if name in _TEXTS else "a whole number, at least 1"
            fits = isinstance(value, str) if name in _TEXTS else isinstance(value, int) and value > 0
            if value is not None and not fits:
                raise ValueError(f"{name} is {value!r:.100}: expected {kind}")
        self.prompt_encoder = PromptEncoder()
        self._calls: dict[int, Call] = {}  # the last one of each thread

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
        denormalized: bool = False,
        noise: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Decode latents.

        Args:
            latents: normalised latents (B, C, h, w) or (C, h, w), as the latent diffusion model denoises them, or its
                packed ones, (B, n, C) or (B, n, 4 C), with `height` and `width`. `None` for a prior, which makes images
                from text alone.
            prompt, negative_prompt: one, or one for each image; ignored by a network without text.
            sigma: noise level of the latents in [0, 1], one, or one for each image: 0 for finished latents,
                `scheduler.sigmas[K]` for latents taken from a flow model after K steps.
            num_inference_steps: 1 to 4 for a student; by default what the decoder was made for.
            guidance_scale: on text alone; 1 and less, as elsewhere in diffusers, is none: the network runs once a step.
            generator: of all noise, initial and in between; a list gives each image its own, and then the same image
                as when it is decoded alone, and makes as many images of a prior without text.
            prompt_embeds, negative_prompt_embeds: (B or 1, T, Dt), in place of prompts.
            sigmas: times in (0, 1], falling, in place of the student's own; the last step ends at 0.
            height, width: in pixels, of a prior's image, or of the latent model's image where latents are packed;
                otherwise the size follows from that of the latents.
            output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1]; or "latent", which is diffusers'
                word for what the sampler leaves as it is: (B, 3, H, W) float32, about [-1, 1] but not clamped.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"image": x})`, x unclamped
                (B, 3, H, W); an "image" in the dictionary that it returns replaces x.
            callback_on_step_end_tensor_inputs: what it gets: "image"; "x0", what the step expects the finished image to
                be, as large; or () for nothing.
            tile_size: side in pixels of the tiles in which the velocity is predicted, at every step on one canvas of
                noise; `None` for the whole image at once. "auto" tiles what is larger than the network is made for, or
                than the memory allows.
            tile_overlap: pixels that neighbouring tiles share, by default 64.
            chunk_size: patches that the network works on at a time, apart from attention; by default what suits the
                device and the memory.
            max_memory: bytes, or a string such as "6GB", that all of it may take; by default what is free.
            denormalized: the latents are what an autoencoder's `decode` takes, and are normalised here by the numbers
                of the decoder's `latent_space`.
            noise: N(0, 1) to start from, (B, 3, H, W) in whole patches, in place of the generator's; a student's noise
                between steps is the generator's still.
            attention_kwargs: for the network: {"scale": s} is the strength of its LoRA.

        Returns:
            `ImagePipelineOutput`, or a tuple of the images.

        Raises:
            ValueError: inputs that do not fit the network, an image that does not fit the memory, or one that is not
                finite, as float16 may overflow; the message says what was expected and what came.
        """
        device = self._execution_device
        wanted = self._check_output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        given = generator if isinstance(generator, list) else [generator]
        if not all(isinstance(one, torch.Generator | None) for one in given):
            raise ValueError(f"expected a torch.Generator, or a list with one for each image, got {generator!r}")
        size = None
        if latents is not None or self.transformer.config.latent_channels is not None:
            latents, size = self._pad(self.check_latents(latents, height, width, denormalized))
            batch, cell = len(latents), self.transformer.config.scale * self.transformer.config.latent_downscale_factor
            height, width = (side * cell for side in latents.shape[-2:])
        else:
            height, width = size = self._check_size(height, width)
            sources = (noise, prompt_embeds, prompt, generator)
            batch = len(next((several for several in sources if not isinstance(several, _ONE)), [0]))
        sigma = self._check_sigma(sigma, batch, device)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"expected one generator, or one for each of {batch} images, got {len(generator)}")
        if noise is not None:
            self._check_noise(noise, (batch, 3, height, width))
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = self.config.default_negative_prompt
        if num_inference_steps is None and sigmas is None:
            num_inference_steps = self.config.default_num_inference_steps
        scheduler = set_times(self.scheduler, num_inference_steps, sigmas, height, width, device)

        @functools.cache
        def negative() -> torch.Tensor | None:
            return self._prompt_embeds(negative_prompt, negative_prompt_embeds, batch, "negative_prompt")

        with self._running(guidance_scale, len(scheduler.timesteps)) as call:
            embeds = self._prompt_embeds(prompt, prompt_embeds, batch, "prompt")
            if self.guides(call.guidance_scale):
                negative()
            generators = [one for one in given if one is not None]
            states = [one.get_state() for one in generators]

            def start() -> torch.Tensor:
                for one, state in zip(generators, states, strict=True):
                    one.set_state(state)  # as at the first try
                if noise is not None:
                    return noise.to(device, torch.float32)
                # Sampling works in float32 whatever the dtype of the network.
                return randn_tensor((batch, 3, height, width), generator=generator, device=device, dtype=torch.float32)

            def denoise(callback: Callable[..., dict[str, Any]] | None) -> torch.Tensor:
                return self._denoise(
                    call, start(), latents, sigma, embeds, negative, copy.deepcopy(scheduler), generator,
                    attention_kwargs, callback, wanted,
                )  # fmt: skip

            def plan_for(memory: int | str | None) -> Plan:
                return plan(
                    self.transformer, height, width, batch, 0 if embeds is None else embeds.shape[1],
                    Limits(tile_size, tile_overlap, chunk_size, memory),
                    trained_size=self.config.trained_size, device=device,
                )  # fmt: skip

            def run(layout: Plan) -> torch.Tensor:
                call.layout = layout
                _tell_plan(layout)
                return denoise(callback_on_step_end)

            image = within_memory(plan_for, run, device, max_memory)[..., : size[0], : size[1]]
            if not image.isfinite().all():
                first = first_not_finite({"transformer": self.transformer}, lambda: denoise(None))
                raise ValueError(_not_finite(image, self.transformer.dtype, first))
        images = postprocess(image, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(
        self,
        call: Call,
        image: torch.Tensor,
        latents: torch.Tensor | None,
        sigma: torch.Tensor,
        embeds: torch.Tensor | None,
        negative: Callable[[], torch.Tensor | None],
        scheduler: SchedulerMixin,
        generator: torch.Generator | list[torch.Generator] | None,
        attention_kwargs: dict[str, Any] | None,
        callback: Callable[..., dict[str, Any]] | None,
        wanted: set[str],
    ) -> torch.Tensor:
        """Noise (B, 3, H, W), float32 whatever the dtype of the network, to an image, as `call.layout` cuts it."""
        layout = call.layout
        assert layout is not None
        with self.progress_bar(total=len(scheduler.timesteps) * layout.tiles.count) as progress:
            network = Velocity(
                self.transformer, sigma, self._features(latents, sigma, layout, attention_kwargs), embeds, negative,
                lambda: call.guidance_scale if self.guides(call.guidance_scale) else None,
                layout.tiles, layout.chunk_size,
                self.transformer.image_rotary(layout.tiles.height, layout.tiles.width, image.device), attention_kwargs,
                call.check_interrupt, progress.update,
            )  # fmt: skip
            steps = sample(network, image, scheduler, generator, "x0" in wanted)
            with suppress(Interrupted):
                for step, timestep, image, x0 in steps:
                    if callback is not None:
                        tensors = {name: value for name, value in (("image", image), ("x0", x0)) if name in wanted}
                        image.copy_((callback(self, step, timestep, tensors) or {}).get("image", image))
                        del tensors
                    del x0  # before the next step
        return image

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Prompts -> `prompt_embeds` and `negative_prompt_embeds`, (B, T, Dt), for a call.

        Args:
            do_classifier_free_guidance: whether the call will be guided; otherwise there are no negative ones. By
                default what the decoder was made for.

        Returns:
            Two `None` for a decoder without text.
        """
        if self.transformer.config.text_embed_dim is None:
            return None, None
        if do_classifier_free_guidance is None:
            do_classifier_free_guidance = self.guides()
        embeds = self._encode(prompt)
        if not do_classifier_free_guidance:
            return embeds, None
        if negative_prompt is None:
            negative_prompt = self.config.default_negative_prompt
        return embeds, self._encode(negative_prompt)

    @torch.no_grad()
    def encode_image(
        self,
        image: Image.Image | torch.Tensor,
        encoder: ImageEncoder | None = None,
        max_memory: int | str | None = None,
    ) -> torch.Tensor:
        """Image -> normalised latents.

        Args:
            image: a picture in any mode (what is transparent is taken on white), or a tensor (B, 3, H, W) in [-1, 1];
                sides that are no multiples of a latent cell are
                padded by repeating the edge.
            encoder: of the decoder's latent space, from `pixeldecoder.autoencoders.load_image_encoder`; by default the
                pipeline's own.
            max_memory: as in `__call__`; what an encoder would exceed it with is encoded in tiles.

        Returns:
            Latents (B, C, ceil(H / f), ceil(W / f)).

        Raises:
            ValueError: no picture, or one of less than 16 px; no encoder, one of another latent space or for other
                sizes; or too little memory.
        """
        config = self.transformer.config
        autoencoder, device = getattr(encoder, "autoencoder", None), self._execution_device
        if encoder is None and (own := self.encoder) is not None:
            autoencoder, device = own, self._device_of(own)
            encoder = lambda x: encode(own, x.to(own.dtype)).float()  # noqa: E731
        if encoder is None:
            known = SPACES.get(self.config.latent_space or "")
            example = f', such as load_image_encoder("{known.encoder}")' if known else ""
            raise ValueError(f"this decoder has no encoder of its own: give one for its latent space{example}")
        image = _picture_tensor(image)
        height, width = image.shape[-2:]
        if min(height, width) < 16:
            raise ValueError(f"expected an image of at least 16 x 16 pixels, got {width} x {height}")
        cell = config.latent_downscale_factor
        image = F.pad(image, (0, -width % cell, 0, -height % cell), mode="replicate").to(device)

        def checked(part: torch.Tensor) -> torch.Tensor:
            latents = encoder(part)
            expected = (len(part), config.latent_channels, *(side // cell for side in part.shape[-2:]))
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"of an image of {width} x {height} pixels the encoder makes latents {tuple(latents.shape)}, but "
                    f"the decoder expects {expected}: it is of another latent space, or for images of one size only"
                )
            return latents

        return encode_in_tiles(checked, autoencoder, image, cell, max_memory)

    def prepare(
        self,
        image: Image.Image | torch.Tensor,
        sigma: float = 0.0,
        noise_generator: torch.Generator | None = None,
        encoder: ImageEncoder | None = None,
        max_memory: int | str | None = None,
    ) -> torch.Tensor:
        """Image -> normalised latents with noise of level sigma in [0, 1], in the frame of their space; otherwise as
        `encode_image`."""
        level = self._check_sigma(sigma, 1, torch.device("cpu"))
        latents = self.encode_image(image, encoder, max_memory)
        if level > 0:
            noise = randn_tensor(latents.shape, generator=noise_generator, device=latents.device, dtype=latents.dtype)
            space = SPACES.get(self.config.latent_space or "")
            latents = add_noise(latents, noise, level, space.frame if space else "flow")
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
            image: a picture in any mode, of at least 16 x 16 pixels. Its alpha is enlarged apart, by Lanczos, and is
                that of the image for `output_type="pil"`.
            sigma: how much noise, in [0, 1], is really added to the latents, in the frame of their space; more of it
                invents more.
            noise_generator: of that noise alone, so that another sigma leaves the sampler's noise as it is.
            encoder: as in `encode_image`.
            kwargs: for `__call__`.

        Returns:
            As `__call__`, the image exactly `scale` times the size of the input.
        """
        if not isinstance(image, Image.Image):
            raise ValueError(f"expected a picture, as PIL's Image.open gives it, got {_described(image)}")
        level = float(self._check_sigma(sigma, 1, torch.device("cpu")))
        picture = read(image)
        image = picture.rgb
        limits = Limits(**{field.name: kwargs[field.name] for field in fields(Limits) if field.name in kwargs})
        self.check_enlarging(image.size, limits)
        latents = self.prepare(image, level, noise_generator, encoder, limits.max_memory)
        images = self(latents, sigma=level, denormalized=False, **kwargs)[0]
        height, width = (side * self.transformer.config.scale for side in (image.height, image.width))
        if isinstance(images, list):
            images = [picture.with_alpha(enlarged.crop((0, 0, width, height))) for enlarged in images]
        else:
            images = images[:, :height, :width] if isinstance(images, np.ndarray) else images[..., :height, :width]
        return ImagePipelineOutput(images=images) if kwargs.get("return_dict", True) else (images,)

    def check_enlarging(self, size: tuple[int, int], limits: Limits) -> None:
        """Raises ValueError if a picture of that width and height cannot be enlarged within the limits."""
        cell, scale = self.transformer.config.latent_downscale_factor, self.transformer.config.scale
        height, width = (-(-side // cell) * cell * scale for side in reversed(size))
        plan(
            self.transformer, height, width, limits=limits,
            trained_size=self.config.trained_size, device=self._execution_device,
        )  # fmt: skip

    def guides(self, guidance_scale: float | None = None) -> bool:
        """Whether a step at this scale, by default the decoder's own, takes a pass without the prompt."""
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        return guidance_scale > 1 and self.transformer.config.text_embed_dim is not None

    def check_latents(
        self, latents: torch.Tensor | np.ndarray | None, height: int | None, width: int | None, denormalized: bool
    ) -> torch.Tensor:
        """Latents in whatever form a call takes them, as normalised (B, C, h, w); raises ValueError for others."""
        config = self.transformer.config
        if latents is None:
            raise ValueError(f"expected latents of shape (B, {config.latent_channels}, h, w), got none")
        if isinstance(latents, np.ndarray) and latents.dtype.kind in "fiu":
            latents = torch.tensor(latents)
        if not isinstance(latents, torch.Tensor):
            hint = {str: ": give the prompt as prompt=...", Image.Image: ": give an image to `upscale`"}
            first = latents[0] if isinstance(latents, (list, tuple)) and latents else latents
            why = next((text for kind, text in hint.items() if isinstance(first, kind)), "")
            raise ValueError(f"expected latents, a tensor, as the first argument, got {type(latents).__name__}{why}")
        if config.latent_channels is None:
            raise ValueError("this network is a text-to-image prior: it takes no latents")
        latents = latents if latents.is_floating_point() else latents.float()
        if latents.ndim == 3 and height and width:
            latents = unpack_tokens(latents, config.latent_channels, config.latent_downscale_factor, height, width)
        latents = latents[None] if latents.ndim == 3 else latents
        if latents.ndim != 4 or latents.shape[1] != config.latent_channels or not latents.numel():
            raise ValueError(
                f"expected latents of shape (B, {config.latent_channels}, h, w), got {tuple(latents.shape)}: this "
                "decoder is for another latent space, or the latents are packed or unpacked differently (packed ones "
                "need the height and width of the latent model's image)"
            )
        if not latents.isfinite().all():
            raise ValueError(
                f"expected finite latents, {int((~latents.isfinite()).sum())} of {latents.numel()} values are NaN or "
                "infinite: the model that made them overflowed; try bfloat16 or float32 there"
            )
        if denormalized:
            latents = normalise(latents.float(), SPACES.get(self.config.latent_space or ""))
        return latents

    def _pad(self, latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Latents, up to whole patches where a patch has several cells, and the image's height and width before it."""
        config = self.transformer.config
        cell = config.scale * config.latent_downscale_factor
        cells = config.patch_size // math.gcd(cell, config.patch_size)
        down, right = (-side % cells for side in latents.shape[-2:])
        size = latents.shape[-2] * cell, latents.shape[-1] * cell
        return F.pad(latents, (0, right, 0, down), mode="replicate"), size

    def _features(
        self,
        latents: torch.Tensor | None,
        sigma: torch.Tensor,
        layout: Plan,
        attention_kwargs: dict[str, Any] | None,
    ) -> LatentFeatures | None:
        if latents is None:
            return None
        return self.transformer.encode_latents(
            latents.to(self._execution_device), layout.height, layout.width, sigma=sigma, base_rows=layout.base_rows,
            attention_kwargs=attention_kwargs,
        )  # fmt: skip

    def _check_output(self, output_type: str, callback: Callable | None, tensor_inputs: Sequence[str]) -> set[str]:
        """What the callback gets."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type is {output_type!r}: expected "pil", "np", "pt" or "latent"')
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        if unknown := set(tensor_inputs or ()) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected some of ['image', 'x0'], got {sorted(unknown)}: the "
                "picture in the making is called image here, and latents and text stay as they are"
            )
        return set(tensor_inputs or ()) if callback is not None else set()

    @staticmethod
    def _check_noise(noise: torch.Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(noise, torch.Tensor) or noise.shape != shape or not noise.isfinite().all():
            raise ValueError(f"expected noise as a tensor of finite values, {shape}, got {_described(noise)}")

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        patch = self.transformer.config.patch_size
        if not height or not width or height % patch or width % patch or min(height, width) < patch:
            raise ValueError(f"expected height and width in pixels, multiples of {patch}, got {height} x {width}")
        return height, width

    @staticmethod
    def _check_sigma(sigma: float | Sequence[float] | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
        try:
            values = torch.as_tensor(sigma, dtype=torch.float32, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"expected sigma in [0, 1], one or one for each image, got {sigma!r}") from None
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
        if prompt is not None and embeds is not None:
            raise ValueError(f"got {name} and {name}_embeds: give one of them")
        if embeds is None:
            if prompt is None:
                raise ValueError(f"this decoder reads text: expected {name} or {name}_embeds (B, T, {width}), got none")
            embeds = self._encode(prompt)
        shape = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else ()
        if len(shape) != 3 or shape[2] != width or shape[0] not in (1, batch):
            raise ValueError(f"expected {name}_embeds of shape (1 or {batch}, T, {width}), got {_described(embeds)}")
        return embeds.to(self._execution_device).expand(batch, -1, -1)

    def _encode(self, prompt: str | list[str]) -> torch.Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"expected a prompt, or a list with one for each image, got {prompt!r}")
        if self.text_encoder is None or self.tokenizer is None:
            return self.prompt_encoder(prompts, self._execution_device)
        return encode_prompts(prompts, self.tokenizer, self.text_encoder, self._device_of(self.text_encoder))

    def _device_of(self, part: torch.nn.Module) -> torch.device:
        """Where a part computes: where its weights are, or will be at its turn, if they are nowhere before it."""
        device = next(part.parameters()).device
        return self._execution_device if device.type == "meta" or hasattr(part, "_hf_hook") else device

    def check_steps(self, steps: int) -> None:
        """Raises ValueError if the decoder cannot be sampled in so many steps."""
        check_steps(self.scheduler, steps)


def postprocess(image: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list[Image.Image]:
    """Image (B, 3, H, W) in [-1, 1] -> "pt", "np" or "pil", as diffusers' `VaeImageProcessor`, with one copy."""
    if output_type == "latent":
        return image
    image = (image * 0.5).add_(0.5).clamp_(0, 1)
    if output_type == "pt":
        return image
    if output_type == "np":
        return image.cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in image.mul_(255).round_().to(torch.uint8)]


def _picture_tensor(image: Any) -> torch.Tensor:
    """A picture, or (B, 3, H, W) in [-1, 1], as the latter.

    Raises:
        ValueError: neither.
    """
    if isinstance(image, Image.Image):
        return to_tensor(image)
    fits = isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == 3 and image.is_floating_point()
    if not fits:
        kind = f" {image.dtype}" if isinstance(image, torch.Tensor) else ""
        raise ValueError(f"expected a picture or a tensor of floats (B, 3, H, W), got {_described(image)}{kind}")
    low, high = (x.item() for x in image.aminmax()) if image.numel() else (0.0, 0.0)
    if not -OVERSHOOT <= low <= high <= OVERSHOOT:  # false of NaN
        raise ValueError(f"expected a picture in [-1, 1], got values from {low:g} to {high:g}")
    return image


def _described(value: Any) -> str:
    """What came in place of a tensor, or of one of another shape."""
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _not_finite(image: torch.Tensor, dtype: torch.dtype, first: str | None) -> str:
    """What is told of an image with such values.

    Args:
        first: where the network has the first of them.
    """
    name = str(dtype).removeprefix("torch.")
    return (
        f"{int((~image.isfinite()).sum())} of the image's {image.numel()} values are NaN or infinite, of a network in "
        f"{name}" + (f" (the first in {first})" if first else "") + ": "
        + ("use bfloat16 or float32" if name == "float16" else "its weights are damaged, or not a decoder's")
    )  # fmt: skip


def _tell_plan(layout: Plan) -> None:
    """Once for each size and way of cutting it, in a process: the memory moves from call to call."""
    told = layout.height, layout.width, layout.tiles, layout.chunk_size
    if told not in _TOLD:
        _TOLD.add(told)
        logger.info(str(layout))


_TOLD: set[tuple] = set()
