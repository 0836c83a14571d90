"""Run by torchrun: `run.yaml`'s update of step `number`; its gradients, before the optimizer's step, into a file."""

import sys
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from pixeldecoder.training.config import Student, Teacher, read_yaml

kind, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
gradients = {}


def keep(part, *_):
    for name, parameter in part.module.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            gradients[f"{type(part.module).__name__.removeprefix('FSDP')}.{name}"] = grad.clone()


if __name__ == "__main__":
    from accelerate import Accelerator

    from pixeldecoder.training.data import load_batches, load_source
    from pixeldecoder.training.distill import StudentStage
    from pixeldecoder.training.teacher import TeacherStage

    config = read_yaml(folder / "run.yaml", Student() if kind == "student" else Teacher())
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    stage = (StudentStage if kind == "student" else TeacherStage)(config, accelerator)
    for part in stage.parts.values():
        part.optimizer.register_step_pre_hook(partial(keep, part))
    for part in stage.parts.values():  # zero layers would hide errors; alike in every process, whatever the sharding
        for name, parameter in part.module.named_parameters():
            if name == "proj_out.weight" or ".heads." in name:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.data.fill_(0.02)
    stream = load_batches(config, stage.model, load_source(config), accelerator, 0)
    count = config.batch_size // config.micro_batch_size // accelerator.num_processes
    stage.update([next(stream) for _ in range(count)], number)
    if accelerator.is_main_process:
        torch.save(gradients, folder / f"gradients_{accelerator.num_processes}_{config.fsdp}_{number}.pt")
    accelerator.end_training()
