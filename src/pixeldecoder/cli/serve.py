"""Decoders in, a web page and a server of them out: `serve`."""

import importlib
import os
import socket
from dataclasses import dataclass, field
from typing import Annotated

from pixeldecoder.cli.options import ExecutionOptions, TextEncoder, check_positive, word
from pixeldecoder.errors import naming, require
from pixeldecoder.presets import check_decoder_name


@dataclass(kw_only=True)
class Serve(TextEncoder, ExecutionOptions):
    """A web page and an HTTP server: diffusers' remote_decode, /v1, OpenAI's image edits.

    Its address is printed when it is ready. At SIGTERM or Ctrl-C it finishes what it has taken. A token in
    $PIXELDECODER_TOKEN is then wanted of every request, as a bearer or as the password that browsers ask for.

    Example: pixeldecoder serve --port 8000
    """

    decoder: Annotated[tuple[str, ...], word("NAME")] = ("nano",)
    """One or several, each as in `decode`; the first is taken where a request names none."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for other machines, too: give a token then."""
    port: int = 8000
    """0: one that is free."""
    queue_size: int = 64
    """Requests that may wait; further ones are told to come later (429)."""
    max_batch: int = 8
    """Images that are decoded together, if the memory allows."""
    max_bytes: Annotated[str, word("SIZE")] = "64MB"
    """Of a request's body."""
    max_pixels: int = 8192 * 8192
    """Of an image that is made."""
    deadline: float = 600.0
    """Seconds after which a request is given up (503)."""
    drain: float = 60.0
    """Seconds for what was taken, at the end."""
    model: str | None = None
    """Folder or Hub id of a diffusers pipeline, which the page then makes latents with."""
    page: bool = True
    """The web page, at /."""
    seed: int = field(default=0, init=False)  # each request's

    def run(self) -> None:
        from pixeldecoder.files import parse_size

        self.check()
        check_positive(queue_size=self.queue_size, max_batch=self.max_batch, max_pixels=self.max_pixels)
        if min(self.deadline, self.drain) <= 0:
            raise ValueError(f"--deadline {self.deadline:g}, --drain {self.drain:g}: expected seconds, more than 0")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: expected 0 to 65535")
        with naming("--max-bytes"):
            max_bytes = parse_size(self.max_bytes)
        if not self.decoder:
            raise ValueError("--decoder: expected at least one")
        for name in self.decoder:
            check_decoder_name(name)
        require("serve", "serve", "fastapi", "fastapi_offline", "prometheus_client", "python_multipart", "uvicorn")
        if self.page:
            require("the web page", "serve", "gradio")
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listening = socket.create_server((self.host, self.port), family=family, backlog=2048)
        except OSError as error:
            raise ValueError(
                f"--host {self.host} --port {self.port}: cannot be listened at: {error.strerror}"
            ) from None

        from pixeldecoder import heap
        from pixeldecoder.execution import load_diffusion_pipeline, torch_device, torch_dtype
        from pixeldecoder.serve.engine import Engine
        from pixeldecoder.serve.http import Server, create_app
        from pixeldecoder.serve.service import Settings

        heap.one_heap()
        pipelines = {name: self.execution().load(name) for name in self.decoder}
        for pipeline in pipelines.values():
            if pipeline.text_encoder is None:
                self.attach(pipeline)
        latent_model = None
        if self.model is not None:
            device = torch_device(self.device)
            latent_model = load_diffusion_pipeline(self.model, torch_dtype(self.dtype, device), {}).to(device)
            latent_model.set_progress_bar_config(disable=True)
        page = importlib.import_module("pixeldecoder.serve.web").mount if self.page else None
        engine = Engine(pipelines, self.limits(), self.queue_size, self.max_batch, self.max_pixels, latent_model)
        settings = Settings(max_bytes, self.deadline, os.environ.get("PIXELDECODER_TOKEN") or None)
        with listening:
            Server(create_app(engine, settings, page), self.drain).run([listening])
