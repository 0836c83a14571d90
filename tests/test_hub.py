"""What is meant for the Hub, and what for a path that is not there."""

import logging
import socket

import pytest

from pixeldecoder import PixelDecoderPipeline, PixelDecoderTransformer2DModel
from pixeldecoder.cli import main
from pixeldecoder.cli.options import json_object
from pixeldecoder.files import expand_braces, parse_size
from pixeldecoder.hub import download, hub_id, is_code, is_command, repository
from pixeldecoder.presets import check_decoder_name


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "decoders").mkdir()
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)

    def refused(*args, **kwargs):
        raise AssertionError(f"a network call: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("somebody/decoder", "somebody/decoder"),
        ("hub:somebody/decoder", "somebody/decoder"),
        ("hub:decoders/teacher", "decoders/teacher"),
        ("hub:checkpoints/x.pth", "checkpoints/x.pth"),
        ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-4B"),
        ("decoders/teacher", None),  # its first part is a folder here
        ("checkpoints/x.pth", None),
        ("checkpoints/x.SAFETENSORS", None),
        ("./somebody/decoder", None),
        ("somebody/decoder/", None),
        ("~/decoder", None),
        ("a/b/c", None),
        ("hub:a/b/c", None),
        ("nano", None),
        ("", None),
        ("sömebody/decoder", None),
        ("somebody/decoder\n", None),
    ],
)
def test_names(name, meant, here):
    assert hub_id(name) == meant


@pytest.mark.parametrize(
    "command",
    [
        "decode z.safetensors o.png --decoder decoders/teacher",
        "upscale p.png o.png --encoder decoders/vae",
        "encode p.png y.safetensors --encoder decoders/vae",
        "generate cat o.png --model decoders/model",
        "decode z.safetensors o.png --lora decoders/lora",
        "train teacher --recipe nano --encoder nano --data.source photos --model decoders/teacher --device cpu",
        "export decoders/teacher out",
        "benchmark --decoder decoders/teacher --output out",
    ],
)
def test_a_missing_folder_is_not_looked_up(command, here, capsys):
    """It says what to write if the Hub was meant."""
    from PIL import Image
    from safetensors.torch import save_file
    from torch import zeros

    Image.new("RGB", (64, 64)).save("p.png")
    Image.new("RGB", (512, 512)).save("photos/p.png")
    save_file({"latents": zeros(1, 16, 2, 2)}, "z.safetensors")
    name = next(word for word in command.split() if word.startswith("decoders/"))
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert name in said and f"hub:{name}" in said and said.count("\n") == 1, said


@pytest.mark.parametrize("kind", [PixelDecoderPipeline, PixelDecoderTransformer2DModel])
def test_nor_by_the_library(kind, here):
    with pytest.raises(ValueError, match=r"decoders/teacher.*no such folder or file \(from the Hub: hub:decoders/t"):
        kind.from_pretrained("decoders/teacher")


def test_the_hub_is_asked_aloud(here, caplog):
    caplog.set_level(logging.INFO, "pixeldecoder")
    assert repository("hub:somebody/decoder") == "somebody/decoder"
    assert "somebody/decoder: not here, so https://huggingface.co or its cache is asked" in caplog.text
    with pytest.raises(ValueError, match=r"decoders/x: no such folder or file"):
        download("decoders/x")


@pytest.mark.parametrize("name, code", [("mine:encode", True), ("hub:a/b", False), ("nano", False), ("photos", False)])
def test_code(name, code, here):
    assert is_code(name) is code


@pytest.mark.parametrize(
    "source",
    [
        "pipe:touch CANARY; cat x #.tar",
        "{pipe:touch CANARY #,a}.tar",
        "pip{e:touch CANARY #,e}.tar",
        " PIPE:touch CANARY #.tar",
    ],
)
def test_no_command_in_an_evaluation(source, here, capsys, tmp_path):
    """Shards are other people's: their names run nothing."""
    assert main(["evaluate", source, "--output", "out", "--baselines", "bicubic", "--crop", "64"]) == 2
    assert "a command, and an evaluation runs none" in capsys.readouterr().err
    assert not (tmp_path / "CANARY").exists() and is_command(source)


@pytest.mark.parametrize("source", ["photos", "a-{000..002}.tar", "https://x.org/a-{0..1}.tar", "C:/photos"])
def test_no_command(source):
    assert not is_command(source)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999999}.tar", "{1..9999999}.tar", "{0..9}" * 7 + ".tar", "{a,b}" * 30 + ".tar",
        "{0..%s}" % ("9" * 400), "{x," + "{a,b}" * 30 + "}.tar", "{x," + "{A..z}" * 8 + "}.tar",
        r"{x\},y," + "{a,b}" * 30 + "}.tar",
    ],
)  # fmt: skip
def test_more_names_than_there_are_files(pattern):
    with pytest.raises(ValueError, match="stands for more than 1000000 files"):
        expand_braces(pattern)


def test_names_in_braces():
    assert expand_braces("a-{08..10}.{tar,x}") == ["a-08.tar", "a-08.x", "a-09.tar", "a-09.x", "a-10.tar", "a-10.x"]
    assert expand_braces(r"{b..a},{x,{y,z}}\,") == ["b,x,", "b,y,", "b,z,", "a,x,", "a,y,", "a,z,"]


def test_braces_that_do_not_close():
    with pytest.raises(ValueError, match=r"a-\{0: Unbalanced braces") as caught:
        expand_braces("a-{0")
    assert type(caught.value) is ValueError
    with pytest.raises(ValueError, match="more than 50 braces within one another"):
        expand_braces("{" * 60 + "a,b" + "}" * 60)


def test_a_home_of_nobody():
    """ "~" before what is no user stays as it is."""
    with pytest.raises(ValueError, match='no decoder "~nobody-here/x": no such folder'):
        check_decoder_name("~nobody-here/x")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "7"])
def test_arguments_that_are_no_object(text):
    with pytest.raises(ValueError, match="expected a JSON object"):
        json_object(text)


@pytest.mark.parametrize("size", ["1" * 400 + "GB", "9" * 400, "." * 3, "1e999GB"])
def test_no_size(size):
    with pytest.raises(ValueError, match="expected bytes, or a size"):
        parse_size(size)
