"""A network in, one that trains over one or many processes out: its optimizer, its average, its updates."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from pixeldecoder.models.finite import first_not_finite
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.sources import Folder, Shards
from pixeldecoder.training.config import Optimizer, Run
from pixeldecoder.training.data import Batch

Terms = dict[str, torch.Tensor]
"""A loss by its weighted terms, each a scalar."""

LARGE = 1e12
"""Gradients' values are scaled down to this before their squares are summed up in float32."""


class TrainingError(ValueError):
    """A run that must stop."""


def ensure_process_group(device: torch.device) -> None:
    """FSDP2 wants one, also of a single process."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def shard(model: nn.Module, config: Run, device: torch.device, offload: bool = False) -> nn.Module:
    """FSDP2, a block at a time, in place."""
    ensure_process_group(device)
    half = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    kwargs: dict[str, Any] = dict(
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        # Times and sigmas stay float32: the network casts what it wants cast.
        mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False),
    )
    if offload:
        kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in (*getattr(model, "patch_blocks", ()), *getattr(model, "pixel_blocks", ())):
        fully_shard(block, **kwargs)
    fully_shard(model, **kwargs)
    if isinstance(model, PixelDecoderTransformer2DModel):
        register_fsdp_forward_method(model, "encode_latents")
    return model


class Part:
    """A network that trains: itself, its wrapper for many processes, its optimizer.

    Call it as the network; `module` is the bare one.

    Args:
        optimizer: by default AdamW; the settings' warm-up and decay scale the learning rates of all its groups.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Optimizer,
        config: Run,
        accelerator: Accelerator,
        optimizer: Callable[[nn.Module, Optimizer], torch.optim.Optimizer] | None = None,
    ):
        self.settings, self.device = settings, accelerator.device
        self.module = module.to(accelerator.device)
        if config.fsdp:
            self.wrapped = shard(self.module, config, self.device)
        else:
            if config.compile and isinstance(module, PixelDecoderTransformer2DModel):
                module.compile_repeated_blocks()
            self.wrapped = accelerator.prepare_model(self.module)
        self.autocast = not config.fsdp and config.precision == "bfloat16"
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = (
            optimizer(self.module, settings)
            if optimizer is not None
            else torch.optim.AdamW(
                self.parameters,
                settings.learning_rate,
                settings.betas,
                weight_decay=settings.weight_decay,
                fused=self.device.type in ("cuda", "cpu"),  # in one pass, without temporary copies of all weights
            )
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def __call__(self, *args, **kwargs):
        with autocast(self.device, self.autocast):
            return (self.wrapped if torch.is_grad_enabled() else self.module)(*args, **kwargs)

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Gradients travel between processes with the last of the accumulated batches alone."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
        else:
            yield

    def clip(self) -> torch.Tensor:
        """Cut the gradient to its longest; returns its norm before."""
        longest = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
        # A fresh adapter's gradient on latents of zeros can be 1e27: each of its norms divides by sqrt(eps) there. Its
        # square would overflow, so that a large norm would look like an infinite one.
        grads = [
            p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in self.parameters if p.grad is not None
        ]
        grads = [grad for grad in grads if grad.numel()]  # a process's share of a small one may be nothing
        largest = torch.stack([torch.zeros((), device=self.device), *torch._foreach_norm(grads, math.inf)]).max()
        if isinstance(self.wrapped, FSDPModule):
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        scale = (LARGE / largest).clamp_max(1)
        torch._foreach_mul_(grads, scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, longest)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm) / scale

    def step(self, number: int, progress: float = 0.0) -> None:
        """The optimizer's step, at the learning rates of this part's update `number`, from 0."""
        share = min(1, (number + 1) / max(1, self.settings.warmup_steps)) * (1 - self.settings.decay * progress)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Stage(Protocol):
    """What a run trains: made of its configuration and an `Accelerator`."""

    model: Any
    """The network whose average is validated and exported, a diffusers `ModelMixin`."""
    parts: dict[str, Part]
    """All that trains, and goes into checkpoints."""
    conditions: Any
    """`Conditions` of the pictures that it is validated on; unused where a run validates never."""

    def batches(self, source: Folder | Shards, position: int) -> Iterator[Batch]:
        """Endless micro-batches of this process, from the position that the last one of an earlier run names."""

    def update(self, batches: list[Batch], step: int, progress: float) -> dict[str, float]:
        """Train on accumulated micro-batches; returns its terms.

        Args:
            progress: share of the run that is over, in [0, 1).
        """

    def model_update(self, step: int) -> int | None:
        """Which of the updates of `model` this step is, from 0; `None`: it is of other parts alone."""

    def pipeline(self, model: Any) -> Any:
        """Around a model of the kind that it trains: what is validated and exported; the model itself, if it is a part
        of a decoder alone, and then never validated."""


def autocast(device: torch.device, enabled: bool):
    """bfloat16 computation; no cache, which would keep a second copy of every weight."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def update(
    parts: dict[str, Part],
    batches: list[Batch],
    losses: Callable[[Batch], Terms],
    step: int,
    number: int,
    accelerator: Accelerator,
    progress: float = 0.0,
) -> dict[str, float]:
    """One optimizer step of `parts` on accumulated batches.

    Args:
        step: of the run, for messages.
        number: of this update among those of `parts`, from 0.
        progress: of the run, in [0, 1).

    Returns:
        The terms' means over all processes, and each part's gradient norm before it is cut.

    Raises:
        TrainingError: a loss, whose first such layer is named, or a gradient that is not finite; the weights of all
            parts are then as before.
    """
    rows = []
    for index, batch in enumerate(batches):
        with ExitStack() as stack:
            for part in parts.values():
                stack.enter_context(part.synchronised(index == len(batches) - 1))
            terms = losses(batch)
            (torch.stack(list(terms.values())).sum() / len(batches)).backward()
        rows.append(torch.stack([term.detach().float() for term in terms.values()]))
    norms = torch.stack([part.clip().float() for part in parts.values()])
    means = torch.cat([torch.stack(rows).mean(dim=0), norms])
    # Looked at once a step: each look waits for the device.
    names = [*terms, *(f"gradient_norm_{name}" for name in parts)]
    values = dict(zip(names, accelerator.reduce(means, "mean").tolist(), strict=True))
    if not all(map(math.isfinite, values.values())):
        bad = [
            name for batch, row in zip(batches, rows, strict=True) for name in batch.names if not row.isfinite().all()
        ]
        if not all(math.isfinite(values[name]) for name in terms):
            where = f", in the batch of {', '.join(bad)}" if bad else " in another process, which names the batch"
            first = None
            if accelerator.num_processes == 1:  # several would wait for one another
                networks = {name: part.module for name, part in parts.items()}
                first = first_not_finite(networks, lambda: [losses(batch) for batch in batches])
            told = f" (the first in {first})" if first else ""
            raise TrainingError(f"the loss of step {step} is not finite{told}{where}")
        found = ", ".join(name for name in parts if not math.isfinite(values[f"gradient_norm_{name}"]))
        seen = [name for batch in batches for name in batch.names]
        raise TrainingError(
            f"the gradient of step {step} ({found}) is not finite, in a batch of {len(seen)}: {', '.join(seen[:10])}"
        )
    for part in parts.values():
        part.step(number, progress)
    return values


class Average:
    """Exponential moving average of the trained weights (eq. 28), float32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.source = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # forgets the start
        for name, value in self.values.items():
            value.lerp_(self.source[name].detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged weights."""
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self.source.items()}
            for name, p in self.source.items():
                p.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.source.items():
                    p.copy_(kept[name])
