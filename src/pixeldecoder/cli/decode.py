"""Latents or pictures in, large pictures out, and pictures to latents: `decode`, `upscale`, `encode`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pixeldecoder.cli.options import (
    Device,
    FilesToImages,
    Output,
    Source,
    check_memory,
    check_sigma,
    source_facts,
    word,
)
from pixeldecoder.errors import naming

if TYPE_CHECKING:
    import torch

    from pixeldecoder.cli.jobs import Job
    from pixeldecoder.files import Latents
    from pixeldecoder.pictures import Picture
    from pixeldecoder.pipeline import PixelDecoderPipeline


@dataclass(kw_only=True)
class Decode(FilesToImages):
    """Latents to images.

    Latents are normalised (as the latent diffusion model denoises them), (C, h, w) or (B, C, h, w), in a .safetensors
    file (its only tensor, or the one called "latents"), .npy or .pt; or ComfyUI's .latent, which are normalised here.

    Example: pixeldecoder decode latents.safetensors image.png --sigma 0.1
    """

    sigma: float | None = None
    """Noise level in [0, 1] that the latents have; by default what their file says ("sigma", as `generate
    --save-latents` writes it), or 0: finished."""
    latent_space: str | None = None
    """Of ComfyUI's latents, by name (flux, flux2, sd3, sdxl, qwenimage); by default the decoder's."""
    backend: Literal["torch", "onnx"] = "torch"
    """What computes: PyTorch; or onnxruntime, with the graphs of a folder that `export` wrote, given as --decoder."""

    def check(self) -> None:
        super().check()
        if self.backend == "torch":
            return
        from pixeldecoder.portable import read_manifest

        for option in ("quantize", "attention", "compile", "lora"):
            if getattr(self, option) != getattr(type(self), option):
                raise ValueError(f"--{option} is PyTorch's: leave it out with --backend onnx")
        precision = read_manifest(self.decoder)["precision"]
        if self.dtype not in ("auto", precision.replace("int8", "float32")):
            raise ValueError(f"--dtype {self.dtype}: {self.decoder} holds graphs in {precision}: export others")

    def load(self, place: bool = True, loras: Sequence[str] = ()) -> "PixelDecoderPipeline":
        if self.backend == "torch":
            return super().load(place, loras)
        from pixeldecoder.errors import require

        require("--backend onnx", "onnx", "onnxruntime")

        from pixeldecoder.export import onnx_pipeline

        pipeline = onnx_pipeline(Path(self.decoder), self.device)
        pipeline.set_progress_bar_config(desc="steps", leave=False)
        if self.steps is not None:
            with naming(f"--steps {self.steps}"):
                pipeline.check_steps(self.steps)
        return pipeline

    def placed(self) -> tuple[str, str]:
        if self.backend == "torch":
            return super().placed()
        from pixeldecoder.export import PROVIDERS, providers
        from pixeldecoder.portable import read_manifest

        device = {name: device for device, name in PROVIDERS.items()}.get(providers(self.device)[0], "auto")
        return device, read_manifest(self.decoder)["precision"].replace("int8", "float32")

    def call_kwargs(self) -> dict[str, Any]:
        kwargs = super().call_kwargs()
        if self.backend == "onnx":  # whose graphs work on all patches of a tile at once
            kwargs["chunk_size"] = 2**20
        return kwargs

    def run(self) -> None:
        from tqdm import tqdm

        from pixeldecoder import files

        check_sigma(self.sigma)
        started = self.start(files.LATENT_SUFFIXES, files.inspect_latents, _decoded_size, lambda head: head[0][0])
        if started is None:
            return
        jobs, pipeline = started
        kwargs = self.call_kwargs() | self.text_kwargs(pipeline)

        def make(job: "Job") -> None:
            with naming(job.source):
                latents = files.load_latents(job.source)
                z, width_height = self._normalised(latents, pipeline), _decoded_size(job, pipeline.transformer.config)
            sigmas = [self.sigma or 0.0] * len(z)
            if self.sigma is None and latents.sigma is not None:
                sigmas = latents.sigma.expand(len(z)).tolist()
                levels = ", ".join(f"{level:.4g}" for level in latents.sigma.tolist())
                tqdm.write(f"{job.source}: decoded at sigma {levels}, which the file says", file=sys.stderr)
            indices = range(len(z)) if self.index is None else [self.index]
            for index, target in zip(indices, job.targets, strict=True):
                if target.exists() and not self.overwrite:  # the rest of a batch that was cut short
                    continue
                with naming(job.source):  # one by one, so that each is what it is alone
                    image = pipeline(
                        z[index : index + 1], sigma=sigmas[index], generator=self.generator(), **kwargs
                    ).images[0]
                facts = {"index": index} if len(z) > 1 else {}
                image = image.crop((0, 0, *width_height))
                made = self.made(pipeline, **source_facts(job.source), **facts, sigma=sigmas[index], size=[*image.size])
                files.save_image(image, target, made)
                tqdm.write(str(target))

        jobs.run(make)

    def _normalised(self, latents: "Latents", pipeline: "PixelDecoderPipeline") -> "torch.Tensor":
        from pixeldecoder.latents import normalise_file

        if self.index is not None and self.index >= len(latents.tensor):
            raise ValueError(f"holds {len(latents.tensor)} latents, none of index {self.index}")
        return normalise_file(latents, pipeline.config.latent_space, self.latent_space, self.decoder)


def _decoded_size(job: "Job", config: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height in pixels of what latents become.

    Raises:
        ValueError: too large for the output's format, or the size that the file tells is not that of its latents.
    """
    from pixeldecoder.files import check_image_size

    (_, _, height, width), size = job.head
    scale, cell = config.get("scale", 4), config.get("latent_downscale_factor", 8)
    height, width = height * cell, width * cell
    if size is not None:
        if size[0] > height or size[1] > width:
            raise ValueError(
                f'{job.source}: "size" is {size[1]} x {size[0]} px, but its latents are those of {width} x {height} px'
            )
        height, width = size
    check_image_size(job.targets[0], scale * width, scale * height)
    return scale * width, scale * height


def _enlarged_size(job: "Job", config: Mapping[str, Any]) -> None:
    """Raises ValueError if what a picture becomes is too large for the output's format."""
    from pixeldecoder.files import check_image_size

    check_image_size(job.targets[0], *(config.get("scale", 4) * side for side in job.head))


def _picture_size(path: Path) -> tuple[int, int]:
    """Of a picture that can be encoded; raises ValueError for what its head says of one that cannot."""
    from pixeldecoder import pictures

    width, height = pictures.size(path)
    if min(width, height) < 16:
        raise ValueError(f"{path}: expected a picture of at least 16 x 16 pixels, got {width} x {height}")
    return width, height


def _read_picture(path: Path) -> "Picture":
    from tqdm import tqdm

    from pixeldecoder import pictures

    picture = pictures.read(path)
    for note in picture.notes:
        tqdm.write(f"{path}: {note}", file=sys.stderr)
    return picture


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

        from pixeldecoder import files, pictures

        check_sigma(self.sigma)
        started = self.start(pictures.SUFFIXES, _picture_size, _enlarged_size)
        if started is None:
            return
        jobs, pipeline = started

        from pixeldecoder.execution import image_encoder

        encoder = image_encoder(self.encoder, pipeline)
        kwargs = self.call_kwargs() | self.text_kwargs(pipeline)

        def make(job: "Job") -> None:
            with naming(job.source):  # before it is read, which takes memory, too
                pipeline.check_enlarging(job.head, self.limits())
            picture = _read_picture(job.source)
            with naming(job.source):
                result = pipeline.upscale(
                    picture.with_alpha(picture.rgb),
                    self.sigma,
                    self.noise_generator(),
                    encoder,
                    generator=self.generator(),
                    **kwargs,
                ).images[0]
            if result.mode == "RGBA" and job.targets[0].suffix.lower() in (".jpg", ".jpeg"):
                tqdm.write(f"{job.source}: what is transparent becomes white, as JPEG keeps no alpha", file=sys.stderr)
                result = pictures.read(result).flattened()
            made = self.made(pipeline, **source_facts(job.source), sigma=self.sigma, size=[*result.size])
            files.save_image(result, job.targets[0], made)
            tqdm.write(str(job.targets[0]))

        jobs.run(make)


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
    max_memory: Annotated[str | None, word("SIZE")] = None
    """Memory that it may take, such as "6GB"; by default what is free. An image that does not fit is encoded in
    tiles."""
    overwrite: bool = False
    """Replace what is there. Without it a file that is there is an error, and in a folder is not made again."""

    def run(self) -> None:
        from pixeldecoder import files, pictures
        from pixeldecoder.cli.jobs import Jobs

        if self.max_memory is not None:
            check_memory(self.max_memory)
        jobs = Jobs(
            self.source, self.output, pictures.SUFFIXES, (".safetensors",), "safetensors", self.overwrite,
            _picture_size,
        )  # fmt: skip
        if not jobs.jobs:
            return jobs.finish()

        import torch
        import torch.nn.functional as F
        from safetensors.torch import save_file
        from tqdm import tqdm

        from pixeldecoder.execution import load_encoder, torch_device
        from pixeldecoder.latents import SPACES
        from pixeldecoder.plan import encode_in_tiles, plan_encoder

        device = torch_device(self.device)
        encoder = load_encoder(self.encoder, device)
        autoencoder = getattr(encoder, "autoencoder", None)
        space = "flux" if self.encoder == "nano" else self.encoder
        metadata = {"latent_space": space} if space in SPACES else None

        def make(job: "Job") -> None:
            with naming(job.source):  # before it is read, which takes memory, too
                width, height = (-(-side // 16) * 16 for side in job.head)
                plan_encoder(autoencoder, height, width, 1, 16, self.max_memory)
            picture = _read_picture(job.source)
            if picture.alpha is not None:
                tqdm.write(
                    f"{job.source}: what is transparent becomes white, as latents keep no alpha", file=sys.stderr
                )
            image = pictures.to_tensor(picture.flattened())
            size = torch.tensor(image.shape[-2:])
            with naming(job.source), torch.no_grad():
                # 16: the largest latent cell, so that no encoder drops an edge.
                image = F.pad(image, (0, -image.shape[-1] % 16, 0, -image.shape[-2] % 16), mode="replicate")
                latents = encode_in_tiles(encoder, autoencoder, image.to(device), 16, self.max_memory)
                latents = latents.cpu().contiguous()
            tensors = {"latents": latents, "size": size}
            files.write_whole(job.targets[0], partial(save_file, tensors, metadata=metadata))
            tqdm.write(str(job.targets[0]))

        jobs.run(make)
