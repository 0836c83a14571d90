"""A real server: uvicorn in a thread of this process, or the command in one of its own."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import torch
from PIL import Image

from conftest import tiny_pipeline
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.serve.engine import Engine
from pixeldecoder.serve.http import Server, create_app
from pixeldecoder.serve.service import Settings


def latents(seed: int, height: int = 2, width: int = 2) -> torch.Tensor:
    return torch.randn(16, height, width, generator=torch.Generator().manual_seed(seed))


def photo(size=(40, 24), mode: str = "RGB") -> Image.Image:
    noise = torch.randint(0, 255, (size[1], size[0], 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Image.fromarray(noise.numpy(), "RGBA").convert(mode)


class Gate:
    """Holds the engine's thread within the network's first pass, so that what comes meanwhile must wait."""

    def __init__(self, pipeline):
        self.entered, self.opened, self.passes = threading.Event(), threading.Event(), 0
        pipeline.transformer.register_forward_pre_hook(self._wait)

    def _wait(self, *args):
        self.passes += 1
        self.entered.set()
        assert self.opened.wait(60)


def flux_pipeline() -> PixelDecoderPipeline:
    pipeline = tiny_pipeline()
    pipeline.register_to_config(latent_space="flux")
    return pipeline


@contextmanager
def serving(pipeline, page=None, settings: Settings | None = None, **engine) -> Iterator[httpx.Client]:
    """A client of a server in this process; `.engine` is its engine."""
    made = Engine({"tiny": pipeline}, **engine)
    server = Server(create_app(made, settings or Settings(), page))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
            client.engine = made
            try:
                while client.get("/healthz").status_code != 200:
                    pass
                yield client
            finally:
                server.should_exit = True
                thread.join(60)
    assert not made.alive


@contextmanager
def command(*args: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`pixeldecoder serve` and its address; ended by SIGTERM unless it has ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pixeldecoder", "serve", "--port", "0", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    try:
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
