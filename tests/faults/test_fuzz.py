"""A few cases of every target of `fuzz.py`, and what its many cases found, each as the smallest file of its kind."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fuzz
from conftest import tiny_model, tiny_pipeline
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.bulk.output import MANIFEST, Output
from pixeldecoder.cli import main
from pixeldecoder.convert import load_folder
from pixeldecoder.errors import explain
from pixeldecoder.execution import Execution, load_encoder, load_loras
from pixeldecoder.files import load_latents
from pixeldecoder.pictures import read, size
from pixeldecoder.portable import read_manifest
from pixeldecoder.text import PromptEncoder, load_prompt_embeds, save_prompt_embeds
from pixeldecoder.training.checkpoints import Checkpoints
from pixeldecoder.training.config import Teacher, load_yaml, write_yaml
from pixeldecoder.training.log import read_log


def test_some_cases_of_every_parser():
    """Values or clear errors alone. `make fuzz` runs as many as one has time for."""
    told = subprocess.run(
        [sys.executable, fuzz.__file__, "--cases", "50"], capture_output=True, text=True, errors="replace"
    )
    assert told.returncode == 0, told.stdout + told.stderr[-3000:]
    assert all(f"\n{name}: " in f"\n{told.stdout}" for name in fuzz.TARGETS)


def test_the_fuzzer_sees_what_it_is_there_for(tmp_path, monkeypatch):
    """Tracebacks, code that runs, files elsewhere, names left out, time and memory."""
    monkeypatch.chdir(tmp_path)
    kept = []

    def wrong(read, seconds=fuzz.CPU_SECONDS) -> str:
        monkeypatch.setattr(fuzz, "CPU_SECONDS", seconds)
        monkeypatch.setitem(fuzz.TARGETS, "x", fuzz.Target(lambda folder: [("in.txt", b"")], lambda path: None))
        fuzzer = fuzz.Fuzzer("x", tmp_path)
        object.__setattr__(fuzzer.target, "read", read)
        fuzzer.counts["read"] = 100
        return str(fuzzer.read(0, "in.txt", b"", b""))

    def raising(error):
        def read(path):
            raise error

        return read

    def spinning(path):
        while True:
            pass

    assert wrong(lambda path: None) == "None"
    assert wrong(raising(ValueError("in.txt: expected another"))) == "None"
    assert "KeyError" in wrong(raising(KeyError("in.txt")))
    assert "JSONDecodeError" in wrong(lambda path: json.loads("{in.txt"))
    assert "not named" in wrong(raising(ValueError("expected another")))
    assert "code was run" in wrong(lambda path: Path("CANARY").touch())
    assert "open" in wrong(lambda path: Path("/nowhere/x.txt").write_text("x"))
    assert "more than 0.2 s" in wrong(spinning, 0.2)
    assert "MiB more" in wrong(lambda path: kept.append(np.ones(100_000_000)) or kept.clear())


def png(*chunks: tuple[bytes, bytes], after: tuple[bytes, bytes] = (b"tEXt", b"a\0b")) -> bytes:
    """6 x 4 pixels, grey."""
    head = (b"IHDR", struct.pack(">IIBBBBB", 6, 4, 8, 0, 0, 0, 0))
    data = (b"IDAT", zlib.compress(b"\0\1\2\3\4\5\6" * 4))
    parts = [head, *chunks, data, after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_exif_after_the_pixels():
    """Allowed in PNG, and written so by some tools: the head knows of it, as the picture does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(after=(b"eXIf", exif.tobytes()[6:]))
    assert size(data) == read(data).rgb.size == (4, 6)
    assert size(png()) == read(png()).rgb.size == (6, 4)
    lost = (b"eXIf", exif.tobytes()[6:])
    broken = png(after=(b"a\x0f\x90b", b"")).replace(chunk(b"IEND", b""), chunk(*lost) + chunk(b"IEND", b""))
    for data in (broken, png() + chunk(*lost)):  # after a chunk of no name, or the end
        assert lost[1] in data and size(data) == read(data).rgb.size == (6, 4)


@pytest.mark.parametrize(
    "text, value",
    [("steps: 010", "010"), ("steps: 09999", "09999"), ("steps: 10", 10), ("steps: 0", 0), ("a: 0x1F", 31)],
)
def test_numbers_mean_what_they_seem(text, value, tmp_path):
    (tmp_path / "in.yaml").write_text(text)
    assert list(load_yaml(tmp_path / "in.yaml").values()) == [value]


@pytest.mark.parametrize("text", ["a: 0b_", "a: 2001-99-99", "a: !!int x", "a: !!float x", "a: !!binary é"])
def test_values_that_yaml_cannot_make(text, tmp_path):
    path = tmp_path / "in.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"in.yaml: not readable as YAML"):
        load_yaml(path)


@pytest.mark.parametrize("content", ["nan", '"somebody/decoder"', "[]", "7", "null", "{", "\xff", "[" * 5000])
@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"])
def test_a_configuration_that_is_none(file, content, tmp_path, monkeypatch):
    """diffusers takes a text for a Hub id, and asks for it."""
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: asked.append(a) or [])
    with pytest.raises(ValueError, match=Path(file).name + ": expected a JSON object"):
        Execution(device="cpu", dtype="float32").load(str(tmp_path))
    if file == "transformer/config.json":
        with pytest.raises(ValueError, match=r"config.json: expected a JSON object"):
            load_folder(tmp_path)
        with pytest.raises(ValueError, match=r"config.json: expected a JSON object"):
            type(tiny_pipeline().transformer).from_pretrained(tmp_path, subfolder="transformer")
    assert not asked


@pytest.mark.parametrize("change", [{"num_layers": 10**9}, {"pixel_dim": 4 * 10**9}, {"num_attention_heads": 10**12}])
def test_a_network_of_absurd_size(change, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for load in (lambda: load_folder(tmp_path), lambda: PixelDecoderPipeline.from_pretrained(tmp_path)):
        with pytest.raises(ValueError):
            load()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000: expected at most 512"),
        ({"out_channels": 3 * 10**9}, "out_channels is 3000000000: expected at most 1048576"),
        ({"block_out_channels": [4] * 10**5}, "block_out_channels is"),
        ({"latent_channels": 2**19}, "config.json is of a network of [0-9]+ weights, but its files have [0-9]+ bytes"),
        ({"_class_name": []}, "expected one of"),
    ],
)
def test_an_autoencoder_of_absurd_size(change, reason, tmp_path):
    fuzz.seeds_encoders(tmp_path)
    path = tmp_path / "one/vae/config.json"
    load_encoder(str(tmp_path / "one"), "cpu")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=reason):
        load_encoder(str(tmp_path / "one"), "cpu")


def test_a_scheduler_that_cannot_be_made(tmp_path):
    from pixeldecoder.convert import save_reference_checkpoint

    model = tiny_model()
    settings = {"pipeline": {}, "scheduler": {"_class_name": "FlowMatchLCMScheduler", "num_train_timesteps": [1]}}
    save_reference_checkpoint(model, tmp_path / "in.safetensors", settings)
    with pytest.raises(ValueError, match=r"in.safetensors: its scheduler: TypeError"):
        PixelDecoderPipeline.from_single_file(tmp_path / "in.safetensors")


@pytest.mark.parametrize(
    "tensors", [{"x": torch.zeros(1)}, {"prompt_embeds": torch.zeros(3)}, {"prompt_embeds": torch.zeros(1, 2, 3).int()}]
)
def test_prompts_that_are_none(tensors, tmp_path):
    """In the cache they are made anew; as a file they are refused."""
    save_file(tensors, tmp_path / "key.safetensors")
    with pytest.raises(ValueError, match=r"key.safetensors: expected"):
        load_prompt_embeds(tmp_path / "key.safetensors")
    encoder = PromptEncoder(cache=tmp_path)
    assert encoder._look_up("key", torch.device("cpu")) is None
    save_prompt_embeds(torch.ones(1, 2, 3), tmp_path / "key.safetensors")
    assert encoder._look_up("key", torch.device("cpu")).shape == (1, 2, 3)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:40], lambda data: b"", lambda data: b"x" * 99]
)
def test_a_damaged_part_of_a_manifest(damage, tmp_path):
    """It is named; without it the folder goes on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "manifest").mkdir()
    for name in "ab":
        row = {"id": name, "status": "done", "time": 1.0}
        pq.write_table(pa.Table.from_pylist([row], MANIFEST), tmp_path / f"manifest/{name}.parquet")
    path, output = tmp_path / "manifest/a.parquet", Output(str(tmp_path), "files", "png", "0")
    path.write_bytes(damage(path.read_bytes()))
    for look in (lambda: output.manifest("id"), lambda: output.rows_in(str(path))):
        with pytest.raises(ValueError, match=r"a.parquet: damaged .*: delete it, and its rows are made again"):
            look()
    path.unlink()
    assert output.manifest("id")["id"].to_pylist() == ["b"]


def test_a_column_of_a_manifest_whose_name_is_no_text(tmp_path):
    """Read or not, a part with it is not written anew."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "manifest").mkdir()
    path, output = tmp_path / "manifest/a.parquet", Output(str(tmp_path), "files", "png", "0")
    pq.write_table(pa.Table.from_pylist([{"id": "a", "status": "done", "time": 1.0}], MANIFEST), path)
    path.write_bytes(damaged := path.read_bytes().replace(b"seconds", b"sec\xffnds"))
    with pytest.raises(ValueError, match=r"a.parquet: damaged .*: delete it, and its rows are made again"):
        output.drop(["a"])
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "shapes, reason",
    [
        ({"A.weight": (2, 8), "B.weight": (24, 1, 2)}, "not of this decoder, which is"),
        ({"A.weight": (2,), "B.weight": (24, 2)}, "not of this decoder, which is"),
        ({"A.weight": (2, 8), "B.weight": (24, 3)}, "not a LoRA of this decoder"),
        ({"A.weight": (2, 8)}, "one of the two sides of patch_blocks.0.attn.to_qkv is missing"),
        ({"B.weight": (24, 2)}, "one of the two sides of patch_blocks.0.attn.to_qkv is missing"),
        ({"A.weight": (2, 8), "B.weight": (24, 2), "x.weight": (2, 8)}, "expected LoRA layers, found"),
    ],
)
def test_a_lora_of_odd_layers(shapes, reason, tmp_path):
    """Of a missing side, peft would take random values."""
    layer = "transformer.patch_blocks.0.attn.to_qkv.lora_"
    save_file({layer + part: torch.ones(shape) for part, shape in shapes.items()}, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=f"in.safetensors: {reason}"):
        load_loras(fuzz.small_pipeline(), [(str(tmp_path / "in.safetensors"), 0.5)])


@pytest.mark.parametrize("content", ["[" * 10**5, "[[1, 2]]", "[]", "7", "{", '"x"'])
def test_json_that_is_no_settings(content, tmp_path):
    """Nested too deep, or another thing than an object."""
    for name in ("settings.json", "log.jsonl", "manifest.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"settings.json: expected the settings"):
        Output(str(tmp_path), "files", "png", "0").check({"kind": "files"})
    assert read_log(tmp_path / "log.jsonl") == ([], 1)
    with pytest.raises(ValueError, match="expected a folder that `pixeldecoder export` wrote"):
        read_manifest(tmp_path, "onnx")


def test_settings_of_a_folder_that_go_on_and_on(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"kind": ["x"] * 9999, "y" * 9999: 1}))
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest/a.parquet").touch()
    with pytest.raises(ValueError, match="was made with") as caught:
        Output(str(tmp_path), "files", "png", "0").check({"kind": "files"})
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "change",
    [{"architecture": 0.5}, {"step": "4"}, {"samples": None}, {"minutes": "x"}, {"position": []}, {"stage": 1}],
)
def test_progress_of_other_types(change, tmp_path):
    step = tmp_path / "checkpoints/step_00000004"
    step.mkdir(parents=True)
    config = Teacher(output=tmp_path)
    write_yaml(config, step / "config.yaml")
    sound = dict(stage="teacher", step=4, position=2, samples=1, minutes=0.5, architecture={})
    (step / "progress.json").write_text(json.dumps(sound))
    assert Checkpoints(config).changes() == []
    (step / "progress.json").write_text(json.dumps(sound | change))
    with pytest.raises(ValueError, match=rf"progress.json does not tell {next(iter(change))}"):
        Checkpoints(config).changes()


def test_messages_do_not_steer_the_terminal(tmp_path, capsys, monkeypatch):
    """Whatever strangers call their files and tensors; and they end."""
    monkeypatch.chdir(tmp_path)
    save_file({"\x1b[2Ja": torch.zeros(1), "b\x9b31m\u202e": torch.zeros(1)}, "z.safetensors")
    with pytest.raises(ValueError) as caught:
        load_latents(Path("z.safetensors"))
    assert explain(caught.value, "").isprintable()
    Path("\x1b[2J.png").write_text("no picture")
    assert main(["upscale", "\x1b[2J.png", "out.png", "--device", "cpu"]) == 2
    Path("folder").mkdir()
    for name in ("\x1b]0;x\x07.png", "good.png"):
        Path("folder", name).write_bytes(b"no picture")
    assert main(["upscale", "folder", "out", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[2J.png" in said and "\\x1b]0;x\\x07.png" in said
    assert all(line.isprintable() for line in said.splitlines())
    assert len(explain(ValueError("x" * 10**6), "")) < 2000
