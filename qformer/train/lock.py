"""One run at a time writes to a run directory."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from qformer.errors import TrainingError

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have none; there everyone must look out for himself."""

_held: set[TextIO] = set()


def _let_go() -> None:
    """In a forked data worker: a lock goes only with the last process that has its file open, and a worker lives on
    for a while where the run itself was killed.
    """
    for opened in _held:
        opened.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """The run directory, made if need be, for this process alone.

    The lock is the system's own and goes with the process, however it ends; the file that it is on stays, unless it
    would be all that a new directory holds.

    Raises:
        TrainingError: another run has it, or the directory cannot be written.
    """
    made = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        opened = (run / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"{run}: it cannot be written ({error.strerror or error}); make room or give another output."
        ) from None
    with opened:
        try:
            import fcntl

            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            opened.seek(0)
            owner = opened.read().strip()
            raise TrainingError(
                f"{run}: another run is writing there{f' ({owner})' if owner else ''}; wait until it has ended, or "
                f"give another output."
            ) from None
        except (ImportError, OSError) as error:
            if not isinstance(error, ImportError) and error.errno not in NO_LOCKS:
                raise
        else:
            _held.add(opened)
            opened.truncate(0)
            opened.write(f"process {os.getpid()} on {socket.gethostname()}")
            opened.flush()
        try:
            yield
        finally:
            _held.discard(opened)
            if made and [entry.name for entry in run.iterdir()] == [LOCK_FILE]:  # refused before anything was written
                (run / LOCK_FILE).unlink()
                run.rmdir()
