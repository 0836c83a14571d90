"""An error in; out comes one line on what a user can do about it."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    "evaluate": ("braceexpand", "jinja2", "matplotlib", "torchmetrics", "webdataset"),
    "iqa": ("onnxruntime", "open_clip", "pyiqa", "rapidocr", "spandrel", "torch_fidelity"),
    "lora": ("peft",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "quantize": ("bitsandbytes", "torchao"),
    "serve": ("fastapi", "fastapi_offline", "gradio", "prometheus_client", "python_multipart", "uvicorn"),
    "ray": ("ray",),
    "train": ("braceexpand", "matplotlib", "peft", "pydantic", "tensorboard", "webdataset", "yaml"),
    "bulk": ("braceexpand", "fsspec", "pyarrow", "ray"),
}
"""Modules of the optional dependencies in pyproject.toml."""
OUT_OF_MEMORY = re.compile(
    r"out of memory|(can't|cannot|unable to) allocate|not enough memory|ALLOC_FAILED"
    r"|could not create a primitive$",  # oneDNN's; of what it cannot do it says more
    re.IGNORECASE,
)


LONGEST = 1200
"""Letters of a message, which may cite a stranger's file."""


def explain(error: Exception, command: str) -> str | None:
    """One line on what a user can do about an error; `None` for a fault of ours, whose traceback is wanted."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    training = command in ("train", "distill")
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0]
        extras = ["train", *EXTRAS] if training else EXTRAS
        extra = next((extra for extra in extras if module in EXTRAS[extra]), None)
        return f"{text}: pip install 'pixeldecoder[{extra}]'" if extra else text
    if out_of_memory(error):
        smaller = "a smaller --micro-batch-size" if training else "--max-memory (such as 6GB) or a smaller --tile"
        return f"out of memory: try {smaller} ({text[:200]})"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile does not work here: {text[:300]}"
    if isinstance(error, ValueError | OSError) or type(error).__name__ == "SafetensorError":
        return text
    return None


def printable(text: str) -> str:
    """What strangers call their files and tensors shall not steer the terminal: shown as Python writes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def out_of_memory(error: BaseException) -> bool:
    """Whether it is PyTorch's, a device's or Python's way to say so."""
    told = isinstance(error, RuntimeError | OSError) and OUT_OF_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(told)


def require(user: str, extra: str, *modules: str) -> None:
    """See, before any work is done, that modules of an optional dependency are there.

    Args:
        user: who needs them, as the message names it.
        extra: of `EXTRAS`.

    Raises:
        ValueError: some are missing; the message says how to install them.
    """
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ValueError(f"{user} needs {' and '.join(missing)}: pip install 'pixeldecoder[{extra}]'")


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Whatever is raised at a broken folder, or in a function of one's own, as a ValueError that names it."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A ValueError is meant for people, but not those of a parser.
        if (
            OUT_OF_MEMORY.search(str(error))
            or type(error) is ValueError
            or type(error).__module__.startswith(__package__)
        ):
            raise
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Puts the name of a file or an option before an error that does not say it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(name) in str(error) else f"{name}: {error}") from None
