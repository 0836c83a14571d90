"""Batches in, DMD2 updates out: the 4-step student (arXiv 2405.14867)."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FlowMatchLCMScheduler
from torch.nn.utils import parametrize

from pixeldecoder.flow import STUDENT_TIMES, SampleRandom, clean, guided, noised
from pixeldecoder.models.discriminator import PixelDecoderDiscriminator
from pixeldecoder.models.transformer import PixelDecoderOutput, PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.sources import Folder, Shards
from pixeldecoder.training import losses
from pixeldecoder.training.config import Student
from pixeldecoder.training.data import Batch, load_batches
from pixeldecoder.training.degrade import Condition, Conditions
from pixeldecoder.training.network import add_lora, build_network, freeze_unused
from pixeldecoder.training.parts import Part, Terms, autocast, shard, update


class StudentStage:
    """Student, frozen teacher and fake score are one class with the same start; the discriminator reads the teacher."""

    def __init__(self, config: Student, accelerator: Accelerator, conditions: Callable[..., Any] = Conditions):
        self.config, self.accelerator = config, accelerator
        self.model = network = build_network(config)
        blocks = network.config.num_layers
        if not config.feature_blocks or not all(0 <= block < blocks for block in config.feature_blocks):
            raise ValueError(f"feature_blocks {config.feature_blocks}: the network has blocks 0 to {blocks - 1}")
        self.conditions = conditions(config, network, accelerator.device)
        self.guides = network.config.text_embed_dim is not None and config.guidance_scale != 1
        freeze_unused(network, aux_rgb=False)
        self.teacher = self._frozen(copy.deepcopy(network))
        fake_score = copy.deepcopy(network)
        if config.lora.rank:
            add_lora(network, config.lora)
        for trained in (network, fake_score):
            if config.gradient_checkpointing:
                trained.enable_gradient_checkpointing()
        self.student = Part(network.train(), config.optimizer, config, accelerator)
        self.fake_score = Part(fake_score.train(), config.fake_score_optimizer, config, accelerator)
        dim = network.config.num_attention_heads * network.config.attention_head_dim
        discriminator = PixelDecoderDiscriminator(dim, len(config.feature_blocks))
        # In float32 for the critics' update and the student's: R1 lives on small differences of logits.
        whole = replace(config, precision="float32")
        self.discriminator = Part(discriminator, config.discriminator_optimizer, whole, accelerator)
        self.parts = {
            "student": self.student,
            "fake_score": self.fake_score,
            "discriminator": self.discriminator,
        }

    def _frozen(self, teacher: PixelDecoderTransformer2DModel) -> torch.nn.Module:
        """As its share of the memory asks for; gradients pass through its activations, not into its weights."""
        config, device = self.config, self.accelerator.device
        teacher.eval().requires_grad_(False)
        if config.gradient_checkpointing:
            teacher.enable_gradient_checkpointing()
        if config.teacher_memory == "offload" or config.fsdp:
            return shard(teacher, config, device, offload=config.teacher_memory == "offload")
        if config.precision == "bfloat16":
            torch.nn.Module.to(teacher, torch.bfloat16)  # diffusers' own warns of float32 modules where there are none
        if config.teacher_memory == "int8":
            for layer in teacher.modules():
                if isinstance(layer, torch.nn.Linear):
                    parametrize.register_parametrization(layer, "weight", Int8Rows(layer.weight.dtype), unsafe=True)
        return teacher.to(device)

    def pipeline(self, model: PixelDecoderTransformer2DModel) -> PixelDecoderPipeline:
        return PixelDecoderPipeline(
            model,
            FlowMatchLCMScheduler(shift=1.0),
            latent_space=self.config.latent_space,
            trained_size=self.config.data.resolution,
        )

    def batches(self, source: Folder | Shards, position: int) -> Iterator[Batch]:
        return load_batches(self.config, self.model, source, self.accelerator, position)

    def model_update(self, step: int) -> int | None:
        """Which of the student's updates this step is, from 0; `None`: it is the critics'."""
        number, place = divmod(step, self.config.student_every)
        return number if place == self.config.student_every - 1 else None

    def update(self, batches: list[Batch], step: int, progress: float = 0.0) -> dict[str, float]:
        number = self.model_update(step)
        if number is None:
            critics = {"fake_score": self.fake_score, "discriminator": self.discriminator}
            number = step - step // self.config.student_every
            return update(critics, batches, self.critic_losses, step, number, self.accelerator, progress)
        warm_up = min(1.0, step / max(1, self.config.gan_warmup_steps))
        self.discriminator.module.requires_grad_(False)  # it judges here; gradients pass through it
        try:
            student, losses_of = {"student": self.student}, partial(self.student_losses, gan_warm_up=warm_up)
            return update(student, batches, losses_of, step, number, self.accelerator, progress)
        finally:
            self.discriminator.module.requires_grad_(True)

    def student_losses(self, batch: Batch, gan_warm_up: float) -> Terms:
        random = SampleRandom(self.config.seed, batch.samples, "training", batch.image.device)
        condition = self.conditions(batch, random)
        image = self.student_image(batch, condition, random)
        x_t, t, _ = self._noised(image, random)
        inputs = self._teacher_inputs(condition, image)
        real = self._teacher(x_t, t, inputs, return_features=self.config.feature_blocks)
        features, velocity = real.features, real.sample.detach()
        del real  # and with it the graph beyond the features, which nothing goes back through
        with torch.no_grad():
            if self.guides:
                negative = inputs | dict(encoder_hidden_states=condition.negative_embeds)
                unconditional = self._teacher(x_t, t, negative).sample
                velocity = guided(unconditional, velocity, self.config.guidance_scale)
            x0_teacher = clean(x_t, velocity, t)
            x0_fake = clean(x_t, self.fake_score(x_t, 1000 * t, **condition.inputs()).sample, t)
        logits = self.discriminator.module(tuple(feature.float() for feature in features))
        return {
            "vsd": losses.vsd(image, x0_teacher, x0_fake),
            "gan": gan_warm_up * self.config.gan_weight * losses.gan_student(logits),
        }

    def critic_losses(self, batch: Batch) -> Terms:
        random = SampleRandom(self.config.seed, batch.samples, "training", batch.image.device)
        condition = self.conditions(batch, random)
        with torch.no_grad():
            image = self.student_image(batch, condition, random)
        x_t, t, noise = self._noised(image, random)
        output = self.fake_score(x_t, 1000 * t, **condition.inputs())
        real = noised(batch.image, noise, t)
        perturbed = real + self.config.r1_noise * random.normal(*real.shape[1:])
        inputs = self._teacher_inputs(condition, image)
        wanted = dict(return_features=self.config.feature_blocks, features_only=True)
        with torch.no_grad():
            features = [self._teacher(x, t, inputs, **wanted).features for x in (x_t, real, perturbed)]
        # One pass for all three: a wrapper for many processes counts on one per update.
        joined = tuple(torch.cat(maps).float() for maps in zip(*features, strict=True))
        fake_logits, real_logits, perturbed_logits = self.discriminator(joined).chunk(3)
        return {
            "fake_score": losses.flow_matching(output.sample, image, noise),
            "discriminator": losses.gan_discriminator(fake_logits, real_logits),
            "r1": self.config.r1_weight * losses.approximate_r1(real_logits, perturbed_logits),
        }

    def student_image(self, batch: Batch, condition: Condition, random: SampleRandom) -> torch.Tensor:
        """The student's clean image, from a real one noised to one of its times, or from its own samples."""
        image = batch.image
        times = torch.tensor(STUDENT_TIMES[:-1], device=image.device)
        if self.config.student_input == "noised":
            t = times[(random.uniform() * len(times)).long()]
            x_t = noised(image, random.normal(*image.shape[1:]), t)
        else:
            # One for all samples of a step: processes must run the network equally often.
            number = batch.samples[0] // self.config.batch_size
            last = Random(f"{self.config.seed}/rollout/{number}").randrange(len(times))
            x_t = random.normal(*image.shape[1:])
            with torch.no_grad():
                for now, following in pairwise(times[: last + 1, None].expand(-1, len(image))):
                    x0 = clean(x_t, self.student(x_t, 1000 * now, **condition.inputs()).sample, now)
                    x_t = noised(x0, random.normal(*image.shape[1:]), following)
            t = times[last].expand(len(image))
        return clean(x_t, self.student(x_t, 1000 * t, **condition.inputs()).sample, t)

    def _noised(self, image: torch.Tensor, random: SampleRandom) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t = random.normal().sigmoid().clamp(0.02, 0.99)
        noise = random.normal(*image.shape[1:])
        return noised(image, noise, t), t, noise

    def _teacher_inputs(self, condition: Condition, image: torch.Tensor) -> dict:
        """The condition, by the teacher's adapter once for all its passes."""
        with torch.no_grad(), self._teacher_autocast():
            features = self.teacher.encode_latents(  # type: ignore[operator]
                condition.latents, *image.shape[-2:], sigma=condition.sigma
            )
        return condition.inputs() | dict(latents=None, latent_features=features)

    def _teacher(self, x_t: torch.Tensor, t: torch.Tensor, inputs: dict, **wanted) -> PixelDecoderOutput:
        with self._teacher_autocast():
            return self.teacher(x_t, 1000 * t, **inputs, **wanted)

    def _teacher_autocast(self) -> torch.autocast:
        return autocast(self.accelerator.device, self.config.precision == "bfloat16" and not self.config.fsdp)


class Int8Rows(torch.nn.Module):
    """A frozen weight as int8 with a scale for each row; gradients pass through to the layer's input."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rows.to(self.dtype) * scale

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127
        return (weight / scale).round().to(torch.int8), scale
