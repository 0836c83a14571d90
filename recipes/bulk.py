"""Bulk decoding by one actor and by two, in turn: rows a second of each, and the memory of driver and actors.

    python recipes/bulk.py
    python recipes/bulk.py --rows 5000 --side 2 --steps 1 --actors 2 --rounds 1      # memory over many rows

Rows are latents in one table, decoded by nano. Each actor has one thread. Seconds are those in the manifest, between
a fifth and nine tenths of the rows, so that neither the start nor the last rows of one actor alone count.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tyro


@dataclass
class Bulk:
    rows: int = 160
    side: int = 8
    """Latent cells: 8 are a picture of 256 px."""
    steps: int = 4
    actors: tuple[int, ...] = (1, 2)
    rounds: int = 2


def run(config: Bulk, actors: int, source: Path, output: Path) -> tuple[float, dict[str, np.ndarray]]:
    """Rows a second, and bytes that each process held, by what it is."""
    command = [sys.executable, "-m", "pixeldecoder", "bulk", str(source), str(output), "--sink", "parquet"]
    options = ["--actors", str(actors), "--steps", str(config.steps), "--dtype", "float32"]
    process = subprocess.Popen([*command, *options], env=os.environ | {"OMP_NUM_THREADS": "1"})
    held = defaultdict[str, list[int]](list)
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):  # one of Ray's that ends
            workers = [one for one in driver.children(recursive=True) if "MapWorker" in "".join(one.cmdline()[:1])]
            if len(workers) == actors and any((output / "manifest").glob("[!.]*.parquet")):
                held["driver"].append(driver.memory_info().rss)
                for one in workers:
                    held[f"actor {one.pid}"].append(one.memory_info().rss)
        time.sleep(0.5)
    assert process.returncode == 0, "the run failed"
    times = np.sort(pq.read_table(output / "manifest")["time"].to_numpy())
    assert len(times) == config.rows, "a row was lost"
    first, last = len(times) // 5, 9 * len(times) // 10
    return (last - first) / (times[last] - times[first]), {name: np.array(values) for name, values in held.items()}


def main(config: Bulk) -> None:
    rates = defaultdict[int, list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.parquet")
        shape = (config.rows, 16, config.side, config.side)
        latents = np.random.default_rng(0).standard_normal(shape, np.float32)
        pq.write_table(pa.table({"latents": pa.FixedShapeTensorArray.from_numpy_ndarray(latents)}), source)
        for turn in range(config.rounds):
            for actors in config.actors:
                rate, held = run(config, actors, source, Path(folder, f"out-{turn}-{actors}"))
                rates[actors].append(rate)
                print(f"{actors} actors: {rate:.2f} rows a second")
                for name, values in held.items():
                    fifth = max(1, len(values) // 5)
                    early, late = (np.median(part) / 1e6 for part in (values[fifth : 2 * fifth], values[-fifth:]))
                    print(f"  {name}: {early:.0f} MB in the second fifth, {late:.0f} in the last")
    for actors, values in rates.items():
        times = np.mean(values) / np.mean(rates[config.actors[0]])
        print(f"{actors} actors: {np.mean(values):.2f} rows a second, {times:.2f} times those of {config.actors[0]}")


if __name__ == "__main__":
    main(tyro.cli(Bulk))
