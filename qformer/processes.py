"""The processes that torchrun or accelerate started, and what they do together: take turns, share, agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from qformer.errors import QFormerError

Value = TypeVar("Value")
PATIENCE = timedelta(hours=12)
"""How long processes wait for the slowest of them; by default they give up after ten minutes."""


@dataclass(frozen=True)
class Processes:
    """This process among those that do the same work; alone, all of it is its own."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.index == 0

    def share(self, number: int) -> bool:
        """Whether piece `number` of the work is this process's."""
        return number % self.count == self.index

    def gathered(self, values: Sequence[Value]) -> list[Value]:
        """The values of all processes, those of the first one first."""
        if self.count == 1:
            return list(values)
        from accelerate.utils import gather_object

        return list(gather_object(list(values)))

    def agreed(self, work: Callable[[], Value]) -> Value:
        """What this process's work gives, unless that of any failed: then all stop, and none waits for it.

        Raises:
            QFormerError, or what else the work raises: of this process, else of the first that failed.
        """
        if self.count == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        failed = self.gathered([] if error is None else [str(error)])
        if error is not None:
            raise error
        if failed:
            raise QFormerError(f"another process: {failed[0]}")
        return result

    def told(self, work: Callable[[], Value]) -> Value:
        """What the work gives in the first process, told to all; it begins when all are here, whatever it leaves."""
        self.gathered(())
        found = self.agreed(lambda: [work()] if self.first else [])
        return self.gathered(found)[0]

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """See `in_turn`."""
        if self.count == 1:
            return work()
        from accelerate import PartialState

        return in_turn(PartialState(), work)


ALONE = Processes()


def joined() -> Processes:
    """All processes of this command, joined and patient; `ALONE` where it was started as one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)


def in_turn(state: Any, work: Callable[[], Value]) -> Value:
    """What each process's work gives: the first process of all goes first, then the first of each machine, then the
    rest, so that what one writes the others find.

    A process whose work fails says so when all have had their turn, so that none waits for it.  `state` is accelerate's
    `PartialState`.
    """
    mine = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    error: Exception | None = None
    for turn in range(3):
        if turn == mine:
            try:
                result = work()
            except Exception as raised:
                error = raised
        if state.num_processes > 1:
            state.wait_for_everyone()
    if error is not None:
        raise error
    return result
