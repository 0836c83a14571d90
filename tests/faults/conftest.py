"""A process to fork runs from, and what they are run on."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import TINY, tiny_pipeline
from faults.zygote import Zygote
from training.conftest import write_photos


@pytest.fixture(scope="session")
def zygote():
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def things():
    """A decoder, three pictures, three files of latents; readable by everyone, which pytest's folders are not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    tiny_pipeline().save_pretrained(folder / "decoder")
    tiny_pipeline(**TINY).save_pretrained(folder / "with-text")
    write_photos(folder / "photos", 3, (64, 64))
    (folder / "latents").mkdir()
    for index in range(3):
        z = torch.randn(16, 2, 3, generator=torch.Generator().manual_seed(index))
        save_file({"latents": z}, folder / "latents" / f"{index}.safetensors")
    for path in folder.rglob("*.safetensors"):  # which are their owner's alone
        path.chmod(0o644)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def here(things):
    """An empty folder, in one of its own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    (folder / "here").mkdir()
    for one in folder, folder / "here":
        one.chmod(0o777)
    yield folder / "here"
    shutil.rmtree(folder)
