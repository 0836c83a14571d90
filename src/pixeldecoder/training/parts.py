"""Networks in, networks that train over one or many processes out: their optimizers, average and memory."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
from torch.linalg import vector_norm

from pixeldecoder.convert import load_folder
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.training.config import Lora, Optimizer, Run
from pixeldecoder.training.data import Batch

Terms = dict[str, torch.Tensor]
"""A loss by its weighted terms, each a scalar."""

LARGE = 1e12
"""Gradients' values are scaled down to this before their squares are summed up in float32."""

LORA_TARGETS = {
    "backbone": r"(patch_blocks|pixel_blocks)\.\d+\.(attn\.(to_qkv|to_out|add_qkv|to_add_out)|compress|expand"
    r"|(text_)?mlp\.(gate_proj|up_proj|down_proj|0|2))",
    "adapter": r"adapter\.(convs\.(0|2|\d+\.block\.[25])|heads\.\d+|pixel_head)",
}


class TrainingError(ValueError):
    """A run that must stop."""


def build_network(config: Run) -> PixelDecoderTransformer2DModel:
    """The network a run starts from, float32.

    Raises:
        ValueError: nothing to start from, or weights that do not fit the architecture.
    """
    if not config.model and config.architecture is None:
        raise ValueError("expected `model` (what to start from) or `architecture` (to start from scratch)")
    start = None
    if config.model:
        folder = Path(config.model)
        if folder.is_dir():
            start = load_folder(folder)
        else:
            # A folder that another run has not exported yet looks like a Hub id.
            missing = f"model {config.model}: no such folder"
            if "/" in config.model and not folder.exists() and folder.parent.is_dir():
                raise ValueError(missing)
            try:
                start = PixelDecoderPipeline.from_pretrained(config.model).transformer
            except ValueError as error:
                if isinstance(error.__context__, OSError):  # of the Hub
                    reason = str(error.__context__).splitlines()[0][:120]
                    raise ValueError(
                        f"{missing}, and https://huggingface.co has none that can be read ({reason})"
                    ) from None
                raise
    if config.architecture is None:
        assert start is not None
        return start.float()
    model = PixelDecoderTransformer2DModel(**read_architecture(config.architecture))
    if start is not None:
        expected, found = model.state_dict(), start.state_dict()
        problems = [n for n in found if n not in expected or expected[n].shape != found[n].shape]
        problems += [n for n in expected if n not in found and not n.startswith("adapter.")]
        if problems:
            raise ValueError(
                f"{config.model} does not fit {config.architecture}: {len(problems)} tensors differ: "
                f"{', '.join(problems[:5])}"
            )
        model.load_state_dict(found, strict=False)
    return model


def read_architecture(path: Path) -> dict[str, Any]:
    """Arguments of the network from JSON or YAML.

    Raises:
        ValueError: unreadable, or an argument that does not exist.
    """
    import inspect

    import yaml

    try:
        found = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML or JSON: {error}") from None
    known = inspect.signature(PixelDecoderTransformer2DModel.__init__).parameters
    if not isinstance(found, dict) or (unknown := [k for k in found if k not in known and k[:1] != "_"]):
        raise ValueError(
            f"{path}: expected arguments of the network ({', '.join(list(known)[1:])})"
            + (f", got {', '.join(unknown)}" if isinstance(found, dict) else "")
        )
    return {key: value for key, value in found.items() if key[:1] != "_"}


def add_lora(model: PixelDecoderTransformer2DModel, lora: Lora) -> None:
    """Freeze the network and add low-rank updates, which train."""
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=LORA_TARGETS[lora.part]))


def freeze_unused(model: PixelDecoderTransformer2DModel, aux_rgb: bool) -> None:
    """What no loss reaches: the text branch of the last block, and the auxiliary head if it has no loss."""
    last = model.patch_blocks[-1]
    unused = [last.text.norm2, last.text_mlp, last.attn.to_add_out] if last.text is not None else []
    if model.adapter is not None and model.adapter.aux_rgb_head is not None and not aux_rgb:
        unused.append(model.adapter.aux_rgb_head)
    for module in unused:
        module.requires_grad_(False)


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
    """

    def __init__(self, module: nn.Module, settings: Optimizer, config: Run, accelerator: Accelerator):
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
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            settings.learning_rate,
            settings.betas,
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",  # without temporary copies of all weights
        )

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
        largest = torch.stack(
            [torch.zeros((), device=self.device), *(vector_norm(grad, math.inf) for grad in grads)]
        ).max()
        if isinstance(self.wrapped, FSDPModule):
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        scale = (LARGE / largest).clamp_max(1)
        torch._foreach_mul_(grads, scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, longest)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm) / scale

    def step(self, number: int) -> None:
        """The optimizer's step, at the learning rate of this part's update `number`, from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1, (number + 1) / max(1, self.settings.warmup_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


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
) -> dict[str, float]:
    """One optimizer step of `parts` on accumulated batches.

    Args:
        step: of the run, for messages.
        number: of this update among those of `parts`, from 0.

    Returns:
        The terms' means over all processes, and each part's gradient norm before it is cut.

    Raises:
        TrainingError: a loss or a gradient that is not finite; the weights of all parts are then as before.
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
            raise TrainingError(f"the loss of step {step} is not finite{where}")
        found = ", ".join(name for name in parts if not math.isfinite(values[f"gradient_norm_{name}"]))
        seen = [name for batch in batches for name in batch.names]
        raise TrainingError(
            f"the gradient of step {step} ({found}) is not finite, in a batch of {len(seen)}: {', '.join(seen[:10])}"
        )
    for part in parts.values():
        part.step(number)
    return values


class Average:
    """Exponential moving average of what trains, float32."""

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
