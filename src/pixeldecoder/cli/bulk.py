"""Many rows in, as many pictures out, by Ray on this machine or a cluster: `bulk`."""

import functools
import os
import secrets
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pixeldecoder.cli.options import Decoder, check_positive, check_sigma, lora_and_strength, word
from pixeldecoder.errors import printable, require

if TYPE_CHECKING:
    import pyarrow as pa

    from pixeldecoder.bulk.run import Settings

TOLD = 10
"""Rows whose failure is told at the end."""


@dataclass(kw_only=True)
class Bulk(Decoder):
    """Any number of latents or images to images, on one machine or a Ray cluster; exactly one for each, whatever dies.

    Run again, it goes on where it was. What became of each row is in OUTPUT/manifest, as Parquet.

    Example: pixeldecoder bulk 's3://data/latents-{000..041}.tar' s3://data/images --sink webdataset --actors 8
    """

    source: Annotated[str, tyro.conf.Positional, word("SOURCE")]
    """A folder of latents and pictures, WebDataset shards (.tar) or tables (.parquet), one file of these, or several by
    {000..041} or *. A path, or any URL that fsspec opens."""
    output: Annotated[str, tyro.conf.Positional, word("OUTPUT")]
    """A folder of its own, as a path or a URL."""
    sink: Literal["files", "webdataset", "parquet"] = "files"
    """A picture's file for each row, or shards or tables of them."""
    format: Literal["png", "webp", "jpg"] = "png"
    """Of the pictures."""
    shard_size: Annotated[int, word("ROWS")] = 64
    """Rows to a shard or table, and to a part of the manifest; a crash may cost that many finished rows."""
    actors: int | None = None
    """Decoders at work, each with a GPU of its own or a share of the cores; by default as many as there are GPUs, or
    one."""
    ray_address: Annotated[str | None, word("ADDRESS")] = None
    """Of the Ray cluster that this machine is in: HOST:PORT or "auto"; by default Ray is started here and ended."""
    limit: Annotated[int | None, word("ROWS")] = None
    """The first rows alone."""
    retry_failed: bool = False
    """Decode once more what failed before."""
    dry_run: bool = False
    """Count the rows, and tell the memory, hours and cost that they would take, judged by a few of them on this
    machine's device."""
    price: Annotated[float | None, word("MONEY")] = None
    """Of one device for an hour, for --dry-run."""
    sigma: float | None = None
    """Noise level in [0, 1] that latents have, or that is added to those of images; by default what each row says
    ("sigma"), or 0."""
    latent_space: str | None = None
    """Of ComfyUI's latents, by name (flux, flux2, sd3, sdxl, qwenimage); by default the decoder's."""
    prompt: str = ""
    """Of rows that have none of their own ("prompt"); ignored by a decoder without text, such as nano."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, word("PATH[:STRENGTH]")] = ()
    """A LoRA of the decoder: a file, a folder or a Hub id, with a strength if it is not 1."""
    metadata: bool = True
    """Write into each picture how it was made, which `info` prints."""

    def run(self) -> None:
        self.check()
        check_sigma(self.sigma)
        check_positive(shard_size=self.shard_size, actors=self.actors, limit=self.limit)
        if self.price is not None and self.price < 0:
            raise ValueError(f"--price {self.price}: expected 0 or more")
        require("bulk", "bulk", "braceexpand", "fsspec", "pyarrow", "ray")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if self.ray_address is None:  # Ray reads this as it is imported
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

        from pixeldecoder.bulk.rows import find_rows
        from pixeldecoder.bulk.run import decode_rows

        rows = find_rows(self.source, self.output, self.limit)
        settings, given = self._settings()
        print(f"{self.source}: {len(rows)} rows", file=sys.stderr)
        if self.dry_run:
            return self._estimate(rows, settings, given)
        begun = time.monotonic()
        counts = decode_rows(
            rows, settings, given, self.shard_size, self.actors, self.ray_address, self.retry_failed, self.limit is None
        )
        seconds, new = time.monotonic() - begun, counts.pop("new")
        earlier = len(rows) - new
        rate = f", {new / seconds:.3g} a second" if new else ""
        print(
            f"{self.output}: {counts['done']} done, {counts['failed']} failed, {counts['skipped']} skipped of "
            f"{len(rows)} rows, {earlier} of them in earlier runs; {new} in {seconds:.0f} s{rate}"
        )
        if counts["failed"]:
            self._tell_failures(rows, settings)

    def _settings(self) -> "tuple[Settings, dict[str, Any]]":
        """What actors are told, and what of it decides how pictures look."""
        import hashlib
        import json

        from pixeldecoder.bulk.output import Output
        from pixeldecoder.bulk.run import Settings
        from pixeldecoder.provenance import weights_hash

        names = (
            "decoder", "dtype", "format", "latent_space", "metadata", "prompt", "quantize", "seed", "sigma", "sink",
            "steps", "tile", "tile_overlap",
        )  # fmt: skip
        loras = [lora_and_strength(lora) for lora in self.lora]
        given = {name: getattr(self, name) for name in names} | {
            "decoder_sha256": weights_hash(self.decoder),
            "lora": [[weights_hash(name) or name, strength] for name, strength in loras],
        }
        hashed = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]
        settings = Settings(
            decoder=self.decoder,
            load=functools.partial(self.load, loras=self.lora),
            limits=self.limits,
            device=self.device,
            output=Output(self.output, self.sink, self.format, hashed),
            seed=self.seed,
            steps=self.steps,
            sigma=self.sigma,
            latent_space=self.latent_space,
            prompt=self.prompt,
            metadata=self.metadata,
        )
        return settings, given

    def _estimate(self, rows: "pa.Table", settings: "Settings", given: dict[str, Any]) -> None:
        from pixeldecoder.bulk.decoder import estimate
        from pixeldecoder.plan import duration

        settings.output.check(given)
        sampled = estimate(rows, settings)
        for reason in sampled.failures:
            print(f"a row that was tried would fail: {reason}", file=sys.stderr)
        print(f"judged by {sampled.tried} rows; the largest of them: {sampled.largest}")
        hours = sampled.seconds * len(rows) / 3600
        for devices in sorted({1, 8, self.actors or 1}):
            cost = "" if self.price is None else f", {hours * self.price:.2f} at {self.price:g} an hour for each"
            print(f"{devices} x {sampled.device}: about {duration(3600 * hours / devices)}{cost}")

    def _tell_failures(self, rows: "pa.Table", settings: "Settings") -> None:
        import pyarrow.compute as pc

        told = settings.output.manifest("id", "status", "reason")
        failed = told.filter(pc.and_(pc.equal(told["status"], "failed"), pc.is_in(told["id"], rows["id"])))
        for row in failed.slice(0, TOLD).to_pylist():
            print(printable(f"{row['id']}: {row['reason']}"), file=sys.stderr)
        more = "" if len(failed) <= TOLD else f", and {len(failed) - TOLD} more in {self.output}/manifest"
        raise ValueError(f"{len(failed)} of {len(rows)} rows failed: see above{more}; --retry-failed tries them again")
