"""A step that runs out of memory is done again with half the micro-batch, on all ranks alike."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size

from lilt import distributed
from lilt.train.engine import recover
from lilt.train.learner import Learner
from lilt.train.place import Place
from lilt.train.randomness import random_state, set_random_state
from lilt.train.step import Step
from lilt.train.stop import Stop

PROBATION = 2  # steps; an optimizer has its moments from the second on
PATIENCE = timedelta(minutes=10)
LOCKSTEP = timedelta(minutes=1)  # where ranks wait for one another in every block


class _OtherRankError(Exception):
    """Another rank ran out of memory."""


class Shrink:
    """Does steps, and again those that run out of memory, with the random numbers of the first time.

    Half the micro-batch is the same batch and the same gradient. Its size is part of the resume state. Ranks ask one
    another, on the host and not on the device, before they wait for one another there: once a step, and twice where it
    has several pieces. With it they tell whether they were asked to stop: stopping is the same on all ranks.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        learner: Learner,
        place: Place,
        micro_batch: int | None,
        say: Callable[[str], None],
        stop: Stop,
    ):
        self.accelerator, self.learner, self.place = accelerator, learner, place
        self.micro_batch, self.say, self.stop = micro_batch, say, stop
        self.stopping = False
        self.host = distributed.HostGroup()

    def __call__(self, rows: int, step: Callable[..., Step]) -> Step:
        """Do a step of so many rows, as often as it takes: step(micro_batch, ready=…, careful=…).

        Raises ValueError where a single row is too much.
        """
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:  # which updates weights on the way back
            return step(self._size)
        state = random_state(accelerator.device)
        if self._size != self.place.micro_batch:  # at the start, and where a run goes on with a smaller one
            self.place.micro_batch, self.place.proved = self._size, 0
        while True:
            # until a size has proved itself nothing is exchanged on the way back, where nobody could be told
            careful = self.host.world > 1 and self.place.proved < PROBATION and not accelerator.is_fsdp2
            reason = ""
            try:
                done = step(self._size, ready=self._ready, careful=careful)
            except _OtherRankError:
                pass
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                reason = str(error).partition("\n")[0] or type(error).__name__
                self._tell(rows)
            else:
                self.place.proved += 1
                return done
            # out here the error is gone, and with it the frames that held tensors
            self._halve(rows, reason)
            set_random_state(accelerator.device, state)

    @property
    def _size(self) -> int | None:
        return min((size for size in (self.place.micro_batch, self.micro_batch) if size), default=None)

    def _ready(self) -> None:
        ran_out, self.stopping = self.host.any(self.place.step, False, self.stop.asked)
        if ran_out:
            raise _OtherRankError

    def _tell(self, rows: int) -> None:
        """Say to the others that this rank has run out of memory, when they ask."""
        patience = LOCKSTEP if self.accelerator.is_fsdp2 else PATIENCE
        try:
            self.host.any(self.place.step, True, self.stop.asked, patience=patience)
        except RuntimeError as error:
            raise ValueError(
                f"step {self.place.step + 1} ran out of memory on rank {distributed.rank()} alone, with "
                f"{min(rows, self._size or rows)} pairs at once, and the other ranks wait for it where they cannot be "
                f"told; expected the same memory on all ranks; start again, or go on from the last state with "
                f"--resume, with --micro_batch {self._half(rows)}"
            ) from error

    def _half(self, rows: int) -> int:
        return min(rows, self._size or rows) // 2

    def _halve(self, rows: int, reason: str) -> None:
        reasons = {rank: why for rank, why in enumerate(distributed.gather_objects(reason)) if why}
        which = "" if self.host.world == 1 else f" on rank {', '.join(map(str, reasons))}"
        half = self._half(rows)
        said = f"step {self.place.step + 1} ran out of memory{which} ({next(iter(reasons.values()))})"
        if half == 0:
            raise ValueError(
                f"{said} with one pair at once; expected memory for one; use --checkpointing, --precision bf16, fewer "
                "--train_tokens, a smaller --image_px, or a policy that trains upper blocks alone, such as last(2)"
            )
        self.place.micro_batch, self.place.proved = half, 0
        for parameter in self.learner.trained().values():
            parameter.grad = None
        recover(self.accelerator, self.learner)
        gc.collect()
        if self.accelerator.device.type != "cpu":
            torch.accelerator.empty_cache()
        self.say(f"{said}; it is done again with {half} pairs at once, and so are all others from now on")
