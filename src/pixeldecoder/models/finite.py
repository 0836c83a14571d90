"""A network that computed NaN in, and its computation once more; where they came from out."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn


class _FoundError(BaseException):
    """Ends the computation at the first layer that is at fault."""


def first_not_finite(networks: Mapping[str, nn.Module], compute: Callable[[], Any]) -> str | None:
    """Which weights, or else which layer's result, hold the first NaN or infinite value; `None` if none does.

    Args:
        networks: by the names that they are told by.
        compute: what made such values, to be done once more, as far as that layer.
    """
    for network, module in networks.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            with suppress(RuntimeError):  # of kinds of numbers that have neither, and of weights that are elsewhere now
                if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
                    return f"the weights {network}.{name}, in {bad} of {tensor.numel()} values"
    thread, hooks = threading.get_ident(), []

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if threading.get_ident() != thread or all(one.isfinite().all() for one in _tensors(result)):
            return
        given = all(one.isfinite().all() for one in _tensors((args, kwargs)))
        raise _FoundError(f"{'the result of' if given else 'what is given to'} {name} ({type(module).__name__})")

    for network, module in networks.items():
        for name, layer in module.named_modules():
            hook = partial(look, f"{network}.{name}".rstrip("."))
            hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        compute()
    except _FoundError as found:
        return str(found)
    finally:
        for handle in hooks:
            handle.remove()
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
