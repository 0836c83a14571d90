"""A call begins and ends; what a callback may read and change of it meanwhile, each thread of its own: `CallsMixin`."""

import math
import numbers
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pixeldecoder.plan import Plan


@dataclass(eq=False)
class Call:
    """What a callback may read and change of the call that it is in."""

    guidance_scale: float
    num_timesteps: int
    interrupt: bool = False
    running: bool = True
    layout: Plan | None = None

    def check_interrupt(self) -> None:
        if self.interrupt:
            raise Interrupted


class Interrupted(BaseException):
    """Ends the sampling of a call that is to stop."""


class CallsMixin:
    """What diffusers' callbacks expect of a pipeline."""

    config: Any
    _calls: dict[int, Call]
    """The last one of each thread."""

    @property
    def guidance_scale(self) -> float:
        return self._read_call().guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._read_call().num_timesteps

    @property
    def layout(self) -> Plan | None:
        """How the last call was cut into tiles and chunks."""
        return self._read_call().layout

    @property
    def interrupt(self) -> bool:
        return self._read_call().interrupt

    # The names that diffusers' callbacks assign to; here each call has its own, so that threads do not meet.
    @property
    def _guidance_scale(self) -> float:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        for call in self._addressed_calls():
            call.guidance_scale = value

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        for call in self._addressed_calls():
            call.interrupt = value

    @contextmanager
    def _running(self, guidance_scale: float | None, num_timesteps: int) -> Iterator[Call]:
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if not isinstance(guidance_scale, numbers.Real) or not math.isfinite(float(guidance_scale)):
            raise ValueError(f"expected a guidance_scale such as 5, got {guidance_scale!r}")
        call = self._calls[threading.get_ident()] = Call(float(guidance_scale), num_timesteps)
        try:
            yield call
        finally:
            call.running = False

    def _read_call(self) -> Call:
        """This thread's last call, or if it made none the last of another."""
        calls = dict(self._calls)
        if not calls:
            raise AttributeError("no call yet")
        return calls.get(threading.get_ident()) or list(calls.values())[-1]

    def _addressed_calls(self) -> list[Call]:
        """The call that runs in this thread; from a thread without one, all that run."""
        calls = dict(self._calls)
        running = [call for call in calls.values() if call.running]
        own = calls.get(threading.get_ident())
        return [own] if own in running else running
