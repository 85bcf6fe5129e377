"""A draft model that works beside the target: on a thread of its own (the CPU), on a stream of its own (CUDA)."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import torch

from simsd.ambient import undisturbed
from simsd.decode.exchange import Commands
from simsd.decode.slots import Slots


class DraftWorker:
    """Slots and commands of the draft's own, on its device, and whoever works on them: one thing after the other.

    Attributes:
        slots, commands: copies of the target's as they were last handed over; the draft works on these.
        drafted: the slots as they were last collected, on the target's device.
        stream: of the draft's, on CUDA; None: a thread works.
    """

    def __init__(self, slots: Slots, device: torch.device) -> None:
        """`slots`: the target's."""
        self.slots, self.commands = slots.twin(device), Commands(slots.count, device)
        self.drafted = self.slots if device == slots.device else slots.twin(slots.device)
        self._target_device, self.stream = slots.device, None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
        else:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "simsd-draft")
            self._work: concurrent.futures.Future | None = None

    def hand_over(self, slots: Slots, commands: Commands, noise: bool) -> None:
        """The draft goes on from here."""
        self.slots.copy(slots, noise)
        self.commands.copy(commands)

    def collect(self, noise: bool) -> None:
        """Brings `drafted` up to date, behind `join`."""
        if self.drafted is not self.slots:
            self.drafted.copy(self.slots, noise)

    def allow_noise(self, vocabulary: int, dtype: torch.dtype) -> None:
        """See `Slots.allow_noise`."""
        for slots in (self.slots, self.drafted):
            slots.allow_noise(vocabulary, dtype)

    def begin(self, work: Callable, *arguments: Any) -> None:
        """Does it meanwhile, behind what the target's device was given before."""
        if self.stream is not None:
            return self.run(work, *arguments)
        self._work = self._thread.submit(_in_turn, work, arguments)

    def run(self, work: Callable, *arguments: Any) -> Any:
        """Does it behind what began before; on CUDA the host does not wait."""
        if self.stream is None:
            self.join()
            return work(*arguments)
        self.stream.wait_stream(torch.cuda.current_stream(self._target_device))
        with torch.cuda.stream(self.stream):
            return work(*arguments)

    def join(self) -> None:
        """What comes then comes behind all that began. Raises what that raised; on CUDA the host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self._target_device).wait_stream(self.stream)
        elif self._work is not None:
            concurrent.futures.wait([self._work])  # an interrupt here leaves it to be waited for
            work, self._work = self._work, None
            work.result()


@undisturbed()
@torch.inference_mode()
def _in_turn(work: Callable, arguments: tuple) -> None:
    work(*arguments)
