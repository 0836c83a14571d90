"""Latents or pictures in, large pictures out, and pictures to latents: `decode`, `upscale`, `encode`."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from pixeldecoder.cli.options import Device, FilesToImages, Output, Source, check_sigma


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
        from pixeldecoder.execution import image_encoder

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

        from pixeldecoder.execution import load_encoder, torch_device

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
