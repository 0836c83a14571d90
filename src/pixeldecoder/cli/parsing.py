"""A dataclass of options and a command line in, the dataclass filled out; or one line that says what is wrong."""

import contextlib
import dataclasses
import inspect
import io
import re
import typing
from typing import Annotated, Any, TypeVar

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

Options = TypeVar("Options")
_REGISTRY = ConstructorRegistry()


def parse(kind: type[Options], args: list[str], prog: str, default: Options | None = None) -> Options:
    """`args` as a `kind`; --help prints and exits.

    Raises:
        ValueError: what tyro says of them in a box, in one line, what was meant by a mistyped option included.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                args=args,
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                registry=_REGISTRY,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(f"{_in_one_line(complaint.getvalue())} (see {prog} --help)") from None


def _in_one_line(box: str) -> str:
    """Of a box (its frame drawn, or spaces) of sections and indented explanations: what is wrong and what was meant."""
    lines = [line[2:].rstrip("│ ") for line in box.splitlines() if line.startswith(("│ ", "  "))]
    told = []
    for section in re.split(r"\n[─-]{5,}\n", "\n".join(lines)):
        if not section.startswith(("For full helptext", "Argument helptext")):
            # Eight spaces: the text of an option that is named above it.
            told.append(" ".join(line.strip() for line in section.split("\n") if line.strip() and line[:8].strip()))
    # What follows would be Python's own words for "not a number".
    return re.sub(r" Got errors: .*", "", "; ".join(told))


@_REGISTRY.struct_rule
def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """As tyro has it, but texts flow whatever the line breaks of their docstrings, what is required comes first, then
    what is the command's own, and a default of nothing is left to the text."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    texts: dict[str, str] = {}
    for parent in reversed(info.type.__mro__[:-1]):
        for param in docstring_parser.parse_from_object(parent).params:
            texts[param.arg_name] = " ".join((param.description or "").split())
    fields = []
    for field in dataclasses.fields(info.type):
        if not field.init:
            continue
        if dataclasses.is_dataclass(info.default):
            default = getattr(info.default, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = tyro.MISSING_NONPROP if field.default is dataclasses.MISSING else field.default
        hint: Any = hints[field.name]
        if default is None or default in ("", (), {}):
            hint = Annotated[hint, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="")]
        fields.append(StructFieldSpec(field.name, hint, default, texts.get(field.name)))
    own = inspect.get_annotations(info.type)
    fields.sort(key=lambda field: (field.default is not tyro.MISSING_NONPROP, field.name not in own))
    return StructConstructorSpec(info.type, tuple(fields))
