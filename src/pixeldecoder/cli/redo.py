"""A picture or latents in; how they were made out, as lines: `info`, or as the same picture again: `redo`."""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from pixeldecoder import __version__
from pixeldecoder.cli.decode import Decode, Upscale
from pixeldecoder.cli.demo import Demo
from pixeldecoder.cli.generate import Generate
from pixeldecoder.cli.options import OUTPUTS, lora_and_strength, word
from pixeldecoder.cli.parsing import parse
from pixeldecoder.errors import naming, printable
from pixeldecoder.hub import is_code

Command = Decode | Upscale | Generate | Demo
COMMANDS: dict[str, type[Command]] = {kind.__name__.lower(): kind for kind in (Decode, Upscale, Generate, Demo)}
"""What makes pictures that say how."""
FILES = ("source", "decoder", "encoder", "model", "lora", "prompt_embeds", "text_encoder")
"""Options that may name a file or folder."""


@dataclass(kw_only=True)
class Info:
    """Print how a picture was made, or what a file of latents holds.

    Example: pixeldecoder info image.png
    """

    file: Annotated[Path, tyro.conf.Positional, word("FILE")]
    """A picture that pixeldecoder wrote (.png, .webp, .jpg), or latents (.safetensors, .npy, .pt, .latent)."""

    def run(self) -> None:
        from pixeldecoder.files import IMAGE_SUFFIXES, LATENT_SUFFIXES, read_made

        if self.file.suffix.lower() in LATENT_SUFFIXES:
            told = _about_latents(self.file)
        elif self.file.suffix.lower() in IMAGE_SUFFIXES:
            told = read_made(self.file)
        else:
            expected = ", ".join((*IMAGE_SUFFIXES, *LATENT_SUFFIXES))
            raise ValueError(f"{self.file}: expected a picture or latents, one of {expected}")
        for name, value in told.items():
            # What a stranger wrote shall not steer the terminal.
            plain = isinstance(value, str) and value.isprintable()
            print(f"{name if name.isprintable() else json.dumps(name)}: {value if plain else json.dumps(value)}")


def _about_latents(path: Path) -> dict[str, Any]:
    from pixeldecoder.files import inspect_latents, load_latents

    shape, size = inspect_latents(path)
    latents = load_latents(path)

    from pixeldecoder.latents import SPACES

    fitting = [space.name for space in SPACES.values() if space.channels == shape[1]]
    told = {"latents": f"{shape[0]} of {shape[1]} channels, {shape[3]} x {shape[2]} cells"}
    told["family"] = latents.space or " or ".join(fitting) or "none that is known"
    told["normalised"] = "no, as ComfyUI stores them" if latents.denormalized else "yes"
    if latents.sigma is None:
        told["sigma"] = "not told, so 0"
    else:
        told["sigma"] = ", ".join(f"{level:.4g}" for level in latents.sigma.tolist())
    if size is not None:
        told["size"] = f"{size[1]} x {size[0]} px"
    return told


@dataclass(kw_only=True)
class Redo:
    """Make a picture again, as it says it was made: the same bytes on the same machine.

    The source, the decoder and whatever else was read must be what they were; where they are not, one line says so.

    Example: pixeldecoder redo image.png again.png
    """

    picture: Annotated[Path, tyro.conf.Positional, word("PICTURE")]
    """A picture that pixeldecoder wrote, without --no-metadata."""
    output: Annotated[Path | None, tyro.conf.Positional, word("OUTPUT")] = None
    """An image (.png, .webp, .jpg), of the picture's format if the bytes are to be the same; by default the picture's
    name with "_redo" added."""
    source: Annotated[Path | None, word("PATH")] = None
    """Where the source is now, if it has been moved."""
    overwrite: bool = False
    """Replace the output if it is there."""

    def run(self) -> None:
        from pixeldecoder.files import IMAGE_SUFFIXES, check_target, read_made

        made = read_made(self.picture)
        output = self.output or self.picture.with_stem(f"{self.picture.stem}_redo")
        check_target(output, IMAGE_SUFFIXES, self.overwrite, [self.picture])
        with naming(self.picture):
            command = self._command(made, output)
            self._check(made, command)
        vars(command).update(recorded=made, index=made.get("index"))
        command.run()

    def _command(self, made: dict[str, Any], output: Path) -> Command:
        """As if it had been typed: what a picture says is checked as what people type is, and may be a stranger's."""
        kind = COMMANDS.get(str(made.get("command")))
        if made.get("command") == "evaluate":
            raise ValueError("a picture of an evaluation: run that again, which makes what is missing in its folder")
        if kind is None:
            raise ValueError(f"made by {made.get('command')!r}: expected one of {', '.join(COMMANDS)}")
        if not isinstance(made.get("index", 0), int) or made.get("index", 0) < 0:
            raise ValueError(f"index {made['index']!r}: expected a whole number")
        if is_code(str(made.get("encoder", ""))):
            raise ValueError(f"its encoder, {made['encoder']}, is code: no picture has code run, so type its command")
        folder = Path(str(made.get("folder", "")))
        files: list[str] = [] if kind is Demo else [str(output)]
        args = [f"--output={output}"] if kind is Demo else []
        for field in fields(kind):
            value = made.get(field.name)
            if field.name in OUTPUTS or value is None or value is False:
                continue
            values = [str(one) for one in value] if isinstance(value, list) else [str(value)]
            if field.name == "source" and self.source is not None:
                values = [str(self.source)]
            elif field.name in FILES:
                values = [_there(one, folder) for one in values]
            option = f"--{field.name.replace('_', '-')}"
            if field.name in ("source", "description"):
                files[:0] = values
            else:
                args += [option] if value is True else [f"{option}={one}" for one in values]
        return parse(kind, [*files, *args, "--overwrite"], f"pixeldecoder {made['command']}")

    def _check(self, made: dict[str, Any], command: Command) -> None:
        from pixeldecoder import provenance

        source = getattr(command, "source", None)
        if source is not None:
            if not source.is_file():
                raise ValueError(f"its source, {source}, is not there: give --source, where it is now")
            if (found := provenance.file_hash(source)) != made.get("source_sha256"):
                raise ValueError(
                    f"made from another {source}: SHA-256 {made.get('source_sha256')}, not {found}: give --source"
                )
        weights = provenance.weights_hash(command.decoder)
        if weights is not None and weights != made.get("decoder_sha256"):
            raise ValueError(f"made by another {command.decoder}: SHA-256 {made.get('decoder_sha256')}, not {weights}")
        if made["software"] != f"pixeldecoder {__version__}":
            print(printable(f"made by {made['software']}, now by {__version__}: it may differ"), file=sys.stderr)


def _there(name: str, folder: Path) -> str:
    """A file's name as it was given, or from the folder that it was given in if it is not here."""
    path = lora_and_strength(name)[0]
    return str(folder / name) if not Path(path).exists() and (folder / path).exists() else name
