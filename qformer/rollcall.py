"""A process that is gone is noticed by the others: they say which one it was, and stop.

What processes do together waits for the slowest of them, for hours where one validates.  So a thread beside each counts
up in a store that the first process keeps, and looks whether the others still do.  It answers SIGTERM too, by which
torchrun and SLURM end what is left, since Python itself would not while it waits for others.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from qformer.errors import QFormerError, TrainingError, reason
from qformer.processes import Processes

BEAT = 0.5
"""Seconds between two signs of life."""
SILENCE = 40.0
"""Seconds without one after which a process is gone: a library may keep a living one's thread waiting for some."""
ALARMED = 5.0
"""The same once something has gone wrong."""
GOES_ON = "What was written is whole; the same command goes on from it."
STOPPED = "it was stopped from outside (SIGTERM)."
LEFT = "left "
"""What a process says that is done, and then why, if it should not be."""
TERMINATED = 128 + signal.SIGTERM


class RollCall:
    """This process's place in the store, and what it knows of the others."""

    def __init__(
        self,
        processes: Processes,
        store: Any,
        *,
        beat: float = BEAT,
        silence: float = SILENCE,
        alarmed: float = ALARMED,
        end: Callable[[int], Any] = os._exit,
        write: Callable[[str], Any] = sys.stderr.write,
    ):
        """Join.

        Args:
            processes: this one and how many there are.
            store: a `torch.distributed` store that all of them reach.
            beat, silence, alarmed: see `BEAT`, `SILENCE`, `ALARMED`.
            end: ends this process with an exit code, at once.
            write: is given the last sentence.
        """
        self.processes, self.store = processes, store
        self.beat, self.silence, self.alarmed, self.end, self.write = beat, silence, alarmed, end, write
        self.others = [number for number in range(processes.count) if number != processes.index]
        self.counted, self.left, self.telling = 0, False, threading.Lock()
        self.ending = threading.Lock()
        """Held by whoever says the last sentence: the thread, or what this process itself raises."""
        self.signals, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        self.thread = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self.kept: Any = None
        store.set(f"host {processes.index}", socket.gethostname())
        store.set(str(processes.index), "0")

    def start(self) -> None:
        """Begin to watch; from the main thread SIGTERM is answered too."""
        if threading.current_thread() is threading.main_thread():
            self.kept = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(self.wake)
        self.thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        os.write(self.wake, b"\0")
        if self.thread is not threading.current_thread():
            self.thread.join()
        if self.kept is not None:
            signal.set_wakeup_fd(self.kept[1])
            signal.signal(signal.SIGTERM, self.kept[0])
        os.close(self.signals)
        os.close(self.wake)

    def leave(self, why: str = "") -> None:
        """Say that this process is done, or why it stops; the first one then waits a moment for the others, since the
        store goes with it.
        """
        with suppress(RuntimeError):
            with self.telling:
                self.left = True
                self.store.set(str(self.processes.index), LEFT + why)
            if self.processes.first:
                latest = time.monotonic() + 2 * self.alarmed
                while time.monotonic() < latest and not all(each.startswith(LEFT) for each in self._heard()):
                    time.sleep(self.beat)

    def missing(self) -> str | None:
        """Once something has gone wrong: a sentence about who stopped first or is gone; None where all are alive."""
        try:
            before, latest = self._heard(), time.monotonic() + self.alarmed
            while True:
                self._beat()
                now = self._heard()
                for number, told in zip(self.others, now, strict=True):
                    why = told.removeprefix(LEFT) if told.startswith(LEFT) else ""
                    if why:
                        return why if why.startswith("process ") else f"{self._named(number)} has stopped: {why}"
                silent = [n for n, a, b in zip(self.others, before, now, strict=True) if a == b and a != LEFT]
                if not silent:
                    return None
                if time.monotonic() > latest:
                    return self._gone(silent)
                time.sleep(self.beat)
        except RuntimeError:  # the store is not there
            return self._gone([0])

    def _watch(self) -> None:
        heard: list[str] = []
        since = [time.monotonic()] * len(self.others)
        while True:
            if select.select([self.signals], [], [], self.beat)[0]:
                told = os.read(self.signals, 64)
                if 0 in told:
                    return
                if signal.SIGTERM in told:
                    if missing := self.missing():
                        return self._last(missing)
                    return self._last(f"{STOPPED} {GOES_ON}", TERMINATED, STOPPED)
            try:
                self._beat()
                now = self._heard()
            except RuntimeError:
                return self._last(self._gone([0]))
            since = [
                time.monotonic() if not heard or a != b else past
                for a, b, past in zip(heard or now, now, since, strict=True)
            ]
            heard = now
            late = any(
                told != LEFT and time.monotonic() - past > (self.alarmed if told.startswith(LEFT) else self.silence)
                for told, past in zip(now, since, strict=True)
            )
            if late:
                if missing := self.missing():
                    return self._last(missing)
                since = [time.monotonic()] * len(self.others)  # this one itself was stopped for a while

    def _last(self, sentence: str, code: int = 1, why: str | None = None) -> None:
        """Say it, and end this process wherever it is; `why`: what the others are told, if not the same."""
        if not self.ending.acquire(blocking=False):
            return  # it ends by itself already
        self.write(f"qformer: {sentence}\n")
        sys.stderr.flush()
        self.leave(why or sentence)
        self.end(code)

    def _beat(self) -> None:
        with self.telling:
            self.counted += 1
            if not self.left:  # what was said last stays
                self.store.set(str(self.processes.index), str(self.counted))

    def _heard(self) -> list[str]:
        return [told.decode() for told in self.store.multi_get([str(number) for number in self.others])]

    def _gone(self, numbers: Sequence[int]) -> str:
        named, what = ", ".join(map(self._named, numbers)), "is" if len(numbers) == 1 else "are"
        return f"{named} {what} gone without a word (killed, out of memory, or the machine is down). {GOES_ON}"

    def _named(self, number: int) -> str:
        name = f"process {number} of {self.processes.count}"
        with suppress(RuntimeError):
            return f"{name} on {self.store.get(f'host {number}').decode()}"
        return name


@contextmanager
def roll_call(processes: Processes) -> Iterator[None]:
    """Inside, a process that is gone ends the others within a minute, with a sentence that names it.

    Raises:
        TrainingError: what was done together has failed, since another process is gone or has stopped.
    """
    if processes.count == 1:
        yield
        return
    call = RollCall(processes, _store(processes))
    processes.gathered([None])  # all are in the store
    call.start()
    try:
        yield
    except QFormerError as error:
        with call.ending:
            call.leave(str(error))
        raise
    except RuntimeError as error:  # as what a lost connection raises
        with call.ending:
            missing = call.missing()
            call.leave(missing or reason(error))
        if missing is None:
            raise
        raise TrainingError(missing) from None
    except BaseException as error:
        with call.ending:
            call.leave(f"it was ended by {type(error).__name__}")
        raise
    else:
        call.leave()
    finally:
        call.stop()


def _store(processes: Processes) -> Any:
    """A store of its own, since calls on the one that torch has may wait for each other."""
    from torch.distributed import TCPStore

    host, patience = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=20)
    kept = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience) if processes.first else None
    port = processes.gathered([] if kept is None else [kept.port])[0]
    return kept or TCPStore(host, port, is_master=False, timeout=patience)
