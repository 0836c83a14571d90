"""Nano for an hour: a server under mixed requests, folders and a training run, with faults thrown in; what it came to.

    python recipes/soak.py --minutes 60

A server answers latents, pictures, and requests that are wrong or cut off; beside it folders are decoded by `decode`,
and by `bulk` (with --bulk), and a network trains, whose processes are killed and started again. Each answer is compared
with the first of its kind, every finished folder with the first. Prints what was done, the faults, and the slope of
the server's memory after its first fifth; fails if anything was lost, wrong, or not cleaned up, or if the memory rises.
Before, every size was asked for by one client and by all, since each makes kernels that are kept. The clients rest for
the seconds in which memory is measured: under load it is that of the batch of the moment.
"""

import io
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import requests
import torch
import tyro
import yaml
from PIL import Image
from safetensors.torch import save

SIDES = (2, 4, 6)
"""Latent cells: 64 to 192 px."""


@dataclass
class Soak:
    minutes: float = 60.0
    clients: int = 2
    seed: int = 0
    bulk: bool = False
    """Bulk runs too: each starts Ray, which takes as much time as all the rest on two cores."""
    slope: float = 1.0
    """MB an hour that the server's memory may rise by after the first fifth, beside what its measuring is unsure of."""


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pixeldecoder", *map(str, words)]


class Load:
    """What all its threads share."""

    def __init__(self, config: Soak, folder: Path):
        self.config, self.folder = config, folder
        self.until = math.inf
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.first: dict[str, str] = {}
        self.memory: list[tuple[float, int]] = []
        self.asking, self.rested = threading.Semaphore(config.clients), threading.Event()
        self.rested.set()
        self.lock = threading.Lock()

    @property
    def running(self) -> bool:
        return time.monotonic() < self.until

    def compare(self, kind: str, data: bytes) -> None:
        """With the first of its kind."""
        hashed = sha256(data).hexdigest()
        with self.lock:
            if self.first.setdefault(kind, hashed) != hashed:
                self.wrong.append(f"{kind}: another result than the first")
        self.done[kind.split()[0]] += 1

    def client(self, url: str, number: int) -> None:
        rng = random.Random(self.config.seed + number)
        ask = {
            "latents": lambda: self.latents(url, rng.randrange(12)),
            "picture": lambda: self.picture(url, rng.randrange(6)),
            "wrong": lambda: self.bad(url, rng),
            "cut": lambda: self.cut(url, rng),
        }
        while self.running:
            kind = rng.choices([*ask], [6, 3, 2, 1])[0]
            self.rested.wait()
            try:
                with self.asking:
                    ask[kind]()
            except (requests.RequestException, OSError) as error:
                self.wrong.append(f"{kind}: {error!r}")
                time.sleep(1)

    def warm_up(self, url: str) -> None:
        """Every size, alone and in batches of up to as many images as there are clients."""
        kinds = [(self.latents, seed) for seed in range(len(SIDES))] + [(self.picture, 0)]
        for ask, seed in kinds:
            for together in (1, *[self.config.clients + 1] * 3):  # the first of which is begun alone
                works = [threading.Thread(target=ask, args=(url, seed)) for _ in range(together)]
                for work in works:
                    work.start()
                for work in works:
                    work.join()
        self.done.clear()

    def measure(self, server: psutil.Process, begun: float) -> None:
        """The server's memory at rest: it gives back what it has freed when there is nothing to do."""
        self.rested.clear()
        for _ in range(self.config.clients):
            self.asking.acquire()
        time.sleep(3)
        self.memory.append((time.monotonic() - begun, server.memory_info().rss))
        self.asking.release(self.config.clients)
        self.rested.set()

    def post(self, url: str, **given) -> requests.Response:
        while True:
            answer = requests.post(f"{url}/v1/decode", timeout=600, **given)
            if answer.status_code != 429:
                return answer
            self.done["429"] += 1
            time.sleep(0.5)

    def latents(self, url: str, seed: int) -> None:
        side = SIDES[seed % len(SIDES)]
        z = torch.randn(16, side, side, generator=torch.Generator().manual_seed(seed))
        answer = self.post(url, files={"latents": ("z.safetensors", save({"latents": z}))}, data={"seed": seed})
        self.expect(f"latents {seed}", answer)

    def picture(self, url: str, seed: int) -> None:
        small = np.random.RandomState(seed).randint(0, 256, (6, 6, 3), dtype=np.uint8)
        path = self.folder / f"{threading.get_ident()}.png"
        Image.fromarray(small).resize((48, 32), Image.Resampling.BICUBIC).save(path)
        answer = requests.post(
            f"{url}/v1/upscale", timeout=600, files={"image": ("a.png", path.read_bytes())}, data={"seed": seed}
        )
        if answer.status_code != 429:
            self.expect(f"picture {seed}", answer)

    def expect(self, kind: str, answer: requests.Response) -> None:
        if answer.status_code != 200:
            self.wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
            return
        array = np.asarray(Image.open(io.BytesIO(answer.content)))
        # A batch changes the last bits of a float, and so now and then a pixel by one: compared coarsely.
        self.compare(kind, np.array(array.shape).tobytes() + (array.astype(int).mean((0, 1)).round()).tobytes())

    def bad(self, url: str, rng: random.Random) -> None:
        """Refused in one line, each in another way."""
        bodies = [b"", b"\x93NUMPY", rng.randbytes(100), save({"latents": torch.full((16, 2, 2), torch.nan)})]
        answer = self.post(url, files={"latents": ("z.safetensors", rng.choice(bodies))})
        if answer.status_code not in (400, 422) or "Traceback" in answer.text:
            self.wrong.append(f"wrong: {answer.status_code} {answer.text[:200]}")
        self.done["refused"] += 1

    def cut(self, url: str, rng: random.Random) -> None:
        """A client that goes away in the middle of its request, or of the answer."""
        where = urlsplit(url)
        with socket.create_connection((where.hostname, where.port)) as connection:
            head = f"POST /v1/decode HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: 5000\r\n\r\n"
            connection.sendall(head.encode()[: rng.randrange(1, 90)] if rng.random() < 0.5 else head.encode() + b"x")
        self.done["cut"] += 1

    def folders(self) -> None:
        """Decoded by the command, killed in half of the runs, and finished by the same command."""
        rng, source = random.Random(self.config.seed), self.folder / "latents"
        source.mkdir()
        for index in range(6):
            z = torch.randn(16, 2, 3, generator=torch.Generator().manual_seed(index))
            (source / f"{index}.safetensors").write_bytes(save({"latents": z}))
        turn = 0
        while self.running:
            turn += 1
            bulk = self.config.bulk and turn % 3 == 0
            output = self.folder / f"out{turn}"
            words = command("bulk" if bulk else "decode", source, output, "--device", "cpu", "--dtype", "float32")
            if rng.random() < 0.5 and not self.killed(words, rng.uniform(0, 25)):
                self.done["finished before its kill"] += 1
            if not self.run(words):
                continue
            pictures = sorted(output.rglob("*.png"))
            pixels = b"".join(np.asarray(Image.open(path)).tobytes() for path in pictures)
            self.compare("bulk" if bulk else "folder", pixels)
            if left := [path for path in output.rglob(".*") if path.is_file() and path.suffix == ".png"]:
                self.wrong.append(f"left behind: {left}")

    def killed(self, words: list[str], seconds: float) -> bool:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return False
        process.send_signal(random.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait()
        self.done["killed"] += 1
        return True

    def run(self, words: list[str]) -> bool:
        ended = subprocess.run(words, capture_output=True, text=True)
        if ended.returncode:
            self.wrong.append(f"{words[3:5]}: {ended.returncode} {ended.stderr[-300:]}")
        return ended.returncode == 0

    def training(self) -> None:
        """One run after the other, killed once each; all end with the same weights."""
        photos, rng = self.folder / "photos", random.Random(self.config.seed)
        photos.mkdir()
        for index in range(6):
            small = np.random.RandomState(index).randint(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(photos / f"{index}.png")
        turn = 0
        while self.running:
            turn += 1
            settings = {
                "data": {"source": str(photos), "resolution": 64, "max_aspect_ratio": 1.0, "workers": 1},
                "output": str(self.folder / f"run{turn}"), "steps": 12, "batch_size": 2, "micro_batch_size": 2,
                "precision": "float32", "device": "cpu", "validate_every": 0, "checkpoint_every": 1,
                "export": str(self.folder / f"trained{turn}"), "tracker": "none", "encoder": "nano", "model": "nano",
            }  # fmt: skip
            path = self.folder / "run.yaml"
            path.write_text(yaml.safe_dump(settings))
            words = command("train", "teacher", "--recipe", "nano", "--config", path)
            if turn > 1:
                self.killed(words, rng.uniform(5, 60))
            if self.run(words):
                weights = sorted((self.folder / f"trained{turn}").rglob("*.safetensors"))
                self.compare("training", b"".join(file.read_bytes() for file in weights))


def slope(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """MB an hour of a straight line, and its standard error."""
    hours, held = (np.array(values, float) for values in zip(*memory, strict=True))
    hours, held = (hours - hours.mean()) / 3600, held / 1e6
    rise = (hours * (held - held.mean())).sum() / (hours**2).sum()
    rest = held - held.mean() - rise * hours
    return rise, float(np.sqrt((rest**2).sum() / max(1, len(held) - 2) / (hours**2).sum()))


def main(config: Soak) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            command("serve", "--port", 0, "--no-page", "--device", "cpu", "--dtype", "float32"),
            stdout=subprocess.PIPE, stderr=open(f"{folder}/server.log", "w"), text=True,  # noqa: SIM115
        )  # fmt: skip
        try:
            url = server.stdout.readline().strip()
            load = Load(config, Path(folder))
            load.warm_up(url)
            begun = time.monotonic()
            load.until = begun + 60 * config.minutes
            targets = [(load.client, (url, number)) for number in range(config.clients)]
            threads = [threading.Thread(target=work, args=args) for work, args in targets]
            threads += [threading.Thread(target=load.folders), threading.Thread(target=load.training)]
            for thread in threads:
                thread.start()
            while load.running and server.poll() is None:
                time.sleep(15)
                load.measure(psutil.Process(server.pid), begun)
            load.until = 0
            for thread in threads:
                thread.join()
            files = psutil.Process(server.pid).num_fds()
            health = requests.get(f"{url}/healthz", timeout=60).status_code
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        log = Path(folder, "server.log").read_text()
    held = [round(bytes / 1e6) for _, bytes in load.memory]
    rise, unsure = slope(load.memory[len(held) // 5 :])
    later, unsure_later = slope(load.memory[len(held) // 2 :])
    facts = {
        "minutes": round(load.memory[-1][0] / 60, 1), "done": dict(load.done), "wrong": load.wrong[:20],
        "server_mb": held[:: max(1, len(held) // 40)], "slope_mb_per_hour": round(rise, 1),
        "its_standard_error": round(unsure, 1), "slope_of_the_second_half": round(later, 1),
        "standard_error_of_that": round(unsure_later, 1), "open_files": files,
        "healthz": health, "server_ended_with": server.returncode, "tracebacks": log.count("Traceback"),
    }  # fmt: skip
    print(json.dumps(facts, indent=1))
    assert not load.wrong and health == 200 and server.returncode in (0, -signal.SIGTERM) and not log.count("Traceback")
    assert rise < config.slope + 2 * unsure


if __name__ == "__main__":
    main(tyro.cli(Soak))
