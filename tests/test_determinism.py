"""The same picture, however it is asked for: alone, in a folder, in a batch, cut or not, twice."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import tiny_pipeline
from pixeldecoder.cli import main


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a decoder, three latents, the same in one file, and the picture of each by itself."""
    folder = tmp_path_factory.mktemp("determinism")
    torch.manual_seed(0)
    tiny_pipeline().save_pretrained(folder / "decoder")
    latents = torch.randn(3, 16, 3, 2)
    (folder / "one").mkdir()
    for index, z in enumerate(latents):
        save_file({"latents": z.clone()}, folder / f"one/{index}.safetensors")
    save_file({"latents": latents}, folder / "batch.safetensors")
    for index in range(3):
        decode(folder, f"one/{index}.safetensors", f"alone/{index}.png")
    return folder


def decode(folder, source, output, *options):
    words = ["decode", str(folder / source), str(folder / output), "--decoder", str(folder / "decoder"), "--seed", "7"]
    assert main([*words, "--device", "cpu", "--dtype", "float32", "--no-metadata", "--overwrite", *options]) == 0
    return folder / output


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("options", [(), ("--chunk", "7"), ("--max-memory", "8GB"), ("--tile", "none")])
def test_the_same_bytes(options, alone):
    again = decode(alone, "one", "folder", *options)
    for index in range(3):
        assert (again / f"{index}.png").read_bytes() == (alone / f"alone/{index}.png").read_bytes()


def test_in_a_batch(alone):
    """Each picture has its own noise there; its values may round otherwise."""
    batch = decode(alone, "batch.safetensors", "batch")
    for index in range(3):
        difference = np.abs(pixels(batch / f"batch_{index:03}.png") - pixels(alone / f"alone/{index}.png"))
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_what_decides_is_seen(alone):
    """Seed and latents."""
    other = decode(alone, "one/0.safetensors", "other.png", "--seed", "8")
    assert np.abs(pixels(other) - pixels(alone / "alone/0.png")).max() > 1
    assert np.abs(pixels(alone / "alone/1.png") - pixels(alone / "alone/0.png")).max() > 1
