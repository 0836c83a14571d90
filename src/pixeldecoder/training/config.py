"""A recipe's name, a YAML file and the command line in, one typed configuration of a training run out.

The defaults are the paper's settings; the recipes below name what else differs.
"""

import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pixeldecoder.errors import require
from pixeldecoder.files import check_writable, write_whole
from pixeldecoder.hub import is_code, is_command
from pixeldecoder.presets import TEXT_ENCODER

if TYPE_CHECKING:
    from pixeldecoder.flow import Frame


@dataclass(frozen=True)
class Range:
    """Of a setting's numbers; "(" or ")" leaves that end out, so that without an upper end they are finite."""

    low: float
    high: float = math.inf
    ends: str = "[)"

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        low = f"{'at least' if self.ends[0] == '[' else 'more than'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'at most' if self.ends[1] == ']' else 'less than'} {self.high:g}"


Count = Annotated[int, Range(1)]
Amount = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, "[]")]


@dataclass(kw_only=True)
class Data:
    """What to learn from."""

    source: str = ""
    """A folder of images, or WebDataset shards (`data-{0000..0041}.tar`, also URLs)."""
    captions: Path | None = None
    """CSV or JSONL with `file_name` and `text`; without it, `.txt` files beside the images of a folder."""
    resolution: Annotated[int, Range(1, 65536, "[]")] = 2048
    """Pictures are shrunk to about resolution^2 pixels, in buckets by aspect ratio; smaller ones are left out."""
    max_aspect_ratio: Annotated[float, Range(1, 100, "[]")] = 2.0
    """Of the buckets; 1: squares only."""
    in_memory: bool = False
    """Keep a small folder on the device and crop squares there, at full resolution, without shrinking."""
    validation: Path | None = None
    """Folder of which four pictures are decoded now and then; by default four that are trained on."""
    workers: Annotated[int, Range(1, 256, "[]")] = 4
    """Threads that decode pictures."""


@dataclass(kw_only=True)
class Optimizer:
    """AdamW."""

    learning_rate: Weight = 2e-5
    """After the warm-up."""
    weight_decay: Weight = 1e-3
    """Decoupled from the gradient."""
    betas: Annotated[tuple[float, float], Range(0, 1)] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    warmup_steps: Amount = 2000
    """Of a linear warm-up, counted in updates of what is trained."""
    decay: Share = 0.0
    """Share of the learning rate that is gone at the end of the run, in a straight line."""
    max_grad_norm: Annotated[float | None, Range(0, ends="()")] = 0.1
    """Longer gradients are cut to it; None: as they are."""


@dataclass(kw_only=True)
class Lora:
    """Train low-rank updates instead of the network."""

    rank: Amount = 0
    """0: no LoRA."""
    part: Literal["backbone", "adapter"] = "backbone"
    """Patch and pixel blocks, or the sigma-aware adapter."""


@dataclass(kw_only=True)
class Run:
    """What every stage has."""

    data: Data = field(default_factory=Data)
    """What to learn from."""
    model: str = ""
    """What to start from: a diffusers folder, "nano", a checkpoint file, a Hub id or a released name."""
    architecture: Path | None = None
    """JSON or YAML file with the network's arguments, to start from scratch; with `model`, what both have in common is
    taken from there (a teacher takes all but its adapter from a prior)."""
    output: Path = Path("outputs/training")
    """Folder of checkpoints, logs and pictures. If it holds a checkpoint, the run goes on from there."""
    export: Path | None = None
    """Folder for the pipeline (averaged weights) at the end, also of a run that is finished already."""
    steps: Count = 20_000
    """Updates of the whole run."""
    minutes: Annotated[float, Range(0, ends="(]")] = math.inf
    """Of training, over all calls, that end the run before its steps do. On a CPU those that this process computes:
    other work on the machine costs the training nothing but patience."""
    piece: Annotated[float, Range(0, ends="(]")] = math.inf
    """Minutes of training until this call ends, with a checkpoint; the same command goes on."""
    batch_size: Count = 128
    """Samples to a step, over all processes and accumulation."""
    micro_batch_size: Count = 1
    """Samples to a forward pass of one process; the rest is accumulated."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """Of the network."""
    ema_decay: Share = 0.9999
    """Of the averaged weights, which are validated and exported."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation; the trained weights are float32."""
    gradient_checkpointing: bool = True
    """Compute a block's activations again in the backward pass: slower, in less memory."""
    compile: bool = False
    """torch.compile the repeated blocks."""
    fsdp: bool = False
    """Shard networks, gradients and optimizers over the processes (FSDP2); otherwise DDP."""
    lora: Lora = field(default_factory=Lora)
    """Train low-rank updates instead of the network."""
    text_encoder: str = TEXT_ENCODER
    """Gemma-2, for a network that reads captions."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto": the fastest there is."""
    seed: Annotated[int, Range(0, 2**63)] = 0
    """Of fresh weights, order, crops and all noise."""
    log_every: Count = 10
    """Steps between the lines of log.jsonl, which are means over them."""
    validate_every: Amount = 1000
    """Steps between decodes of the validation pictures; 0: never."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; the last step has one, too."""
    keep_checkpoints: Count = 2
    """The newest so many; older ones are deleted."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where charts go, beside log.jsonl."""


@dataclass(kw_only=True)
class Conditioned(Run):
    """What stages have that read latents."""

    encoder: str = ""
    """Image to latents: a folder or Hub id of a diffusers autoencoder, "nano", or "module:function" of your own."""
    latent_space: Literal["flux", "flux2", "sd3", "sdxl", "qwenimage", "dinov2", "siglip"] | None = None
    """Whose latents they are, if it is one of these: tells how they are noised (otherwise as flow models do), and is
    exported with the decoder."""
    noise_probability: Share = 0.75
    """Share of the samples whose latents are noised, to sigma ~ U(0, max_sigma)."""
    max_sigma: Share = 0.8
    """The largest noise level of the latents."""

    @property
    def frame(self) -> "Frame":
        """How latents are noised."""
        from pixeldecoder.latents import SPACES

        return SPACES[self.latent_space].frame if self.latent_space else "flow"


@dataclass(kw_only=True)
class Prior(Run):
    """Text to image, without latents: flow matching, optionally REPA."""

    caption_dropout: Share = 0.1
    """Share of the samples that are trained without their caption."""
    repa_weight: Weight = 0.0
    """0.5 in the paper; needs repa_encoder."""
    repa_encoder: str = "facebook/dinov2-base"
    """Through transformers."""
    repa_block: Amount = 6
    """Patch block, from 0, whose tokens are aligned."""


@dataclass(kw_only=True)
class Teacher(Conditioned):
    """A decoder in many steps: flow matching given noisy latents."""

    steps: Count = 30_000
    """Updates of the whole run."""
    batch_size: Count = 64
    """Samples to a step, over all processes and accumulation."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=5e-5))
    """Of the network."""
    train: Literal["adapter", "all"] = "adapter"
    """The adapter alone (as v1.5), or everything."""
    aux_rgb_weight: Weight = 0.8
    """Of the auxiliary RGB loss, for a network with that head."""
    caption_dropout: Share = 0.1
    """Share of the samples that are trained without their caption."""
    latent_dropout: Share = 0.1
    """Share of the samples that are trained without their latents."""


@dataclass(kw_only=True)
class Student(Conditioned):
    """DMD2: the teacher in 4 steps."""

    steps: Count = 3000
    """Updates of the whole run, the student's and the critics' together."""
    batch_size: Count = 16
    """Samples to a step, over all processes and accumulation."""
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=1e-5, weight_decay=0.0, warmup_steps=100)
    )
    """Of the student."""
    fake_score_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-5, warmup_steps=0))
    """Of the fake score."""
    discriminator_optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=1e-5, weight_decay=0.0, warmup_steps=0, max_grad_norm=None)
    )
    """Of the discriminator."""
    student_every: Count = 6
    """Every so many updates one is the student's, the others the critics'."""
    guidance_scale: Weight = 3.0
    """Of the teacher, on text alone."""
    negative_prompt: str = ""
    """The text of the teacher's unconditional pass; the released students' is `presets.RELEASED_NEGATIVE_PROMPT`."""
    student_input: Literal["noised", "rollout"] = "noised"
    """A real image noised to a student time, or the student's own sample up to a random step."""
    gan_weight: Weight = 0.05
    """Of the student's adversarial term."""
    gan_warmup_steps: Amount = 100
    """Until the student's adversarial term has its full weight, counted in updates of all."""
    r1_weight: Weight = 200.0
    """Of the discriminator's approximate R1 penalty."""
    r1_noise: Weight = 0.1
    """Standard deviation of the noise by which that perturbs real images."""
    feature_blocks: Annotated[tuple[int, ...], Range(0)] = (7,)
    """Patch blocks of the teacher, from 0, that the discriminator reads."""
    teacher_memory: Literal["full", "int8", "offload"] = "full"
    """int8: quantised weights; offload: its weights stay in the CPU's memory (FSDP2)."""


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
    "prior": {"paper": functools.partial(Prior, repa_weight=0.5)},  # else all defaults are the paper's
    "teacher": {"paper": Teacher, "nano": nano_teacher},
    "student": {"paper": Student, "nano": nano_student},
}


DEEPEST = 8
"""Levels of a settings file."""
FREE = {
    "architecture",  # what is in the file must stay, which a checkpoint knows
    "output", "export", "steps", "minutes", "piece",
    "micro_batch_size", "gradient_checkpointing", "compile", "fsdp", "device", "tracker",
    "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "data.validation", "data.workers",
}  # fmt: skip
"""Settings that a run may change when it goes on: they do not decide what it learns."""


def check(config: Run) -> None:
    """Whether a run can be had with these settings, before anything is loaded or made.

    Raises:
        ValueError: a number out of its bounds, an output that cannot be written, or a package that is not installed.
    """
    _check_bounds(config)
    check_writable(config.output / "config.yaml")
    if config.export is not None:
        check_writable(config.export / "training.yaml")
    require("training", "train", "pydantic", "yaml", "matplotlib")
    if config.tracker == "tensorboard":
        require("training", "train", "tensorboard")
    elif config.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ValueError("tracker wandb: pip install wandb")
    if config.lora.rank:
        require("training", "train", "peft")
    if ".tar" in config.data.source:
        require("training", "train", "webdataset", "braceexpand")


def _check_bounds(config: Any, prefix: str = "") -> None:
    hints = get_type_hints(type(config), include_extras=True)
    for name, value in vars(config).items():
        if is_dataclass(value):
            _check_bounds(value, f"{prefix}{name}.")
        for bounds in getattr(hints[name], "__metadata__", ()):
            for number in value if isinstance(value, tuple | list) else (value,):
                if number is not None and number not in bounds:
                    raise ValueError(f"{prefix}{name} {number}: expected {bounds}")


def read_yaml(path: Path, default: Run) -> Run:
    """`default` with what the file sets.

    Raises:
        ValueError: no such file, a key that does not exist, or a value of another type; the message names it.
    """
    require("training", "train", "pydantic", "yaml")
    from pydantic import ValidationError

    try:
        config = _adapter(type(default)).validate_python(_merged(to_dict(default), load_yaml(path)))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {_short(e['input'])})" for e in error.errors()]
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ValueError(f"{path}: {'; '.join(lines[:3])}{more}") from None
    return config


def refuse_code(config: Run, file: Path, typed: list[str]) -> None:
    """Files are passed on, and run nothing: commands and modules are named on the command line.

    Args:
        config: with what a file set.
        typed: the words of the command line.

    Raises:
        ValueError: naming the setting.
    """
    encoder, source = getattr(config, "encoder", ""), config.data.source
    for option, value, runs in ("data.source", source, is_command(source)), ("encoder", encoder, is_code(encoder)):
        if runs and not any(word.split("=")[0] == f"--{option}" for word in typed):
            raise ValueError(f"{file}: {option} {_short(value)}: code is run for --{option} alone, not for a file")


def load_yaml(path: Path) -> dict:
    """Plain settings: a few lines cannot stand for gigabytes.

    Raises:
        ValueError: no file, no YAML or no mapping, or one with aliases or nested beyond all use.
    """
    import yaml

    try:
        text, depth = path.read_text(encoding="utf-8-sig"), 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                what = f"*{event.anchor}" if isinstance(event, yaml.AliasEvent) else f"more than {DEEPEST} levels"
                raise ValueError(f"{path}: expected settings without aliases, in a few levels, got {what}")
        found = yaml.load(text, _loader())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as a number that is none
        text = " ".join(str(error).split())
        raise ValueError(text if str(path) in text else f"{path}: not readable as YAML: {text[:300]}") from None
    if not isinstance(found, dict | None):
        raise ValueError(f"{path}: expected keys and values, got {type(found).__name__}")
    return found or {}


@functools.cache
def _loader() -> type:
    """PyYAML's safe one without YAML 1.1's numbers to other bases than it seems: 1:30:00 is no 5,400, and 010 no 8."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INTEGER, _FLOAT)]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(
        _INTEGER, re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"), "-+0123456789"
    )
    number = r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?$"
    words = r"[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    Loader.add_implicit_resolver(_FLOAT, re.compile(f"{number}|{words}"), "-+0123456789.")
    return Loader


_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


def changes(old: dict, new: dict) -> dict[str, str]:
    """By the name of each setting that differs between `to_dict`s (of those that `old` has): "old -> new"."""
    before, after = _flat(old), _flat(new)
    return {
        name: f"{_short(before[name])} -> {_short(value)}"
        for name, value in after.items()
        if _plain(before.get(name, value)) != _plain(value)
    }


def _plain(value: object) -> object:
    """A path as it would be without "/" at its end, or "./" before it."""
    return os.path.normpath(value) if isinstance(value, str) and Path(value).exists() else value


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_dict(config: Run) -> dict:
    """Plain values, as YAML has them."""
    return _adapter(type(config)).dump_python(config, mode="json")


def write_yaml(config: Run, path: Path) -> None:
    import yaml

    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    write_whole(path, lambda file: file.write_text(text))


def _adapter(kind: type):
    from pydantic import ConfigDict, TypeAdapter

    for part in (Data, Optimizer, Lora, kind):
        part.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return TypeAdapter(kind)


def _merged(old: dict, new: dict) -> dict:
    """`old` with the leaves of `new`, "~" at their beginning expanded."""

    def merged(key: str, value: object) -> object:
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            return _merged(old[key], value)
        return os.path.expanduser(value) if isinstance(value, str) and value[:2] == "~/" else value

    return old | {key: merged(key, value) for key, value in new.items()}
