"""Whether the model hub can be asked at all, found out once instead of name by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5.0
"""Seconds that the hub is given to answer."""


def reachable() -> bool:
    """Whether the hub answers, with whatever."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # its client raises many kinds, and one of its own where it was told to stay offline
        return False
    return True


@contextmanager
def asked_if_there() -> Iterator[None]:
    """Inside, names are looked up in the hub's cache alone where the hub cannot be reached.

    Its client asks five times for every file of every name, with longer and longer pauses, before it gives up.
    """
    from huggingface_hub import constants

    told = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = told or not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = told
