"""Files in, files out: the `pixeldecoder` command."""

import argparse
import difflib
import inspect
import json
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pixeldecoder import __version__
from pixeldecoder.errors import OUT_OF_MEMORY, blaming, explain
from pixeldecoder.hub import is_hub_id
from pixeldecoder.options import parse
from pixeldecoder.presets import TEXT_ENCODER, check_decoder_name

if TYPE_CHECKING:
    import torch

    from pixeldecoder.pipeline import PixelDecoderPipeline


def word(name: str) -> Any:
    """What help calls an argument's value."""
    return tyro.conf.arg(metavar=name)


Source = Annotated[Path, tyro.conf.Positional, word("SOURCE")]
Output = Annotated[Path, tyro.conf.Positional, word("OUTPUT")]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(kw_only=True)
class Execution:
    """Where a decoder runs, and how."""

    device: Device = "auto"
    """Where it runs; "auto": the fastest there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; "auto": bfloat16, but float32 on a CPU that has no instructions for it."""
    seed: int = 0
    """Of all noise: the same seed gives the same image."""
    tile: Annotated[str, word("PIXELS")] = "auto"
    """Side of the tiles that a large image is decoded in, on one canvas of noise; "none": whole; "auto": tiles for
    what is larger than the decoder was trained on, or than the memory allows."""
    tile_overlap: Annotated[int | None, word("PIXELS")] = None
    """What neighbouring tiles share; by default 64."""
    chunk: Annotated[int | None, word("PATCHES")] = None
    """Patches at a time, apart from attention; by default what suits device and memory."""
    max_memory: Annotated[str | None, word("SIZE")] = None
    """Such as 6GB: of the process on a CPU, else of the device; by default what is free."""
    quantize: Literal["none", "int8", "float8", "float8-storage"] = "none"
    """Of the weights of the large matrix products: int8 on any device, float8 on NVIDIA GPUs from compute capability
    8.9 on (both by torchao), float8-storage to save memory alone."""
    attention: Annotated[str, word("KERNEL")] = "auto"
    """By diffusers' name ("flash", "sage", "_native_cudnn"...); "auto": what suits the device."""
    compile: bool = False
    """Let torch.compile fuse the blocks: minutes at first (kept in $PIXELDECODER_CACHE), faster from then on."""

    def check(self) -> None:
        """Raises ValueError for what can be seen to be wrong before anything is imported or loaded."""
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: expected a whole number from 0 to 2^63 - 1")
        if self.tile not in ("auto", "none") and not self.tile.isdecimal():
            raise ValueError(f'--tile {self.tile}: expected "auto", "none" or a side in pixels')
        if self.tile_overlap is not None and self.tile_overlap < 0:
            raise ValueError(f"--tile-overlap {self.tile_overlap}: expected 0 pixels or more")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"--chunk {self.chunk}: expected a chunk size of at least 1 patch")
        if self.max_memory is not None:
            check_memory(self.max_memory)

    def load_decoder(self, name: str, place: bool = True, loras: Sequence[str] = ()) -> "PixelDecoderPipeline":
        """`place`: move it to the device, or arrange that its blocks take turns there."""
        import torch

        from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
        from pixeldecoder.performance import compile_blocks, quantize, set_attention
        from pixeldecoder.pipeline import PixelDecoderPipeline
        from pixeldecoder.plan import must_offload

        device = torch_device(self.device)
        with blaming(f"{name} could not be loaded"):
            pipeline = PixelDecoderPipeline.from_pretrained(name, dtype=self.torch_dtype(device))
        if not isinstance(pipeline.transformer, PixelDecoderTransformer2DModel):
            raise ValueError(f"{name}: expected a decoder, got a pipeline with {type(pipeline.transformer).__name__}")
        pipeline.set_progress_bar_config(desc="steps", leave=False)
        model, target = pipeline.transformer, torch.device(device)
        load_loras(pipeline, loras)
        set_attention(model, self.attention)
        quantize(model, self.quantize)
        if not place:
            return pipeline
        if must_offload(model, target, self.max_memory):
            print("the weights take turns on the device: slower, but they fit", file=sys.stderr)
            model.enable_group_offload(
                target, offload_type="block_level", num_blocks_per_group=1, use_stream=device == "cuda"
            )
            for part in (pipeline.encoder, pipeline.text_encoder):
                if part is not None:
                    part.to(target)
        else:
            pipeline.to(target)
        if self.compile:
            compile_blocks(model)
        return pipeline

    def layout_kwargs(self) -> dict[str, Any]:
        """For the pipeline's call."""
        return {
            "tile_size": int(self.tile) if self.tile.isdecimal() else None if self.tile == "none" else "auto",
            "tile_overlap": self.tile_overlap,
            "chunk_size": self.chunk,
            "max_memory": int(self.max_memory) if self.max_memory and self.max_memory.isdecimal() else self.max_memory,
        }

    def torch_dtype(self, device: str) -> "torch.dtype":
        import torch

        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32

    def generator(self) -> "torch.Generator":
        """On the CPU, so that a seed gives the same noise on every device."""
        import torch

        return torch.Generator().manual_seed(self.seed)

    def noise_generator(self) -> "torch.Generator":
        """Of the noise in the latents, not of the sampler's: another sigma shall not change the rest of the noise."""
        import torch

        return torch.Generator().manual_seed(self.seed + 1)


@dataclass(kw_only=True)
class Decoder(Execution):
    """Which decoder runs, where, and how."""

    decoder: str = "nano"
    """"nano" (bundled), a diffusers folder, a checkpoint file, a Hub id or a released name."""
    steps: int | None = None
    """Sampling steps; by default what the decoder was made for (nano: 4)."""

    def check(self) -> None:
        super().check()
        check_positive(steps=self.steps)
        if self.decoder != "auto":
            check_decoder_name(self.decoder)

    def load(self, place: bool = True, loras: Sequence[str] = ()) -> "PixelDecoderPipeline":
        from pixeldecoder.files import Naming

        pipeline = self.load_decoder(self.decoder, place, loras)
        if self.steps is not None:
            with Naming(f"--steps {self.steps}"):
                pipeline.check_steps(self.steps)
        return pipeline

    def call_kwargs(self) -> dict[str, Any]:
        """For the pipeline's call."""
        return {"num_inference_steps": self.steps} | self.layout_kwargs()


@dataclass(kw_only=True)
class TextEncoder:
    """What encodes prompts for a decoder that reads text."""

    text_encoder: str = TEXT_ENCODER
    """Folder or Hub id of Gemma-2; it is loaded if the prompt is not in the cache ($PIXELDECODER_CACHE)."""
    text_device: Device = "auto"
    """Where it runs; "auto": where the decoder does."""
    text_quantization: Literal["none", "8bit", "4bit"] = "none"
    """Of its weights, by bitsandbytes."""

    def attach(self, pipeline: "PixelDecoderPipeline") -> None:
        from pixeldecoder.hub import cache_folder
        from pixeldecoder.text import PromptEncoder

        pipeline.prompt_encoder = PromptEncoder(
            self.text_encoder,
            pipeline.device if self.text_device == "auto" else torch_device(self.text_device, "--text-device"),
            None if self.text_quantization == "none" else self.text_quantization,
            cache_folder() / "prompts",
        )


@dataclass(kw_only=True)
class Text(TextEncoder):
    """What a decoder that reads text is given."""

    prompt: str = ""
    """Describes the image; ignored by a decoder without text, such as nano."""
    prompt_embeds: Path | None = None
    """A .safetensors file with an encoded prompt, in place of the prompt and its 5 GB encoder."""
    save_prompt_embeds: Path | None = None
    """Write the encoded prompt to this .safetensors file."""

    def text_kwargs(self, pipeline: "PixelDecoderPipeline") -> dict[str, Any]:
        """Arguments for the decoder's call; encoded here, so that the text encoder is gone when the decoder runs."""
        from pixeldecoder.text import load_prompt_embeds, save_prompt_embeds

        width = pipeline.transformer.config.text_embed_dim
        if width is None:
            if self.save_prompt_embeds is not None:
                raise ValueError("--save-prompt-embeds: this decoder reads no text")
            return {}
        if pipeline.text_encoder is None:
            self.attach(pipeline)
        if self.prompt_embeds is not None:
            embeds = load_prompt_embeds(self.prompt_embeds)
            if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width:
                raise ValueError(f"{self.prompt_embeds}: expected (1, T, {width}), got {tuple(embeds.shape)}")
            texts: dict[str, Any] = {"prompt_embeds": embeds}
            if pipeline.guides():
                texts["negative_prompt_embeds"], _ = pipeline.encode_prompt(
                    pipeline.config.default_negative_prompt, None, False
                )
        else:
            names = ("prompt_embeds", "negative_prompt_embeds")
            texts = dict(zip(names, pipeline.encode_prompt(self.prompt), strict=True))
        pipeline.prompt_encoder.unload()
        if self.save_prompt_embeds is not None:
            save_prompt_embeds(texts["prompt_embeds"].cpu(), self.save_prompt_embeds, self.prompt)
            print(self.save_prompt_embeds)
        return texts


@dataclass(kw_only=True)
class FilesToImages(Text, Decoder):
    """Files in, images out."""

    source: Source
    """A file, or a folder of them."""
    output: Output
    """An image (.png, .webp, .jpg), or a folder to write into."""
    format: Literal["png", "webp", "jpg"] = "png"
    """Of the images in an output folder."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, word("PATH[:STRENGTH]")] = ()
    """A LoRA of the decoder: a file, a folder or a Hub id, with a strength if it is not 1. May be given several times,
    and they add up."""

    def prepare(self, suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
        """Each input with its output, after everything that can be checked without a decoder."""
        from pixeldecoder.files import IMAGE_SUFFIXES, check_target, jobs

        self.check()
        if self.save_prompt_embeds is not None:
            check_target(self.save_prompt_embeds, (".safetensors",))
        for lora in self.lora:
            name = lora_and_strength(lora)[0]
            if not Path(name).exists() and not is_hub_id(name):
                raise ValueError(f"--lora {lora}: expected a file, a folder or a Hub id (owner/name); there is none")
        return jobs(self.source, self.output, suffixes, IMAGE_SUFFIXES, self.format)


@dataclass(kw_only=True)
class Decode(FilesToImages):
    """Latents to images.

    Latents are normalised (as the latent diffusion model denoises them), (C, h, w) or (B, C, h, w), in a
    .safetensors file (its only tensor, or the one called "latents"), .npy or .pt.

    Example: pixeldecoder decode latents.safetensors image.png --sigma 0.1
    """

    sigma: float | None = None
    """Noise level in [0, 1] that the latents have; by default what their file says ("sigma", as `generate
    --save-latents` writes it), or 0: finished."""

    def run(self) -> None:
        from tqdm import tqdm

        from pixeldecoder import files

        check_sigma(self.sigma)
        pairs = self.prepare(files.LATENT_SUFFIXES)
        files.load_latents(pairs[0][0])  # complains before a decoder is loaded
        pipeline = self.load(loras=self.lora)
        kwargs = self.call_kwargs() | self.text_kwargs(pipeline)
        pixels = pipeline.transformer.config.scale * pipeline.transformer.config.latent_downscale_factor
        for path, target in files.progress(pairs):
            latents, stored = files.load_latents(path)
            count = len(latents) if latents.ndim == 4 else 1
            if count > 1 and not files.is_folder(self.output):
                raise ValueError(f"{path}: {count} images cannot go into {target}: give a folder as output")
            files.check_image_size(target, pixels * latents.shape[-1], pixels * latents.shape[-2])
            sigma: Any = self.sigma or 0.0
            if self.sigma is None and stored is not None:
                sigma = stored
                levels = ", ".join(f"{level:.4g}" for level in stored.tolist())
                tqdm.write(f"{path}: decoded at sigma {levels}, which the file says", file=sys.stderr)
            with files.Naming(path):
                generators = [self.generator() for _ in range(count)]
                images = pipeline(latents, sigma=sigma, generator=generators, **kwargs).images
            for index, image in enumerate(images):
                name = target if count == 1 else target.with_stem(f"{path.stem}_{index:03}")
                files.save_image(image, name)
                tqdm.write(str(name))


@dataclass(kw_only=True)
class Upscale(FilesToImages):
    """Images to larger images: encode, then decode 4 or 8 times larger.

    Example: pixeldecoder upscale photo.jpg large.png --sigma 0.2
    """

    encoder: str = "auto"
    """What makes the latents: "nano", a folder or Hub id of an autoencoder of the decoder's latent space, a latent
    space by name (its usual autoencoder), or "module:function"; "auto": the one that the decoder was made with."""
    sigma: float = 0.0
    """Noise in [0, 1] added to the latents. More gives an image that differs more and invents more."""

    def run(self) -> None:
        from tqdm import tqdm

        from pixeldecoder import files

        check_sigma(self.sigma)
        pairs = self.prepare(files.IMAGE_SUFFIXES)
        sizes = [files.image_size(path) for path, _ in pairs]  # complains before a decoder is loaded
        pipeline = self.load(loras=self.lora)
        scale = pipeline.transformer.config.scale
        for (_, target), (width, height) in zip(pairs, sizes, strict=True):
            files.check_image_size(target, scale * width, scale * height)
        encoder = image_encoder(self.encoder, pipeline)
        kwargs = self.call_kwargs() | self.text_kwargs(pipeline)
        for path, target in files.progress(pairs):
            image = files.load_image(path)
            with files.Naming(path):
                result = pipeline.upscale(
                    image, self.sigma, self.noise_generator(), encoder, generator=self.generator(), **kwargs
                )
            files.save_image(result.images[0], target)
            tqdm.write(str(target))


@dataclass(kw_only=True)
class Encode:
    """Images to normalised latents, in .safetensors files that `decode` takes.

    Example: pixeldecoder encode photo.jpg latents.safetensors --encoder Tongyi-MAI/Z-Image-Turbo
    """

    source: Source
    """An image, or a folder of them."""
    output: Output
    """A .safetensors file, or a folder to write into."""
    encoder: str = "nano"
    """"nano" (bundled, FLUX.1's space), a folder or Hub id of an autoencoder, a pipeline or SigLIP 2, a latent space by
    name (flux, flux2, sd3, sdxl, qwenimage, dinov2, siglip: its usual autoencoder), or "module:function"."""
    device: Device = "auto"
    """Where it runs; "auto": the fastest there is."""

    def run(self) -> None:
        from pixeldecoder import files

        pairs = files.jobs(self.source, self.output, files.IMAGE_SUFFIXES, (".safetensors",), "safetensors")
        for path, _ in pairs:
            files.image_size(path)  # complains before an encoder is loaded

        import torch
        import torch.nn.functional as F
        from safetensors.torch import save_file
        from tqdm import tqdm

        device = torch_device(self.device)
        encoder = load_encoder(self.encoder, device)
        for path, target in files.progress(pairs):
            image = files.to_tensor(files.load_image(path))
            with files.Naming(path), torch.no_grad():
                # 16: the largest latent cell, so that no encoder drops an edge.
                image = F.pad(image, (0, -image.shape[-1] % 16, 0, -image.shape[-2] % 16), mode="replicate")
                latents = encoder(image.to(device)).cpu().contiguous()
            files.write_whole(target, partial(save_file, {"latents": latents}))
            tqdm.write(str(target))


@dataclass(kw_only=True)
class Generate(Text, Decoder):
    """Prompt to image: any diffusers pipeline, stopped early, then the decoder.

    Example: pixeldecoder generate "a lighthouse at dusk" image.png --model Tongyi-MAI/Z-Image --stop-at 46
    """

    description: Annotated[str, tyro.conf.Positional, word("PROMPT")]
    """What to make: for the latent model, and for the decoder if it reads text."""
    output: Output
    """An image (.png, .webp, .jpg), or a folder to write into, each image under its seed."""
    model: str
    """Folder or Hub id of a diffusers pipeline."""
    decoder: str = "auto"
    """As in `decode`; "auto": the released decoder of the model's latent space, which is fetched from the Hub at first,
    as is Gemma-2, which reads prompts for it (8 GB together; the licence is non-commercial)."""
    prompt: str = ""
    """For the decoder alone, in place of PROMPT."""
    stop_at: Annotated[str, word("STOP")] = "auto"
    """Where the latent model stops: a step (24), a share of its steps (0.85), "sigma=0.1", or "auto": where the paper
    stops this family."""
    latent_space: str | None = None
    """By name (flux, flux2, sd3, sdxl, qwenimage), if the model's autoencoder does not tell."""
    negative_prompt: str | None = None
    """For the latent model."""
    height: Annotated[int | None, word("PIXELS")] = None
    """Of the latent model's image; the output is 4 times larger. By default the model's."""
    width: Annotated[int | None, word("PIXELS")] = None
    """Of the latent model's image, likewise."""
    latent_steps: int | None = None
    """Steps of the latent model; by default the model's."""
    latent_guidance_scale: float | None = None
    """Of the latent model; by default the model's."""
    images: int = 1
    """How many, with seeds that count on."""
    lora: str | None = None
    """LoRA for the latent model: a file, a folder or a Hub id."""
    pipeline_args: Annotated[str, word("JSON")] = "{}"
    """Everything else for the pipeline's call: '{"max_sequence_length": 256}'."""
    compare: bool = False
    """Let the latent model finish, decode with its own VAE too, and save both side by side."""
    save_latents: Path | None = None
    """Write latents and sigma to this .safetensors file, which `decode` takes."""
    offload: bool = False
    """Keep on the device only the model that is running."""

    def check(self) -> None:
        from pixeldecoder.files import IMAGE_SUFFIXES, check_target, is_folder

        super().check()
        check_positive(images=self.images, height=self.height, width=self.width, latent_steps=self.latent_steps)
        if not is_folder(self.output):
            if self.images > 1:
                raise ValueError(f"{self.output}: expected an image for one, for several a folder")
            check_target(self.output, IMAGE_SUFFIXES)
        for path in (self.save_latents, self.save_prompt_embeds):
            if path is not None:
                check_target(path, (".safetensors",))
        for option, name in ("--model", self.model), ("--lora", self.lora):
            if name is not None and not Path(name).exists() and not is_hub_id(name):
                raise ValueError(f"{option} {name}: expected a folder or a Hub id (owner/name); there is none")

    def run(self) -> None:
        self.check()
        extra = json_object(self.pipeline_args)

        import torch
        from PIL import Image
        from safetensors.torch import save_file

        from pixeldecoder.files import is_folder, save_image, side_by_side, write_whole
        from pixeldecoder.ldm import check_decoder, generate, parse_stop, pipeline_latent_space

        parse_stop(self.stop_at)
        device = torch_device(self.device)
        pipe = load_diffusion_pipeline(self.model, self.torch_dtype(device), extra)
        if self.lora is not None:
            load_latent_lora(pipe, self.lora)
        space = pipeline_latent_space(pipe, self.latent_space)
        if self.decoder == "auto":
            self.decoder = space.preset
        decoder = self.load(place=not self.offload)
        check_decoder(decoder, space)
        self.prompt = self.prompt or self.description
        text = self.text_kwargs(decoder)
        if not self.offload:
            pipe.to(device)
        given = {
            "negative_prompt": self.negative_prompt,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.latent_steps,
            "guidance_scale": self.latent_guidance_scale,
        }
        try:
            result = generate(
                pipe, decoder, self.description, stop_at=self.stop_at, seed=self.seed, latent_space=self.latent_space,
                compare=self.compare, offload=self.offload, num_images_per_prompt=self.images,
                decoder_kwargs=self.call_kwargs() | text,
                **{key: value for key, value in given.items() if value is not None} | extra,
            )  # fmt: skip
        except (TypeError, AttributeError) as error:
            if not extra:
                raise
            raise ValueError(f"--pipeline-args {self.pipeline_args}: {type(pipe).__name__}: {error}") from None
        taken = result.taken
        if self.save_latents is not None:
            tensors = {"latents": taken.latents.cpu().contiguous(), "sigma": torch.tensor(taken.sigma)}
            write_whole(self.save_latents, partial(save_file, tensors))
            print(self.save_latents)
        print(f"{type(pipe).__name__}: {taken.step} of {taken.steps} steps, sigma {taken.sigma:.4f}", file=sys.stderr)
        for index, image in enumerate(result.images):
            if taken.images is not None:
                image = side_by_side(taken.images[index].resize(image.size, Image.Resampling.LANCZOS), image)
            target = self.output / f"{self.seed + index}.png" if is_folder(self.output) else self.output
            save_image(image, target)
            print(target)


@dataclass(kw_only=True)
class Convert:
    """Checkpoints to the other format.

    A reference checkpoint (.pth, .safetensors) becomes a diffusers folder; a diffusers folder becomes a reference
    checkpoint. What tensors do not tell comes from the release name, of the file or given here.

    Example: pixeldecoder convert model_ema_bf16.pth decoder --preset PiD_res2k_sr4x_official_flux_distill_4step
    """

    source: Source
    """A reference checkpoint or a diffusers folder."""
    output: Output
    """A new folder, or a .pth or .safetensors file."""
    preset: str | None = None
    """The released name of a checkpoint that is called otherwise."""
    rope_reference_size: int | None = None
    """Image side in pixels that the rotary frequencies are made for, of a network that was not released."""
    adapter_padding_mode: Literal["zeros", "replicate"] | None = None
    """How its adapter's convolutions pad latents."""
    latent_channels: int | None = None
    """Channels of its latents."""
    latent_downscale_factor: int | None = None
    """Pixels of the autoencoder's image to a cell of its latents, by side."""
    scale: int | None = None
    """How many times larger than the autoencoder's its image is, by side."""
    unpack_latents: bool | None = None
    """Whether it unpacks latents of 2 x 2 cells, as v1.5's for FLUX.2 do."""

    def run(self) -> None:
        from pixeldecoder.files import check_target, check_writable, write_folder

        if not self.source.exists():
            raise ValueError(f"{self.source}: no such file or folder")
        if self.source.is_dir():
            check_target(self.output, (".pth", ".safetensors"))
        elif self.output.suffix:
            raise ValueError(f"{self.output}: a reference checkpoint becomes a folder: give a name without suffix")
        elif self.output.exists():
            raise ValueError(f"{self.output} exists: give a new folder")
        check_writable(self.output)

        from pixeldecoder.convert import folder_to_reference
        from pixeldecoder.pipeline import PixelDecoderPipeline

        if self.source.is_dir():
            with blaming(f"{self.source} could not be read"):
                folder_to_reference(self.source, self.output)
        else:
            known = ("source", "output", "preset")
            overrides = {k: v for k, v in vars(self).items() if k not in known and v is not None}
            with blaming(f"{self.source} could not be read"):
                pipeline = PixelDecoderPipeline.from_single_file(self.source, self.preset, **overrides)
            write_folder(self.output, pipeline.save_pretrained)
        print(self.output)


@dataclass(kw_only=True)
class Demo(Decoder):
    """See what it does: decode a bundled photo's latents and compare.

    Writes comparison.png: the small photo enlarged bicubically, nano's decode of its latents, nano's decode of the
    latents with noise of sigma 0.3, and the original.

    Example: pixeldecoder demo --output outputs/demo
    """

    output: Path = Path("outputs/demo")
    """Folder of the pictures."""

    def run(self) -> None:
        from pixeldecoder.files import check_writable, save_image

        self.check()
        if self.decoder != "nano":
            raise ValueError("the demo's latents are nano's: use decode or upscale with another decoder")
        target = self.output / "comparison.png"
        check_writable(target)

        from pixeldecoder.demo import comparison

        save_image(comparison(self.load(), self.generator, self.noise_generator, self.call_kwargs()), target)
        print(target)


@dataclass(kw_only=True)
class Plan(Decoder):
    """What decoding an image would take, and how it would be done, without doing it.

    Example: pixeldecoder plan 4096 4096 --max-memory 6GB
    """

    width: Annotated[int, tyro.conf.Positional, word("WIDTH")]
    """Of the image in pixels."""
    height: Annotated[int, tyro.conf.Positional, word("HEIGHT")]
    """Of the image in pixels."""
    batch: int = 1
    """Images at a time."""
    seed: int = field(default=0, init=False)  # nothing is drawn
    compile: bool = field(default=False, init=False)  # the estimate knows nothing of it

    def run(self) -> None:
        self.check()
        if min(self.width, self.height, self.batch) < 1:
            raise ValueError(f"{self.width} x {self.height} px, batch {self.batch}: expected at least 1")

        import torch

        from pixeldecoder.files import Naming
        from pixeldecoder.flow import student_times
        from pixeldecoder.performance import quantize
        from pixeldecoder.plan import (
            Limits,
            duration,
            estimate_seconds,
            measure_rates,
            must_offload,
            plan,
            weight_bytes,
        )
        from pixeldecoder.presets import PRESETS

        kwargs = self.call_kwargs()
        device = torch.device(torch_device(self.device))
        if self.decoder in PRESETS:  # without its weights
            from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel

            preset = PRESETS[self.decoder]
            if preset.distilled and self.steps is not None:
                with Naming(f"--steps {self.steps}"):
                    student_times(self.steps)
            with torch.device("meta"):
                model = PixelDecoderTransformer2DModel(**preset.config).to(self.torch_dtype(device.type))
            trained, steps, guidance = preset.trained_size, preset.num_inference_steps, preset.guidance_scale
            quantize(model, self.quantize)
        else:
            pipeline = self.load(place=False)
            model, config = pipeline.transformer, pipeline.config
            trained, steps, guidance = (
                config.trained_size, config.default_num_inference_steps, config.default_guidance_scale
            )  # fmt: skip
        config = model.config
        # As the pipeline rounds: whole latent cells, which are whole patches.
        cell = 1 if config.latent_channels is None else config.scale * config.latent_downscale_factor
        unit = math.lcm(cell, config.patch_size)
        height, width = (-(-side // unit) * unit for side in (self.height, self.width))
        if (width, height) != (self.width, self.height):
            print(f"{self.width} x {self.height} px: rounded up to multiples of {unit} px, whole latents and patches")
        steps = kwargs.pop("num_inference_steps") or steps
        offload = must_offload(model, device, self.max_memory)
        chosen = plan(
            model, height, width, self.batch, config.max_text_length if config.text_embed_dim else 0,
            Limits(**kwargs), trained_size=trained, device=device, offload=offload,
        )  # fmt: skip
        seconds = estimate_seconds(chosen, measure_rates(model, device), steps * (1 if guidance == 1 else 2))
        print(f"{chosen}, of it {weight_bytes(model) / 1e9:.2f} GB weights{', block by block' if offload else ''}")
        dtype = str(model.dtype).removeprefix("torch.")
        print(f"{steps} steps on {device.type} in {dtype}: about {duration(seconds)}")


@dataclass(kw_only=True)
class Benchmark:
    """Time, peak memory and FLOPs of configurations at several output sizes, as a table, JSON and a plot.

    Example: pixeldecoder benchmark --configs bfloat16+whole bfloat16 bfloat16+int8 --sizes 512 1024
    """

    configs: tuple[str, ...] = ("float32+whole", "bfloat16+whole", "bfloat16")
    """Each of parts joined by "+": a dtype; "whole" or tile=PIXELS; chunk=PATCHES; compile; int8, float8 or
    float8-storage; attention=NAME. Or "vae" (FLUX.1's), "upscaler" (it and the x4 upscaler), or module:function. All
    are compared with the first."""
    sizes: tuple[int, ...] = (512, 1024)
    """Sides of the outputs in pixels."""
    decoder: str = "nano"
    """As in `decode`; a released name gets random weights, which are as fast."""
    device: Device = "auto"
    """Where it runs; "auto": the fastest there is."""
    steps: int | None = None
    """Sampling steps; by default what the decoder was made for."""
    repeats: int = 3
    """Timed runs, after one that is not."""
    max_memory: Annotated[str | None, word("SIZE")] = None
    """As in `decode`."""
    startup: bool = False
    """Instead, the CPU time until the command itself answers: --help, --version, a plan, an error."""
    output: Path = Path("outputs/benchmark")
    """Folder of benchmark.json and benchmark.png."""

    def run(self) -> None:
        from pixeldecoder import files

        check_positive(steps=self.steps, repeats=self.repeats)
        if self.max_memory is not None:
            check_memory(self.max_memory)
        check_decoder_name(self.decoder)
        files.check_writable(self.output / "benchmark.json")

        from pixeldecoder.benchmark import benchmark, plot, startup

        if self.startup:
            for command, seconds in startup(self.repeats).items():
                print(f"{command:40} {seconds:6.2f} s of CPU")
            return

        device = torch_device(self.device)
        report = benchmark(
            list(self.configs), list(self.sizes), self.decoder, device, self.steps, self.repeats, self.max_memory
        )
        files.write_whole(self.output / "benchmark.json", lambda path: path.write_text(json.dumps(report, indent=1)))
        try:
            plot(report, self.output / "benchmark.png")
        except ImportError:
            print("no plot: pip install 'pixeldecoder[evaluate]'", file=sys.stderr)
        print(self.output / "benchmark.json")


@dataclass(kw_only=True)
class Evaluate(TextEncoder, Execution):
    """Decoders and baselines on the same pictures or prompts: images, metrics and a report.

    Pictures are made small, encoded, noised, decoded and compared with themselves. With prompts a latent model is
    stopped early. What is in the output folder already is not made again, so an interrupted run goes on, and more
    decoders, settings or metrics can be added; `torchrun --nproc-per-node 2 -m pixeldecoder evaluate ...` shares the
    work.

    Example: pixeldecoder evaluate photos/ --crop 512 --sigmas 0 0.4 --baselines bicubic vae --vae madebyollin/taef1
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder of pictures (captions in .txt files beside them), WebDataset shards ("data-{000..041}.tar"), or a .txt
    file with a prompt in each line."""
    output: Path = Path("outputs/evaluation")
    """Folder of report.html, report.md, results.csv and images."""
    decoders: tuple[str, ...] = ("nano",)
    """As in `decode`, all of the same scale."""
    baselines: tuple[str, ...] = ("bicubic",)
    """bicubic, lanczos; vae (the autoencoder's own decoder, then bicubic); upscale:FOLDER_OR_HUB_ID (that decoder, then
    a diffusers upscale pipeline); spandrel:FILE (that decoder, then a model that spandrel loads)."""
    steps: tuple[int, ...] = ()
    """Sampling steps of the decoders; by default what each was made for."""
    sigmas: tuple[float, ...] = (0.0,)
    """Noise levels of the latents of pictures, in [0, 1]."""
    as_if_clean: bool = False
    """Decode noisy latents also as if they were clean."""
    crop: int | None = None
    """Side in pixels of the centre crops; by default whole pictures."""
    limit: int | None = None
    """The first pictures or prompts alone."""
    scale: int = 4
    """Of the baselines, if there is no decoder."""
    encoder: str = "auto"
    """What makes the decoders' latents, as in `upscale`."""
    vae: str | None = None
    """Folder or Hub id of the autoencoder of the baselines: it encodes and decodes."""
    model: str | None = None
    """Folder or Hub id of a diffusers pipeline, for prompts."""
    stops: tuple[str, ...] = ("auto",)
    """Where it stops, as in `generate`."""
    pipeline_args: Annotated[str, word("JSON")] = "{}"
    """For its call: '{"num_inference_steps": 28}'."""
    metrics: tuple[str, ...] = ()
    """By name, or "all"; by default those that need no weights, and those whose weights are given. What cannot be had
    is skipped with a line."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Of metrics, in files: squeezenet PATH lpips BACKBONE lpips-linear PATH fid PATH."""

    def run(self) -> None:
        from pixeldecoder.files import check_writable

        self.check()
        check_writable(self.output / "report.html")
        check_positive(crop=self.crop, limit=self.limit, scale=self.scale, steps=min(self.steps, default=None))
        for name in self.decoders:
            check_decoder_name(name)
        extra = json_object(self.pipeline_args)

        from pixeldecoder.evaluation.cases import Source
        from pixeldecoder.evaluation.report import write_report
        from pixeldecoder.evaluation.study import Baselines, Decoders, LatentModel, Study

        device = torch_device(self.device)
        dtype = self.torch_dtype(device)

        def load(name: str) -> "PixelDecoderPipeline":
            pipeline = self.load_decoder(name)
            if pipeline.transformer.config.text_embed_dim is not None and pipeline.text_encoder is None:
                self.attach(pipeline)
            return pipeline

        def pipe() -> Any:
            return load_diffusion_pipeline(str(self.model), dtype, extra).to(device)

        study = Study(
            source=Source(
                path=self.source, crop=self.crop, limit=self.limit, sigmas=self.sigmas, stops=self.stops
            ),
            output=self.output,
            decoders=Decoders(
                load={name: partial(load, name) for name in self.decoders},
                encoder=lambda pipeline: image_encoder(self.encoder, pipeline),
                steps=self.steps, as_if_clean=self.as_if_clean, call_kwargs=self.layout_kwargs(),
            ),
            baselines=Baselines(names=self.baselines, vae=self.vae, scale=self.scale),
            latent_model=LatentModel(load=None if self.model is None else pipe, kwargs=extra),
            metrics=self.metrics, weights=self.weights, seed=self.seed, device=device,
            identity={
                name: getattr(self, name)
                for name in ("encoder", "model", "tile", "tile_overlap", "quantize", "attention")
            }
            | {"dtype": str(dtype)},
        )  # fmt: skip
        study.run()
        if study.state.is_main_process:
            write_report(self.output)
            print(self.output / "report.html")


@dataclass(kw_only=True)
class Compare:
    """Two images of one size: metrics of the second against the first, and a page with a slider and a zoom.

    Example: pixeldecoder compare original.png decoded.png
    """

    first: Annotated[Path, tyro.conf.Positional, word("TRUTH")]
    """The image that is taken for the truth."""
    second: Annotated[Path, tyro.conf.Positional, word("IMAGE")]
    """The image that is compared with it."""
    output: Path = Path("outputs/comparison.html")
    """The page, a file."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Of metrics, as in `evaluate`."""

    def run(self) -> None:
        from pixeldecoder.files import check_target, image_size

        check_target(self.output, (".html",))
        for path in (self.first, self.second):
            image_size(path)

        from pixeldecoder.evaluation.report import write_comparison

        for name, value in write_comparison(self.first, self.second, self.output, self.weights).items():
            print(f"{name:16} {'–' if value is None else format(value, '.4f'):>10}")
        print(self.output)


@dataclass(kw_only=True)
class Judge:
    """Let a vision model say which of two methods' images it prefers, in both orders; win rates go to the report.

    Example: pixeldecoder judge outputs/evaluation --url http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct
    """

    evaluation: Annotated[Path, tyro.conf.Positional, word("FOLDER")]
    """Folder of a finished evaluation."""
    url: str
    """Of an OpenAI-compatible server, up to /v1."""
    model: str
    """Its name there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    settings: tuple[str, ...] = ()
    """As the report calls them; by default the first of each method."""
    limit: int | None = None
    """The first images alone."""

    def run(self) -> None:
        check_positive(limit=self.limit)

        from pixeldecoder.evaluation.judge import judge
        from pixeldecoder.evaluation.report import write_report

        # Never a token of another service's.
        key = os.environ.get(self.key_variable) or "none"
        answers = judge(self.evaluation, self.url, self.model, key, self.settings, self.limit)
        if unclear := sum(answer["answer"] is None for answer in answers):
            print(f"{unclear} of {len(answers)} answers are neither first, second nor tie: left out", file=sys.stderr)
        write_report(self.evaluation)
        print(self.evaluation / "report.html")


@dataclass(kw_only=True)
class Train:
    """Train a prior or a teacher.

    Settings come from the recipe, then from the YAML file, then from the command line;
    `pixeldecoder train teacher --help` lists them.

    Example: pixeldecoder train teacher --config my.yaml --data.source photos/ --steps 1000
    """

    stage: Annotated[Literal["prior", "teacher"], tyro.conf.Positional]
    """What to train."""
    recipe: str = "paper"
    """"paper", or for a teacher "nano"."""
    config: Path | None = None
    """YAML file, such as the one beside every checkpoint."""


@dataclass(kw_only=True)
class Distill:
    """Distil a teacher to 4 steps (DMD2).

    Settings come from the recipe, then from the YAML file, then from the command line; `pixeldecoder distill --help`
    lists them.

    Example: pixeldecoder distill --model teacher/ --encoder nano --data.source photos/
    """

    recipe: str = "paper"
    """"paper" or "nano"."""
    config: Path | None = None
    """YAML file, such as the one beside every checkpoint."""


def run_training(stage: str, args: list[str]) -> None:
    """`args` without the command and the stage."""
    from pixeldecoder.training.config import RECIPES, check, read_yaml

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", default="paper")
    first.add_argument("--config", type=Path)
    command = "distill" if stage == "student" else f"train {stage}"
    try:
        found, rest = first.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (see pixeldecoder {command} --help)") from None
    if found.recipe not in RECIPES[stage]:
        raise ValueError(f"--recipe {found.recipe}: expected {' or '.join(RECIPES[stage])}")
    default = RECIPES[stage][found.recipe]()
    if found.config is not None:
        default = read_yaml(found.config, default)
    config = parse(type(default), rest, f"pixeldecoder {command}", default)
    check(config)  # before the libraries, which take seconds

    from pixeldecoder.training.loop import train

    print(train(config))


COMMANDS: dict[str, type] = {
    "demo": Demo,
    "decode": Decode,
    "encode": Encode,
    "upscale": Upscale,
    "generate": Generate,
    "convert": Convert,
    "plan": Plan,
    "evaluate": Evaluate,
    "compare": Compare,
    "judge": Judge,
    "benchmark": Benchmark,
    "train": Train,
    "distill": Distill,
}


def torch_device(name: str, option: str = "--device") -> str:
    """The device of that name, "auto" the fastest.

    Raises:
        ValueError: this machine has none.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [device for device, there in available.items() if there]
    if name != "auto" and name not in usable:
        raise ValueError(f"{option} {name}: this machine has none; available: {', '.join(usable)}")
    return usable[0] if name == "auto" else name


def check_sigma(sigma: float | None) -> None:
    if sigma is not None and not 0 <= sigma <= 1:
        raise ValueError(f"--sigma {sigma}: expected a noise level in [0, 1]")


def check_positive(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")


def check_memory(size: str) -> None:
    if not re.fullmatch(r"\d+|\d*\.?\d+[KMG]i?B", size, re.IGNORECASE) or not re.search("[1-9]", size):
        raise ValueError(f'--max-memory {size}: expected bytes, or a size such as "6GB"')


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--pipeline-args {text}: expected a JSON object")
    return found


def load_diffusion_pipeline(name: str, dtype: "torch.dtype", arguments: dict[str, Any]) -> Any:
    """`arguments` are those its call is to take."""
    from diffusers import DiffusionPipeline

    from pixeldecoder.hub import unreachable

    try:
        with blaming(f"{name} could not be loaded"):
            pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except OSError as error:
        raise ValueError(str(error)) if Path(name).exists() else unreachable(name, error) from None
    taken = inspect.signature(pipe.__call__).parameters
    if unknown := [key for key in arguments if key not in taken]:
        raise ValueError(f"--pipeline-args: {type(pipe).__name__} has no {unknown[0]}: expected {', '.join(taken)}")
    return pipe


def lora_and_strength(given: str) -> tuple[str, float]:
    """Of PATH or PATH:STRENGTH."""
    path, colon, number = given.rpartition(":")
    try:
        strength = float(number) if colon and not Path(given).exists() else 1.0
    except ValueError:  # the colon is the path's
        return given, 1.0
    if not math.isfinite(strength):
        raise ValueError(f"--lora {given}: expected a number as strength, got {number}")
    return (path if colon and not Path(given).exists() else given), strength


def lora_file(name: str) -> Path:
    """A LoRA's file: itself, the one of a folder, or of a Hub repository."""
    from pixeldecoder.hub import download

    path = Path(name) if Path(name).exists() else download(name, ["*.safetensors"])
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    usual = path / "pytorch_lora_weights.safetensors"
    if usual not in files and len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"--lora {name}: expected one .safetensors file, found {names}")
    return usual if usual in files else files[0]


def load_loras(pipeline: "PixelDecoderPipeline", loras: Sequence[str]) -> None:
    """Onto the decoder, added up by their strengths.

    Raises:
        ValueError: of another network, or no LoRA at all.
    """
    if not loras:
        return
    import peft  # noqa: F401  # diffusers would not say which extra has it

    from pixeldecoder.files import Naming

    modules = dict(pipeline.transformer.named_modules())
    strengths = {}
    for index, given in enumerate(loras):
        name, strength = lora_and_strength(given)
        path, adapter = lora_file(name), f"lora{index}"
        with Naming(f"--lora {name}"):
            try:
                state = pipeline.lora_state_dict(path)
            except OSError as error:
                raise ValueError(f"not a readable file of tensors ({' '.join(str(error).split())})") from None
            for key, tensor in state.items():
                # peft would take what fits, and say nothing of the rest.
                module, _, part = key.removeprefix("transformer.").partition(".lora_")
                weight = getattr(modules.get(module), "weight", None)
                side = {"A": 1, "B": 0}.get(part[:1])
                if weight is None or (side is not None and tensor.shape[side] != weight.shape[side]):
                    ours = "has no such layer" if weight is None else f"is {tuple(weight.shape)} there"
                    raise ValueError(f"not of this decoder, which {ours}: {key} {tuple(tensor.shape)}")
            pipeline.load_lora_weights(state, adapter_name=adapter)
        strengths[adapter] = strength
    pipeline.set_adapters(list(strengths), list(strengths.values()))


def load_latent_lora(pipe: Any, name: str) -> None:
    """Onto a latent model; diffusers' own warnings tell what does not fit."""
    import peft  # noqa: F401
    from diffusers.utils import logging

    path, level = lora_file(name), logging.get_verbosity()
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"--lora {name}: {type(pipe).__name__} takes none")
    logging.set_verbosity_warning()
    try:
        pipe.load_lora_weights(path)
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"--lora {name}: not a LoRA of {type(pipe).__name__}: {error}") from None
    finally:
        logging.set_verbosity(level)


def image_encoder(name: str, pipeline: "PixelDecoderPipeline") -> Any:
    """For `upscale`: the encoder of that name, or `None` for the decoder's own."""
    from pixeldecoder.latents import SPACES

    if name == "auto":
        if pipeline.encoder is not None:
            return None
        if trained := pipeline.config.encoder_name:
            if ":" in trained:  # no file has a module imported
                raise ValueError(f"the decoder was trained with the encoder {trained}: give --encoder {trained}")
            try:
                return load_encoder(trained, pipeline.device)
            except ValueError as error:
                raise ValueError(f"the decoder was trained with the encoder {trained}: {error}") from None
        if pipeline.config.latent_space not in SPACES:
            raise ValueError("the decoder has no encoder and does not tell its latent space: give --encoder")
        name = pipeline.config.latent_space
    return load_encoder(name, pipeline.device)


def load_encoder(name: str, device: Any) -> Any:
    """The encoder of that name; of one's own, ValueErrors tell what goes wrong in it."""
    import torch

    from pixeldecoder.files import Naming
    from pixeldecoder.latents import load_image_encoder

    with blaming(f"{name} could not be loaded"):
        encoder = load_image_encoder(name, device)

    def checked(image: torch.Tensor) -> torch.Tensor:
        with blaming(f'encoder "{name}"'), Naming(f'encoder "{name}"'):
            latents = encoder(image)
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
            got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f'encoder "{name}": expected latents (B, C, h, w), got {got}')
        return latents

    return checked


def be_quiet() -> None:
    """Libraries keep their warnings to themselves; before they are imported."""
    import warnings

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for library in "DIFFUSERS", "TRANSFORMERS":
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    os.environ.setdefault("TQDM_DELAY", "2")  # a bar for what takes longer
    for name in "accelerate", "bitsandbytes", "torchao", "torch.utils._pytree":
        logging.getLogger(name).setLevel(logging.ERROR)


ABOUT = f"""{__doc__}

`pixeldecoder COMMAND --help` tells a command's options, `pixeldecoder --version` the version."""


def dispatch(args: list[str]) -> None:
    """Run a command."""
    name, rest = (args[0] if args else ""), args[1:]
    if name == "--version":
        print(f"pixeldecoder {__version__}")
    elif name in ("-h", "--help"):
        tyro.extras.subcommand_cli_from_dict(dict(COMMANDS), args=["--help"], prog="pixeldecoder", description=ABOUT)
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        wrong = f'no command "{name}"' if name else "no command"
        meant = f', did you mean "{close[0]}"? Expected' if close else "; expected"
        raise ValueError(f"{wrong}{meant} one of {', '.join(COMMANDS)} (see pixeldecoder --help)")
    # Their settings depend on a recipe and a file that must be read first.
    elif name == "distill":
        run_training("student", rest)
    elif name == "train" and rest[:1] in (["prior"], ["teacher"]):
        run_training(rest[0], rest[1:])
    else:
        command: Any = parse(COMMANDS[name], rest, f"pixeldecoder {name}")
        try:
            command.run()
        except RuntimeError as error:  # a kernel tells only when it runs what it cannot
            if getattr(command, "attention", "auto") == "auto" or OUT_OF_MEMORY.search(str(error)):
                raise
            raise ValueError(f"--attention {command.attention} cannot be used here: {error}") from error


def main(args: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 2 after one line on what a user can mend; 130 on Ctrl-C; 141 if the output's reader has gone.
    """
    args = sys.argv[1:] if args is None else args
    be_quiet()
    ours, handler = logging.getLogger("pixeldecoder"), logging.StreamHandler()
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        try:
            dispatch(args)
        except SystemExit as end:  # --help
            code = int(end.code or 0)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            print("pixeldecoder: interrupted", file=sys.stderr)
            code = 130
        except Exception as error:
            line = explain(error, args[0] if args else "")
            if line is None:
                raise
            print(f"pixeldecoder: {line}", file=sys.stderr)
            code = 2
        else:
            code = 0
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain of it once more when it flushes at its end.
        for stream in sys.stdout, sys.stderr:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + 13  # as of a tool that dies of SIGPIPE
    finally:
        ours.removeHandler(handler)
    return code


def entry_point() -> None:
    sys.exit(main())
