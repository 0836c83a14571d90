"""Every command that needs no network, with none: no name is looked up, no address but this machine's is reached."""

import json
import socket

import pytest

from pixeldecoder.cli import main
from pixeldecoder.presets import NANO
from training.conftest import ARCHITECTURE, write_photos

LATENTS = NANO / "samples/sign.safetensors"
QUICK = "--device cpu --dtype float32 --steps 1"
TRAIN = (
    "--recipe nano --data.source photos --data.resolution 64 --data.max-aspect-ratio 1 --data.no-in-memory --steps 1 "
    "--batch-size 2 --micro-batch-size 2 --precision float32 --device cpu --validate-every 0 --encoder averaging:encode"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("offline")
    write_photos(folder / "photos", 2)
    (folder / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    save_file({"latents": torch.zeros(1, 16, 2, 2)}, folder / "z.safetensors")
    return folder


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What of the network was wanted."""
    found: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connecting(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            found.append(f"connect {address}")
            raise OSError("no network")
        return connect(self, address)

    def looking_up(host, *args, **kwargs):
        if host not in ("127.0.0.1", "::1", "localhost", None, socket.gethostname()):
            found.append(f"look up {host}")
            raise socket.gaierror("no network")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connecting)
    monkeypatch.setattr(socket.socket, "connect_ex", connecting)
    monkeypatch.setattr(socket, "getaddrinfo", looking_up)
    return found


COMMANDS = [  # in this order: some read what others made
    f"decode z.safetensors a.png {QUICK}",
    f"upscale photos up {QUICK}",
    "encode photos latents --device cpu",
    "info a.png",
    "info z.safetensors",
    "redo a.png again.png",
    "plan 512 512 --device cpu",
    "compare a.png again.png --output compared.html",
    f"evaluate photos --output study --decoders nano --baselines bicubic --crop 64 --metrics psnr {QUICK}",
    f"train teacher {TRAIN} --architecture architecture.json --output teacher --export exported",
    "train teacher --help",
    f"distill {TRAIN} --model exported --feature-blocks 1 --output student",
    "convert exported exported.pth",
    "--version",
]


def test_nothing_is_asked_of_the_network(folder, asked, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        code = main(command.split())
        said = capsys.readouterr().err
        assert not asked, (command, asked)
        assert code == 0 or "reference knows only networks with text" in said, (command, said)


def test_the_guard_sees_it(asked):
    with pytest.raises(OSError):
        socket.create_connection(("huggingface.co", 443))
    with pytest.raises(OSError), socket.socket() as unconnected:
        unconnected.connect(("192.0.2.1", 80))
    assert asked == ["look up huggingface.co", "connect ('192.0.2.1', 80)"]
