"""A batch of pictures in, the network's conditions out: noisy latents, their sigma, prompt embeddings."""

from typing import NamedTuple

import torch

from pixeldecoder.autoencoders import load_image_encoder
from pixeldecoder.flow import SampleRandom, add_noise
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pictures import shrink
from pixeldecoder.text import PromptEncoder
from pixeldecoder.training.config import Conditioned, Run, Student
from pixeldecoder.training.data import Batch, bucket_sizes, side_multiple


class Condition(NamedTuple):
    """`latents`, `sigma` and `small` are `None` for a prior, the embeddings for a network without text."""

    latents: torch.Tensor | None
    """(B, C, h, w), noised to sigma, zeros where dropped."""
    sigma: torch.Tensor | None
    """(B,) in [0, 1]."""
    small: torch.Tensor | None
    """The low-resolution picture that the latents stand for, (B, 3, H/s, W/s) in [-1, 1]."""
    kept: torch.Tensor | None
    """(B,), 0 where the latents were dropped, else 1."""
    embeds: torch.Tensor | None
    """(B, T, Dt)."""
    negative_embeds: torch.Tensor | None
    """Of the unconditional pass: those of the student's `negative_prompt`, else of the empty caption."""

    def inputs(self) -> dict:
        """For the network."""
        return dict(
            encoder_hidden_states=self.embeds,
            latents=self.latents,
            sigma=0.0 if self.sigma is None else self.sigma,
        )

    @property
    def aux_rgb_weight(self) -> torch.Tensor:
        """(B,): 1 - sigma, 0 where the latents were dropped."""
        assert self.kept is not None and self.sigma is not None
        return self.kept * (1 - self.sigma)


class Conditions:
    """Shrinks pictures, encodes them, noises (eq. 6, 7) and drops the latents, drops captions.

    Raises:
        ValueError: no encoder, or one for another latent space.
    """

    def __init__(self, config: Run, network: PixelDecoderTransformer2DModel, device: torch.device):
        self.run, self.network, self.encoder, self.text = config, network.config, None, None
        bucket_sizes(config.data.resolution, side_multiple(self.network), 1.0)  # before an encoder is blamed for it
        if self.network.latent_channels is not None:
            if not isinstance(config, Conditioned):
                raise ValueError("a prior takes no latents, but this network does: train it as a teacher")
            if not config.encoder:
                raise ValueError('encoder: expected what turns pictures into latents: a folder, a Hub id or "nano"')
            self.encoder = load_image_encoder(config.encoder, device)
            side = config.data.resolution // self.network.scale
            found = tuple(self.encoder(torch.zeros(1, 3, side, side, device=device)).shape)
            cells = side // self.network.latent_downscale_factor
            if found != (expected := (1, self.network.latent_channels, cells, cells)):
                raise ValueError(
                    f"encoder {config.encoder}: a picture of {side} px gives latents {found}, the network expects "
                    f"{expected}: they are of different latent spaces"
                )
        elif isinstance(config, Conditioned):
            raise ValueError("this network takes no latents: give a decoder, or `architecture` with latent_channels")
        if self.network.text_embed_dim is not None:
            self.text = PromptEncoder(config.text_encoder, device)
            self.negative_embeds = self.text([config.negative_prompt if isinstance(config, Student) else ""])

    def __call__(
        self, batch: Batch, random: SampleRandom, caption_dropout: float = 0.0, latent_dropout: float = 0.0
    ) -> Condition:
        # Always drawn, so that an option does not shift the numbers of what comes after.
        draws = random.uniform(4)
        embeds = negative = None
        if self.text is not None:
            dropped = (draws[:, 0] < caption_dropout).tolist()
            embeds = self.text(["" if drop else c for c, drop in zip(batch.captions, dropped, strict=True)])
            negative = self.negative_embeds.expand_as(embeds)
        if self.encoder is None:
            return Condition(None, None, None, None, embeds, negative)
        assert isinstance(self.run, Conditioned)
        small = shrink(batch.image, self.network.scale)
        kept, sigma = self._levels(draws, latent_dropout)
        latents = self.encoder(small)
        latents = add_noise(latents, random.normal(*latents.shape[1:]), sigma, self.run.frame)
        return Condition(latents * kept[:, None, None, None], sigma, small, kept, embeds, negative)

    def aux_rgb_weight(self, random: SampleRandom, latent_dropout: float) -> torch.Tensor:
        """`Condition.aux_rgb_weight` of the samples that a call with this new `random` would draw."""
        kept, sigma = self._levels(random.uniform(4), latent_dropout)
        return kept * (1 - sigma)

    def _levels(self, draws: torch.Tensor, latent_dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Uniform draws (B, 4), the first of them the caption's -> `kept` and `sigma`."""
        assert isinstance(self.run, Conditioned)
        _, drop_latents, is_noised, level = draws.unbind(1)
        kept = (drop_latents >= latent_dropout).float()
        return kept, self.run.max_sigma * level * (is_noised < self.run.noise_probability)
