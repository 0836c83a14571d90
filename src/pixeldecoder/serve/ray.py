"""The server under Ray Serve: the same app, in as many replicas as asked for, each with an engine and a device.

    serve run pixeldecoder.serve.ray:build decoder=nano replicas=2

Each replica's own queue is smaller than what Ray sends it at a time, so that a full one answers 429 itself.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from ray import serve

from pixeldecoder import heap
from pixeldecoder.execution import Execution
from pixeldecoder.serve.engine import Engine
from pixeldecoder.serve.http import create_app
from pixeldecoder.serve.service import Settings


@dataclass(frozen=True)
class Replica:
    """What each replica makes; it can be pickled."""

    decoders: tuple[str, ...] = ("nano",)
    execution: Execution = field(default_factory=Execution)
    settings: Settings = field(default_factory=Settings)
    queue_size: int = 64
    max_batch: int = 8
    max_pixels: int | None = 8192 * 8192

    def app(self) -> FastAPI:
        heap.one_heap()
        pipelines = {name: self.execution.load(name) for name in self.decoders}
        return create_app(
            Engine(pipelines, self.execution.limits, self.queue_size, self.max_batch, self.max_pixels), self.settings
        )


def deployment(replica: Replica, replicas: int = 1, cpus: float = 1, gpus: float = 0) -> serve.Application:
    """For `ray.serve.run`.

    Args:
        replicas: their number.
        cpus, gpus: of each.
    """

    def app() -> FastAPI:  # called in the replica: engines and networks stay there
        return replica.app()

    deployed: Any = serve.deployment(
        serve.ingress(app)(),
        name="pixeldecoder",
        num_replicas=replicas,
        # More than wait, run and ask for the state of jobs at a time: what is too much is told by us.
        max_ongoing_requests=4 * (replica.queue_size + replica.max_batch),
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=60,
    )
    return deployed.bind()


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve run`, whose words are `decoder`, `device`, `replicas`, `cpus` and `gpus`; the token is that of
    $PIXELDECODER_TOKEN."""
    known = {"decoder", "device", "replicas", "cpus", "gpus"}
    if unknown := set(args) - known:
        raise ValueError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}")
    replica = Replica(
        (args.get("decoder", "nano"),),
        Execution(device=args.get("device", "auto")),
        Settings(token=os.environ.get("PIXELDECODER_TOKEN") or None),
    )
    return deployment(
        replica, int(args.get("replicas", 1)), float(args.get("cpus", 1)), float(args.get("gpus", 0))
    )  # fmt: skip
