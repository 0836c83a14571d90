"""A recipe's name, a YAML file and the command line in, one typed configuration of a training run out.

The defaults are the paper's settings (method: Training); the recipes below name what else differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pixeldecoder.latents import SPACES, Frame
from pixeldecoder.text import TEXT_ENCODER


@dataclass(kw_only=True)
class Data:
    """What to learn from."""

    source: str = ""
    """A folder of images, or WebDataset shards (`data-{0000..0041}.tar`, also URLs)."""
    captions: Path | None = None
    """CSV or JSONL with `file_name` and `text`; without it, `.txt` files beside the images of a folder."""
    resolution: int = 2048
    """Pictures have about resolution^2 pixels, in buckets by aspect ratio."""
    max_aspect_ratio: float = 2.0
    """Of the buckets; 1: squares only."""
    in_memory: bool = False
    """Keep a small folder on the device and crop squares there, at full resolution."""
    validation: Path | None = None
    """Folder whose first four pictures are decoded now and then; by default the first four that are trained on."""
    workers: int = 4
    """Threads that decode pictures."""


@dataclass(kw_only=True)
class Optimizer:
    """AdamW."""

    learning_rate: float = 2e-5
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 2000
    """Of a linear warm-up, counted in updates of what is trained; constant after it."""
    max_grad_norm: float | None = 0.1
    """Longer gradients are cut to it; None: as they are."""


@dataclass(kw_only=True)
class Lora:
    """Train low-rank updates instead of the network."""

    rank: int = 0
    """0: no LoRA."""
    part: Literal["backbone", "adapter"] = "backbone"
    """Patch and pixel blocks, or the sigma-aware adapter."""


@dataclass(kw_only=True)
class Run:
    """What every stage has."""

    data: Data = field(default_factory=Data)
    model: str = ""
    """What to start from: a diffusers folder, "nano", a checkpoint file, a Hub id or a released name."""
    architecture: Path | None = None
    """JSON or YAML file with the network's arguments, to start from scratch; with `model`, what both have in common is
    taken from there (a teacher takes all but its adapter from a prior)."""
    output: Path = Path("outputs/training")
    """Folder of checkpoints, logs and pictures. If it holds a checkpoint, the run goes on from there."""
    export: Path | None = None
    """Folder for the pipeline (averaged weights) at the end."""
    steps: int = 20_000
    batch_size: int = 128
    """Samples to a step, over all processes and accumulation."""
    micro_batch_size: int = 1
    """Samples to a forward pass of one process; the rest is accumulated."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema_decay: float = 0.9999
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation; the trained weights are float32."""
    gradient_checkpointing: bool = True
    compile: bool = False
    """torch.compile the repeated blocks."""
    fsdp: bool = False
    """Shard networks, gradients and optimizers over the processes (FSDP2); otherwise DDP."""
    lora: Lora = field(default_factory=Lora)
    text_encoder: str = TEXT_ENCODER
    """Gemma-2, for a network that reads captions."""
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0
    log_every: int = 10
    validate_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"


@dataclass(kw_only=True)
class Conditioned(Run):
    """What stages have that read latents."""

    encoder: str = ""
    """Image to latents: a folder or Hub id of a diffusers autoencoder, "nano", or "module:function" of your own."""
    latent_space: Literal["flux", "flux2", "sd3", "sdxl", "qwenimage", "dinov2", "siglip"] | None = None
    """Whose latents they are, if it is one of these: tells how they are noised (otherwise as flow models do), and is
    exported with the decoder."""
    noise_probability: float = 0.75
    """Share of the samples whose latents are noised, to sigma ~ U(0, max_sigma)."""
    max_sigma: float = 0.8

    @property
    def frame(self) -> Frame:
        """How latents are noised."""
        return SPACES[self.latent_space].frame if self.latent_space else "flow"


@dataclass(kw_only=True)
class Prior(Run):
    """Text to image, without latents: flow matching, optionally REPA."""

    caption_dropout: float = 0.1
    repa_weight: float = 0.0
    """0.5 in the paper; needs repa_encoder."""
    repa_encoder: str = "facebook/dinov2-base"
    """Through transformers."""
    repa_block: int = 6


@dataclass(kw_only=True)
class Teacher(Conditioned):
    """A decoder in many steps: flow matching given noisy latents."""

    steps: int = 30_000
    batch_size: int = 64
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=5e-5))
    train: Literal["adapter", "all"] = "adapter"
    """The adapter alone (as v1.5), or everything."""
    aux_rgb_weight: float = 0.8
    """Of the auxiliary RGB loss, for a network with that head."""
    caption_dropout: float = 0.1
    latent_dropout: float = 0.1


@dataclass(kw_only=True)
class Student(Conditioned):
    """DMD2: the teacher in 4 steps."""

    steps: int = 3000
    batch_size: int = 16
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=1e-5, weight_decay=0.0, warmup_steps=100)
    )
    fake_score_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-5, warmup_steps=0))
    discriminator_optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=1e-5, weight_decay=0.0, warmup_steps=0, max_grad_norm=None)
    )
    student_every: int = 6
    """Every so many updates one is the student's, the others the critics'."""
    guidance_scale: float = 3.0
    """Of the teacher, on text alone."""
    negative_prompt: str = ""
    """The text of the teacher's unconditional pass; the released students' is `presets.RELEASED_NEGATIVE_PROMPT`."""
    student_input: Literal["noised", "rollout"] = "noised"
    """A real image noised to a student time, or the student's own sample up to a random step."""
    gan_weight: float = 0.05
    gan_warmup_steps: int = 100
    """Until the student's adversarial term has its full weight, counted in updates of all."""
    r1_weight: float = 200.0
    r1_noise: float = 0.1
    feature_blocks: tuple[int, ...] = (7,)
    """Patch blocks of the teacher, from 0, that the discriminator reads."""
    teacher_memory: Literal["full", "int8", "offload"] = "full"
    """int8: quantised weights; offload: its weights stay in the CPU's memory (FSDP2)."""


def paper_prior() -> Prior:
    """20k steps at batch 128 (paper, Training)."""
    return Prior(repa_weight=0.5)


def paper_teacher() -> Teacher:
    """30k steps at batch 64, the adapter alone."""
    return Teacher()


def paper_student() -> Student:
    """3k steps at batch 16."""
    return Student()


def nano_teacher() -> Teacher:
    """A small decoder from scratch, on a small folder of photos, for hours on one GPU."""
    return Teacher(
        data=Data(resolution=512, in_memory=True),
        encoder="nano",
        train="all",
        batch_size=32,
        micro_batch_size=32,
        optimizer=Optimizer(learning_rate=5e-4, warmup_steps=200, max_grad_norm=1.0),
        ema_decay=0.999,
        gradient_checkpointing=False,
    )


def nano_student() -> Student:
    """Its distillation."""
    optimizer = Optimizer(learning_rate=5e-5, weight_decay=0.0, warmup_steps=100, max_grad_norm=1.0)
    return Student(
        data=Data(resolution=512, in_memory=True),
        encoder="nano",
        micro_batch_size=16,
        optimizer=optimizer,
        fake_score_optimizer=replace(optimizer, weight_decay=1e-3, warmup_steps=0),
        discriminator_optimizer=replace(optimizer, warmup_steps=0, max_grad_norm=None),
        feature_blocks=(1,),
        ema_decay=0.95,  # of 500 updates of the student's own
        gradient_checkpointing=False,
    )


RECIPES: dict[str, dict[str, Callable[[], Run]]] = {
    "prior": {"paper": paper_prior},
    "teacher": {"paper": paper_teacher, "nano": nano_teacher},
    "student": {"paper": paper_student, "nano": nano_student},
}


def read_yaml(path: Path, default: Run) -> Run:
    """`default` with what the file sets.

    Raises:
        ValueError: a key that does not exist or a value of another type; the message names it.
    """
    import yaml
    from pydantic import ValidationError

    try:
        found = yaml.safe_load(path.read_text()) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{path}: expected keys and values, got {type(found).__name__}")
        return _adapter(type(default)).validate_python(_merged(to_dict(default), found))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise ValueError(f"{path}: {'; '.join(lines)}") from None


def to_dict(config: Run) -> dict:
    """Plain values, as YAML has them."""
    return _adapter(type(config)).dump_python(config, mode="json")


def write_yaml(config: Run, path: Path) -> None:
    import yaml

    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def _adapter(kind: type):
    from pydantic import ConfigDict, TypeAdapter

    for part in (Data, Optimizer, Lora, kind):
        part.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return TypeAdapter(kind)


def _merged(old: dict, new: dict) -> dict:
    return old | {
        key: _merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }
