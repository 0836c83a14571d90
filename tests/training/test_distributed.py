"""Two processes give the gradients of one on the same global batch."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixeldecoder.training.config import write_yaml

HERE = Path(__file__).parent


def gradients(config, kind, folder, processes, number):
    write_yaml(config, folder / "run.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         str(HERE / "distributed.py"), kind, str(folder), str(number)],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    return torch.load(folder / f"gradients_{processes}_{config.fsdp}_{number}.pt", weights_only=True)


@pytest.mark.parametrize("kind, number", [("teacher", 0), ("student", 0), ("student", 1)])
def test_ddp_and_fsdp(kind, number, request, tmp_path):
    """A teacher's update, the critics' and the student's; with accumulation of two batches."""
    config = replace(request.getfixturevalue(kind), batch_size=8, micro_batch_size=4)
    one = gradients(config, kind, tmp_path, 1, number)
    assert len(one) > 20
    for fsdp in (False, True):
        two = gradients(replace(config, micro_batch_size=2, fsdp=fsdp), kind, tmp_path, 2, number)
        assert two.keys() == one.keys()
        scale = max(gradient.abs().max() for gradient in one.values())
        for name, gradient in one.items():
            assert (two[name] - gradient).abs().max() < 1e-5 * scale, name
