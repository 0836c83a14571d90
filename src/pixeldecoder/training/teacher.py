"""Batches in, flow-matching updates out: the prior and the many-step teacher (method: Training)."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from pixeldecoder.flow import SampleRandom, noised, training_times
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline, teacher_scheduler
from pixeldecoder.training import losses
from pixeldecoder.training.config import Prior, Teacher
from pixeldecoder.training.data import Batch
from pixeldecoder.training.degrade import Conditions
from pixeldecoder.training.network import add_lora, build_network, freeze_unused
from pixeldecoder.training.parts import Part, Terms, autocast, update


class TeacherStage:
    """`prior` (no latents, optional REPA) and `teacher` (noisy latents, optional auxiliary RGB)."""

    def __init__(self, config: Prior | Teacher, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        network = build_network(config)
        self.conditions = Conditions(config, network, accelerator.device)
        self.aux_rgb = isinstance(config, Teacher) and network.config.aux_rgb and config.aux_rgb_weight > 0
        if config.lora.rank:
            add_lora(network, config.lora)
        elif isinstance(config, Teacher) and config.train == "adapter":
            network.requires_grad_(False)
            network.adapter.requires_grad_(True)
        freeze_unused(network, self.aux_rgb or network.config.aux_rgb_base)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.repa = None
        if isinstance(config, Prior) and config.repa_weight:
            self.repa = RepaTarget(config, network, accelerator)
        self.network = Part(network.train(), config.optimizer, config, accelerator)
        self.parts = {"network": self.network} | ({"repa": self.repa.projector} if self.repa else {})

    @property
    def model(self) -> PixelDecoderTransformer2DModel:
        return self.network.module  # type: ignore[return-value]

    def pipeline(self, model: PixelDecoderTransformer2DModel) -> PixelDecoderPipeline:
        steps, guidance = (25, 5.0) if isinstance(self.config, Teacher) else (50, 2.75)
        return PixelDecoderPipeline(
            model,
            teacher_scheduler(),
            default_num_inference_steps=steps,
            default_guidance_scale=guidance if model.config.text_embed_dim else 1.0,
            latent_space=getattr(self.config, "latent_space", None),
            trained_size=self.config.data.resolution,
        )

    def model_update(self, step: int) -> int:
        """Which of the updates of `model` this step is, from 0: each is one."""
        return step

    def update(self, batches: list[Batch], step: int) -> dict[str, float]:
        # The auxiliary term is a weighted mean over the whole batch, of which micro-batches and processes are parts.
        weight = None
        if self.aux_rgb:
            weight = torch.stack([self._aux_rgb_weight(batch).sum() for batch in batches]).mean()
            weight = self.accelerator.reduce(weight, "mean")
        return update(self.parts, batches, lambda batch: self.losses(batch, weight), step, step, self.accelerator)

    def _random(self, batch: Batch) -> SampleRandom:
        return SampleRandom(self.config.seed, batch.samples, "training", batch.image.device)

    def _aux_rgb_weight(self, batch: Batch) -> torch.Tensor:
        assert isinstance(self.config, Teacher)
        return self.conditions.aux_rgb_weight(self._random(batch), self.config.latent_dropout)

    def losses(self, batch: Batch, aux_rgb_weight: torch.Tensor | None = None) -> Terms:
        """The terms of a micro-batch; `aux_rgb_weight`: what the weights of its auxiliary term sum up to in the mean
        of all micro-batches, by default its own."""
        config, image, random = self.config, batch.image, self._random(batch)
        latent_dropout = config.latent_dropout if isinstance(config, Teacher) else 0.0
        condition = self.conditions(batch, random, config.caption_dropout, latent_dropout)
        t = training_times(random, *image.shape[-2:])
        noise = random.normal(*image.shape[1:])
        output = self.network(
            noised(image, noise, t),
            1000 * t,
            **condition.inputs(),
            return_aux_rgb=self.aux_rgb,
            return_features=(self.repa.block,) if self.repa else None,
        )
        terms = {"velocity": losses.flow_matching(output.sample, image, noise)}
        if self.aux_rgb:
            assert isinstance(config, Teacher) and condition.small is not None
            rgb = losses.aux_rgb(output.aux_rgb, condition.small, condition.aux_rgb_weight, aux_rgb_weight)
            terms["aux_rgb"] = config.aux_rgb_weight * rgb
        if self.repa:
            assert isinstance(config, Prior)
            terms["repa"] = config.repa_weight * self.repa.loss(output.features[0], image)
        return terms


class RepaTarget:
    """A block's image tokens shall say, through a 2-layer MLP, what a vision encoder sees there (arXiv 2410.06940)."""

    def __init__(self, config: Prior, network: PixelDecoderTransformer2DModel, accelerator: Accelerator):
        from transformers import AutoModel

        last = network.config.num_layers - 1
        if not 0 <= config.repa_block <= last:
            raise ValueError(f"repa_block {config.repa_block}: the network has blocks 0 to {last}")
        self.block = config.repa_block
        encoder = AutoModel.from_pretrained(config.repa_encoder).eval().requires_grad_(False)
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
