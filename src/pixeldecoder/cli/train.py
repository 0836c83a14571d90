"""Settings in, a trained decoder out: `train`, `distill`."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pixeldecoder.cli.parsing import parse


@dataclass(kw_only=True)
class Train:
    """Train a prior or a teacher.

    Settings come from the recipe, then from the YAML file, then from the command line;
    `pixeldecoder train teacher --help` lists them.

    Example: pixeldecoder train teacher --config my.yaml --data.source photos/ --steps 1000
    """

    stage: Annotated[Literal["prior", "teacher"], tyro.conf.Positional]
    """What to train."""
    recipe: str = "paper"
    """"paper", or for a teacher "nano"."""
    config: Path | None = None
    """YAML file, such as the one beside every checkpoint."""


@dataclass(kw_only=True)
class Distill:
    """Distil a teacher to 4 steps (DMD2).

    Settings come from the recipe, then from the YAML file, then from the command line; `pixeldecoder distill --help`
    lists them.

    Example: pixeldecoder distill --model teacher/ --encoder nano --data.source photos/
    """

    recipe: str = "paper"
    """"paper" or "nano"."""
    config: Path | None = None
    """YAML file, such as the one beside every checkpoint."""


def run_training(stage: str, args: list[str]) -> None:
    """`args` without the command and the stage."""
    from pixeldecoder.training.config import RECIPES, check, read_yaml, refuse_code

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", default="paper")
    first.add_argument("--config", type=Path)
    command = "distill" if stage == "student" else f"train {stage}"
    try:
        found, rest = first.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (see pixeldecoder {command} --help)") from None
    if found.recipe not in RECIPES[stage]:
        raise ValueError(f"--recipe {found.recipe}: expected {' or '.join(RECIPES[stage])}")
    default = RECIPES[stage][found.recipe]()
    if found.config is not None:
        default = read_yaml(found.config, default)
    config = parse(type(default), rest, f"pixeldecoder {command}", default)
    if found.config is not None:
        refuse_code(config, found.config, rest)
    check(config)  # before the libraries, which take seconds

    from pixeldecoder.training.loop import train

    print(train(config))
