"""Bundled latents in, a picture that compares their decodes out: `demo`."""

from dataclasses import dataclass
from pathlib import Path

from pixeldecoder.cli.options import Pictures


@dataclass(kw_only=True)
class Demo(Pictures):
    """See what it does: decode bundled photos' latents and compare.

    Writes comparison.png: of each photo what the decoder of an autoencoder (TAEF1) makes of its latents, enlarged
    bicubically, nano's decode of them, nano's decode of the latents with noise of sigma 0.3, and the original.

    Example: pixeldecoder demo --output outputs/demo
    """

    output: Path = Path("outputs/demo")
    """Folder of the pictures."""

    def run(self) -> None:
        from pixeldecoder.files import IMAGE_SUFFIXES, check_target, save_image

        self.check()
        if self.decoder != "nano":
            raise ValueError("the demo's latents are nano's: use decode or upscale with another decoder")
        target = self.output if self.recorded else self.output / "comparison.png"
        check_target(target, IMAGE_SUFFIXES, self.overwrite)

        from pixeldecoder.cli.comparison import comparison

        pipeline = self.load()
        picture = comparison(pipeline, self.generator, self.noise_generator, self.call_kwargs())
        save_image(picture, target, self.made(pipeline, size=[*picture.size]))
        print(target)
