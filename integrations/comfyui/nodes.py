"""A decoder, LATENT and IMAGE in; images and captured latents out: the nodes, in ComfyUI's schema (V3).

A node's id never changes; what it does is in `logic`.
"""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy_api.latest import ComfyExtension, io

from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.execution import Execution
from pixeldecoder.latents import SPACES
from pixeldecoder.pipeline import postprocess
from pixeldecoder.plan import Limits, held_memory, plan, weight_bytes
from pixeldecoder.presets import PRESETS

from . import logic

CATEGORY = "pixeldecoder"
Decoder = io.Custom("PIXEL_DECODER")
MODELS = Path(folder_paths.models_dir) / "pixeldecoder"
"""Where decoders of one's own lie: diffusers folders and checkpoint files."""
NOT_CAPTURED = ("dpm_fast", "dpm_adaptive", "sample_unipc")
"""Samplers whose callback counts other steps than the sigmas have, or shows latents in another scale."""
PREVIEW = 512
"""Side in pixels of the pictures of an image in the making."""


def _decoder_names() -> list[str]:
    own = [path.name for path in MODELS.iterdir() if not path.name.startswith(".")] if MODELS.is_dir() else []
    return ["nano", *sorted(own), *PRESETS]


class LoadPixelDecoder(io.ComfyNode):
    """A name -> a decoder whose weights ComfyUI moves to the device, and away, as it does with other models'."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PixelDecoderLoad",
            display_name="Load Pixel Decoder",
            category=CATEGORY,
            description="nano (bundled), a folder or checkpoint file in models/pixeldecoder, or a released decoder, "
            "which is fetched from the Hub (non-commercial licence).",
            inputs=[
                io.Combo.Input("decoder", options=_decoder_names(), default="nano"),
                io.Combo.Input("dtype", options=["auto", "float32", "bfloat16", "float16"], default="auto"),
            ],
            outputs=[Decoder.Output(display_name="decoder")],
        )

    @classmethod
    def execute(cls, decoder: str, dtype: str) -> io.NodeOutput:
        own, device = MODELS / decoder, comfy.model_management.get_torch_device()
        name = str(own) if own.exists() and decoder not in ("nano", *PRESETS) else decoder
        pipeline = Execution("cpu", _dtype(dtype, device)).load(name, place=False)
        pipeline.set_progress_bar_config(disable=True)
        # ComfyUI's button stops after the tile at hand.
        pipeline.transformer.register_forward_pre_hook(
            lambda *_: comfy.model_management.throw_exception_if_processing_interrupted()
        )
        # Held by another module, as ComfyUI writes attributes into it, "device" among them.
        held = torch.nn.ModuleDict({"transformer": pipeline.transformer})
        patcher = comfy.model_patcher.ModelPatcher(held, device, comfy.model_management.unet_offload_device())
        return io.NodeOutput((pipeline, patcher))


class PixelDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PixelDecode",
            display_name="Pixel Decode",
            category=CATEGORY,
            description="Latents to an image 4 or 8 times larger than a VAE's, in place of VAE Decode.",
            inputs=[
                Decoder.Input("decoder"),
                io.Latent.Input("latent", tooltip="Of the decoder's latent space; captured ones know their sigma."),
                io.Float.Input(
                    "sigma", default=-1.0, min=-1.0, max=1.0, step=0.01,
                    tooltip="Noise that the latents still have; -1: what they say, or none.",
                ),
                *_settings(),
            ],
            outputs=[io.Image.Output(), io.String.Output(display_name="plan")],
        )  # fmt: skip

    @classmethod
    def execute(cls, decoder, latent, sigma, seed, steps, tile, prompt) -> io.NodeOutput:
        pipeline, patcher = decoder
        latents, sigma = logic.normalised(latent, pipeline, sigma)
        cell = pipeline.transformer.config.scale * pipeline.transformer.config.latent_downscale_factor
        call = _placed(pipeline, patcher, *(side * cell for side in latents.shape[2:]), steps, tile, prompt)
        return io.NodeOutput(*logic.decode(pipeline, latents, sigma, seed, _shown(), **call))


class PixelUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PixelUpscale",
            display_name="Pixel Upscale",
            category=CATEGORY,
            description="An image through latents to one 4 or 8 times larger.",
            inputs=[
                Decoder.Input("decoder"),
                io.Image.Input("image"),
                io.Float.Input(
                    "sigma", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Noise that is added to the latents: more of it invents more.",
                ),
                *_settings(),
                io.Vae.Input("vae", optional=True, tooltip="Of the decoder's latent space, where it has no encoder."),
            ],
            outputs=[io.Image.Output(), io.String.Output(display_name="plan")],
        )  # fmt: skip

    @classmethod
    def execute(cls, decoder, image, sigma, seed, steps, tile, prompt, vae=None) -> io.NodeOutput:
        pipeline, patcher = decoder
        encoder = None
        if vae is not None:

            def encoder(x: torch.Tensor) -> torch.Tensor:
                samples = vae.encode((x / 2 + 0.5).movedim(1, -1))
                return logic.normalised({"samples": samples}, pipeline, 0.0)[0].to(x.device)

        scale, cell = pipeline.transformer.config.scale, pipeline.transformer.config.latent_downscale_factor
        height, width = (-(-side // cell) * cell * scale for side in image.shape[1:3])
        call = _placed(pipeline, patcher, height, width, steps, tile, prompt)
        return io.NodeOutput(*logic.upscale(pipeline, image, sigma, seed, _shown(), encoder, **call))


class CaptureLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PixelDecoderCapture",
            display_name="Capture Latent at Step",
            category=CATEGORY,
            description="SamplerCustomAdvanced that stops after a step: the noisy latents, with their sigma, for Pixel "
            "Decode.",
            inputs=[
                io.Noise.Input("noise"),
                io.Guider.Input("guider"),
                io.Sampler.Input("sampler"),
                io.Sigmas.Input("sigmas"),
                io.Latent.Input("latent_image"),
                io.Int.Input(
                    "step", default=24, min=1, max=10000, tooltip="After so many; ComfyUI tells as the next begins."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Float.Output(display_name="sigma"),
            ],
        )

    @classmethod
    def execute(cls, noise, guider, sampler, sigmas, latent_image, step) -> io.NodeOutput:
        steps, model = len(sigmas) - 1, guider.model_patcher.model
        name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
        if name.startswith(NOT_CAPTURED):
            raise ValueError(f"{name} does not tell its latents after each of these steps: take another, such as euler")
        if step > steps:
            raise ValueError(f"step {step}: the sampler makes only {steps} steps: give 1 to {steps}")
        form = model.latent_format
        space = SPACES[logic.find_space(form.process_in, form.latent_channels)]
        shown, x = latent_preview.prepare_callback(guider.model_patcher, step), None

        def callback(index: int, denoised: torch.Tensor, now: torch.Tensor, total: int) -> None:
            nonlocal x
            if index == step:
                x = now.clone()
                raise _Stop
            shown(index, denoised, now, step)

        samples = comfy.sample.fix_empty_latent_channels(
            guider.model_patcher, latent_image["samples"], latent_image.get("downscale_ratio_spacial")
        )
        try:
            finished = guider.sample(
                noise.generate_noise(latent_image | {"samples": samples}), samples, sampler, sigmas,
                denoise_mask=latent_image.get("noise_mask"), callback=callback, disable_pbar=True, seed=noise.seed,
            )  # fmt: skip
        except _Stop:
            pass
        else:
            if step < steps:
                raise ValueError(f"{name} does not tell its latents after step {step}: take another, such as euler")
            last = float(sigmas[-1])
            if last > 0:  # of a flow, which ComfyUI gives divided by 1 - sigma
                raise ValueError(f"step {step} is the end of sigmas that do not end at 0: give more of them")
            x = model.process_latent_in(finished)
        one = torch.ones(1, 1, 1, 1)
        signal, level = (
            float(model.model_sampling.noise_scaling(sigmas[step].cpu(), *pair))
            for pair in ((0 * one, 1 * one), (1 * one, 0 * one))
        )
        latent = logic.captured(x, signal, level, space, model.process_latent_out)
        return io.NodeOutput(latent, latent[logic.CAPTURED]["sigma"])


class _Stop(Exception):  # noqa: N818  # nothing is wrong
    """Leaves a sampler."""


def _settings() -> list[io.Input]:
    return [
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
        io.Int.Input("steps", default=0, min=0, max=100, tooltip="0: what the decoder was made for."),
        io.Int.Input(
            "tile", default=0, min=0, max=8192, step=64,
            tooltip="Side in pixels; 0: tiles where the image is larger than the decoder was made for, or the memory.",
        ),
        io.String.Input("prompt", default="", multiline=True, tooltip="Read by released decoders, not by nano."),
    ]  # fmt: skip


def _dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    known = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    dtype = comfy.model_management.unet_dtype(device, supported_dtypes=[torch.bfloat16, torch.float32])
    return known.get(dtype, "float32")


def _placed(
    pipeline: PixelDecoderPipeline, patcher: Any, height: int, width: int, steps: int, tile: int, prompt: str
) -> dict[str, Any]:
    """A call's arguments, once the text is encoded and the weights are on the device."""
    call: dict[str, Any] = {"num_inference_steps": steps or None, "tile_size": tile or "auto"}
    if pipeline.transformer.config.text_embed_dim is not None:
        names = "prompt_embeds", "negative_prompt_embeds"
        call |= {name: x for name, x in zip(names, pipeline.encode_prompt(prompt), strict=True) if x is not None}
        pipeline.prompt_encoder.unload()
    device, model = patcher.load_device, pipeline.transformer
    patch = model.config.patch_size
    total = int(comfy.model_management.get_total_memory(device))  # of which ComfyUI frees what others hold
    whole = (-(-side // patch) * patch for side in (height, width))
    limits = Limits(tile or "auto", max_memory=total)
    layout = plan(model, *whole, limits=limits, trained_size=pipeline.config.trained_size, device=device)
    needed = layout.memory - held_memory(device) - (weight_bytes(model) if model.device != device else 0)
    comfy.model_management.load_models_gpu([patcher], memory_required=max(0, needed))
    return call


def _shown():
    """Moves ComfyUI's bar, with a preview."""
    bar = comfy.utils.ProgressBar(1)

    def after_step(made: int, steps: int, image: torch.Tensor) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        stride = max(1, max(image.shape[2:]) // PREVIEW)
        (preview,) = postprocess(image[:1, :, ::stride, ::stride], "pil")
        bar.update_absolute(made, steps, ("JPEG", preview, PREVIEW))

    return after_step


class PixelDecoderExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadPixelDecoder, PixelDecode, CaptureLatent, PixelUpscale]


async def comfy_entrypoint() -> PixelDecoderExtension:
    return PixelDecoderExtension()
