"""The records that travel: what was read (`Sample`) and what a model is given (`Batch`).  No torch is needed here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


FRAMES = 4
"""Frames of a video that are looked at where nothing else is said, as in the paper's evaluation."""


@dataclass(frozen=True)
class Packed(ABC):
    """A picture that is no file of its own: a member of an archive, a cell of a table.  Read when it is opened."""

    container: Path
    name: str
    """Tells it apart inside its container."""

    def __str__(self) -> str:
        return f"{self.container}/{self.name}"

    @property
    def identity(self) -> str:
        """Tells the picture itself apart, where a container may hold it more than once."""
        return self.name

    @abstractmethod
    def read(self) -> bytes:
        """The bytes of the picture's file.

        Raises:
            DataError: it is not there, cannot be read, or is larger than any picture should be.
        """


@dataclass(frozen=True)
class Video:
    """A video file, or a folder of frames, and which of its frames are looked at.

    `frames`: how many, evenly spread from the first to the last; or which, by their numbers from 0.
    """

    path: Path | Packed
    frames: int | tuple[int, ...] = FRAMES

    @property
    def count(self) -> int:
        """How many frames are looked at: reads it has, and slots it takes."""
        return self.frames if isinstance(self.frames, int) else len(self.frames)


@dataclass(frozen=True)
class Turn:
    """One exchange of a dialogue."""

    instruction: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One record as a file has it; nothing is rendered or tokenised yet.

    `fields` holds what the file says by name (question, options, ocr, context …) and fills the templates.
    `references` keeps duplicates: ten annotators give ten answers.  `candidates` are the record's own choices.
    """

    id: str
    task: str
    images: tuple[Path | bytes | Packed | Video, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    references: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """Token ids of the LLM; a trained span is one the loss is taken over."""

    ids: tuple[int, ...]
    trained: bool = False


@dataclass(frozen=True)
class Slot:
    """The place of the soft tokens of one read; `frame` is its number within a video, 0 of a picture."""

    read: int
    frame: int = 0


Row = tuple[Text | Slot, ...]


@dataclass(frozen=True)
class Read:
    """The Q-Former looking at one picture with one instruction in mind (ids of its own tokenizer)."""

    picture: int
    instruction: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """What one forward pass is given.

    pixels: (N, 3, H, W) float32, each distinct picture once.  `reads` index pictures, slots in `rows` index reads.
    `samples` names the sample behind each row, for error messages.  `weight` 0 marks a dummy that only keeps the
    number of forward passes equal over ranks.

    With a feature cache (`vision.cache`) some pictures, or all, are there as what the encoder gives for them:
    `features` (M, P, V) of the pictures whose numbers are `featured`.  `pixels` then holds the others alone, and `keys`
    by what name each of those is to be kept.
    """

    pixels: Tensor
    reads: tuple[Read, ...]
    rows: tuple[Row, ...]
    samples: tuple[str, ...] = ()
    weight: float = 1.0
    features: Tensor | None = None
    featured: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """The same, pictures and features where a GPU fetches them without being waited for (`DataLoader` asks)."""
        features = None if self.features is None else self.features.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), features=features)

    @property
    def pictures(self) -> int:
        """How many distinct pictures there are."""
        return len(self.pixels) + len(self.featured)

    @property
    def opened(self) -> list[int]:
        """The numbers of the pictures that `pixels` holds."""
        known = set(self.featured)
        return [number for number in range(self.pictures) if number not in known]


def row_length(row: Row, soft_tokens: int) -> int:
    """Positions a row takes in the LLM when each slot takes `soft_tokens`."""
    return sum(soft_tokens if isinstance(piece, Slot) else len(piece.ids) for piece in row)


def trained_tokens(row: Row) -> int:
    """Number of tokens of a row that the loss is taken over."""
    return sum(len(piece.ids) for piece in row if isinstance(piece, Text) and piece.trained)
