"""A checkpoint in, the other format out: `convert`."""

from dataclasses import dataclass
from typing import Literal

from pixeldecoder.cli.options import (
    Output,
    Source,
)
from pixeldecoder.errors import blaming


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
            if self.output.exists():
                raise ValueError(f"{self.output} exists: give a new file")
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
