"""What was installed from a wheel, tried: `release.py alone`, or the name of an extra, whose modules are imported."""

import importlib
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pixeldecoder
from pixeldecoder import errors


def command(folder: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "pixeldecoder", *words], cwd=folder, check=True)


def main(extra: str) -> None:
    package = Path(pixeldecoder.__file__).parent
    assert "site-packages" in str(package), f"{package}: expected an installed package"
    assert (package / "py.typed").is_file()
    if extra != "alone":
        for module in errors.EXTRAS[extra]:
            try:
                importlib.import_module(module)
            except RuntimeError as error:
                # The index has torchvision for CUDA alone; beside a PyTorch for CPUs it cannot be imported.
                if "torchvision::" not in str(error) or not version("torch").endswith("+cpu"):
                    raise
                print(f"{extra}: NOT imported: {module}, by a torchvision for another PyTorch ({error})")
            else:
                print(f"{extra}: {module} imported")
        return
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        command(folder, "demo", "--output", "demo")
        Image.effect_noise((64, 48), 60).convert("RGB").save(f"{folder}/photo.png")
        command(folder, "encode", "photo.png", "z.safetensors")
        command(folder, "decode", "z.safetensors", "large.png")
        assert Image.open(f"{folder}/large.png").size == (256, 192)
    print("alone: demo, encode and decode ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
