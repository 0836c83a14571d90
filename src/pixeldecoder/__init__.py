"""Decode latents into images 4 or 8 times larger, with a pixel diffusion model."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixeldecoder.ldm import attach, detach
    from pixeldecoder.models.discriminator import PixelDecoderDiscriminator
    from pixeldecoder.models.encoder import TinyLatentEncoder
    from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
    from pixeldecoder.pipeline import PixelDecoderPipeline

__version__ = "0.1.0"
__all__ = [
    "PixelDecoderDiscriminator",
    "PixelDecoderPipeline",
    "PixelDecoderTransformer2DModel",
    "TinyLatentEncoder",
    "attach",
    "detach",
]

# Imported when first asked for: `pixeldecoder --help` need not wait for torch.
_HOMES = {
    "PixelDecoderDiscriminator": "pixeldecoder.models.discriminator",
    "PixelDecoderPipeline": "pixeldecoder.pipeline",
    "PixelDecoderTransformer2DModel": "pixeldecoder.models.transformer",
    "TinyLatentEncoder": "pixeldecoder.models.encoder",
    "attach": "pixeldecoder.ldm",
    "detach": "pixeldecoder.ldm",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pixeldecoder' has no attribute {name!r}")
