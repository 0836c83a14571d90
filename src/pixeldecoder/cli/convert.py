"""A checkpoint in, the other format out: `convert`; a decoder in, graphs for other runtimes out: `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pixeldecoder.cli.options import (
    Output,
    Source,
    word,
)
from pixeldecoder.errors import blaming, require
from pixeldecoder.hub import CHECKPOINTS
from pixeldecoder.presets import check_decoder_name


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
        elif self.output.suffix.lower() in CHECKPOINTS:
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
class Export:
    """A decoder to graphs that run without PyTorch's Python: ONNX, or torch.export's archives.

    Example: pixeldecoder export nano nano-onnx
    """

    decoder: Annotated[str, tyro.conf.Positional, word("DECODER")]
    """"nano" (bundled), a diffusers folder, a checkpoint file, a Hub id or a released name."""
    folder: Annotated[Path, tyro.conf.Positional, word("FOLDER")]
    """A new one."""
    format: Literal["onnx", "pt2"] = "onnx"
    """"onnx", which `decode --backend onnx` runs, and browsers; "pt2", for torch.export.load."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """Of the weights; int8, ONNX's alone, is refused where it would keep less than 40 dB."""

    def run(self) -> None:
        from pixeldecoder.files import check_writable

        check_decoder_name(self.decoder)
        if self.folder.exists():
            raise ValueError(f"{self.folder} exists: give a new folder")
        check_writable(self.folder)
        if self.format == "onnx":
            require("--format onnx", "onnx", "onnx", "onnxruntime", "onnxscript")

        from pixeldecoder.execution import Execution
        from pixeldecoder.export import export

        export(Execution("cpu", "float32").load(self.decoder), self.folder, self.format, self.dtype)
        print(self.folder)
