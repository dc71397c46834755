"""All 26 sets in their official files: those of the ordinary demo, the other eight held-in and nine held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qformer.demo import formats, heldout, moving, thirteen


def write(
    root: Path,
    seed: int,
    *,
    pictures_train: int,
    pictures_test: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write thirteen held-in and thirteen held-out sets under `root`; the same files for the same arguments.

    What the ordinary demo has is written as `formats.write` does; `thirteen`, `heldout` and `moving` say what else.

    Raises:
        DataError: the folder holds other things, or cannot be written; PyAV is missing.
    """
    moving.need_av(root)  # before all the rest is drawn
    size = {"pictures_train": pictures_train, "pictures_test": pictures_test}

    def others(partial: Path, shown: formats.Shown) -> None:
        thirteen.write(partial, shown, seed, **size, advance=advance)
        heldout.write(partial, seed, pictures_test=pictures_test, advance=advance)
        moving.write(partial, seed, films_test=_films(pictures_test), advance=advance)

    formats.write(root, seed, **size, advance=advance, others=others)


def picture_count(pictures_train: int, pictures_test: int) -> int:
    """How many pictures and films `write` makes."""
    pictures = formats.picture_count(pictures_train, pictures_test) + heldout.picture_count(pictures_test)
    return pictures + thirteen.picture_count(pictures_train, pictures_test) + moving.film_count(_films(pictures_test))


def _films(pictures_test: int) -> int:
    """A few more than pictures, since evening out the answers leaves some of two questions a film out."""
    return -(-pictures_test * 21 // 20)
