"""Memory and speed of training the full network: measured on a GPU, or counted without running anything.

    python recipes/training_memory.py                        # counts every stage and resolution, seconds on a CPU
    python recipes/training_memory.py --measure              # runs them on the GPU: peak memory, samples per second

Latents and prompt embeddings are made up: encoders are left out. Counting follows the tensors of a whole update
(networks, average, gradients, AdamW, activations) without their values; an allocator needs somewhat more.
"""

import itertools
import time
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
import yaml
from accelerate import Accelerator
from diffusers.models.modeling_utils import no_init_weights
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixeldecoder.presets import PRESETS
from pixeldecoder.training import degrade, distill, teacher
from pixeldecoder.training.config import Student, Teacher
from pixeldecoder.training.data import Batch
from pixeldecoder.training.parts import Average

PRESET = PRESETS["PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled"]
RUNS = {
    "teacher, adapter alone": Teacher(),
    "teacher, everything": Teacher(train="all"),
    "student": Student(),
    "student, int8 teacher": Student(teacher_memory="int8"),
}


@dataclass
class Config:
    resolutions: tuple[int, ...] = (1024, 2048)
    measure: bool = False
    """Run on the GPU instead of counting."""
    updates: int = 6
    """That are timed, after as many that are not; the student's come one in six."""
    runs: tuple[str, ...] = tuple(RUNS)


class RandomConditions:
    """Stands in for the encoders."""

    def __init__(self, run: Teacher | Student, network: torch.nn.Module, device: torch.device):
        self.network, self.device, self.encoder = network.config, device, None

    def __call__(self, batch: Batch, *_, **__) -> degrade.Condition:
        count, _, height, width = batch.image.shape
        network, cell = self.network, self.network.scale * self.network.latent_downscale_factor
        text = network.text_embed_dim
        embeds = None if text is None else torch.zeros(count, 300, text, device=self.device)
        return degrade.Condition(
            latents=torch.randn(count, network.latent_channels, height // cell, width // cell, device=self.device),
            sigma=torch.full((count,), 0.4, device=self.device),
            small=torch.zeros(count, 3, height // network.scale, width // network.scale, device=self.device),
            kept=torch.ones(count, device=self.device),
            embeds=embeds,
            negative_embeds=embeds,
        )


class Counter(TorchDispatchMode):
    """Bytes of all tensors alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return output

    def _add(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)


def main(config: Config) -> None:
    if config.measure and not torch.cuda.is_available():
        raise SystemExit("--measure: expected a CUDA device")
    device = torch.cuda.get_device_name() if config.measure else "counted"
    print(f"| stage ({device}, torch {torch.__version__}) | resolution | peak memory | samples/s |\n|---|---|---|---|")
    for name in config.runs:
        for resolution in config.resolutions:
            peak, rate = one(replace(RUNS[name], batch_size=1, micro_batch_size=1), resolution, config)
            print(f"| {name} | {resolution} px | {peak / 1e9:.1f} GB | {rate} |", flush=True)


def one(run: Teacher | Student, resolution: int, config: Config) -> tuple[int, str]:
    """Peak bytes and samples per second of one stage, a micro-batch at a time; of the full network if none is given."""
    accelerator = Accelerator(cpu=not config.measure)
    counter = Counter()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        if config.measure:
            # Fresh weights begin on the GPU: making 1.4 G of them on a CPU takes longer than the measurement.
            stack.enter_context(accelerator.device)
        else:
            stack.enter_context(no_init_weights())  # of tensors without values
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            # It remembers what stands for what by weak references, with which `Module.to` cannot replace a tensor.
            converter, numbers = mode.fake_tensor_converter, itertools.count()
            converter.set_tensor_memo = lambda *_: None
            converter.meta_converter.describer.get_tensor_id = lambda _: next(numbers)
            stack.enter_context(counter)
        if run.architecture is None:
            run = replace(run, architecture=Path(folder) / "architecture.yaml")
            run.architecture.write_text(yaml.safe_dump(dict(PRESET.config)))
        count = run.micro_batch_size
        kind = distill.StudentStage if isinstance(run, Student) else teacher.TeacherStage
        stage = kind(run, accelerator, RandomConditions)
        average = Average(stage.model, run.ema_decay)
        image = torch.zeros(count, 3, resolution, resolution, device=accelerator.device)
        batch = Batch(image=image, captions=[""] * count, names=[""] * count, samples=list(range(count)), position=0)
        if not config.measure:
            # What `update` does, without looking at the values of losses, which are not there.
            updates = [(stage.losses, ["network"])] if isinstance(stage, teacher.TeacherStage) else []
            if isinstance(stage, distill.StudentStage):
                updates = [(stage.critic_losses, ["fake_score", "discriminator"])]
                updates += [(partial(stage.student_losses, gan_warm_up=1.0), ["student"])]
            for losses, parts in updates:
                torch.stack(list(losses(batch).values())).sum().backward()
                for part in parts:
                    stage.parts[part].clip()
                    stage.parts[part].step(0)
            average.update(0)
            return counter.peak, "not measured"
        for step in range(2 * config.updates):
            if step == config.updates:
                torch.cuda.synchronize()
                begun = time.time()
            stage.update([batch], step)
            if (number := stage.model_update(step)) is not None:
                average.update(number)
        torch.cuda.synchronize()
    rate = count * config.updates / (time.time() - begun)
    peak = torch.cuda.max_memory_allocated()
    del stage, average
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak, f"{rate:.2f}"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
