"""A diffusers pipeline in, its latents after any step with their sigma out; and images decoded from them."""

import functools
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image

from pixeldecoder.execution import Execution
from pixeldecoder.latents import LatentSpace, find_latent_space, unpack
from pixeldecoder.pipeline import PixelDecoderPipeline

PER_IMAGE = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "generator", "noise")
"""Arguments of a decoder's call of which each image may have its own."""
OURS = {"self", "latents", "sigma", "height", "width", "denormalized"}
"""Arguments of a decoder's call that `generate` gives."""
FEW_STEPS = 12
"""Up to here a run is a distilled model's, and "auto" goes to the end."""
_STOPS = {"ZImage": 46 / 50, "Flux2Klein": 1.0}
"""Recommended stops of pipelines that differ from their latent space's, by the beginning of their name."""
_REFUSED = {
    "Ideogram4": "it orders FLUX.2's channels in another way and has statistics of its own",
    "Cosmos": "its latents are noised in a frame of their own",
    "QwenImageLayered": "it makes several layers at once",
    "VisualCloze": "it makes a grid of pictures at once",
}
_VIDEO = (
    "Allegro", "AnimateDiff", "AnyFlow", "ChronoEdit", "CogVideoX", "ConsisID", "EasyAnimate", "Helios", "Hunyuan15",
    "HunyuanSkyreels", "HunyuanVideo", "I2VGenXL", "Kandinsky5I2V", "Kandinsky5T2V", "Kandinsky6", "LTX", "Latte",
    "LucyEdit", "Mochi", "MotifVideo", "PIA", "SanaImageToVideo", "SanaVideo", "SanaWM", "SkyReels",
    "StableVideoDiffusion", "TextToVideo", "VideoToVideo", "WanAnimate", "WanImageToVideo", "WanVACE",
    "WanVideoToVideo",
)  # fmt: skip
"""Beginnings of the names of pipelines that make video."""


@dataclass
class PartlyDenoised:
    """What `partly_denoise` took from a pipeline."""

    latents: torch.Tensor
    """Normalised, (B, C, h, w) float32, in the frame of their space."""
    sigma: float
    """Their noise level in [0, 1]: what the decoder is told."""
    step: int
    """Steps that the latent model made before they were taken."""
    steps: int
    """Steps of its whole run."""
    space: LatentSpace
    images: list[Image.Image] | None = None
    """What the pipeline's own autoencoder makes of the finished latents, if it was let finish."""


@dataclass
class Generated:
    images: list[Image.Image]
    """Decoded by the pixel decoder; arrays or tensors if `decoder_kwargs` have another `output_type`."""
    taken: PartlyDenoised


class _StopRun(BaseException):
    """Leaves a pipeline, through whatever it makes of exceptions."""


def decoder_seed(seed: int) -> int:
    """The seed of a decoder's noise: not the latent model's, whose noise it would repeat number by number.

    `seed` + 2^31 for a seed below 2^31, so that it can be had by hand, too.
    """
    return seed ^ 2**31


def parse_stop(stop_at: int | float | str | None) -> tuple[str, float]:
    """A stop as ("step", K), ("share", 0 to 1), ("sigma", 0 to 1) or ("auto", 0).

    Raises:
        ValueError: anything else.
    """
    text = "1.0" if stop_at is None else str(stop_at).strip()
    if text == "auto":
        return "auto", 0.0
    kind, number = ("sigma", text.removeprefix("sigma=")) if text.startswith("sigma=") else ("", text)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not kind:
        kind = "step" if number.lstrip("+-").isdigit() else "share"
    fits = {"step": value >= 1, "share": 0 < value <= 1, "sigma": 0 <= value < 1}
    if not fits[kind]:
        raise ValueError(
            f'stop_at={stop_at!r}: expected a step (1 or more), a share of the steps in (0, 1] such as 0.85, "sigma=X" '
            'with X in [0, 1), or "auto"'
        )
    return kind, value


@torch.no_grad()
def partly_denoise(
    pipe: DiffusionPipeline,
    stop_at: int | float | str | None = "auto",
    *,
    latent_space: str | None = None,
    finish: bool = False,
    **kwargs: Any,
) -> PartlyDenoised:
    """Run any latent diffusion pipeline and stop it after a step.

    The remaining steps are not run, nor is its autoencoder. (A `callback_on_step_end` is called after every step but
    the one at which the run stops.)

    Args:
        pipe: text to image, or another that denoises the latents of one image.
        stop_at: a step K (int): after K steps, as `num_inference_steps` counts them; a share (float in (0, 1]) of the
            steps; "sigma=X": after the first step whose noise level, in the decoder's frame, is at most X; "auto":
            where the paper stops this family, the end for runs of up to 12 steps; `None`: the end of the run, or its
            `denoising_end`.
        latent_space: its name, if the autoencoder does not tell.
        finish: let the pipeline finish after all, and keep its own images.
        kwargs: everything for the pipeline's call.

    Raises:
        ValueError: no known decoder fits the pipeline, or a stop outside the run.
    """
    kind, value = parse_stop(stop_at)
    space = pipeline_latent_space(pipe, latent_space)
    name = type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    custom = kwargs.get("sigmas") is not None or kwargs.get("timesteps") is not None
    if "num_inference_steps" in parameters and not custom:  # before anything is run
        planned = kwargs.get("num_inference_steps", parameters["num_inference_steps"].default)
        _check_stop(kind, value, planned)
    height, width = (default_side(pipe, key, kwargs) for key in ("height", "width"))
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not isinstance(pipe, ModularPipeline) and not any_name:
        # Some calls take the size from a picture: here it says what they will.
        kwargs = {key: value for key, value in kwargs.items() if key in parameters or key not in ("height", "width")}
    scheduler = pipe.scheduler
    step = scheduler.step
    order, calls, due, whole = scheduler.order, 0, 0, 0
    taken: PartlyDenoised | None = None
    pending: tuple[float, float] | None = None
    # What lies outside a mask is put back after the scheduler's step: only a callback sees the latents then.
    late, told = "Inpaint" in name and "callback_on_step_end" in parameters, kwargs.get("callback_on_step_end")

    def as_taken(latents: torch.Tensor, signal: float, total: float) -> torch.Tensor:
        if name.startswith("BriaFibo2"):  # whose latents are normalised, and not packed
            latents = F.pixel_unshuffle(latents, 2)
        if name.startswith("JoyImageEditPlus"):  # 2 x 2 cells each, and then those of the pictures that it was given
            latents = latents[:, : (height or 0) * (width or 0) // 16**2].flatten(2)
        latents = unpack(latents.detach(), space, height, width, getattr(pipe, "vae", None)).float()
        if name.startswith("Kandinsky5"):  # whose latents are scaled, but not shifted
            latents = latents - signal * pipe.vae.config.scaling_factor * (pipe.vae.config.shift_factor or 0)
        return latents / total

    def look_late(pipe, index, timestep, tensors):
        nonlocal pending
        if pending is not None and taken is not None:
            taken.latents, pending = as_taken(tensors["latents"], *pending), None
            if not finish:
                raise _StopRun
        return told(pipe, index, timestep, tensors) if told is not None else {}

    if late:
        names = kwargs.get("callback_on_step_end_tensor_inputs") or ["latents"]
        kwargs |= {
            "callback_on_step_end": look_late,
            "callback_on_step_end_tensor_inputs": list(dict.fromkeys(["latents", *names])),
        }

    @functools.wraps(step)
    def step_and_look(model_output, timestep, *args, **step_kwargs):
        nonlocal calls, due, whole, taken, pending
        result = step(model_output, timestep, *args, **step_kwargs)
        calls += 1
        index = _steps_made(scheduler, timestep)
        if calls == 1:
            timesteps = scheduler.timesteps[index - 1 :]  # an image-to-image run starts later
            due, whole = _calls_due(scheduler, timesteps, kwargs.get("denoising_end")), -(-len(timesteps) // order)
            _check_stop(kind, value, -(-due // order))
        # A step of Heun's or KDPM2's is two calls, the last one a single call.
        if taken is None and (calls % order == 0 or calls == due):  # brought to the decoder's frame (eq. 7, 8)
            made, steps = -(-calls // order), -(-due // order)
            signal, noise = signal_and_noise(scheduler, index)
            total = signal + noise if space.frame == "flow" else math.hypot(signal, noise)
            share = next((stop for start, stop in _STOPS.items() if name.startswith(start)), space.stop)
            last = {
                "step": value,
                "share": max(1, round(value * steps)),
                "auto": min(steps, whole if whole <= FEW_STEPS else round(share * whole)),
                "sigma": made if noise / total <= value else steps,
            }[kind]
            if made >= last:
                latents = as_taken(result[0], signal, total)
                taken = PartlyDenoised(latents, noise / total, made, steps, space)
                pending = (signal, total) if late else None
                if not finish and not late:
                    raise _StopRun
        return result

    scheduler.step = step_and_look
    try:
        result = pipe(**kwargs)
        images = result.get("images") if isinstance(pipe, ModularPipeline) else result[0]
    except _StopRun:
        images = None
    finally:
        del scheduler.step
    if not isinstance(pipe, ModularPipeline):
        pipe.maybe_free_model_hooks()
    if taken is None:
        raise ValueError(
            f"{name} made {-(-calls // order)} steps and did not come to stop_at={stop_at!r}: it cannot be stopped"
        )
    taken.images = images
    return taken


def generate(
    pipe: DiffusionPipeline,
    decoder: PixelDecoderPipeline,
    prompt: str | list[str],
    *,
    stop_at: int | float | str | None = "auto",
    seed: int | Sequence[int] | None = 0,
    latent_space: str | None = None,
    compare: bool = False,
    offload: bool = False,
    decoder_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Generated:
    """Prompt in, image out: the latent model, stopped early, then the pixel decoder.

    Args:
        pipe, stop_at, latent_space: as in `partly_denoise`.
        decoder: of the same latent space.
        prompt: one or several; the decoder reads it too. With `prompt_embeds` for the pipeline, the decoder alone does.
        seed: of the first image, the next ones count on; or one for each image; `None` if a `generator` is given. It
            seeds the latent model, and its `decoder_seed` the decoder.
        compare: let the pipeline finish, and return its own images in `.taken.images`.
        offload: keep on the device only the model that is running.
        decoder_kwargs: for the decoder's call: `num_inference_steps`, `prompt_embeds`, ...; those of `PER_IMAGE` one
            for all images or one for each.
        kwargs: everything else for the pipeline's call: `num_images_per_prompt`, `negative_prompt`, ...

    Raises:
        ValueError: a decoder of another latent space, a wrong number of seeds or of arguments for each image, or as
            `partly_denoise`.
    """
    check_decoder(decoder, pipeline_latent_space(pipe, latent_space))
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    per_prompt = kwargs.get("num_images_per_prompt", 1)
    count = len(prompts) * per_prompt
    decoder_kwargs = dict(decoder_kwargs or {})
    known = set(inspect.signature(PixelDecoderPipeline.__call__).parameters) - OURS
    if unknown := set(decoder_kwargs) - known:
        raise ValueError(
            f"decoder_kwargs: {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}; the rest "
            "follows from the latent model's run"
        )
    if seed is not None:
        seeds: list[Any] = list(seed) if isinstance(seed, Iterable) else []
        if isinstance(seed, Integral):
            seeds = [int(seed) + i for i in range(count)]
        if len(seeds) != count or not all(isinstance(s, Integral) for s in seeds):
            raise ValueError(
                f"expected one seed, or one for each of {count} images, whole numbers, got {str(seed)[:80]}"
            )
        seeds = [int(s) for s in seeds]
        # On the CPU, so that a seed gives the same noise on every device.
        kwargs.setdefault("generator", [torch.Generator().manual_seed(s) for s in seeds])
        decoder_kwargs.setdefault("generator", [torch.Generator().manual_seed(decoder_seed(s)) for s in seeds])
    if decoder_kwargs.get("prompt_embeds") is None:
        decoder_kwargs.setdefault("prompt", [p for p in prompts for _ in range(per_prompt)])
    given = {key: decoder_kwargs.pop(key, None) for key in PER_IMAGE}
    shares = {key: _shares(key, argument, count) for key, argument in given.items() if argument is not None}
    if kwargs.get("prompt_embeds") is None:
        kwargs["prompt"] = prompt
    device = decoder._execution_device
    if offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        decoder.enable_model_cpu_offload(device=device)
    taken = partly_denoise(pipe, stop_at, latent_space=latent_space, finish=compare, **kwargs)
    if len(taken.latents) != count:
        raise ValueError(f"the pipeline made {len(taken.latents)} images for {len(prompts)} prompts x {per_prompt}")
    if offload and decoder.transformer.config.text_embed_dim is not None and decoder.text_encoder is None:
        # Encoded together, so that the text encoder is gone when the decoder runs.
        guidance = decoder_kwargs.get("guidance_scale")
        for name in ("prompt", *(["negative_prompt"] if decoder.guides(guidance) else [])):
            if f"{name}_embeds" not in shares:
                texts = shares.pop(name, [decoder.config.default_negative_prompt] * count)
                shares[f"{name}_embeds"] = list(decoder.prompt_encoder(texts, device).split(1))
        decoder.prompt_encoder.unload()
    images = []
    for i in range(count):  # one by one, so that memory does not grow with their number
        one = {key: values[i] for key, values in shares.items()}
        images.extend(decoder(taken.latents[i : i + 1], sigma=taken.sigma, **one, **decoder_kwargs)[0])
    return Generated(images, taken)


def attach(
    pipe: DiffusionPipeline,
    decoder: str | PixelDecoderPipeline = "nano",
    stop_at: int | float | str | None = "auto",
    *,
    latent_space: str | None = None,
    decoder_kwargs: dict[str, Any] | None = None,
) -> DiffusionPipeline:
    """Have a pipeline's own call return images that the pixel decoder decoded, until `detach`.

    The call takes the arguments that it took, and returns an `ImagePipelineOutput` or a tuple, of `output_type` "pil",
    "np" or "pt"; with "latent" it is what it was. Its generator seeds the decoder as in `generate`.

    Args:
        pipe, stop_at, latent_space: as in `partly_denoise`.
        decoder: one of the same latent space, or its name, which is then loaded to the pipeline's device; "auto": the
            released one.
        decoder_kwargs: as in `generate`. By default a decoder that reads text reads the pipeline's prompt.

    Returns:
        The pipeline.

    Raises:
        ValueError: no such decoder, or one of another latent space; no known decoder fits the pipeline.
    """
    detach(pipe)
    parse_stop(stop_at)
    space = pipeline_latent_space(pipe, latent_space)
    if isinstance(decoder, str):
        execution = Execution(device=pipe._execution_device.type)
        decoder = execution.load(space.preset if decoder == "auto" else decoder)
    check_decoder(decoder, space)
    own = type(pipe)
    signature = inspect.signature(own.__call__)

    @functools.wraps(own.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        del given["self"]
        given |= given.pop("kwargs", {})
        output_type, return_dict = given.pop("output_type", "pil"), given.pop("return_dict", True)
        self.__class__ = own  # what follows runs the pipeline as it is
        try:
            if output_type == "latent":
                return self(**given, output_type=output_type, return_dict=return_dict)
            images = _call_attached(self, decoder, given, output_type, stop_at, latent_space, decoder_kwargs or {})
        finally:
            self.__class__ = attached
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    members = {"__call__": call, "__module__": own.__module__, "__doc__": own.__doc__, "_detached": own}
    attached = type(own.__name__, (own,), members)
    pipe.__class__ = attached
    return pipe


def detach(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Have a pipeline's call do what it did before `attach`, if there was one."""
    pipe.__class__ = getattr(pipe, "_detached", type(pipe))
    return pipe


def _call_attached(
    pipe: DiffusionPipeline,
    decoder: PixelDecoderPipeline,
    given: dict[str, Any],
    output_type: str,
    stop_at: int | float | str | None,
    latent_space: str | None,
    decoder_kwargs: dict[str, Any],
) -> Any:
    """What a call with these arguments returns once a decoder is attached: images of that type."""
    prompt, embeds = given.pop("prompt", None), given.get("prompt_embeds")
    if prompt is None:
        texts = {"prompt", "prompt_embeds"} & set(decoder_kwargs)
        if decoder.transformer.config.text_embed_dim is not None and not texts:
            raise ValueError("the decoder reads text: give a prompt, or one in the decoder_kwargs of attach")
        prompt = [""] * (1 if embeds is None else len(embeds))
    count = (1 if isinstance(prompt, str) else len(prompt)) * given.get("num_images_per_prompt", 1)
    generator = given.get("generator")
    if generator is not None:
        several = isinstance(generator, (list, tuple))
        seeds = (
            [one.initial_seed() for one in generator]
            if several
            else [generator.initial_seed() + i for i in range(count)]
        )
        generators = [torch.Generator().manual_seed(decoder_seed(seed)) for seed in seeds]
        decoder_kwargs = {"generator": generators} | decoder_kwargs
    images = generate(
        pipe, decoder, prompt, stop_at=stop_at, seed=None, latent_space=latent_space,
        decoder_kwargs=decoder_kwargs | {"output_type": output_type}, **given,
    ).images  # fmt: skip
    if output_type == "pil":
        return images
    return torch.stack(images) if output_type == "pt" else np.stack(images)  # type: ignore[arg-type]


def pipeline_latent_space(pipe: DiffusionPipeline, name: str | None = None) -> LatentSpace:
    """The latent space that a pipeline denoises, or the one called `name`.

    Raises:
        ValueError: no known decoder fits it.
    """
    kind = type(pipe).__name__
    if name is None:
        if why := next((why for start, why in _REFUSED.items() if kind.startswith(start)), None):
            raise ValueError(f"no known decoder fits {kind}: {why}")
        if kind.startswith(_VIDEO):
            raise ValueError(
                f"{kind} makes video: expected a pipeline of images. Frames would need a decoder trained on latents of "
                "its autoencoder, and noise and tiles that are one for all frames of a scene"
            )
        if getattr(pipe, "vae", None) is None or not hasattr(pipe, "scheduler"):
            raise ValueError(f"{kind} has no autoencoder (vae) and scheduler: expected a latent diffusion pipeline")
    return find_latent_space(getattr(pipe, "vae", None), name)


def check_decoder(decoder: PixelDecoderPipeline, space: LatentSpace) -> None:
    """Raises ValueError if a decoder is not for this latent space."""
    config = decoder.transformer.config
    known = decoder.config.latent_space
    ours = f"decodes {known or f'{config.latent_channels} channels at 1/{config.latent_downscale_factor} size'}"
    if config.latent_channels is None:
        raise ValueError("this network is a text-to-image prior, which decodes no latents")
    if (known or space.name) != space.name or (config.latent_channels, config.latent_downscale_factor) != (
        space.channels,
        space.downscale_factor,
    ):
        raise ValueError(
            f"the decoder {ours}, but the latents are of the {space.name} space ({space.channels} channels at "
            f'1/{space.downscale_factor} size): use one for that space, such as "{space.preset}"'
        )


def signal_and_noise(scheduler: SchedulerMixin, index: int) -> tuple[float, float]:
    """(a, s): after `index` of its timesteps a scheduler's latents are a z + s noise."""
    if hasattr(scheduler, "sigmas"):
        # After the first of a step's two calls KDPM2 is between two sigmas.
        between = index % 2 and hasattr(scheduler, "sigmas_interpol")
        sigma = float((scheduler.sigmas_interpol if between else scheduler.sigmas)[index])
        config = scheduler.config
        if config.get("invert_sigmas"):  # OmniGen's count the image, not the noise
            sigma = 1 - sigma
        if (
            type(scheduler).__name__.startswith("FlowMatch")
            or config.get("use_flow_sigmas")
            or config.get("prediction_type") == "flow_prediction"
        ):
            return 1 - sigma, sigma
        if scheduler.init_noise_sigma > 1:  # Euler, Heun, LMS, ...: unscaled signal
            return 1.0, sigma
        return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)  # DPM-Solver, UniPC, ...
    if index >= len(scheduler.timesteps):
        return 1.0, 0.0
    alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])  # DDIM, DDPM, LCM, ...
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def _steps_made(scheduler: SchedulerMixin, timestep: torch.Tensor | float) -> int:
    """How many of its timesteps a scheduler has made, the given one the last."""
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = int((scheduler.timesteps == torch.as_tensor(timestep).to(scheduler.timesteps)).nonzero()[0]) + 1
    return int(index)


def _calls_due(scheduler: SchedulerMixin, timesteps: torch.Tensor, denoising_end: float | None) -> int:
    """How many of these timesteps a run makes: without those that SDXL's `denoising_end` leaves to a refiner."""
    if denoising_end is not None and 0 < denoising_end < 1:
        total = scheduler.config.num_train_timesteps
        timesteps = timesteps[timesteps >= round(total - denoising_end * total)]
    return len(timesteps)


def _check_stop(kind: str, value: float, steps: int) -> None:
    if kind == "step" and value > steps:
        raise ValueError(f"stop_at={value:g}: the latent model makes only {steps} steps: give 1 to {steps}")


def default_side(pipe: DiffusionPipeline, key: str, kwargs: dict[str, Any]) -> int | None:
    """Height or width of a pipeline's image in pixels, by its call's arguments: its own default if none is given."""
    if kwargs.get(key):
        return kwargs[key]
    cells, factor = getattr(pipe, "default_sample_size", None), getattr(pipe, "vae_scale_factor", None)
    return cells * factor if isinstance(cells, int) and factor else None


def _shares(name: str, argument: Any, count: int) -> list[Any]:
    """Each image's share of an argument for all, or of a list or tensor with one for each."""
    if isinstance(argument, torch.Tensor):
        argument = argument.split(1)
    if not isinstance(argument, (list, tuple)):
        return [argument] * count
    if len(argument) not in (1, count):
        raise ValueError(
            f"decoder_kwargs: {name}: expected one, or one for each of {count} images, got {len(argument)}"
        )
    return [*argument] * (count // len(argument))
