"""The whole: frozen image encoder, trainable connector, frozen LLM; answering, ranking, saving."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor, nn

from qformer import __version__, config, devices, exporting, features, modelcard, starting, weights
from qformer.assemble import Assembler, Item
from qformer.backbones import precision, sharding
from qformer.backbones.language import LanguageTower
from qformer.backbones.vision import FrozenTower, OwnTower, VisionSettings
from qformer.cards import Decoding
from qformer.config import RunConfig
from qformer.devices import sent
from qformer.errors import ConfigError, TrainingError, reason
from qformer.features import Cache, Filler
from qformer.images import ImageTransform
from qformer.nn.qformer import QFormerConnector
from qformer.nn.tokens import Tokens
from qformer.objectives import AnswerLikelihood, Objective
from qformer.processes import ALONE, Processes
from qformer.sample import Batch, Row, Sample, Slot, Video
from qformer.text import Joiner, Rendered
from qformer.untokenized import MissingTokenizer
from qformer.videos import is_video

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "instruction_tokenizer"
CARD_FILE = "README.md"
ADAPTER_FILES = (ADAPTER_FILE, CONFIG_FILE, TOKENIZER_FOLDER, CARD_FILE)
FINGERPRINT = "language.fingerprint"
"""The tensor of an adapter file by which its LLM is known again."""
FORMAT = 1


class VLM(nn.Module):
    """Towers, connector and projection as one module; only the connector is trained, saved and exported.

    N reads, Q queries, P image tokens, V encoder width, L LLM width, T instruction ids.
    """

    def __init__(
        self,
        vision: FrozenTower | OwnTower,
        connector: QFormerConnector,
        language: LanguageTower | None,
        instruction_tokenizer: Any | None,
        settings: RunConfig,
        objective: Objective | None = None,
    ):
        super().__init__()
        self.vision, self.connector = vision, connector
        self.language = cast(LanguageTower, language)  # None where an objective needs no LLM
        self.instruction_tokenizer, self.settings = instruction_tokenizer, settings
        self.objective: Objective = objective or AnswerLikelihood()
        self.recipe: dict[str, Any] = modelcard.trained(settings)
        """Data and recipe of its tuning, as the model card tells them; carried from save to load."""
        self.lavis_projection: str | None = None
        """LAVIS' name of the projection, where it was loaded with one; carried from save to load."""
        self.run: Path | None = None
        """The run it was loaded from; its scores go into the model card."""

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of the objective's parts; the loss is reached here so that wrappers' hooks run."""
        return self.objective.sums(self, batch)

    def encode(self, pixels: Tensor) -> Tokens:
        """(B, 3, H, W) -> tokens (B, P, V) of the frozen encoder, in the connector's dtype; no gradient is kept.

        An encoder in half precision computes in it, whatever autocast says.
        """
        first = next(self.vision.parameters(), None)
        with torch.no_grad(), precision.in_own(None if first is None else first.dtype, self.device):
            tokens = self.vision(sent(pixels, self.device))
        return tokens._replace(values=tokens.values.to(self.connector.dtype))

    def tokens(self, batch: Batch) -> Tokens:
        """Encoder outputs of a batch's pictures: those that it brings, and those of its pixels."""
        if batch.features is None:
            return self.encode(batch.pixels)
        values = sent(batch.features, self.device).to(self.connector.dtype)
        if len(batch.pixels):
            order = sent(torch.tensor([*batch.featured, *batch.opened]).argsort(), self.device)
            values = torch.cat([values, self.encode(batch.pixels).values])[order]
        return Tokens(values)

    def read(self, batch: Batch) -> Tensor:
        """Soft tokens (N, Q, L) of a batch's reads: every picture is encoded once, however many reads it has."""
        return self.connector(*self._reads(batch))

    def seen(self, batch: Batch) -> tuple[Tensor, tuple[Row, ...]]:
        """Soft tokens (N, Q, L) of a batch, and its rows with slots that number them.

        Without a frame embedding these are the reads and the rows themselves.  With one, a read that stands at several
        places in time is told apart there.
        """
        soft = self.read(batch)
        if not self.connector.size.frames:
            return soft, batch.rows
        places: dict[tuple[int, int], int] = {}
        rows = tuple(
            tuple(
                dataclasses.replace(piece, read=places.setdefault((piece.read, piece.frame), len(places)))
                if isinstance(piece, Slot)
                else piece
                for piece in row
            )
            for row in batch.rows
        )
        reads, frames = torch.tensor([*places]).reshape(-1, 2).T
        return self.connector.in_time(soft[sent(reads, soft.device)], frames), rows

    def look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Query outputs (N, Q, D) of a batch's reads, and the mean entropy of their cross-attention over log P."""
        tokens, instruction = self._reads(batch)
        return self.connector.look(tokens, instruction)

    def soft_prompts(
        self, pixels: Tensor, instruction_ids: Tensor | None = None, instruction_mask: Tensor | None = None
    ) -> Tensor:
        """(N, 3, H, W), ids and mask (N, T) of the instruction tokenizer -> soft tokens (N, Q, L)."""
        instruction = None
        if instruction_ids is not None:
            mask = torch.ones_like(instruction_ids) if instruction_mask is None else instruction_mask
            instruction = (instruction_ids.to(self.device), mask.to(self.device).bool())
        return self.connector(self.encode(pixels), instruction)

    @property
    def device(self) -> torch.device:
        """Where the connector is."""
        return self.connector.projection.weight.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that take a gradient, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def train_only(self, parts: Sequence[str]) -> None:
        """Freeze what is in none of the parts (`train.only`); no parts: nothing is frozen.

        Raises:
            ConfigError: nothing is left to train.
        """
        for name, parameter in self.connector.named_parameters():
            if not starting.covers(parts, name):
                parameter.requires_grad_(False)
        if not self.trainable():
            raise ConfigError(
                f"train.only is {list(parts)}, and this Q-Former has nothing of that to train; name other parts, or "
                f"leave it empty to train all of it."
            )

    def _reads(self, batch: Batch) -> tuple[Tokens, tuple[Tensor, Tensor | None] | None]:
        pictures = [read.picture for read in batch.reads]
        tokens = self.tokens(batch)
        if pictures != list(range(batch.pictures)):
            tokens = tokens._replace(pictures=sent(torch.tensor(pictures), self.device))
        return tokens, self._instructions([read.instruction for read in batch.reads])

    def _instructions(self, instructions: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor | None] | None:
        if self.instruction_tokenizer is None:
            return None
        longest = max(map(len, instructions))
        pad = self.instruction_tokenizer.pad_token_id
        ids = sent(torch.tensor([[*each, *[pad] * (longest - len(each))] for each in instructions]), self.device)
        if all(len(each) == longest for each in instructions):
            return ids, None
        lengths = torch.tensor([len(each) for each in instructions])
        return ids, torch.arange(longest) < lengths[:, None]  # stays where real words are found without waiting

    # -- several processes --------------------------------------------------------------------------------------------

    def settle(self, device: torch.device, processes: Processes = ALONE) -> VLM:
        """Put it all on a device; with `language.shard` of the LLM's blocks only this process's part.

        On a GPU the process then takes no attention of cuDNN (`qformer.devices`).  All processes have to
        call this.  DDP then leaves the LLM alone: what it would copy to all is in parts.

        Raises:
            ConfigError: `language.shard` with one process, or with an LLM that cannot be cut into parts.
        """
        devices.choose_attention(device)
        if not self.settings.language.shard or self.language is None:
            return self.to(device)
        if processes.count == 1:
            raise ConfigError(
                "language.shard is true, and there is one process, which would hold the whole LLM; start several "
                "(torchrun --nproc_per_node N -m qformer …), or set it to false."
            )
        self.vision.to(device)
        self.connector.to(device)
        sharding.shard(self.language, device)
        named = (*self.named_parameters(), *self.named_buffers())
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in named if name.startswith("language.")]
        return self

    def together(self) -> AbstractContextManager[None]:
        """Where processes that share the LLM ask it unlike things: see `LanguageTower.together`."""
        return nullcontext() if self.language is None else self.language.together()

    # -- answering ----------------------------------------------------------------------------------------------------

    def joiner(self) -> Joiner:
        """Makes this model's ids from words."""
        joiner = Joiner(
            self.language.tokenizer,
            self.language.profile,
            self.instruction_tokenizer,
            self.settings.qformer.instruction_limit,
        )
        joiner.truncations = self.language.truncations
        return joiner

    def assembler(self, *, training: bool, cache: Cache | None = None) -> Assembler:
        """Makes this model's batches from pictures, or what a cache has of them, and words."""
        room = None if self.language.positions is None else (self.language.positions, self.connector.size.queries)
        seen = self.vision.settings
        return assembler(self.settings, seen, self.joiner(), training=training, room=room, cache=cache)

    @functools.cached_property
    def filler(self) -> Filler | None:
        """What keeps the encoder's features when samples are answered; None where no `vision.cache` is here."""
        kept = self.settings.vision.cache
        if kept is None or not Path(kept).is_dir() or isinstance(self.vision, OwnTower):
            return None
        return features.filler(self.settings, self.vision, training=False, say=to_stderr)

    @torch.no_grad()
    def answer(
        self, samples: Sequence[Sample], instructions: Sequence[str | Rendered], decoding: Decoding
    ) -> list[str]:
        """One generated answer per sample."""
        batch = self._asked(samples, instructions)
        return self.language.generate(*self.seen(batch), **dataclasses.asdict(decoding))

    @torch.no_grad()
    def rank_samples(
        self,
        samples: Sequence[Sample],
        instructions: Sequence[str | Rendered],
        candidates: Sequence[Sequence[str]],
        normalize: str = "sum",
        end: bool = True,
    ) -> list[list[float]]:
        """Log-likelihoods of each sample's candidates, in their order."""
        batch = self._asked(samples, instructions)
        return self.language.rank(*self.seen(batch), candidates, normalize=normalize, end=end)

    @torch.no_grad()
    def generate(self, images: Sequence[Any], prompts: Sequence[str], **decoding: Any) -> list[str]:
        """One answer per prompt.  `images`: a path or PIL image per prompt, or a list of them.

        The path of a video, or of a folder of frames, stands for four of its frames; `Video(path, frames)` for others.

        `decoding` takes the fields of `qformer.cards.Decoding`; what is not given has its defaults.

        Raises:
            ConfigError: an unknown decoding setting or one out of range, another number of images than prompts, or
                what is no picture or no text.
        """
        settings = config.structured(Decoding, [("generate", decoding)])
        pictures = _listed("generate", images, prompts)
        if not prompts:
            return []
        batch = self._prompts(pictures, prompts)
        return self.language.generate(*self.seen(batch), **dataclasses.asdict(settings))

    @torch.no_grad()
    def rank(
        self,
        images: Sequence[Any],
        prompts: Sequence[str],
        candidates: Sequence[str] | Sequence[Sequence[str]],
        normalize: str = "sum",
        end: bool = True,
    ) -> list[list[float]]:
        """Log-likelihoods of candidate answers, in the candidates' order: one list for all prompts or one per prompt.

        normalize: "sum", "mean" (over scored tokens) or "pmi" (sum minus the sum without slots); `end`: whether the
        end mark is scored.

        Raises:
            ConfigError: another number of images or lists than prompts, an empty list, an unknown `normalize`, or what
                is no picture or no text.
        """
        pictures = _listed("rank", images, prompts)
        lists = _choices(candidates, len(prompts))
        if not prompts:
            return []
        batch = self._prompts(pictures, prompts)
        return self.language.rank(*self.seen(batch), lists, normalize=normalize, end=end)

    def _asked(self, samples: Sequence[Sample], instructions: Sequence[str | Rendered]) -> Batch:
        """Samples as prompts; the features of their pictures are kept, where there is a cache."""
        pictures, names = [sample.images for sample in samples], [sample.id for sample in samples]
        if self.filler is None:
            return self._prompts(pictures, instructions, names)
        assembler = self.assembler(training=False, cache=self.filler.cache)
        batch = self._prompts(pictures, instructions, names, assembler)
        return self.filler.complete([batch], assembler.tally)[0]

    def _prompts(
        self,
        pictures: Sequence[Sequence[Any]],
        instructions: Sequence[str | Rendered],
        names: Sequence[str] | None = None,
        assembler: Assembler | None = None,
    ) -> Batch:
        self.eval()
        names = names or [f"prompt {number}" for number in range(len(instructions))]
        items = [
            Item(name, tuple(images), Rendered(text) if isinstance(text, str) else text)
            for name, images, text in zip(names, pictures, instructions, strict=True)
        ]
        return (assembler or self.assembler(training=False))(items, answered=False)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write the adapter alone: weights, settings, the LLM's profile and fingerprint, the instruction tokenizer, and
        a model card.

        The towers are named, never copied.  The directory appears whole or not at all; an adapter that is there is
        replaced.

        Raises:
            ConfigError: the directory holds something else.
            TrainingError: it cannot be written.
        """
        directory = Path(directory).resolve()
        _only_own_files("save", directory, ADAPTER_FILES)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with whole_directory(directory) as work:
            self.write(work)

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **hub: Any
    ) -> None:
        """What `save` does, under the name that transformers has for it; `push_to_hub` uploads it as well.

        `repo_id`: OWNER/NAME on the hub, by default the directory's name; `hub`: further arguments of `push_to_hub`.
        """
        self.save(save_directory)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **hub)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> VLM:
        """What `qformer.load` does, under the name that transformers has for it."""
        loading = import_module("qformer.loading")  # which stands on this module
        return cast(VLM, loading.load(source, **options))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a Q-Former adapter",
    ) -> str:
        """Upload what `save` writes to a model repository of the hub, made if need be; the commit's address.

        Raises:
            ConfigError: the hub cannot be reached or refuses; says why.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "adapter")
            try:
                place = api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=place.repo_id,
                    folder_path=Path(folder) / "adapter",
                    revision=revision,
                    commit_message=commit_message,
                )
            except Exception as error:  # the hub's client raises many kinds
                raise ConfigError(
                    f"{repo_id}: the hub does not take the adapter ({reason(error)}); log in (hf auth login), or save "
                    f"it here."
                ) from None
        return str(commit.commit_url)

    def export_transformers(self, directory: str | Path) -> tuple[str, ...]:
        """Write the whole model, towers and all, as transformers' InstructBLIP (BLIP-2 where no instruction is read).

        It loads with `InstructBlipForConditionalGeneration.from_pretrained` and `InstructBlipProcessor`.  The
        directory appears whole or not at all.

        Returns:
            What transformers will do otherwise, in sentences; nothing in most cases.

        Raises:
            ConfigError: transformers cannot express the model (says why), or the directory is not empty.
        """
        directory = Path(directory).resolve()
        _only_own_files("export", directory, ())
        directory.parent.mkdir(parents=True, exist_ok=True)
        with whole_directory(directory) as work:
            return exporting.to_transformers(self, work)

    def write(self, directory: Path) -> None:
        """The adapter's files into a directory that is there."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.connector.state_dict().items()}
        tensors[FINGERPRINT] = self.language.fingerprint().cpu().contiguous()
        weights.save_tensors(directory / ADAPTER_FILE, tensors, {"format": str(FORMAT)})
        description = {
            "format": FORMAT,
            "qformer_version": __version__,
            "vision": dataclasses.asdict(self.settings.vision),
            "language": dataclasses.asdict(self.settings.language),
            "qformer": dataclasses.asdict(self.settings.qformer),
            "max_pixels": self.settings.data.max_pixels,
            "size": dataclasses.asdict(self.connector.size),
            "norm_eps": self.connector.norm.eps,
            "lavis_projection": self.lavis_projection,
            "profile": self.language.profile.as_dict(),
            "recipe": self.recipe,
        }
        (directory / CONFIG_FILE).write_text(json.dumps(description, indent=2), encoding="utf-8")
        scores = modelcard.read_scores(self.run) if self.run is not None else []
        card = modelcard.text(self.settings, self.connector.size, self.recipe, scores)
        (directory / CARD_FILE).write_text(card, encoding="utf-8")
        if self.instruction_tokenizer is not None and not isinstance(self.instruction_tokenizer, MissingTokenizer):
            self.instruction_tokenizer.save_pretrained(directory / TOKENIZER_FOLDER)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """An empty directory to write to, which takes the place of `directory` when all is written, or goes away.

    Raises:
        TrainingError: it cannot be written (disk full); what was there before is left as it was.
    """
    work, old = (directory.parent / f".{directory.name}.{os.getpid()}{ending}" for ending in ("", ".old"))
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            for file in work.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if directory.exists():
                os.replace(directory, old)
            os.replace(work, directory)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            if old.exists() and not directory.exists():
                os.replace(old, directory)
            raise
    except (OSError, RuntimeError, TrainingError) as error:
        raise TrainingError(
            f"{directory}: it cannot be written ({error}); what was there before is whole. Make room, then start the "
            f"same command again."
        ) from None


def _only_own_files(call: str, directory: Path, own: Sequence[str]) -> None:
    """Refuse to put what is written in the place of other files."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{call}: {directory} is a file; give a directory that is not there yet.")
    there = directory.iterdir() if directory.exists() else ()
    foreign = sorted(file.name for file in there if file.name not in own)
    if foreign:
        raise ConfigError(
            f"{call}: {directory} holds {', '.join(foreign[:3])}{' …' if len(foreign) > 3 else ''}, which would be "
            f"lost; give a directory of its own, such as {directory / ('adapter' if own else 'whole')}."
        )


def assembler(
    settings: RunConfig,
    vision: VisionSettings,
    joiner: Joiner,
    *,
    training: bool,
    room: tuple[int, int] | None = None,
    cache: Cache | None = None,
) -> Assembler:
    """The assembler of a run, for an encoder that wants its pictures so; `room` and `cache`: see `Assembler`."""
    transform = settings.vision.train_transform if training else settings.vision.eval_transform
    return Assembler(
        joiner,
        ImageTransform(transform, vision.size, vision.mean, vision.std, vision.interpolation),
        settings.data.max_pixels,
        root=Path(settings.data.root),
        room=room,
        cache=cache,
    )


def to_stderr(line: str) -> None:
    """Where a report goes that nobody asks for."""
    print(line, file=sys.stderr)  # noqa: T201


def _listed(call: str, images: Sequence[Any], prompts: Sequence[str]) -> list[Sequence[Any]]:
    """The pictures of each prompt, checked as the prompts are: both come from a user's own code."""
    for name, given in (("images", images), ("prompts", prompts)):
        if not isinstance(given, list | tuple):
            raise ConfigError(f"{call}: {name} is a {type(given).__name__}; it takes a list, even of one.")
    if len(images) != len(prompts):
        raise ConfigError(
            f"{call}: {len(images)} images for {len(prompts)} prompts; give one each, or lists of several."
        )
    listed: list[Sequence[Any]] = [list(each) if isinstance(each, list | tuple) else [each] for each in images]
    for number, (pictures, prompt) in enumerate(zip(listed, prompts, strict=True)):
        if not isinstance(prompt, str):
            raise ConfigError(f"{call}: prompts[{number}] is a {type(prompt).__name__}; it takes text.")
        if not pictures:
            raise ConfigError(f"{call}: images[{number}] is an empty list; give at least one picture to a prompt.")
        for picture in pictures:
            if not isinstance(picture, str | Path | bytes | Image | Video):
                raise ConfigError(
                    f"{call}: images[{number}] holds a {type(picture).__name__}; it takes a path, the bytes of a file, "
                    f"a PIL image, or a Video."
                )
    return [[_as_video(picture) for picture in pictures] for pictures in listed]


def _as_video(picture: Any) -> Any:
    """A video where a path is that of one."""
    return Video(Path(picture)) if isinstance(picture, str | Path) and is_video(picture) else picture


def _choices(candidates: Sequence[str] | Sequence[Sequence[str]], prompts: int) -> list[list[str]]:
    """A list of candidates for each prompt, from one list for all or one per prompt."""
    if not isinstance(candidates, list | tuple):
        raise ConfigError(f"rank: candidates is a {type(candidates).__name__}; it takes a list of texts, or of lists.")
    shared = bool(candidates) and all(isinstance(each, str) for each in candidates)
    lists: Sequence[Any] = [candidates] * prompts if shared else candidates
    if len(lists) != prompts:
        raise ConfigError(f"rank: {len(lists)} lists of candidates for {prompts} prompts; give one each.")
    for number, each in enumerate(lists):
        if not isinstance(each, list | tuple) or not all(isinstance(text, str) for text in each):
            raise ConfigError(f"rank: candidates[{number}] is no list of texts; give one list for all, or one each.")
    return [[str(text) for text in each] for each in lists]
