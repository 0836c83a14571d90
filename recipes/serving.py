"""A server under load: 200 requests from 16 clients, grouped and one at a time, in turn.

    python recipes/serving.py

Starts two servers of nano, with and without batches, and sends both the same requests, in alternating rounds; prints
seconds of a request (p50, p95), requests a second and the memory of each, and asserts that nothing is lost, that every
answer is a local decode's with its seed, and that memory stays flat from one round's end to the next: half as many
requests go before, for the kernels that are kept, and it is looked at when a server has rested and has given back what
it freed. Requests are latents of 64 to 256 px images.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil
import requests
import torch
import tyro
from diffusers.utils.remote_utils import remote_decode

from pixeldecoder import PixelDecoderPipeline

SIDES = (2, 4, 6, 8)
"""Latent cells: 64 to 256 px."""
REST = 3.0
"""Seconds, more than those of the engine."""


@dataclass
class Serving:
    requests: int = 200
    clients: int = 16
    rounds: int = 4
    """Each server's share of turns."""
    max_batch: int = 8


def latents(seed: int) -> torch.Tensor:
    side = SIDES[seed % len(SIDES)]
    return torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(seed))


def ask(url: str, seed: int) -> tuple[float, torch.Tensor]:
    begun = time.perf_counter()
    while True:
        try:
            image = remote_decode(
                f"{url}/decode?seed={seed}", latents(seed), scaling_factor=0.3611, shift_factor=0.1159,
                output_type="pt", return_type="pt",
            )  # fmt: skip
            return time.perf_counter() - begun, image
        except RuntimeError as error:
            if error.args[0]["error"]["code"] != 429:
                raise
            time.sleep(0.5)


def main(config: Serving) -> None:
    servers = {}
    for batch in (config.max_batch, 1):
        command = [sys.executable, "-m", "pixeldecoder", "serve", "--port", "0", "--no-page", "--dtype", "float32"]
        process = subprocess.Popen([*command, "--max-batch", str(batch)], stdout=subprocess.PIPE, text=True)
        servers[batch] = process, process.stdout.readline().strip()
    try:
        times: dict[int, list[float]] = {batch: [] for batch in servers}
        spent, answers = dict.fromkeys(servers, 0.0), {}
        memory: dict[int, list[int]] = {batch: [] for batch in servers}
        peaks = dict.fromkeys(servers, 0)
        parts = np.array_split(np.arange(config.requests), config.rounds)
        with ThreadPoolExecutor(config.clients) as clients:
            for _, url in servers.values():
                list(clients.map(partial(ask, url), range(config.requests // 2)))
            for part in parts:
                for batch, (process, url) in servers.items():
                    begun, seeds, held = time.perf_counter(), part.tolist(), psutil.Process(process.pid).memory_info
                    for seed, (seconds, image) in zip(seeds, clients.map(partial(ask, url), seeds), strict=True):
                        times[batch].append(seconds)
                        answers[batch, seed] = image
                        peaks[batch] = max(peaks[batch], held().rss)
                    spent[batch] += time.perf_counter() - begun
                    time.sleep(REST)
                    memory[batch].append(held().rss)
        for batch, (_, url) in servers.items():
            p50, p95 = np.percentile(times[batch], (50, 95))
            print(
                f"max batch {batch}: {len(times[batch])} answers, p50 {p50:.2f} s, p95 {p95:.2f} s, "
                f"{config.requests / spent[batch]:.2f} a second, memory {min(memory[batch]) / 1e9:.2f} to "
                f"{max(memory[batch]) / 1e9:.2f} GB at rest, up to {peaks[batch] / 1e9:.2f} GB under load"
            )
            batches = [line for line in requests.get(f"{url}/metrics").text.splitlines() if "batches_total{" in line]
            print("  " + ", ".join(line.removeprefix("pixeldecoder_batches_total") for line in batches))
        print(f"grouping: {spent[1] / spent[config.max_batch]:.2f} times the throughput")
    finally:
        for process, _ in servers.values():
            process.terminate()
    pipeline = PixelDecoderPipeline.from_pretrained("nano")
    pipeline.set_progress_bar_config(disable=True)
    worst = 0.0
    for seed in range(config.requests):
        generator = torch.Generator().manual_seed(seed)
        alone = pipeline(latents(seed), generator=generator, output_type="latent").images.clamp(-1, 1)
        worst = max(worst, *((answers[batch, seed] - alone).abs().max().item() for batch in servers))
    print(f"largest difference from a local decode: {worst:.1e} of 2")
    assert worst < 1e-4, "not the answer of a local decode"
    for batch in servers:
        assert len(times[batch]) == config.requests, "an answer was lost"
        assert max(memory[batch]) < 1.1 * memory[batch][0], f"memory grows: {memory[batch]}"


if __name__ == "__main__":
    main(tyro.cli(Serving))
