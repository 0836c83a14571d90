"""Broken and hostile files in; of each a value or one clear error of the package's own out, or else a finding.

A case is a seed, changed by what knows its format and by what knows nothing; its number gives it again.

    python tests/fuzz.py [--cases N] [TARGET ...]          all targets, or those
    python tests/fuzz.py --case 123 TARGET                 one case again, with its traceback
    python tests/fuzz.py --coverage --cases N TARGET       led by coverage: needs atheris
"""

import argparse
import faulthandler
import functools
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_SECONDS = 5.0
"""That a case may take."""
MEMORY = 300
"""MiB by which a case may raise the most that the process ever held."""
LONGEST = 1500
"""Letters of a message."""
TEMPORARY = tempfile.gettempdir()
CANARY = "CANARY"
"""A file that hostile seeds try to make."""

Seed = tuple[str, bytes]
"""A file's name, and what is in it."""


@dataclass(frozen=True)
class Target:
    """A parser.

    Args:
        seeds: makes, in a folder,
        whatever the parser reads beside the file that is changed; returns that file's sound
            forms.
        read: has a file read; returns what cannot be right of what came out, or `None`.
        names: whether errors must name the file.
        weight: cases for each 100 of the usual.
    """

    seeds: Callable[[Path], list[Seed]]
    read: Callable[[Path], str | None]
    names: bool = True
    weight: int = 100


class SlowError(BaseException):
    """More CPU time than a case may take."""


# What formats are changed by.

INTERESTING = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    "[", "]", "{", "}", '"', "'", ",", ":", "\n", "\r\n", "\0", "\t", "*a", "&a",
    "!!python/object/apply:os.system ['touch "
    "CANARY']", "nan", "NaN", "Infinity", "1e999", "-1", "0", "1" * 400, "null", "true", "../../x", "/etc/passwd",
    "\ud800",
    "\x1b[2J\x1b]0;x\x07", "\ufeff", "é", "x" * 5000, "pipe:touch CANARY", "os:system", "__class__", "[" * 3000,
    "{0..99999999999}",
    "%s%n", "<script>", "\u202e", "`touch CANARY`", "$(touch CANARY)", "; touch CANARY;", "--config=x", "CON", ".",
    "..", "~", "~root/x",
)  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice((3, 900))):
        deep = [deep]
    return rng.choice(
        (
            None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**70), 10**30, 0.5, -0.5, 1e308, float("nan"),
            float("inf"), "", "x", [], {},
            [1, 2], [[]], {"a": 1}, [None], deep, rng.choice(WORDS), rng.randrange(1 << 20), [rng.random()] * 5,
            ["x"] * 300,
        )
    )  # fmt: skip


def change_tree(tree: Any, rng: random.Random) -> Any:
    """One leaf or branch of JSON another."""
    inner = isinstance(tree, dict | list) and len(tree) and rng.random() < 0.85
    if not inner:
        if isinstance(tree, int | float) and not isinstance(tree, bool) and rng.random() < 0.5:
            return rng.choice((-tree, tree + 1, tree * 1000, tree * 10**9, tree / 3, str(tree), 0))
        return odd_value(rng)
    if isinstance(tree, dict):
        key, tree = rng.choice(list(tree)), dict(tree)
        way = rng.randrange(6)
        if way == 0:
            del tree[key]
        elif way == 1:
            tree[rng.choice((key + "_", "", rng.choice(WORDS), key.upper()))] = tree[key]
        elif way == 2:
            tree[key] = tree[rng.choice(list(tree))]
        else:
            tree[key] = change_tree(tree[key], rng)
        return tree
    tree, index = list(tree), rng.randrange(len(tree))
    way = rng.randrange(4)
    if way == 0:
        del tree[index]
    elif way == 1:
        tree.insert(index, odd_value(rng))
    else:
        tree[index] = change_tree(tree[index], rng)
    return tree


def dumped(tree: Any) -> bytes:
    try:
        return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return b"[" * 100_000


def change_json(data: bytes, rng: random.Random) -> bytes:
    """A document, or one in some line of several."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    index = rng.randrange(len(lines))
    try:
        lines[index] = dumped(change_tree(json.loads(lines[index]), rng))
    except (ValueError, RecursionError):
        return change_text(data, rng)
    return b"\n".join(lines)


def change_text(data: bytes, rng: random.Random) -> bytes:
    tokens = re.findall(rb"\w+|\s+|[^\w\s]", data) or [b""]
    index = rng.randrange(len(tokens))
    way, word = rng.randrange(5), rng.choice(WORDS).encode("utf-8", "surrogatepass")
    if way == 0:
        del tokens[index]
    elif way == 1:
        tokens[index] = word
    elif way == 2:
        tokens.insert(index, word)
    elif way == 3:
        tokens[index:index] = tokens[index : index + rng.randrange(1, 20)]
    else:
        other = rng.randrange(len(tokens))
        tokens[index], tokens[other] = tokens[other], tokens[index]
    return b"".join(tokens)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    at = rng.randrange(len(changed))
    if rng.random() < 0.5:  # where heads are
        at = rng.randrange(min(len(changed), 64))
    way = rng.randrange(8)
    if way == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif way == 1:
        changed[at] = rng.randrange(256)
    elif way == 2:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(INTERESTING) % (1 << 8 * width)
        changed[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
    elif way == 3:
        del changed[at : at + rng.choice((1, 2, 4, 16, 200))]
    elif way == 4:
        del changed[at:]
    elif way == 5:
        changed[at:at] = rng.randbytes(rng.choice((1, 2, 8, 300)))
    elif way == 6:
        other = rng.randrange(len(changed))
        length = rng.randrange(1, 64)
        changed[at : at + length] = changed[other : other + length]
    else:
        changed[at:at] = changed[at : at + rng.randrange(1, 64)]
    return bytes(changed)


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        head = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return change_bytes(data, rng)
    settings = head.get("__metadata__", {}) if isinstance(head, dict) else {}
    nested = [key for key, value in settings.items() if str(value)[:1] == "{"] if isinstance(settings, dict) else []
    if nested and rng.random() < 0.5:
        head["__metadata__"][nested[0]] = change_json(str(settings[nested[0]]).encode(), rng).decode("utf-8", "replace")
    else:
        head = change_tree(head, rng)
    head = dumped(head)
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + data[8 + length :]


def change_npy(data: bytes, rng: random.Random) -> bytes:
    major = data[6:7]
    width = 2 if major == b"\1" else 4
    head = change_text(data[8 + width : 8 + width + int.from_bytes(data[8 : 8 + width], "little")], rng)
    return data[:8] + (len(head) % 256**width).to_bytes(width, "little") + head + data[-64:]


EVIL = (
    b"cos\nsystem\n(S'touch CANARY'\ntR", b"cposix\nsystem\n(S'touch CANARY'\ntR",
    b"c__builtin__\neval\n(S'open(\"CANARY\",\"w\")'\ntR",
    b"csubprocess\ncall\n(S'touch CANARY'\nI01\ntR", b"ctorch._utils\n_rebuild_tensor_v2\n(tR",
    b"ctorch\nload\n(S'x'\ntR",
    b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR", b"ccollections\nOrderedDict\n)R", b"cbuiltins\ngetattr\n",
    b"ctorch\nrandn\n",
    b"ctorch\nzeros\n((L99999999999L\ntt", b"(l", b"}", b"]", b")", b"0", b"h\x00", b"q\x00",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"R", b"b", b"\x81",
    b"cpathlib\nPosixPath\n(S'x'\ntR", b"ctorch.serialization\n_get_layout\n(S'x'\ntR",
    b"ctorch.hub\nload\n(S'x'\ntR",
)  # fmt: skip


def change_pickle(data: bytes, rng: random.Random) -> bytes:
    import pickletools

    try:
        starts = [position for _, _, position in pickletools.genops(data)]
    except Exception:
        return change_bytes(data, rng)
    bounds = [*starts, len(data)]
    ops = [data[a:b] for a, b in itertools.pairwise(bounds)]
    index = rng.randrange(len(ops))
    way = rng.randrange(6)
    if way == 0:
        del ops[index]
    elif way == 1:
        ops.insert(index, rng.choice(EVIL))
    elif way == 2:
        ops[index] = rng.choice(EVIL)
    elif way == 3:
        ops.insert(index, rng.choice(ops))
    elif way == 4:
        other = rng.randrange(len(ops))
        ops[index], ops[other] = ops[other], ops[index]
    else:
        ops[index] = ops[index][:1] + change_bytes(ops[index][1:], rng)
    return b"".join(ops)


def change_pt(data: bytes, rng: random.Random) -> bytes:
    """A pickle in a zip archive, or several in a row as they were before."""
    if not data.startswith(b"PK"):
        return change_pickle(data, rng)
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name.endswith("data.pkl"):
                    content = change_pickle(content, rng)
                elif rng.random() < 0.1:
                    content = change_bytes(content, rng)
                if rng.random() > 0.03:
                    new.writestr(name if rng.random() > 0.03 else rng.choice(("x/" + name, "../" + name)), content)
    except Exception:
        return change_bytes(data, rng)
    return made.getvalue()


def change_png(data: bytes, rng: random.Random) -> bytes:
    """A chunk, with a right checksum."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return change_bytes(data, rng)
    index = rng.randrange(len(chunks))
    kind, content = chunks[index]
    way = rng.randrange(8)
    if kind in (b"tEXt", b"iTXt") and rng.random() < 0.8:
        key, _, text = content.partition(b"\0")
        chunks[index] = kind, key + b"\0" + change_json(text, rng)
    elif kind in (b"IDAT", b"zTXt", b"iCCP") and way == 0:
        chunks[index] = kind, zlib.compress(b"\0" * rng.choice((10, 10_000, 3_000_000)))
    elif way == 1:
        del chunks[index]
    elif way == 2:
        chunks.insert(index, chunks[rng.randrange(len(chunks))])
    elif way == 3:
        chunks.insert(
            index, (rng.choice((b"zTXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"tRNS", b"PLTE", b"gAMA")), content)
        )
    else:
        chunks[index] = kind, change_bytes(content, rng)
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(parts)


def change_tar(data: bytes, rng: random.Random) -> bytes:
    """A member, in an archive that is sound for the rest."""
    made = io.BytesIO()
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=made, mode="w") as new:
            members = old.getmembers()
            chosen = rng.randrange(len(members))
            for index, member in enumerate(members):
                content = file.read() if (file := old.extractfile(member)) else b""
                if index == chosen:
                    way = rng.randrange(6)
                    if way == 0:
                        member.name = rng.choice(
                            (rng.choice(WORDS), "../" + member.name, "/" + member.name, member.name + ".x.y", "")
                        )
                    elif way == 1:
                        member.type = rng.choice(
                            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
                        )
                        member.linkname = rng.choice(("/etc/passwd", "../x", member.name, ""))
                        member.size, content = 0, b""
                    elif way == 2:
                        continue
                    elif member.name.endswith(".json"):
                        content = change_json(content, rng)
                    elif member.name.endswith(".png"):
                        content = change_png(content, rng)
                    else:
                        content = change_text(content, rng)
                if member.isreg():
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    except Exception:
        return change_bytes(data, rng)
    return made.getvalue()


def change_request(data: bytes, rng: random.Random) -> bytes:
    head, _, body = data.partition(b"\n\n")
    way = rng.randrange(4)
    if way == 0 or not body:
        return change_text(head, rng) + b"\n\n" + body
    if body[:1] == b"{":
        return head + b"\n\n" + change_json(body, rng)
    return head + b"\n\n" + (change_text if way == 1 else change_bytes)(body, rng)


CHANGES = {
    ".json": change_json, ".jsonl": change_json, ".safetensors": change_safetensors, ".latent": change_safetensors,
    ".npy": change_npy, ".pt": change_pt, ".pth": change_pt, ".metadata": change_pickle, ".png": change_png,
    ".tar": change_tar, ".http": change_request, ".yaml": change_text, ".csv": change_text, ".txt": change_text,
}  # fmt: skip


def change(name: str, data: bytes, rng: random.Random) -> bytes:
    """A case of a seed."""
    known = CHANGES.get(Path(name).suffix or name, change_bytes)
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = (known if rng.random() < 0.65 else change_bytes)(data, rng)
    return data


# The parsers, and what they read.


def seeds_latents(folder: Path) -> list[Seed]:
    import numpy as np
    import torch
    from safetensors.torch import save

    z = torch.randn(1, 16, 2, 2)
    told = {"latents": z, "sigma": torch.tensor([0.3]), "size": torch.tensor([16, 16])}
    comfy = {"latent_tensor": z, "latent_format_version_0": torch.tensor([])}
    files = [("in.safetensors", save(told, {"latent_space": "flux"})), ("in.safetensors", save({"x": z[0]}))]
    files += [("in.latent", save(comfy)), ("in.latent", save({"latent_tensor": z[:, :, None]}))]
    for array, version in ((z.numpy(), (1, 0)), (z[0].half().numpy(), (2, 0)), (np.asfortranarray(z.numpy()), (3, 0))):
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version)
        files.append(("in.npy", file.getvalue()))
    for content, as_zip in ((told, True), (z, True), (z, False), ({"latents": z, "sigma": 0.5}, False)):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=as_zip)
        files.append(("in.pt", file.getvalue()))
    return files


def read_latents(path: Path) -> str | None:
    import torch

    from pixeldecoder.files import inspect_latents, load_latents, parse_latents

    data = path.read_bytes()
    latents = load_latents(path)
    shape, size = inspect_latents(path)
    again = parse_latents(data, path.suffix)
    if shape != tuple(latents.tensor.shape) or size != latents.size:
        return f"the head tells {shape}, {size}, the file holds {tuple(latents.tensor.shape)}, {latents.size}"
    if latents.tensor.dtype != torch.float32 or latents.tensor.ndim != 4:
        return f"{latents.tensor.dtype}, {latents.tensor.ndim} dimensions"
    if not torch.equal(again.tensor, latents.tensor) and not latents.tensor.isnan().any():
        return "other values by way of bytes"
    return None


SMALL = dict(
    patch_size=4, num_layers=2, num_attention_heads=1, attention_head_dim=8, num_pixel_layers=1, pixel_dim=4,
    num_pixel_attention_heads=1, pixel_attention_head_dim=8, text_embed_dim=4, max_text_length=4, adapter_dim=4,
    num_adapter_layers=1, latent_channels=4, latent_downscale_factor=8, rope_reference_size=64,
)  # fmt: skip


def seeds_checkpoint(folder: Path) -> list[Seed]:
    import torch

    from pixeldecoder import PixelDecoderTransformer2DModel
    from pixeldecoder.convert import export_reference_state_dict, save_reference_checkpoint

    files = []
    for config in (SMALL, SMALL | dict(aux_rgb=True, inject_pixels=True, per_channel_gate=False)):
        model = PixelDecoderTransformer2DModel(**config)
        for suffix in (".safetensors", ".pth"):
            scheduler = {"_class_name": "FlowMatchLCMScheduler", "shift": 1.0}
            settings = {"pipeline": {"latent_space": "flux", "default_num_inference_steps": 4}, "scheduler": scheduler}
            save_reference_checkpoint(model, folder / f"in{suffix}", settings)
            files.append((f"in{suffix}", (folder / f"in{suffix}").read_bytes()))
    file = io.BytesIO()
    torch.save(export_reference_state_dict(model.state_dict()), file, _use_new_zipfile_serialization=False)
    return [*files, ("in.pth", file.getvalue())]


def read_checkpoint(path: Path) -> None:
    from pixeldecoder import PixelDecoderPipeline

    PixelDecoderPipeline.from_single_file(path, **({} if path.suffix == ".safetensors" else FREE))


FREE = {
    name: SMALL.get(name, default)
    for name, default in dict(
        latent_channels=4, latent_downscale_factor=8, scale=4, unpack_latents=False, adapter_padding_mode="zeros",
        rope_reference_size=64,
    ).items()
}  # fmt: skip


def small_pipeline() -> Any:
    from diffusers import FlowMatchLCMScheduler

    from pixeldecoder import PixelDecoderPipeline, PixelDecoderTransformer2DModel, TinyLatentEncoder

    model = PixelDecoderTransformer2DModel(**SMALL | dict(text_embed_dim=None)).eval()
    encoder = TinyLatentEncoder(latent_channels=4, channels=4, num_blocks=(0, 0, 0, 1)).eval()
    pipe = PixelDecoderPipeline(model, FlowMatchLCMScheduler(shift=1.0), encoder=encoder, latent_space="sdxl")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds_folder(folder: Path) -> list[Seed]:
    small_pipeline().save_pretrained(folder / "decoder", max_shard_size="10KB")
    names = (
        "model_index.json",
        "scheduler/*.json",
        "transformer/*.json",
        "encoder/config.json",
    )
    "transformer/*-00001-*"
    paths = [path for name in names for path in sorted((folder / "decoder").glob(name))]
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def read_folder(path: Path) -> None:
    from pixeldecoder.convert import load_folder
    from pixeldecoder.execution import Execution
    from pixeldecoder.presets import told_config

    folder = path.parents[len(path.relative_to(Path.cwd()).parts) - 2]
    told_config(str(folder))
    error = None
    try:
        Execution(device="cpu", dtype="float32").load(str(folder))
    except Exception as raised:  # the other way in, too
        error = raised
    load_folder(folder)
    if error is not None:
        raise error


def seeds_encoders(folder: Path) -> list[Seed]:
    from diffusers import AutoencoderKL

    small = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, layers_per_block=1)
    small.save_pretrained(folder / "one/vae")
    small_pipeline().encoder.save_pretrained(folder / "two")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors")]
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def read_encoder(path: Path) -> None:
    from pixeldecoder.execution import load_encoder

    load_encoder(path.relative_to(Path.cwd()).parts[0], "cpu")


def seeds_pictures(folder: Path) -> list[Seed]:
    from PIL import Image, ImageCms

    image = Image.effect_noise((9, 7), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgba = image.copy()
    rgba.putalpha(Image.effect_noise((9, 7), 80))
    made = [
        (image, "PNG", {"icc_profile": profile, "exif": exif}), (rgba, "PNG", {}), (image.convert("P"), "PNG",
        {"transparency": 3}),
        (image.convert("I;16"), "PNG", {}), (image.convert("1"), "PNG", {}), (image, "JPEG", {"exif": exif,
        "icc_profile": profile}),
        (image.convert("CMYK"), "JPEG", {}), (image, "WEBP", {"exif": exif}), (rgba, "WEBP", {"lossless": True}),
        (image, "BMP", {}),
        (image.convert("F"), "TIFF", {}), (image, "TIFF", {"compression": "jpeg"}), (image.convert("LAB"), "TIFF",
        {}),
        (image, "TIFF", {"compression": "tiff_lzw", "exif": exif}), (image, "GIF", {"save_all": True,
        "append_images": [rgba, image]}),
        (image, "PNG", {"save_all": True, "append_images": [image]}), (image, "AVIF", {"exif": exif}), (image,
        "DIB", {}),
    ]  # fmt: skip
    files = []
    for picture, kind, options in made:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files.append((f"in.{kind.lower()}", file.getvalue()))
    return files


def read_picture(path: Path) -> str | None:
    from pixeldecoder.pictures import read, size

    if math.prod(size(path)) > 1 << 20:  # what is too large is known by its head
        return None
    picture = read(path)
    if size(path) != picture.rgb.size:
        return f"the head tells {size(path)}, the picture is {picture.rgb.size}"
    if picture.rgb.mode != "RGB" or (picture.alpha is not None and picture.alpha.size != picture.rgb.size):
        return f"{picture.rgb.mode}, alpha {picture.alpha}"
    return None


def seeds_captions(folder: Path) -> list[Seed]:
    rows = [{"file_name": "a.png", "text": "a cat, black"}, {"file_name": "b.png", "text": 'two "dogs"'}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    table = b'file_name,text\r\na.png,"a cat, black"\r\nb.png,"two ""dogs"""\r\n'
    return [
        ("in.jsonl", lines),
        ("in.csv", table),
        ("in.csv", b"\xef\xbb\xbf" + table),
        ("in.txt", "a cat\né".encode()),
    ]


def read_captions(path: Path) -> str | None:
    from pixeldecoder.evaluation.cases import Source, list_cases
    from pixeldecoder.sources import Skipped, _caption_beside, _read_captions

    if path.suffix == ".txt":
        list_cases(Source(path=str(path)), 32, path.parent)
        captions = {"": _caption_beside(path)}
    else:
        captions = _read_captions(path, Skipped())
    return None if all(isinstance(text, str) for pair in captions.items() for text in pair) else str(captions)[:200]


def seeds_tars(folder: Path) -> list[Seed]:
    import torch
    from safetensors.torch import save

    pictures = [data for name, data in seeds_pictures(folder) if name == "in.png"]
    picture = pictures[1]  # without a profile, which takes ten times the rest
    latents = save({"latents": torch.zeros(4, 2, 2)})
    samples = (
        [("0.png", picture), ("0.json", b'{"caption": "a cat", "sigma": 0.5, "prompt": "x"}'), ("1.png", picture),
        ("1.txt", b"dog")],
        [("a/0.safetensors", latents), ("a/0.json", b'{"sigma": 0.2}'), ("b/1.PNG", picture), ("b/1.json",
        b'"text"')],
    )  # fmt: skip
    files = []
    for members in samples:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        files.append(("in.tar", file.getvalue()))
    return files


def read_shards(path: Path) -> str | None:
    from pixeldecoder.pictures import UNREADABLE
    from pixeldecoder.sources import Shards

    for record in Shards(str(path)).once():
        if not isinstance(record.caption, str):
            return f"caption {record.caption!r}"
        if math.prod(record.size) > 1 << 20:  # as above
            continue
        try:
            record.open()
        except UNREADABLE:
            continue
    return None


def read_rows(path: Path) -> str | None:
    """Shards and tables, as `bulk` reads them."""
    from pixeldecoder.bulk.output import Output
    from pixeldecoder.bulk.rows import find_rows, read_row

    output = Output(str(path.parent / "out"), "files", "png", "00000000")
    inside = (path.parent / "out/images").resolve()
    for row in find_rows(str(path)).to_pylist():
        place = Path(f"{inside}/{output.name(row['id'])}.png")
        if inside not in Path(os.path.normpath(place)).parents or "\0" in str(place):
            return f"{row['id']!r} leads to {place}"
        if row["error"] is None:
            try:
                read_row(row)
            except (ValueError, OSError):  # told of that row
                continue
    return None


def seeds_tables(folder: Path) -> list[Seed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = (
        {"id": ["a", "b"], "latents": [[[[0.0] * 2] * 2] * 4] * 2, "sigma": [0.1, None], "prompt": ["x", None]},
        {"image": [{"bytes": seeds_pictures(folder)[0][1], "path": "a"}] * 2, "id": [1, 2]},
        {"image": [b"x", None], "prompt": [1, 2]},
        {"latents": [b"\x93NUMPY\1\0", b"x"], "id": ["../x", "/etc/y"]},
    )
    files = []
    for columns in tables:
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file)
        files.append(("in.parquet", file.getvalue()))
    return files


def seeds_settings(folder: Path) -> list[Seed]:
    import yaml

    from pixeldecoder.training.config import RECIPES, to_dict

    settings = [to_dict(RECIPES[stage][name]()) for stage in RECIPES for name in RECIPES[stage]]
    files = [("in.yaml", yaml.safe_dump(one, sort_keys=False).encode()) for one in settings]
    network = {key: value for key, value in SMALL.items()}
    return [*files, ("in.json", json.dumps(network).encode()), ("in.yaml", yaml.safe_dump(network).encode())]


def read_settings(path: Path) -> None:
    import torch

    from pixeldecoder import PixelDecoderTransformer2DModel
    from pixeldecoder.errors import naming
    from pixeldecoder.training.config import RECIPES, _check_bounds, read_yaml, refuse_code
    from pixeldecoder.training.network import read_architecture

    if b"patch_size" in path.read_bytes():
        with naming(path), torch.device("meta"):
            PixelDecoderTransformer2DModel(**read_architecture(path))
        return
    config = read_yaml(path, RECIPES["teacher"]["nano"]())
    with naming(path):
        refuse_code(config, path, [])
        _check_bounds(config)


def seeds_results(folder: Path) -> list[Seed]:
    setting = dict(method="nano", steps=4, sigma=0.0, told=0.0, stop=None)
    other = setting | dict(method="bicubic", steps=None)
    study = dict(
        identity=dict(source="p", seed=0, crop=None, scale=4, vae=None), settings=[setting | {"label": "nano"},
        other | {"label": ""}],
        better={"psnr": "higher", "texture": "one"}, sets={"fid": {"nano": 3.0}}, set_images={"fid": 2},
        skipped={"x": "y"},
        unreadable={"z": "y"}, made_by="pixeldecoder",
    )  # fmt: skip
    from pixeldecoder.evaluation.methods import Case

    rows = [
        one | dict(image=name, file=Case(name, "").file, psnr=20.0 + index, texture=1.0, seconds=0.1)
        for one in (setting, other) for index, name in enumerate(("a.png", "b.png"))
    ]  # fmt: skip
    answers = [
        dict(model="m", image="a.png", first=a, second=b, answer=c, text=c)
        for a, b, c in (("nano", "bicubic", "first"), ("bicubic", "nano", "second"), ("nano", "x", "tie"))
    ]
    return [
        ("study.json", dumped(study)), ("rows-0.jsonl", b"\n".join(map(dumped, rows)) + b"\n"),
        ("judge.jsonl", b"\n".join(map(dumped, answers)) + b"\n"),
    ]  # fmt: skip


def read_results(path: Path) -> None:
    """As a report does, but for its pictures."""
    from pixeldecoder.evaluation import results, tables
    from pixeldecoder.evaluation.report import _metric, _summary
    from pixeldecoder.evaluation.tables import judge_tables, score_tables

    tables.RESAMPLES = 10
    study = results.read_finished(path.parent)
    rows: dict[Any, dict] = {setting: {} for setting in results.study_settings(study)}
    for (setting, image), row in results.read_rows(path.parent).items():
        if setting in rows:
            rows[setting][image] = row
    every = [row for own in rows.values() for row in own.values()]
    metrics = [_metric(name, way) for name, way in study["better"].items() if any(name in row for row in every)]
    _summary(study, len(every))
    for table in score_tables(rows, metrics, study) + judge_tables(results.read_lines(path.parent / "judge.jsonl")):
        str(table)


def seeds_prompts(folder: Path) -> list[Seed]:
    import torch
    from safetensors.torch import save

    return [("in.safetensors", save({"prompt_embeds": torch.zeros(1, 3, 4)}, {"prompt": "a cat"}))]


def read_prompts(path: Path) -> str | None:
    from pixeldecoder.text import PromptEncoder, load_prompt_embeds

    shutil.copy(path, path.with_name("key.safetensors"))
    kept = PromptEncoder(cache=path.parent)._look_up("key", "cpu")  # what is damaged is made anew
    embeds = load_prompt_embeds(path)
    if embeds.ndim != 3 or not embeds.is_floating_point():
        return f"{embeds.dtype} {tuple(embeds.shape)}"
    return None if kept is not None else "left out of the cache"


def seeds_made(folder: Path) -> list[Seed]:
    from PIL import Image

    from pixeldecoder.files import image_bytes

    inspect.getsource = functools.cache(inspect.getsource)  # which tyro reads for each command line
    image = Image.new("RGB", (8, 8))
    common = dict(
        software="pixeldecoder 1", folder="/x", decoder="nano", decoder_sha256="0", seed=1, steps=4, device="cpu",
        dtype="float32",
        guidance_scale=1.0, tile="auto",
    )  # fmt: skip
    decode = common | dict(
        command="decode", source="a.safetensors", source_sha256="0", sigma=0.5, lora=["x:0.5"], prompt="p"
    )
    generate = common | dict(
        command="generate", description="a cat", model="x/y", index=1, pipeline_args="{}", stop_at="auto"
    )
    upscale = common | dict(command="upscale", source="a.png", source_sha256="0", encoder="auto", text_encoder="x/y")
    demo = common | dict(command="demo", sample="budgie", metadata=True, overwrite=True)
    files = []
    for made in (decode, generate, upscale, demo):
        for suffix in (".png", ".webp", ".jpg"):
            files.append((f"in{suffix}", image_bytes(image, suffix, made)))
    return files


def read_made(path: Path) -> str | None:
    """As `redo` does, up to the command that it would run."""
    from pixeldecoder.cli.redo import Redo
    from pixeldecoder.errors import naming
    from pixeldecoder.files import read_made

    made, output = read_made(path), path.with_name("out.png")
    with naming(path):
        command = Redo(picture=path, output=output)._command(made, output)
    if getattr(command, "output", None) != output:
        return f"the output is {command.output}"
    for name in ("save_prompt_embeds", "save_latents"):
        if getattr(command, name, None) is not None:
            return f"{name} is {getattr(command, name)}"
    encoder = str(getattr(command, "encoder", ""))
    return (
        f"the encoder is code: {encoder}"
        if ":" in encoder and not encoder.startswith("hub:") and not Path(encoder).exists()
        else None
    )


def seeds_bulk(folder: Path) -> list[Seed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pixeldecoder.bulk.output import MANIFEST

    (folder / "out/manifest").mkdir(parents=True)
    row = dict(
        id="a",
        status="done",
        output="images/a.png",
        seed=1,
        width=8,
        height=8,
        seconds=0.1,
        time=1.0,
        device="cpu",
        url="x",
    )
    rows = [row, row | dict(id="b", status="failed", reason="why", output=None), row | dict(time=2.0)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, MANIFEST), file)
    settings = b'{"decoder": "nano", "seed": 0, "kind": "files"}'
    return [("out/manifest/in.parquet", file.getvalue()), ("out/settings.json", settings)]


def read_bulk(path: Path) -> None:
    from pixeldecoder.bulk.output import Output
    from pixeldecoder.errors import naming

    output = Output(str(Path.cwd() / "out"), "files", "png", "00000000")
    settings = {"decoder": "nano", "seed": 0, "kind": "files"}
    with naming(output.url):
        lock = output.begin(settings)
        if lock is not None:
            lock.close()
    table = output.manifest("id", "status", "time")
    output.drop(["b"])
    table.to_pylist()
    for extra in path.parent.glob("*") if path.suffix == ".parquet" else ():
        if extra != path:
            extra.unlink()


def seeds_export(folder: Path) -> list[Seed]:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for name in ("encode_latents", "velocity"):
        onnx.save(model, folder / f"{name}.onnx")
    manifest = dict(
        version=1, format="onnx", precision="float32", graphs={name: f"{name}.onnx" for name in ("encode_latents",
        "velocity")},
        sampler="lcm", times=[1.0, 0.5], cells=1, scale=4, patch_size=4, latent_channels=4, latent_downscale_factor=8,
        text_embed_dim=None, latent_space="sdxl", license=None, scheduler={"shift": 1.0},
        transformer=SMALL | {"text_embed_dim": None},
        pipeline={"default_num_inference_steps": 4, "latent_space": "sdxl", "trained_size": 64},
    )  # fmt: skip
    return [("manifest.json", dumped(manifest)), ("velocity.onnx", (folder / "velocity.onnx").read_bytes())]


def read_export(path: Path) -> None:
    import numpy as np

    from pixeldecoder.errors import blaming
    from pixeldecoder.export import onnx_pipeline
    from pixeldecoder.portable import run_onnx

    with blaming(str(path.parent)):  # as the command does
        onnx_pipeline(path.parent, "cpu")
    try:
        run_onnx(path.parent, np.zeros((1, 4, 2, 2), np.float32), np.zeros)
    except Exception as error:  # these graphs compute nothing
        if isinstance(error, MemoryError):
            raise


def seeds_resume(folder: Path) -> list[Seed]:
    import torch
    import torch.distributed.checkpoint as dcp

    from pixeldecoder.training.config import RECIPES, write_yaml

    step = folder / "run/checkpoints/step_00000004"
    step.mkdir(parents=True)
    dcp.save({"average": {"a": torch.ones(3, 2), "b": torch.zeros(5)}, "n": 7}, checkpoint_id=step, no_dist=True)
    write_yaml(RECIPES["teacher"]["nano"](), step / "config.yaml")
    progress = dict(stage="teacher", step=4, position=2, samples=1, minutes=0.5, architecture={"patch_size": 16})
    (step / "progress.json").write_text(json.dumps(progress))
    log = [dict(step=step, loss=0.5, velocity=0.2) for step in range(3)]
    (folder / "run/log.jsonl").write_bytes(b"\n".join(map(dumped, log)) + b"\n")
    paths = [
        step / "progress.json",
        step / ".metadata",
        step / "config.yaml",
        *step.glob("*.distcp"),
        folder / "run/log.jsonl",
    ]
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def read_resume(path: Path) -> str | None:
    from types import SimpleNamespace

    import torch

    from pixeldecoder.training.checkpoints import Checkpoints
    from pixeldecoder.training.config import RECIPES
    from pixeldecoder.training.log import read_log

    config = RECIPES["teacher"]["nano"]()
    config.output = Path.cwd() / "run"
    lines, _ = read_log(config.output / "log.jsonl")
    if not all(isinstance(line["step"], int | float) for line in lines):
        return str(lines)[:200]
    checkpoints = Checkpoints(config)
    checkpoints.changes()
    average: Any = SimpleNamespace(values={"a": torch.zeros(3, 2), "b": torch.ones(5)})
    checkpoints.load({}, average, {"patch_size": 16}, 1)
    return None


def seeds_lora(folder: Path) -> list[Seed]:
    import torch
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save

    pipe = small_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_qkv", "to_out"]))
    layers = get_peft_model_state_dict(pipe.transformer)
    state = {f"transformer.{name}": tensor.detach().clone() for name, tensor in layers.items()}
    return [("in.safetensors", save(state)), ("in.safetensors", save({"transformer.patch_blocks.0.x": torch.zeros(2)}))]


def read_lora(path: Path) -> None:
    from pixeldecoder.execution import load_loras

    load_loras(small_pipeline(), [(str(path), 0.5)])


REQUESTS: dict[str, Any] = {}
"""The server of a process, once there is one."""
TOKEN = "a-secret-of-the-server"


def seeds_requests(folder: Path) -> list[Seed]:
    import base64

    import torch
    from safetensors.torch import save

    bearer = f"authorization: Bearer {TOKEN}"
    z = save({"latents": torch.zeros(1, 4, 2, 2)})
    code = base64.b64encode(z).decode()
    picture = seeds_pictures(folder)[0][1]
    form = "--B\r\ncontent-disposition: form-data; name={}\r\n\r\n{}\r\n"
    part = form.format('"latents"; filename="z.safetensors"', "").encode().removesuffix(b"\r\n") + z + b"\r\n"
    image = form.format('"image"; filename="../../x.png"', "").encode().removesuffix(b"\r\n") + picture + b"\r\n"
    multipart = f"{bearer}\ncontent-type: multipart/form-data; boundary=B"
    raw = torch.zeros(1, 4, 2, 2).numpy().tobytes()
    requests = [
        (f"POST /v1/decode\n{bearer}\ncontent-type: application/json", json.dumps({"latents": code,
        "name": "z.safetensors", "steps": 1})),
        (f"POST /v1/decode\n{bearer}\ncontent-type: application/json", json.dumps({"latents": code,
        "background": True, "seed": 3})),
        (f"POST /v1/decode\n{multipart}", part + form.format('"steps"', "1").encode() + b"--B--\r\n"),
        (f"POST /v1/upscale\n{multipart}", image + form.format('"response_format"', "jpg").encode() + b"--B--\r\n"),
        (f"POST /v1/images/edits\n{multipart}", image + form.format('"model"', "tiny").encode() + b"--B--\r\n"),
        (f"POST /decode?shape=1&shape=4&shape=2&shape=2&dtype=float32&do_scaling=true&sigma=0.1&seed=1\n{bearer}",
        raw),
        (f"POST /decode?shape=1&shape=4&shape=2&shape=2&dtype=float16&output_type=pt&prompt=x\n{bearer}", raw[:32]),
        (f"POST /encode?scaling_factor=0.13025\n{bearer}", picture),
        (f"GET /v1/jobs/job-1/events\n{bearer}", ""), (f"DELETE /v1/jobs/job-1\n{bearer}", ""),
        (f"GET /v1/models/tiny\n{bearer}", ""),
        (f"GET /metrics\n{bearer}", ""), ("GET /healthz\n", ""), ("GET /v1/models\nauthorization: Basic eDp4", ""),
        (f"GET /\n{bearer}", ""),
        (f"POST /v1/upscale\n{bearer}\ncontent-type: application/x-www-form-urlencoded", "image=x&sigma=0.1"),
    ]  # fmt: skip
    return [
        ("in.http", f"{head}\n\n".encode() + (body if isinstance(body, bytes) else body.encode()))
        for head, body in requests
    ]


def read_request(path: Path) -> str | None:
    """The server, as uvicorn would call it."""
    import asyncio

    if not REQUESTS:
        from pixeldecoder.serve.engine import Engine
        from pixeldecoder.serve.http import create_app
        from pixeldecoder.serve.service import Settings

        engine = Engine({"tiny": small_pipeline()}, max_pixels=128 * 128, queue_size=8)
        app = create_app(engine, Settings(max_bytes=1 << 20, deadline=5, token=TOKEN))
        REQUESTS.update(app=app, loop=asyncio.new_event_loop())
    head, _, body = path.read_bytes().partition(b"\n\n")
    line, *lines = head.split(b"\n")
    method, _, target = line.partition(b" ")
    place, _, query = target.partition(b"?")
    headers = [
        (name.strip().lower(), value.strip())
        for name, _, value in (one.partition(b":") for one in lines)
        if name.strip()
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1",
        "method": method.decode("latin-1") or "GET", "scheme": "http",
        "path": place.decode("utf-8", "replace") or "/", "raw_path": place, "query_string": query, "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "app": REQUESTS["app"],
    }  # fmt: skip
    sent: list[dict] = []
    told = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        if told:
            return told.pop()
        await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    REQUESTS["loop"].run_until_complete(asyncio.wait_for(REQUESTS["app"](scope, receive, send), 20))
    status = next(message["status"] for message in sent if message["type"] == "http.response.start")
    answer = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    if status >= 500 and status != 503:
        return f"status {status}: {answer[:200]!r}"
    if status >= 400:
        message = json.loads(answer)["error"]["message"]
        if len(message) > LONGEST:
            return f"a message of {len(message)} letters: {message[:200]!r}"
        leaks = (TOKEN, TEMPORARY, str(Path.cwd()), "site-packages", "Traceback", str(Path.home()))
        if leak := next((word for word in leaks if word in message and word.encode() not in head + body), ""):
            return f"a message with {leak!r}: {message[:200]!r}"
    return None


def seeds_words(folder: Path) -> list[Seed]:
    words = (
        "6GB",
        "1.5 GiB",
        "a-{000..004}.tar",
        "path/lora.safetensors:0.5",
        "24/28",
        "0.85",
        "auto",
        '{"a": 1}',
        "hub:a/b",
        "a/b",
        "~/x",
    )
    return [("in.txt", word.encode()) for word in words]


def read_words(path: Path) -> str | None:
    """What people type."""
    from pixeldecoder import files
    from pixeldecoder.cli.options import json_object, lora_and_strength
    from pixeldecoder.files import parse_size
    from pixeldecoder.ldm import parse_stop
    from pixeldecoder.presets import check_decoder_name
    from pixeldecoder.sources import Shards

    word = path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", "")
    files.MOST_NAMES = 1000
    for read in (parse_size, lora_and_strength, parse_stop, json_object, check_decoder_name, Shards):
        try:
            read(word)
        except ValueError as error:
            if wrong := unclear(error, None):
                return f"{read.__name__}: {wrong}"
    return None


TARGETS = {
    "latents": Target(seeds_latents, read_latents),
    "checkpoints": Target(seeds_checkpoint, read_checkpoint, weight=40),
    "folders": Target(seeds_folder, read_folder, names=False, weight=4),
    "encoders": Target(seeds_encoders, read_encoder, names=False, weight=10),
    "pictures": Target(seeds_pictures, read_picture),
    "captions": Target(seeds_captions, read_captions, weight=200),
    "shards": Target(seeds_tars, read_shards),
    "rows": Target(seeds_tars, read_rows, weight=60),
    "tables": Target(seeds_tables, read_rows, weight=60),
    "settings": Target(seeds_settings, read_settings, weight=25),
    "results": Target(seeds_results, read_results, names=False, weight=60),
    "prompts": Target(seeds_prompts, read_prompts),
    "made": Target(seeds_made, read_made, weight=30),
    "bulk": Target(seeds_bulk, read_bulk, names=False, weight=30),
    "export": Target(seeds_export, read_export, names=False, weight=5),
    "resume": Target(seeds_resume, read_resume, names=False, weight=15),
    "lora": Target(seeds_lora, read_lora, weight=5),
    "requests": Target(seeds_requests, read_request, names=False, weight=30),
    "words": Target(seeds_words, read_words, names=False, weight=100),
}


# One case, and many.


def unclear(error: BaseException, name: str | None) -> str | None:
    """What is wrong with an error, if it is not one clear line of the package's own."""
    from pixeldecoder.errors import explain

    if type(error) not in (ValueError, OSError) and not type(error).__module__.startswith("pixeldecoder"):
        return f"{type(error).__name__}: {str(error)[:300]}"
    line = explain(error, "") if isinstance(error, Exception) else None
    if not line:
        return f"no message: {error!r}"
    if len(line) > LONGEST:
        return f"a message of {len(line)} letters: {line[:200]}"
    if not line.isprintable():
        return f"a message that steers terminals: {line[:300]!r}"
    if name is not None and name not in line:
        return f"the file is not named: {line[:300]}"
    return None


FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo", "socket.bind", "os.remove", "os.rmdir", "shutil.rmtree", "open",
}  # fmt: skip


@dataclass
class Watch:
    """What a case did that none may."""

    folder: Path
    armed: bool = False
    events: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.armed or event not in FORBIDDEN:
            return
        if event == "open":
            path, _, flags = arguments
            written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if not written or not isinstance(path, str) or self._own(path):
                return
        if event in ("os.remove", "os.rmdir", "shutil.rmtree") and self._own(str(arguments[0])):
            return
        self.events.append(f"{event} {arguments!r:.200}")

    def _own(self, path: str) -> bool:
        path = os.path.abspath(path)
        return path.startswith((str(self.folder), TEMPORARY, "/dev/null", "/proc/self")) and CANARY not in path


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Of CPU time; what hangs outside Python's reach ends the process."""

    def stop(*_: Any) -> None:
        raise SlowError

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Fuzzer:
    """A target in a folder of its own, in this process."""

    def __init__(self, name: str, folder: Path, seed: int = 0):
        self.name, self.folder, self.seed, self.target = name, folder, seed, TARGETS[name]
        os.environ.update(HF_HUB_OFFLINE="1", PIXELDECODER_CACHE=str(folder / "cache"))
        os.chdir(folder)
        self.seeds = self.target.seeds(folder)
        for file, data in self.seeds:
            self._write(file, data)
        self.several = len({file for file, _ in self.seeds}) > 1
        self.watch = Watch(folder)
        self.findings: dict[str, tuple[int, str]] = {}
        self.counts: Counter[str] = Counter()
        for file, data in self.seeds:  # with all imports, which are nobody's case
            path = self._write(file, data)
            try:
                self.target.read(path)
            except ValueError:  # some are to be refused
                self.counts["seeds refused"] += 1
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sys.addaudithook(self.watch)

    def _write(self, file: str, data: bytes) -> Path:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def case(self, number: int) -> tuple[str, bytes, bytes]:
        """The file, its sound form, and the case."""
        rng = random.Random(f"{self.name}/{self.seed}/{number}")
        file, sound = rng.choice(self.seeds)
        return file, sound, change(Path(file).name, sound, rng)

    def run(self, number: int) -> str | None:
        file, sound, data = self.case(number)
        (self.folder / "last").write_text(str(number))
        return self.read(number, file, sound, data)

    def read(self, number: int, file: str, sound: bytes, data: bytes) -> str | None:
        """What is wrong, if anything is."""
        path, wrong, place = self._write(file, data), None, ""
        begun = time.process_time()
        self.watch.armed = True
        try:
            with limited(CPU_SECONDS):
                wrong = self.target.read(path)
            self.counts["read"] += 1
        except SlowError as error:
            wrong, place = f"more than {CPU_SECONDS:g} s", _place(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # Rust's are no Exceptions
            wrong, place = unclear(error, path.name if self.target.names else None), _place(error)
            self.counts["refused"] += 1
        finally:
            self.watch.armed = False
        before, self.peak = self.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        risen = (self.peak - before) >> 10
        if wrong is None and risen > MEMORY and self.counts.total() > 20:
            wrong = f"{risen} MiB more"
        if wrong is None and time.process_time() - begun > CPU_SECONDS:
            wrong = f"{time.process_time() - begun:.1f} s"
        if self.watch.events:
            wrong = f"it did {self.watch.events.pop()}"
            self.watch.events.clear()
        if (self.folder / CANARY).exists():
            (self.folder / CANARY).unlink()
            wrong = "code was run"
        if self.several:
            self._write(file, sound)
        if wrong is not None:
            kind = f"{re.sub(r'[0-9]+', '#', wrong)[:60]} {place}"
            self.counts["findings"] += 1
            self.findings.setdefault(kind, (number, wrong))
        return wrong


def _place(error: BaseException) -> str:
    frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    own = [f for f in frames if not f.startswith("fuzz.py")]
    return " < ".join([*own[-1:], *(f for f in own if f != own[-1])][:1] + own[:2])


def work(name: str, start: int, stop: int, seconds: float, seed: int) -> dict[str, Any]:
    """Cases of a target, until the time is over."""
    # In memory, where there is such a file system: cases are files.
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=base) as folder:
        fuzzer = Fuzzer(name, Path(folder), seed)
        logging.disable()
        warnings.simplefilter("ignore")
        said = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libraries complain of broken pictures
        begun, number = time.process_time(), start
        while number < stop and time.process_time() - begun < seconds:
            if number % 500 == start % 500:  # what hangs outside Python's reach ends the process
                faulthandler.dump_traceback_later(1800, exit=True)
            fuzzer.run(number)
            number += 1
        os.chdir("/")
        os.dup2(said, 2)
    took = time.process_time() - begun
    return dict(cases=number - start, counts=fuzzer.counts, seconds=took, findings=fuzzer.findings)


def led_by_coverage(name: str, cases: int) -> None:
    """By libFuzzer, with our changes among its own. Findings are printed as they come."""
    import atheris

    folder = tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    with atheris.instrument_imports(include=["pixeldecoder"]):
        fuzzer = Fuzzer(name, Path(folder))
        for file, sound in fuzzer.seeds:
            fuzzer.read(-1, file, sound, sound)
    files = sorted({file for file, _ in fuzzer.seeds})
    sound = dict(fuzzer.seeds)
    corpus = Path(tempfile.mkdtemp())
    for index, (file, data) in enumerate(fuzzer.seeds):
        (corpus / str(index)).write_bytes(bytes([files.index(file)]) + data)

    def one(data: bytes) -> None:
        file = files[data[0] % len(files)] if data else files[0]
        told = len(fuzzer.findings)
        fuzzer.read(-1, file, sound[file], data[1:])
        if len(fuzzer.findings) > told:
            kept = corpus / f"finding-{told}"
            kept.write_bytes(data)
            print(f"{name}: {list(fuzzer.findings.values())[-1][1]} ({kept})", flush=True)

    def mutated(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, size)
        file = files[data[0] % len(files)] if data else files[0]
        return (data[:1] or b"\0") + change(Path(file).name, data[1:], rng)[: size - 1]

    options = [
        f"-runs={cases}",
        "-max_len=65536",
        "-timeout=120",
        "-rss_limit_mb=6000",
        "-close_fd_mask=0",
        str(corpus),
    ]
    atheris.Setup(["fuzz", *options], one, custom_mutator=mutated)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], default=[])
    parser.add_argument("--cases", type=int, default=1000, help="of a target of weight 100")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--seconds", type=float, default=1e9, help="of CPU for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--coverage", action="store_true")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if options.coverage:
        led_by_coverage(names[0], options.cases)
    if options.case is not None:
        return again(names[0], options.case, options.seed)
    total, wrong = 0, 0
    if len(names) > 1:
        preload()
    for name in names:
        cases = max(1, options.cases * TARGETS[name].weight // 100)
        told = apart(name, options.start, cases, options.seconds, options.seed)
        total, wrong = total + told["cases"], wrong + len(told["findings"])
        counts = ", ".join(f"{count} {what}" for what, count in sorted(told["counts"].items()))
        print(f"{name}: {told['cases']} cases in {told['seconds']:.0f} s: {counts}", flush=True)
        for kind, (number, text) in told["findings"].items():
            print(f"  --case {number} {name}: {text}\n      {kind}", flush=True)
    print(f"{total} cases, {wrong} kinds of findings")
    return int(wrong > 0)


def preload() -> None:
    """What all targets import, once for all of their processes."""
    modules = (
        "pixeldecoder.cli.redo", "pixeldecoder.execution", "pixeldecoder.evaluation.report", "pixeldecoder.export",
        "pixeldecoder.serve.http", "pixeldecoder.bulk.output", "pixeldecoder.training.network", "peft", "webdataset",
    )  # fmt: skip
    for module in modules:
        importlib.import_module(module)


def apart(name: str, start: int, cases: int, seconds: float, seed: int) -> dict[str, Any]:
    """In another process, so that one that dies is a finding."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            told = json.dumps(work(name, start, start + cases, seconds, seed))
            os.write(write, told.encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    _, status = os.waitpid(process, 0)
    try:
        return json.loads(text)
    except ValueError:
        findings = {"died": (start, f"the process died with {os.waitstatus_to_exitcode(status)}")}
        return dict(cases=0, counts={}, seconds=0, findings=findings)


def again(name: str, number: int, seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzzer = Fuzzer(name, Path(folder), seed)
        file, _, data = fuzzer.case(number)
        print(f"{file}, {len(data)} bytes: {data[:1500]!r}")
        try:
            print("returned", fuzzer.target.read(fuzzer._write(file, data)))
        except BaseException:
            traceback.print_exc()
        os.chdir("/")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(Path(__file__).parent.parent / "src")]
    sys.exit(main())
