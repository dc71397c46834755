"""The whole: frozen image encoder, trainable connector, frozen LLM; building, answering, ranking, saving, loading."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qformer import __version__, config, resources, weights
from qformer.assemble import Assembler, Item
from qformer.backbones import language as language_backbone
from qformer.backbones import vision as vision_backbone
from qformer.cards import Decoding
from qformer.config import LanguageConfig, QFormerConfig, RunConfig
from qformer.errors import ConfigError, TrainingError
from qformer.images import ImageTransform
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.nn.tokens import Tokens
from qformer.objectives import AnswerLikelihood, Objective
from qformer.sample import Batch, Sample
from qformer.text import Joiner, Profile, Rendered

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "instruction_tokenizer"
FORMAT = 1


class VLM(nn.Module):
    """Towers, connector and projection as one module; only the connector is trained, saved and exported.

    N reads, Q queries, P image tokens, V encoder width, L LLM width, T instruction ids.
    """

    def __init__(
        self,
        vision: nn.Module,
        connector: QFormerConnector,
        language: nn.Module | None,
        instruction_tokenizer: Any | None,
        settings: RunConfig,
        objective: Objective | None = None,
    ):
        super().__init__()
        self.vision, self.connector, self.language = vision, connector, language
        self.instruction_tokenizer, self.settings = instruction_tokenizer, settings
        self.objective: Objective = objective or AnswerLikelihood()

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of the objective's parts; the loss is reached here so that wrappers' hooks run."""
        return self.objective.sums(self, batch)

    def encode(self, pixels: Tensor) -> Tokens:
        """(B, 3, H, W) -> tokens (B, P, V) of the frozen encoder, in the connector's dtype; no gradient is kept."""
        with torch.no_grad():
            tokens = self.vision(pixels.to(self.device))
        return tokens._replace(values=tokens.values.to(self.connector.dtype))

    def read(self, batch: Batch) -> Tensor:
        """Soft tokens (N, Q, L) of a batch's reads: every picture is encoded once, however many reads it has."""
        return self.connector(*self._reads(batch))

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

    def _reads(self, batch: Batch) -> tuple[Tokens, tuple[Tensor, Tensor] | None]:
        pictures = torch.tensor([read.picture for read in batch.reads], device=self.device)
        tokens = self.encode(batch.pixels)
        mask = None if tokens.mask is None else tokens.mask[pictures]
        tokens = Tokens(tokens.values[pictures], mask, tokens.grid)
        return tokens, self._instructions([read.instruction for read in batch.reads])

    def _instructions(self, instructions: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor] | None:
        if self.instruction_tokenizer is None:
            return None
        longest = max(map(len, instructions))
        pad = self.instruction_tokenizer.pad_token_id
        ids = torch.tensor([[*each, *[pad] * (longest - len(each))] for each in instructions], device=self.device)
        lengths = torch.tensor([len(each) for each in instructions], device=self.device)
        return ids, torch.arange(longest, device=self.device) < lengths[:, None]

    # -- answering ----------------------------------------------------------------------------------------------------

    def joiner(self) -> Joiner:
        """Makes this model's ids from words."""
        return Joiner(
            self.language.tokenizer,
            self.language.profile,
            self.instruction_tokenizer,
            self.settings.qformer.instruction_limit,
        )

    def assembler(self, *, training: bool) -> Assembler:
        """Makes this model's batches from pictures and words."""
        return assembler(self.settings, self.vision, self.joiner(), training=training)

    @torch.inference_mode()
    def answer(
        self, samples: Sequence[Sample], instructions: Sequence[str | Rendered], decoding: Decoding
    ) -> list[str]:
        """One generated answer per sample."""
        batch = self._prompts([sample.images for sample in samples], instructions)
        return self.language.generate(self.read(batch), batch.rows, **dataclasses.asdict(decoding))

    @torch.inference_mode()
    def rank_samples(
        self,
        samples: Sequence[Sample],
        instructions: Sequence[str | Rendered],
        candidates: Sequence[Sequence[str]],
        normalize: str = "sum",
        end: bool = True,
    ) -> list[list[float]]:
        """Log-likelihoods of each sample's candidates, in their order."""
        batch = self._prompts([sample.images for sample in samples], instructions)
        return self.language.rank(self.read(batch), batch.rows, candidates, normalize=normalize, end=end)

    @torch.inference_mode()
    def generate(self, images: Sequence[Any], prompts: Sequence[str], **decoding: Any) -> list[str]:
        """One answer per prompt.  `images`: a path or PIL image per prompt, or a list of them.

        `decoding` takes the fields of `qformer.cards.Decoding`; what is not given has its defaults.

        Raises:
            ConfigError: an unknown decoding setting, or another number of images than prompts.
        """
        unknown = set(decoding) - {entry.name for entry in dataclasses.fields(Decoding)}
        if unknown:
            known = ", ".join(entry.name for entry in dataclasses.fields(Decoding))
            raise ConfigError(f"generate: unknown decoding setting '{sorted(unknown)[0]}'. Known: {known}.")
        batch = self._prompts(_listed(images, prompts), prompts)
        return self.language.generate(self.read(batch), batch.rows, **dataclasses.asdict(Decoding(**decoding)))

    @torch.inference_mode()
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
            ConfigError: another number of images or lists than prompts, an empty list, an unknown `normalize`.
        """
        lists = [list(candidates)] * len(prompts) if isinstance(candidates[0], str) else [list(c) for c in candidates]
        if len(lists) != len(prompts):
            raise ConfigError(f"rank: {len(lists)} lists of candidates for {len(prompts)} prompts; give one each.")
        batch = self._prompts(_listed(images, prompts), prompts)
        return self.language.rank(self.read(batch), batch.rows, lists, normalize=normalize, end=end)

    def _prompts(self, pictures: Sequence[Sequence[Any]], instructions: Sequence[str | Rendered]) -> Batch:
        self.eval()
        items = [
            Item(f"prompt {number}", tuple(images), Rendered(text) if isinstance(text, str) else text)
            for number, (images, text) in enumerate(zip(pictures, instructions, strict=True))
        ]
        return self.assembler(training=False)(items, answered=False)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write the adapter alone: weights, settings, the LLM's profile and fingerprint, the instruction tokenizer.

        The towers are named, never copied.  The directory appears whole or not at all.
        """
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with whole_directory(directory) as work:
            self.write(work)

    def write(self, directory: Path) -> None:
        """The adapter's files into a directory that is there."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.connector.state_dict().items()}
        tensors["language.fingerprint"] = self.language.fingerprint().cpu().contiguous()
        weights.save_tensors(directory / ADAPTER_FILE, tensors, {"format": str(FORMAT)})
        description = {
            "format": FORMAT,
            "qformer_version": __version__,
            "vision": dataclasses.asdict(self.settings.vision),
            "language": dataclasses.asdict(self.settings.language),
            "qformer": dataclasses.asdict(self.settings.qformer),
            "max_pixels": self.settings.data.max_pixels,
            "size": dataclasses.asdict(self.connector.size),
            "profile": self.language.profile.as_dict(),
        }
        (directory / CONFIG_FILE).write_text(json.dumps(description, indent=2), encoding="utf-8")
        if self.instruction_tokenizer is not None:
            self.instruction_tokenizer.save_pretrained(directory / TOKENIZER_FOLDER)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """An empty directory to write to, which takes the place of `directory` when all is written, or goes away.

    Raises:
        TrainingError: it cannot be written (disk full); what was there before is left as it was.
    """
    work = directory.parent / f".{directory.name}.{os.getpid()}"
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
                shutil.rmtree(directory)
            os.replace(work, directory)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    except (OSError, RuntimeError, TrainingError) as error:
        raise TrainingError(
            f"{directory}: it cannot be written ({error}); what was there before is whole. Make room, then start the "
            f"same command again."
        ) from None


def assembler(settings: RunConfig, vision: Any, joiner: Joiner, *, training: bool) -> Assembler:
    """The assembler of a run; `vision` is a tower or its settings (size, mean, std, interpolation)."""
    transform = settings.vision.train_transform if training else settings.vision.eval_transform
    size = getattr(vision, "image_size", None) or vision.size
    return Assembler(
        joiner,
        ImageTransform(transform, size, vision.mean, vision.std, vision.interpolation),
        settings.data.max_pixels,
    )


def build(settings: RunConfig, *, report: Any = print) -> VLM:
    """Towers and a fresh connector as the settings say; reports what the Q-Former's start was made of.

    Raises:
        ConfigError: an unknown tower, sizes that do not fit; before any weight is read where that can be told.
    """
    vision_backbone.check_vision(located(settings.vision))
    vision = vision_backbone.load_vision(located(settings.vision))
    language = language_backbone.load_language(located(settings.language))
    given = settings.qformer
    generator = torch.Generator().manual_seed(settings.seed)
    if given.init is not None:
        qformer, table = weights.start_from_bert(
            resources.located(given.init),
            vision_width=vision.width,
            queries=given.queries,
            cross_attention_every=given.cross_attention_every,
            instruction=given.instruction,
            dropout=given.dropout,
            hidden=given.hidden,
            layers=given.layers,
            heads=given.heads,
            intermediate=given.intermediate,
            generator=generator,
        )
        report(table.table())
    else:
        qformer = None
    tokenizer = instruction_tokenizer(given)
    if qformer is None:
        size = QFormerSize(
            vision_width=vision.width,
            hidden=given.hidden or 768,
            layers=given.layers or 12,
            heads=given.heads or 12,
            intermediate=given.intermediate or 4 * (given.hidden or 768),
            vocabulary=len(tokenizer) if tokenizer is not None else 0,
            queries=given.queries,
            cross_attention_every=given.cross_attention_every,
            instruction=given.instruction,
            dropout=given.dropout,
        )
        qformer = QFormer(size, generator=generator)
    _check_reading(qformer.size, tokenizer, given)
    connector = QFormerConnector(qformer, language.width, generator=generator)
    if given.soft_scale == "embeddings":
        _scale_soft_tokens(connector, language.embedding_norm(), generator)
    return VLM(vision, connector, language, tokenizer, settings)


def load(
    source: str | Path,
    vision: str | None = None,
    language: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any | None = None,
) -> VLM:
    """A saved adapter, or a run's last checkpoint, between its towers.

    `vision` and `language` name the towers where they are now, if elsewhere than in training; `dtype` is that of the
    frozen LLM.

    Raises:
        ConfigError: nothing to load there, weights that do not fit, or another LLM than the adapter was trained with
            (use `qformer.plug` to carry an adapter to another LLM).
    """
    if quantization is not None:
        raise ConfigError("load: quantization of the LLM is not supported yet; leave it out.")
    directory = adapter_directory(Path(source))
    description = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    settings = config.structured(
        RunConfig,
        [(str(directory / CONFIG_FILE), {name: description[name] for name in ("vision", "language", "qformer")})],
    )
    settings = dataclasses.replace(
        settings,
        vision=dataclasses.replace(settings.vision, **({"name": vision, "checkpoint": None} if vision else {})),
        language=dataclasses.replace(
            settings.language,
            **({"name": language} if language else {}),
            **({"dtype": str(dtype).removeprefix("torch.")} if dtype else {}),
        ),
        data=dataclasses.replace(settings.data, max_pixels=description["max_pixels"]),
    )
    tensors = weights.load_tensors(directory / ADAPTER_FILE)
    towers = (
        vision_backbone.load_vision(located(settings.vision)),
        language_backbone.load_language(located(settings.language)),
    )
    _same_language(towers[1], tensors.pop("language.fingerprint"), description["language"]["name"], settings.language)
    towers[1].profile = Profile.from_dict(description["profile"])
    size = QFormerSize(**description["size"])
    if size.vision_width != towers[0].width:
        raise ConfigError(
            f"{directory}: the adapter was trained on '{description['vision']['name']}' of width {size.vision_width}, "
            f"and '{settings.vision.name}' is {towers[0].width} wide; name the encoder it was trained on."
        )
    connector = QFormerConnector(QFormer(size), towers[1].width)
    weights.load_strict(connector, tensors, str(directory / ADAPTER_FILE))
    tokenizer = None
    if size.instruction:
        tokenizer = _tokenizer(directory / TOKENIZER_FOLDER)
    model = VLM(towers[0], connector, towers[1], tokenizer, settings)
    return model.to(device).eval() if device else model.eval()


def adapter_directory(source: Path) -> Path:
    """Where the adapter's files are: the directory itself, or a run's last checkpoint.

    Raises:
        ConfigError: neither is there.
    """
    if (source / ADAPTER_FILE).is_file():
        return source
    steps = checkpoints(source)
    if steps:
        return steps[-1]
    raise ConfigError(
        f"{source}: no adapter there; give a directory written by save(), or a run directory with a checkpoint."
    )


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run directory, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / ADAPTER_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _same_language(tower: Any, fingerprint: Tensor, trained: str, given: LanguageConfig) -> None:
    if not language_backbone.same_language(tower.fingerprint(), fingerprint):
        raise ConfigError(
            f"the adapter was trained with the LLM '{trained}', and '{given.name}' is another one (their embeddings "
            f"differ); name the right one, or carry the adapter over with qformer.plug."
        )


def located(tower: Any) -> Any:
    """A tower's settings with shipped names (`demo:…`) turned into directories."""
    return dataclasses.replace(tower, name=resources.located(tower.name))


def instruction_tokenizer(given: QFormerConfig) -> Any | None:
    """What the Q-Former reads with; None where it reads no instruction.

    Raises:
        ConfigError: it is to read, and no tokenizer is named or there.
    """
    if not given.instruction:
        return None
    source = given.tokenizer or given.init
    if source is None:
        raise ConfigError(
            "qformer.instruction is on and there is no tokenizer to read it with; set qformer.init to a BERT "
            "checkpoint, qformer.tokenizer to a BERT tokenizer, or qformer.instruction: false."
        )
    return _tokenizer(resources.located(source))


def _tokenizer(source: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: no tokenizer can be read from there: {str(error).splitlines()[0]}") from None


def _check_reading(size: QFormerSize, tokenizer: Any | None, given: QFormerConfig) -> None:
    if tokenizer is None:
        return
    if len(tokenizer) > size.vocabulary:
        raise ConfigError(
            f"qformer.tokenizer: '{given.tokenizer or given.init}' has {len(tokenizer)} words and the Q-Former "
            f"{size.vocabulary} word embeddings; use the tokenizer that belongs to qformer.init."
        )
    if given.instruction_limit > size.positions:
        raise ConfigError(
            f"qformer.instruction_limit is {given.instruction_limit} and the Q-Former has {size.positions} positions; "
            f"set it to at most {size.positions}."
        )


def _scale_soft_tokens(connector: QFormerConnector, norm: float, generator: torch.Generator) -> None:
    """Query outputs leave a LayerNorm with length √D, so this spread gives soft tokens of the wanted length."""
    weight = connector.projection.weight
    with torch.no_grad():
        weight.normal_(0.0, norm / math.sqrt(weight.shape[0] * weight.shape[1]), generator=generator)


def _listed(images: Sequence[Any], prompts: Sequence[str]) -> list[Sequence[Any]]:
    if len(images) != len(prompts):
        raise ConfigError(f"{len(images)} images for {len(prompts)} prompts; give one each, or a list of several.")
    return [image if isinstance(image, list | tuple) else [image] for image in images]
