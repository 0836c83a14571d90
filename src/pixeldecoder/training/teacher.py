"""Batches in, flow-matching updates out: the prior and the many-step teacher."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from pixeldecoder.flow import SampleRandom, noised, training_times
from pixeldecoder.hub import repository
from pixeldecoder.models.transformer import PixelDecoderOutput, PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.sampler import teacher_scheduler
from pixeldecoder.sources import Folder, Shards
from pixeldecoder.training import losses
from pixeldecoder.training.config import Prior, Teacher
from pixeldecoder.training.data import Batch, load_batches
from pixeldecoder.training.degrade import Condition, Conditions
from pixeldecoder.training.network import build_network, set_trained
from pixeldecoder.training.parts import Part, Terms, autocast, update


class PriorStage:
    """Text to image, without latents: flow matching, and REPA where it has a weight."""

    def __init__(self, config: Prior, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.model = build_network(config)
        self.conditions = Conditions(config, self.model, accelerator.device)
        set_trained(self.model, config, aux_rgb=False)
        self.repa = RepaTarget(config, self.model, accelerator) if config.repa_weight else None
        self.network = Part(self.model.train(), config.optimizer, config, accelerator)
        self.parts = {"network": self.network} | ({"repa": self.repa.projector} if self.repa else {})

    def pipeline(self, model: PixelDecoderTransformer2DModel) -> PixelDecoderPipeline:
        return many_step_pipeline(model, self.config.data.resolution, steps=50, guidance=2.75)

    def batches(self, source: Folder | Shards, position: int) -> Iterator[Batch]:
        return load_batches(self.config, self.model, source, self.accelerator, position)

    def model_update(self, step: int) -> int:
        return step

    def update(self, batches: list[Batch], step: int, progress: float = 0.0) -> dict[str, float]:
        return update(self.parts, batches, self.losses, step, step, self.accelerator, progress)

    def losses(self, batch: Batch) -> Terms:
        random = SampleRandom(self.config.seed, batch.samples, "training", batch.image.device)
        condition = self.conditions(batch, random, self.config.caption_dropout)
        wanted = dict(return_features=(self.repa.block,)) if self.repa else {}
        output, velocity = flow_matching(self.network, batch.image, condition, random, **wanted)
        terms = {"velocity": velocity}
        if self.repa:
            assert output.features is not None
            terms["repa"] = self.config.repa_weight * self.repa.loss(output.features[0], batch.image)
        return terms


class TeacherStage:
    """A decoder in many steps: flow matching given noisy latents, and the auxiliary image where it has a weight."""

    def __init__(self, config: Teacher, accelerator: Accelerator, conditions: Callable[..., Any] = Conditions):
        self.config, self.accelerator = config, accelerator
        self.model = build_network(config)
        self.conditions = conditions(config, self.model, accelerator.device)
        self.aux_rgb = self.model.config.aux_rgb and config.aux_rgb_weight > 0
        set_trained(self.model, config, self.aux_rgb, config.train == "adapter")
        self.network = Part(self.model.train(), config.optimizer, config, accelerator)
        self.parts = {"network": self.network}

    def pipeline(self, model: PixelDecoderTransformer2DModel) -> PixelDecoderPipeline:
        return many_step_pipeline(model, self.config.data.resolution, 25, 5.0, self.config.latent_space)

    def batches(self, source: Folder | Shards, position: int) -> Iterator[Batch]:
        return load_batches(self.config, self.model, source, self.accelerator, position)

    def model_update(self, step: int) -> int:
        return step

    def update(self, batches: list[Batch], step: int, progress: float = 0.0) -> dict[str, float]:
        # The auxiliary term is a weighted mean over the whole batch, of which micro-batches and processes are parts.
        weight = None
        if self.aux_rgb:
            weight = torch.stack([self._aux_rgb_weight(batch).sum() for batch in batches]).mean()
            weight = self.accelerator.reduce(weight, "mean")
        return update(
            self.parts, batches, lambda batch: self.losses(batch, weight), step, step, self.accelerator, progress
        )

    def _random(self, batch: Batch) -> SampleRandom:
        return SampleRandom(self.config.seed, batch.samples, "training", batch.image.device)

    def _aux_rgb_weight(self, batch: Batch) -> torch.Tensor:
        return self.conditions.aux_rgb_weight(self._random(batch), self.config.latent_dropout)

    def losses(self, batch: Batch, aux_rgb_weight: torch.Tensor | None = None) -> Terms:
        """The terms of a micro-batch; `aux_rgb_weight`: what the weights of its auxiliary term sum up to in the mean
        of all micro-batches, by default its own."""
        random = self._random(batch)
        condition = self.conditions(batch, random, self.config.caption_dropout, self.config.latent_dropout)
        output, velocity = flow_matching(self.network, batch.image, condition, random, return_aux_rgb=self.aux_rgb)
        terms = {"velocity": velocity}
        if self.aux_rgb:
            assert condition.small is not None
            assert output.aux_rgb is not None
            rgb = losses.aux_rgb(output.aux_rgb, condition.small, condition.aux_rgb_weight, aux_rgb_weight)
            terms["aux_rgb"] = self.config.aux_rgb_weight * rgb
        return terms


def flow_matching(
    network: Part, image: torch.Tensor, condition: Condition, random: SampleRandom, **wanted
) -> tuple[PixelDecoderOutput, torch.Tensor]:
    """What the network puts out for images (B, 3, H, W) noised to random times (eq. 1, 23), and its loss (eq. 24)."""
    t = training_times(random, *image.shape[-2:])
    noise = random.normal(*image.shape[1:])
    output = network(noised(image, noise, t), 1000 * t, **condition.inputs(), **wanted)
    return output, losses.flow_matching(output.sample, image, noise)


def many_step_pipeline(
    model: PixelDecoderTransformer2DModel, resolution: int, steps: int, guidance: float, space: str | None = None
) -> PixelDecoderPipeline:
    return PixelDecoderPipeline(
        model,
        teacher_scheduler(),
        default_num_inference_steps=steps,
        default_guidance_scale=guidance if model.config.text_embed_dim else 1.0,
        latent_space=space,
        trained_size=resolution,
    )


class RepaTarget:
    """Aligns a block's image tokens, through a 2-layer MLP, with a vision encoder's (eq. 27; arXiv 2410.06940)."""

    def __init__(self, config: Prior, network: PixelDecoderTransformer2DModel, accelerator: Accelerator):
        from transformers import AutoModel

        last = network.config.num_layers - 1
        if not 0 <= config.repa_block <= last:
            raise ValueError(f"repa_block {config.repa_block}: the network has blocks 0 to {last}")
        self.block = config.repa_block
        name = config.repa_encoder
        encoder = AutoModel.from_pretrained(name if Path(name).exists() else repository(name))
        encoder.eval().requires_grad_(False)
        self.encoder = encoder.to(accelerator.device)
        dim = network.config.num_attention_heads * network.config.attention_head_dim
        width = self.encoder.config.hidden_size
        projector = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, width))
        self.projector = Part(projector, config.optimizer, config, accelerator)
        self.autocast = config.precision == "bfloat16"

    def loss(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Block features (B, D, Hp, Wp) and the picture they were made from (B, 3, H, W) in [-1, 1]."""
        patch = self.encoder.config.patch_size
        mean, std = (image.new_tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        size = [patch * side for side in features.shape[-2:]]  # one patch of the encoder for each of ours
        seen = F.interpolate(image / 2 + 0.5, size=size, mode="bicubic")
        with torch.no_grad(), autocast(image.device, self.autocast):
            tokens = self.encoder((seen - mean) / std).last_hidden_state
            target = tokens[:, -features[0, 0].numel() :]  # without class and register tokens, which come first
        return losses.repa(self.projector(features.flatten(2).transpose(1, 2)), target)
