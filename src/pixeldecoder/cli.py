"""Files in, files out: the `pixeldecoder` command."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import torch

    from pixeldecoder.pipeline import PixelDecoderPipeline


Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Output = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]


@dataclass(kw_only=True)
class Execution:
    """Where a decoder runs, and how."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """"auto": the fastest there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. "auto": bfloat16, but float32 on a CPU that has no instructions for it."""
    seed: int = 0
    """The same seed gives the same image."""
    tile: str = "auto"
    """Side in pixels of the tiles that a large image is decoded in, on one canvas of noise; "none": whole. "auto":
    tiles for what is larger than the decoder was trained on, or than the memory allows."""
    tile_overlap: int | None = None
    """Pixels that neighbouring tiles share; by default 64."""
    chunk: int | None = None
    """Patches at a time, apart from attention; by default what suits device and memory."""
    max_memory: str | None = None
    """Such as 6GB: of the process on a CPU, else of the device; by default what is free."""
    quantize: Literal["none", "int8", "float8", "float8-storage"] = "none"
    """Of the weights of the large matrix products: see docs/performance.md."""
    attention: str = "auto"
    """Kernel, by diffusers' name ("flash", "sage", "_native_cudnn"...). "auto": what suits the device."""
    compile: bool = False
    """Let torch.compile fuse the blocks: minutes at first (kept in $PIXELDECODER_CACHE), faster from then on."""

    def load_decoder(self, name: str, place: bool = True) -> "PixelDecoderPipeline":
        """`place`: move it to the device, or arrange that its blocks take turns there."""
        import logging

        from pixeldecoder.performance import compile_blocks, quantize, set_attention
        from pixeldecoder.pipeline import PixelDecoderPipeline
        from pixeldecoder.plan import must_offload

        self.layout_kwargs()  # complain before loading
        device = self.torch_device()
        pipeline = PixelDecoderPipeline.from_pretrained(name, dtype=self.torch_dtype(device))
        pipeline.set_progress_bar_config(desc="steps", leave=False)
        logger = logging.getLogger("pixeldecoder.pipeline")  # what it plans
        logger.setLevel(logging.INFO)
        logger.handlers = [logging.StreamHandler()]
        model, target = pipeline.transformer, torch_device_of(device)
        set_attention(model, self.attention)
        quantize(model, self.quantize)
        if not place:
            return pipeline
        if must_offload(model, target, self.max_memory):
            print("the weights take turns on the device: slower, but they fit", file=sys.stderr)
            model.enable_group_offload(target, offload_type="block_level", num_blocks_per_group=1, use_stream=True)
            if pipeline.encoder is not None:
                pipeline.encoder.to(target)
        else:
            pipeline.to(target)
        if self.compile:
            compile_blocks(model)
        return pipeline

    def layout_kwargs(self) -> dict[str, Any]:
        """For the pipeline's call."""
        from pixeldecoder.plan import memory_budget

        if self.tile not in ("auto", "none") and not self.tile.isdigit():
            raise ValueError(f'--tile {self.tile}: expected "auto", "none" or a side in pixels')
        memory_budget(torch_device_of("cpu"), self.max_memory)
        tiles: Any = {"auto": "auto", "none": None}.get(self.tile, self.tile)
        return {
            "tile_size": int(tiles) if self.tile.isdigit() else tiles,
            "tile_overlap": self.tile_overlap,
            "chunk_size": self.chunk,
            "max_memory": self.max_memory,
        }

    def torch_device(self) -> str:
        import torch

        available = {
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
            "cpu": True,
        }
        device = self.device if self.device != "auto" else next(name for name, there in available.items() if there)
        if not available[device]:
            usable = ", ".join(name for name, there in available.items() if there)
            raise ValueError(f"--device {device}: this machine has none; available: {usable}")
        return device

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


@dataclass(kw_only=True)
class Decoder(Execution):
    """Which decoder runs, where, and how."""

    decoder: str = "nano"
    """"nano" (bundled), a diffusers folder, a checkpoint file, a Hub id or a released name."""
    steps: int | None = None
    """Sampling steps; by default what the decoder was made for (nano: 4)."""

    def load(self, place: bool = True) -> "PixelDecoderPipeline":
        pipeline = self.load_decoder(self.decoder, place)
        if self.steps is not None:
            pipeline.check_steps(self.steps)
        return pipeline

    def call_kwargs(self) -> dict[str, Any]:
        """For the pipeline's call."""
        return {"num_inference_steps": self.steps} | self.layout_kwargs()


@dataclass(kw_only=True)
class TextEncoder:
    """What encodes prompts for a decoder that reads text."""

    text_encoder: str = "Efficient-Large-Model/gemma-2-2b-it"
    """Folder or Hub id of Gemma-2; it is loaded if the prompt is not in the cache ($PIXELDECODER_CACHE)."""
    text_device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where it runs. "auto": where the decoder does."""
    text_quantization: Literal["none", "8bit", "4bit"] = "none"
    """Of its weights, by bitsandbytes."""

    def attach(self, pipeline: "PixelDecoderPipeline") -> None:
        from pixeldecoder.text import PromptEncoder, prompt_cache

        pipeline.prompt_encoder = PromptEncoder(
            self.text_encoder,
            pipeline.device if self.text_device == "auto" else self.text_device,
            None if self.text_quantization == "none" else self.text_quantization,
            prompt_cache(),
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

        if pipeline.transformer.config.text_embed_dim is None:
            return {}
        if pipeline.text_encoder is None:
            self.attach(pipeline)
        if self.prompt_embeds is not None:
            texts: dict[str, Any] = {"prompt_embeds": load_prompt_embeds(self.prompt_embeds)}
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
        return texts


@dataclass(kw_only=True)
class FilesToImages(Decoder):
    source: Source
    """A file, or a folder of them."""
    output: Output
    """An image (.png, .webp, .jpg); for several, a folder."""
    format: Literal["png", "webp", "jpg"] = "png"
    """Of the images in an output folder."""


@dataclass(kw_only=True)
class Decode(Text, FilesToImages):
    """Latents to images.

    Latents are normalised (as the latent diffusion model denoises them), (C, h, w) or (B, C, h, w), in a
    .safetensors file (its only tensor, or the one called "latents"), .npy or .pt.

    Example: pixeldecoder decode latents.safetensors image.png --sigma 0.1
    """

    sigma: float = 0.0
    """Noise level in [0, 1] that the latents have: 0 if they are finished."""

    def run(self) -> None:
        from pixeldecoder.files import LATENT_SUFFIXES, Naming, check_output, load_latents, pairs, save_image

        check_output(self.source, self.output)
        check_sigma(self.sigma)
        pipeline = self.load()
        text = self.text_kwargs(pipeline)
        for path, target in pairs(self.source, self.output, LATENT_SUFFIXES, self.format):
            latents = load_latents(path)
            with Naming(path):
                count = len(latents) if latents.ndim == 4 else 1
                if count > 1 and not self.source.is_dir() and target.suffix:
                    raise ValueError(f"{count} images cannot go into {target}: give a folder as output")
                generators = [self.generator() for _ in range(count)]
                images = pipeline(latents, sigma=self.sigma, generator=generators, **self.call_kwargs(), **text).images
            if count == 1:
                save_image(images[0], target)
            else:
                folder = target.parent if target.suffix else target
                for index, image in enumerate(images):
                    save_image(image, folder / f"{path.stem}_{index:03}.{self.format}")


@dataclass(kw_only=True)
class Upscale(Text, FilesToImages):
    """Images to larger images: encode, then decode 4 or 8 times larger.

    Example: pixeldecoder upscale photo.jpg large.png --sigma 0.2
    """

    encoder: str = "auto"
    """What makes the latents: a folder or Hub id of an autoencoder of the decoder's latent space, the space by name, or
    "module:function". "auto": the decoder's own, or the one that pixeldecoder.latents names for its space."""
    sigma: float = 0.0
    """Noise in [0, 1] added to the latents. More gives an image that differs more and invents more."""

    def run(self) -> None:
        import torch

        from pixeldecoder.files import IMAGE_SUFFIXES, Naming, check_output, load_image, pairs, save_image

        check_output(self.source, self.output)
        check_sigma(self.sigma)
        pipeline = self.load()
        encoder = image_encoder(self.encoder, pipeline)
        text = self.text_kwargs(pipeline)
        for path, target in pairs(self.source, self.output, IMAGE_SUFFIXES, self.format):
            image = load_image(path)
            with Naming(path):
                result = pipeline.upscale(
                    image,
                    sigma=self.sigma,
                    encoder=encoder,
                    # Not the sampler's: another sigma shall not change the rest of the noise.
                    noise_generator=torch.Generator().manual_seed(self.seed + 1),
                    generator=self.generator(),
                    **self.call_kwargs(),
                    **text,
                )
            save_image(result.images[0], target)


@dataclass(kw_only=True)
class Encode:
    """Images to normalised latents, in .safetensors files that `decode` takes.

    Example: pixeldecoder encode photo.jpg latents.safetensors --encoder Tongyi-MAI/Z-Image-Turbo
    """

    source: Source
    """An image, or a folder of them."""
    output: Output
    """A .safetensors file; for several, a folder."""
    encoder: str = "nano"
    """"nano" (bundled, FLUX.1's space), a folder or Hub id of an autoencoder, a pipeline or SigLIP 2, a latent space by
    name (flux, flux2, sd3, sdxl, qwenimage, dinov2, siglip: its usual autoencoder), or "module:function"."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """"auto": the fastest there is."""

    def run(self) -> None:
        import torch
        import torch.nn.functional as F
        from safetensors.torch import save_file

        from pixeldecoder.files import IMAGE_SUFFIXES, Naming, load_image, pairs, to_tensor, write_whole
        from pixeldecoder.latents import load_image_encoder

        if not self.source.exists():
            raise ValueError(f"{self.source}: no such file or folder")
        if not self.source.is_dir() and self.output.suffix != ".safetensors":
            raise ValueError(f"{self.output}: expected a file ending in .safetensors")
        device = Decoder(device=self.device).torch_device()
        encoder = load_image_encoder(self.encoder, device)
        for path, target in pairs(self.source, self.output, IMAGE_SUFFIXES, "safetensors"):
            image = to_tensor(load_image(path))
            with Naming(path), torch.no_grad():
                # 16: the largest latent cell, so that no encoder drops an edge.
                image = F.pad(image, (0, -image.shape[-1] % 16, 0, -image.shape[-2] % 16), mode="replicate")
                latents = encoder(image.to(device)).cpu().contiguous()
            write_whole(target, partial(save_file, {"latents": latents}))


@dataclass(kw_only=True)
class Generate(Text, Decoder):
    """Prompt to image: any diffusers pipeline, stopped early, then the decoder.

    Example: pixeldecoder generate "a lighthouse at dusk" image.png --model Tongyi-MAI/Z-Image --stop-at 46
    """

    description: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """What to make."""
    output: Output
    """An image (.png, .webp, .jpg); for several, a folder."""
    model: str
    """Folder or Hub id of a diffusers pipeline."""
    decoder: str = "auto"
    """"auto": the released decoder of the model's latent space; otherwise as in `decode`."""
    stop_at: str = "auto"
    """Where the latent model stops: a step (24), a share of its steps (0.85), "sigma=0.1", or "auto": where the paper
    stops this family."""
    latent_space: str | None = None
    """By name (flux, flux2, sd3, sdxl, qwenimage), if the model's autoencoder does not tell."""
    negative_prompt: str | None = None
    """For the latent model."""
    height: int | None = None
    """Of the latent model's image in pixels; the output is 4 times larger. By default the model's."""
    width: int | None = None
    latent_steps: int | None = None
    """Steps of the latent model; by default the model's."""
    latent_guidance_scale: float | None = None
    """Of the latent model; by default the model's."""
    images: int = 1
    """How many, with seeds that count on."""
    lora: str | None = None
    """LoRA for the latent model: a file, a folder or a Hub id."""
    pipeline_args: str = "{}"
    """Everything else for the pipeline's call, as JSON: '{"max_sequence_length": 256}'."""
    compare: bool = False
    """Let the latent model finish, decode with its own VAE too, and save both side by side."""
    save_latents: Path | None = None
    """Write latents and sigma to this .safetensors file."""
    offload: bool = False
    """Keep on the device only the model that is running."""

    def run(self) -> None:
        import torch
        from PIL import Image
        from safetensors.torch import save_file

        from pixeldecoder.files import IMAGE_SUFFIXES, save_image, side_by_side, write_whole
        from pixeldecoder.ldm import check_decoder, generate, parse_stop, pipeline_latent_space

        parse_stop(self.stop_at)
        if self.images < 1:
            raise ValueError(f"--images {self.images}: expected at least 1")
        if self.output.suffix and (self.images > 1 or self.output.suffix.lower() not in IMAGE_SUFFIXES):
            raise ValueError(
                f"{self.output}: expected an image ending in {', '.join(IMAGE_SUFFIXES)}, or for several a folder"
            )
        extra = json_object(self.pipeline_args)
        device = self.torch_device()
        pipe = load_diffusion_pipeline(self.model, self.torch_dtype(device))
        if self.lora is not None:
            pipe.load_lora_weights(self.lora)
        space = pipeline_latent_space(pipe, self.latent_space)
        if self.decoder == "auto":
            self.decoder = space.preset
        decoder = self.load()
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
        result = generate(
            pipe, decoder, self.description, stop_at=self.stop_at, seed=self.seed, latent_space=self.latent_space,
            compare=self.compare, offload=self.offload, num_images_per_prompt=self.images,
            decoder_kwargs=self.call_kwargs() | text,
            **{key: value for key, value in given.items() if value is not None} | extra,
        )  # fmt: skip
        taken = result.taken
        if self.save_latents is not None:
            tensors = {"latents": taken.latents.cpu().contiguous(), "sigma": torch.tensor(taken.sigma)}
            write_whole(self.save_latents, lambda file: save_file(tensors, file))
        print(f"{type(pipe).__name__}: {taken.step} of {taken.steps} steps, sigma {taken.sigma:.4f}", file=sys.stderr)
        for index, image in enumerate(result.images):
            if taken.images is not None:
                image = side_by_side(taken.images[index].resize(image.size, Image.Resampling.LANCZOS), image)
            if self.images == 1 and self.output.suffix:
                target = self.output
            else:
                target = self.output / f"{self.seed + index}.png"
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
    """Of a network that was not released, as are the following."""
    latent_channels: int | None = None
    latent_downscale_factor: int | None = None
    scale: int | None = None
    unpack_latents: bool | None = None

    def run(self) -> None:
        from pixeldecoder.convert import folder_to_reference
        from pixeldecoder.pipeline import PixelDecoderPipeline

        if self.source.is_dir():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            folder_to_reference(self.source, self.output)
        else:
            if self.output.suffix:
                raise ValueError(f"{self.output}: a reference checkpoint becomes a folder: give a name without suffix")
            if self.output.exists():
                raise ValueError(f"{self.output} exists: give a new folder")
            known = ("source", "output", "preset")
            overrides = {k: v for k, v in vars(self).items() if k not in known and v is not None}
            pipeline = PixelDecoderPipeline.from_single_file(self.source, self.preset, **overrides)
            temporary = self.output.with_name(f".{self.output.name}.{os.getpid()}.tmp")
            try:
                pipeline.save_pretrained(temporary)
                temporary.replace(self.output)
            finally:
                if temporary.exists():
                    import shutil

                    shutil.rmtree(temporary)
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
        from pixeldecoder.demo import comparison
        from pixeldecoder.files import save_image

        if self.decoder != "nano":
            raise ValueError("the demo's latents are nano's: use decode or upscale with another decoder")
        save_image(comparison(self.load(), self.generator(), self.call_kwargs()), self.output / "comparison.png")
        print(self.output / "comparison.png")


@dataclass(kw_only=True)
class Plan(Decoder):
    """What decoding an image would take, and how it would be done, without doing it.

    Example: pixeldecoder plan 4096 4096 --max-memory 6GB
    """

    width: Annotated[int, tyro.conf.Positional]
    """Of the image in pixels."""
    height: Annotated[int, tyro.conf.Positional]
    batch: int = 1
    """Images at a time."""

    def run(self) -> None:
        import torch

        from pixeldecoder.performance import quantize
        from pixeldecoder.plan import estimate_seconds, measure_rates, must_offload, plan, weight_bytes
        from pixeldecoder.presets import PRESETS

        kwargs = self.call_kwargs()
        device = torch_device_of(self.torch_device())
        if self.decoder in PRESETS:  # without its weights
            from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel

            preset = PRESETS[self.decoder]
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
        patch = model.config.patch_size
        if min(self.width, self.height, self.batch) < 1:
            raise ValueError(f"{self.width} x {self.height} px, batch {self.batch}: expected at least 1")
        sides = [-(-side // patch) * patch for side in (self.height, self.width)]
        steps = kwargs.pop("num_inference_steps") or steps
        offload = must_offload(model, device, self.max_memory)
        text_tokens = model.config.max_text_length if model.config.text_embed_dim else 0
        chosen = plan(
            model,
            sides[0],
            sides[1],
            self.batch,
            text_tokens,
            trained_size=trained,
            device=device,
            offload=offload,
            **kwargs,
        )
        seconds = estimate_seconds(chosen, measure_rates(model, device), steps * (1 if guidance == 1 else 2))
        print(f"{chosen}, of it {weight_bytes(model) / 1e9:.2f} GB weights{', block by block' if offload else ''}")
        print(f"{steps} steps on {device.type} in {str(model.dtype).removeprefix('torch.')}: about {seconds:.2g} s")


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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """"auto": the fastest there is."""
    steps: int | None = None
    """Sampling steps."""
    repeats: int = 3
    """Timed runs, after one that is not."""
    max_memory: str | None = None
    """As in `decode`."""
    startup: bool = False
    """Instead, the CPU time until the command itself answers: --help, --version, a plan, an error."""
    output: Path = Path("outputs/benchmark")
    """Folder of benchmark.json and benchmark.png."""

    def run(self) -> None:
        import json

        from pixeldecoder.evaluation.benchmark import benchmark, plot, startup
        from pixeldecoder.files import write_whole

        if self.startup:
            for command, seconds in startup(self.repeats).items():
                print(f"{command:40} {seconds:6.2f} s of CPU")
            return
        device = Decoder(device=self.device).torch_device()
        report = benchmark(
            list(self.configs), list(self.sizes), self.decoder, device, self.steps, self.repeats, self.max_memory
        )
        write_whole(self.output / "benchmark.json", lambda path: path.write_text(json.dumps(report, indent=1)))
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
    pipeline_args: str = "{}"
    """For its call, as JSON: '{"num_inference_steps": 28}'."""
    metrics: tuple[str, ...] = ()
    """By name, or "all"; by default those that need no weights, and those whose weights are given. What cannot be had
    is skipped with a line."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Of metrics, in files: squeezenet PATH lpips BACKBONE lpips-linear PATH fid PATH."""

    def run(self) -> None:
        from pixeldecoder.evaluation.report import write_report
        from pixeldecoder.evaluation.run import Study

        device = self.torch_device()
        dtype = self.torch_dtype(device)

        def load(name: str) -> "PixelDecoderPipeline":
            pipeline = self.load_decoder(name)
            if pipeline.transformer.config.text_embed_dim is not None and pipeline.text_encoder is None:
                self.attach(pipeline)
            return pipeline

        study = Study(
            **{
                name: getattr(self, name)
                for name in (
                    "output", "baselines", "vae", "steps", "sigmas", "stops", "as_if_clean", "crop", "scale", "limit",
                    "seed", "metrics", "weights",
                )
            },
            source=self.source,
            decoders={name: partial(load, name) for name in self.decoders},
            encoder=lambda pipeline: image_encoder(self.encoder, pipeline),
            pipe=None if self.model is None else lambda: load_diffusion_pipeline(str(self.model), dtype).to(device),
            pipe_kwargs=json_object(self.pipeline_args),
            call_kwargs=self.layout_kwargs(),
            device=device,
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

    first: Annotated[Path, tyro.conf.Positional]
    """Taken for the truth."""
    second: Annotated[Path, tyro.conf.Positional]
    output: Path = Path("outputs/comparison.html")
    """The page."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Of metrics, as in `evaluate`."""

    def run(self) -> None:
        from pixeldecoder.evaluation.report import write_comparison

        for name, value in write_comparison(self.first, self.second, self.output, self.weights).items():
            print(f"{name:16} {'–' if value is None else format(value, '.4f'):>10}")
        print(self.output)


@dataclass(kw_only=True)
class Judge:
    """Let a vision model say which of two methods' images it prefers, in both orders; win rates go to the report.

    Example: pixeldecoder judge outputs/evaluation --url http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct
    """

    evaluation: Annotated[Path, tyro.conf.Positional]
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

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="paper")
    first.add_argument("--config", type=Path)
    found, rest = first.parse_known_args(args)
    if found.recipe not in RECIPES[stage]:
        raise ValueError(f"--recipe {found.recipe}: expected {' or '.join(RECIPES[stage])}")
    default = RECIPES[stage][found.recipe]()
    if found.config is not None:
        default = read_yaml(found.config, default)
    command = "distill" if stage == "student" else f"train {stage}"
    config = tyro.cli(type(default), args=rest, default=default, prog=f"pixeldecoder {command}")
    check(config)  # before the libraries, which take seconds

    from pixeldecoder.training.loop import train

    print(train(config))


COMMANDS: dict[str, Callable[..., Any]] = {
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


def torch_device_of(name: str) -> "torch.device":
    import torch

    return torch.device(name)


def check_sigma(sigma: float) -> None:
    if not 0 <= sigma <= 1:
        raise ValueError(f"--sigma {sigma}: expected a noise level in [0, 1]")


def json_object(text: str) -> dict[str, Any]:
    import json

    try:
        found = json.loads(text)
        assert isinstance(found, dict)
    except (ValueError, AssertionError):
        raise ValueError(f"--pipeline-args {text}: expected a JSON object") from None
    return found


def load_diffusion_pipeline(name: str, dtype: "torch.dtype") -> Any:
    from diffusers import DiffusionPipeline

    from pixeldecoder.latents import unreachable

    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except OSError as error:
        raise ValueError(str(error)) if Path(name).exists() else unreachable(name, error) from None


def image_encoder(name: str, pipeline: "PixelDecoderPipeline") -> Any:
    """For `upscale`: the encoder of that name, or `None` for the decoder's own."""
    from pixeldecoder.latents import SPACES, load_image_encoder

    if name == "auto":
        if pipeline.encoder is not None:
            return None
        if trained := pipeline.config.encoder_name:
            if ":" in trained:  # no file has a module imported
                raise ValueError(f"the decoder was trained with the encoder {trained}: give --encoder {trained}")
            try:
                return load_image_encoder(trained, pipeline.device)
            except ValueError as error:
                raise ValueError(f"the decoder was trained with the encoder {trained}: {error}") from None
        if pipeline.config.latent_space not in SPACES:
            raise ValueError("the decoder has no encoder and does not tell its latent space: give --encoder")
        name = pipeline.config.latent_space
    return load_image_encoder(name, pipeline.device)


def main(args: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after one line on bad input."""
    args = sys.argv[1:] if args is None else args
    try:
        # Their settings depend on a recipe and a file that must be read first.
        if args[:1] == ["distill"]:
            run_training("student", args[1:])
        elif args[:1] == ["train"] and args[1:2] in (["prior"], ["teacher"]):
            run_training(args[1], args[2:])
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, args=args, description=__doc__).run()
    except (ValueError, OSError) as error:
        print(f"pixeldecoder: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def entry_point() -> None:
    sys.exit(main())
