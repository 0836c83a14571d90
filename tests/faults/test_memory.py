"""Memory that runs out while the device works: smaller plans, and what is said of them."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from conftest import tiny_pipeline
from pixeldecoder.plan import encode_in_tiles
from pixeldecoder.serve.engine import Engine, Request

LATENTS = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def short_of_memory(pipeline, largest: int, message: str = "CUDA out of memory. Tried to allocate 2 GiB") -> list[int]:
    """A network that takes no more than so many pixels at a time; those that it was given."""
    given: list[int] = []

    def refuse(module, args, kwargs):
        given.append(args[0].shape[-1] * args[0].shape[-2])
        if given[-1] > largest:
            raise torch.OutOfMemoryError(message)

    pipeline.transformer.register_forward_pre_hook(refuse, with_kwargs=True)
    return given


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]


def test_a_decode_is_cut_smaller_until_it_fits(told):
    """The same picture as of one that was cut so from the beginning, noise between the steps too."""
    pipeline, steps = tiny_pipeline(), dict(num_inference_steps=2, output_type="pt")
    latents = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    given = short_of_memory(pipeline, 300**2)
    image = pipeline(latents, generator=torch.Generator().manual_seed(3), **steps).images
    tiles = pipeline.layout.tiles
    assert given[0] == 384**2 and pipeline.layout.tiled and tiles.height <= 300
    assert "out of memory: trying once more with 384 x 384 px" in told()[-1] and f"{tiles.count} tiles" in told()[-1]
    expected = tiny_pipeline()(
        latents, generator=torch.Generator().manual_seed(3), tile_size=max(tiles.height, tiles.width), **steps
    )
    assert (image - expected.images).abs().mean() < 1e-4  # where other noise would make it .1


def test_what_cannot_be_made_smaller_says_so(told):
    pipeline = tiny_pipeline()
    short_of_memory(pipeline, 0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        pipeline(LATENTS, num_inference_steps=1)
    with pytest.raises(RuntimeError, match="no memory's fault"):
        broken = tiny_pipeline()
        broken.transformer.register_forward_pre_hook(fails)
        broken(LATENTS, num_inference_steps=1)
    assert len(told()) > 1


def fails(*args):
    raise RuntimeError("no memory's fault")


def test_an_image_is_encoded_in_tiles(told):
    encoder = nn.Conv2d(3, 4, 8, 8).eval()
    encoder.config = {"block_out_channels": [64]}
    encoder.__class__.__name__, name = "AutoencoderKL", encoder.__class__.__name__
    image = torch.randn(1, 3, 512, 512)

    def encode(part):
        if part.shape[-1] > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return encoder(part)

    try:
        with torch.no_grad():
            latents = encode_in_tiles(encode, encoder, image, 8)
            expected = encoder(image)
    finally:
        encoder.__class__.__name__ = name
    assert torch.allclose(latents, expected, atol=1e-5) and "out of memory: trying once more" in told()[0]


@pytest.mark.slow
def test_the_server_splits_a_batch_and_then_the_picture(told):
    """Of four requests, each alone fits, and each is what it is alone."""
    alone = tiny_pipeline()
    engine = Engine({"tiny": tiny_pipeline()})
    try:
        expected = [
            alone(LATENTS, num_inference_steps=1, generator=torch.Generator().manual_seed(seed), output_type="latent")
            for seed in range(4)
        ]
        engine.pipelines["tiny"].transformer.register_forward_pre_hook(alone_only)
        jobs = [engine.submit(Request(decoder="tiny", latents=LATENTS, steps=1, seed=seed)) for seed in range(4)]
        for job, one in zip(jobs, expected, strict=True):
            assert torch.allclose(job.result(60).image, one.images, atol=1e-5)
        assert not engine.batches.keys() - {1} and engine.batches[1] == 4
    finally:
        engine.close()


def alone_only(module, args):
    if len(args[0]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.slow
def test_an_address_space_that_is_too_small():
    """PyTorch's and oneDNN's own errors, of a process that may have little more than it holds when its decoder is
    loaded: somewhere between what suffices and what does not, an image is made by a smaller plan."""
    script = """
import logging, resource, psutil, torch
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.errors import out_of_memory
from pixeldecoder.plan import logger

told = logging.Handler()
told.emit = lambda record: said.append(record.getMessage())
logger.addHandler(told)
pipe = PixelDecoderPipeline.from_pretrained("nano", dtype=torch.float32)
pipe(torch.zeros(1, 16, 2, 2), num_inference_steps=1)
held, most = psutil.Process().memory_info().vms, resource.getrlimit(resource.RLIMIT_AS)[1]
low, high = 200.0, 1500.0
while high - low > 2:
    more, said = (low + high) / 2, []
    resource.setrlimit(resource.RLIMIT_AS, (held + int(more * 2**20), most))
    try:
        image = pipe(torch.zeros(1, 16, 24, 24), num_inference_steps=1).images[0]
    except RuntimeError as error:
        assert out_of_memory(error), error
        low = more
        continue
    if said:
        print(image.size, *said)
        break
    high = more
else:
    print("none between", low, high)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("(768, 768) out of memory: trying once more with"), child.stdout
