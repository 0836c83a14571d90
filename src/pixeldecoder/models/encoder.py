"""Image (B, 3, H, W) in, normalised latents (B, C, H/8, W/8) out: the small bundled encoder."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import EncoderTiny
from diffusers.models.modeling_utils import ModelMixin

from pixeldecoder.models.folder import FolderMixin


class TinyLatentEncoder(FolderMixin, ModelMixin, ConfigMixin):
    """A deterministic convolutional encoder trained to give the latents of a larger autoencoder.

    The encoder half of diffusers' `AutoencoderTiny` (MIT, TAESD).

    Args:
        latent_channels: channels C of the latents.
        channels: width of every convolution.
        num_blocks: residual blocks at 1/1, 1/2, 1/4 and 1/8 of the image size.
        packed: give 2 x 2 cells as one of 4 C channels, as FLUX.2 has them.

    Raises:
        ValueError: numbers that no such encoder has.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: int = 64,
        num_blocks: tuple[int, ...] = (1, 3, 3, 3),
        packed: bool = False,
    ):
        super().__init__()
        numbers = (latent_channels, channels, *num_blocks)
        if type(packed) is not bool:
            raise ValueError(f"packed {packed!r:.100}: expected true or false")
        if not all(type(number) is int and 0 <= number <= 4096 for number in numbers) or sum(num_blocks) > 64:
            raise ValueError(
                f"latent_channels, channels, num_blocks {numbers!r:.100}: expected 0 to 4096, 64 blocks in all"
            )
        self.encoder = EncoderTiny(3, latent_channels, tuple(num_blocks), (channels,) * len(num_blocks), "relu")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image in [-1, 1], (B, 3, H, W) -> normalised latents (B, C, H/8, W/8), packed (B, 4 C, H/16, W/16)."""
        latents = self.encoder(image)
        return F.pixel_unshuffle(latents, 2) if self.config.packed else latents
