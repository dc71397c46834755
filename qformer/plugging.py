"""Another LLM under the same Q-Former: all is kept but the projection, which may start from the words both LLMs have.

n shared words, L and K the widths of the old and the new LLM, D of the Q-Former.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qformer import weights
from qformer.backbones import language as language_backbone
from qformer.backbones import language_loading
from qformer.backbones.language import LanguageTower
from qformer.config import LanguageConfig, VisionConfig
from qformer.errors import ConfigError, did_you_mean
from qformer.loading import Unplugged, scale_soft_tokens, unplug
from qformer.named import located
from qformer.nn.qformer import QFormer, QFormerConnector
from qformer.untokenized import MissingTokenizer
from qformer.vlm import VLM, to_stderr

Start = Literal["mapped", "random"]

FEWEST_WORDS = 32
"""Shared words under which nothing is mapped."""
RIDGES = tuple(10.0**power for power in range(-9, 3))
"""Weights of the penalty that are tried, as shares of the mean variance of the old embeddings along a direction."""
CHUNK = 4096


def plug(
    source: str | Path,
    language: str | LanguageConfig,
    *,
    start: Start = "mapped",
    own_language: str | LanguageConfig | None = None,
    vision: str | VisionConfig | Callable[[Tensor], Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any | None = None,
    instruction_tokenizer: str | Path | None = None,
    revision: str | None = None,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> VLM:
    """The same queries, Q-Former and norm in front of another LLM, with a new projection.

    Args:
        source: an adapter in any form that `load` takes.
        language: the new LLM: a name, which takes dtype, limits and checkpointing from the source's, or settings.
        start: of the projection.  mapped: the old one followed by the affine map that takes the old LLM's embeddings
            of the words both LLMs have to the new one's, by least squares; random: drawn anew.
        own_language: where the source's own LLM is, if it moved or the source does not say (a .pth file of LAVIS); read
            for a mapped start alone.
        vision: where the image encoder is, as in `load`.
        device: where to put it all.
        dtype: of the new LLM.
        quantization: of the new LLM, as in `load`.
        instruction_tokenizer: what the Q-Former reads with, where the source does not bring it.
        revision: of a hub id that is the source.
        seed: of a projection that is drawn.
        report: is given what was kept and what was made; by default it goes to standard error.

    Raises:
        ConfigError: the source cannot be read, the new LLM is the source's own, its own LLM is not to be had or shares
            too few words with the new one, or an unknown `start`.
    """
    if start not in get_args(Start):
        raise ConfigError(f"plug: unknown start '{start}'.{did_you_mean(start, get_args(Start))}")
    adapter = unplug(
        source,
        vision=vision,
        language=own_language,
        instruction_tokenizer=instruction_tokenizer,
        revision=revision,
    )
    own = adapter.settings.language
    if start == "mapped":
        _check_mappable(adapter)
    spoken = spoken_by(language, own, dtype, quantization)
    tower = language_loading.load_language(located(spoken))
    _check_another(adapter, tower, spoken.name)
    generator = torch.Generator().manual_seed(seed)
    connector = QFormerConnector(QFormer(adapter.size, generator), tower.width, generator, adapter.norm_eps)
    kept = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith("projection.")}
    table = weights.fill(connector, kept, f"{source}, in front of '{spoken.name}' ({tower.width} wide)")
    if start == "mapped":
        told = _map_projection(connector.projection, adapter, tower, spoken.name)
    else:
        told = "drawn anew"
        if adapter.settings.qformer.soft_scale == "embeddings":
            scale_soft_tokens(connector, tower.embedding_norm(), generator)
    say = report or to_stderr
    say(f"{table.table()}\n  projection: {told}")
    settings = dataclasses.replace(adapter.settings, language=spoken)
    model = VLM(adapter.encoder, connector, tower, adapter.tokenizer, settings)
    model.recipe = {**adapter.recipe, "carried_over_from": own.name} if adapter.recipe else {}
    return model.to(device).eval() if device else model.eval()


def spoken_by(
    language: str | LanguageConfig,
    own: LanguageConfig,
    dtype: str | torch.dtype | None = None,
    quantization: Any | None = None,
) -> LanguageConfig:
    """The new LLM's settings: the profile, revision and quantisation of the old one say nothing about it."""
    if not isinstance(language, LanguageConfig):
        language = LanguageConfig(
            name=language,
            dtype=own.dtype,
            gradient_checkpointing=own.gradient_checkpointing,
            packing=own.packing,
            instruction_limit=own.instruction_limit,
            target_limit=own.target_limit,
        )
    if dtype is not None:
        language = dataclasses.replace(language, dtype=str(dtype).removeprefix("torch."))
    if quantization is not None:
        language = dataclasses.replace(language, quantization=language_loading.quantization_values(quantization))
    return language


def _check_mappable(adapter: Unplugged) -> None:
    """Refuse a mapped start that has nothing to start from, before an LLM is read."""
    if "projection.weight" not in adapter.tensors:
        raise ConfigError(f"{adapter.source}: it has no projection that could be mapped; take start='random'.")
    if not adapter.settings.language.name:
        raise ConfigError(
            f"{adapter.source}: a file of LAVIS does not say which LLM it was trained with; name it with "
            f"own_language, or take start='random'."
        )


def _check_another(adapter: Unplugged, tower: LanguageTower, name: str) -> None:
    if adapter.fingerprint is not None and language_backbone.same_language(tower.fingerprint(), adapter.fingerprint):
        raise ConfigError(
            f"{adapter.source}: it was trained with '{name}' (or with a copy of it), so there is nothing to carry "
            f"over; use it as it is, or name another LLM."
        )


def _map_projection(projection: nn.Linear, adapter: Unplugged, new: LanguageTower, name: str) -> str:
    """Fill a projection with the old one carried over by words; what was done, in words."""
    own = adapter.settings.language
    try:
        old = language_loading.load_language(located(own))
    except ConfigError as error:
        raise ConfigError(
            f"{adapter.source}: a mapped start needs the LLM that it was trained with, which cannot be read "
            f"({str(error).rstrip('.')}); say where it is with own_language, or take start='random'."
        ) from None
    known = adapter.fingerprint
    if known is not None and not language_backbone.same_language(old.fingerprint(), known):
        raise ConfigError(
            f"{adapter.source}: '{own.name}' is not the LLM that it was trained with (their embeddings differ); name "
            f"the right one with own_language, or take start='random'."
        )
    if old.width != adapter.tensors["projection.weight"].shape[0]:
        raise ConfigError(
            f"{adapter.source}: it projects to an LLM of width {adapter.tensors['projection.weight'].shape[0]}, and "
            f"'{own.name}' is {old.width} wide; name the right one with own_language, or take start='random'."
        )
    if known is None and language_backbone.same_language(old.fingerprint(), new.fingerprint()):
        raise ConfigError(f"{adapter.source}: '{own.name}' and '{name}' are one LLM; name another one.")
    pairs = shared_words(old, new)
    if len(pairs) < FEWEST_WORDS:
        raise ConfigError(
            f"{adapter.source}: '{own.name}' and '{name}' have {len(pairs)} words in common, and a map between them "
            f"takes at least {FEWEST_WORDS}; take start='random'."
        )
    found = map_words(
        old.embedded(torch.tensor([a for a, _ in pairs])), new.embedded(torch.tensor([b for _, b in pairs]))
    )
    weight, bias = adapter.tensors["projection.weight"].double(), adapter.tensors["projection.bias"].double()
    with torch.no_grad():
        projection.weight.copy_(found.matrix @ weight)
        projection.bias.copy_(found.matrix @ bias + found.shift)
    return (
        f"mapped by the {len(pairs):,} words that '{own.name}' ({old.words:,} words) and '{name}' ({new.words:,}) have "
        f"in common; a map from the others foretells {max(0.0, found.explained):.0%} of where a word lies"
    )


# -- words ------------------------------------------------------------------------------------------------------------


def shared_words(old: LanguageTower, new: LanguageTower) -> list[tuple[int, int]]:
    """Pairs of ids that add the same to a running text, in the order of the old ones.

    Raises:
        ConfigError: one of them came without a tokenizer.
    """
    first, second = words(old), words(new)
    return [(number, second[word]) for word, number in first.items() if word in second]


BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""Names of tokens that stand for one byte, which SentencePiece has beside the letters themselves."""


def words(tower: LanguageTower) -> dict[str, int]:
    """What each id adds to a running text, blanks and all, and the first id that adds it.

    Vocabularies write one word in several ways ("Ġred", "▁red"): here it is what comes out behind other text.  Marks,
    single bytes and parts of a letter are left out.
    """
    tokenizer = tower.tokenizer
    if isinstance(tokenizer, MissingTokenizer):
        raise ConfigError(f"{tokenizer.where}, so the words that two LLMs have in common cannot be told.")
    before = tokenizer("a", add_special_tokens=False).input_ids[-1]
    start = tokenizer.decode([before], clean_up_tokenization_spaces=False)
    marks = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    ids = [number for number in range(tower.words) if number not in marks]
    ids = [
        n for n, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if not BYTE.fullmatch(token or "")
    ]
    found: dict[str, int] = {}
    for number in ids:
        text = tokenizer.decode([before, number], clean_up_tokenization_spaces=False)
        word = text.removeprefix(start)
        if word and word != text and "\N{REPLACEMENT CHARACTER}" not in word:
            found.setdefault(word, number)
    return found


# -- the map ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordMap:
    """An affine map x -> matrix @ x + shift from one LLM's embeddings (L) to another's (K), in float64."""

    matrix: Tensor
    shift: Tensor
    explained: float
    """Share of the new embeddings' variance that is foretold of a word left out, estimated."""


@torch.no_grad()
def map_words(old: Tensor, new: Tensor) -> WordMap:
    """Embeddings of the same words in two LLMs, (n, L) and (n, K) -> the map between them, by penalised least squares.

    The penalty is the one with the least generalised cross-validation error (Golub, Heath and Wahba 1979): next to none
    where words abound and determine the map, more where they are few or the relation is loose.  A penalised map
    shortens what it maps; its linear part is stretched until the mapped words are as far spread as the new LLM's own.
    """
    count, width = old.shape
    means = old.double().mean(0), new.double().mean(0)
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(width, new.shape[1], dtype=torch.float64)
    spread = 0.0
    for first, second in zip(old.split(CHUNK), new.split(CHUNK), strict=True):
        x, y = first.double() - means[0], second.double() - means[1]
        gram += (x.mT @ x).cpu()
        cross += (x.mT @ y).cpu()
        spread += float(y.square().sum())
    variances, directions = torch.linalg.eigh(gram)
    variances = variances.clamp(min=0)
    turned = directions.mT @ cross  # (L, K)
    real = variances > 1e-12 * variances.max()
    held = turned.square().sum(1)[real] / variances[real]  # of the spread, what each direction can tell
    beyond, spare = max(0.0, spread - float(held.sum())), max(0, count - 1 - int(real.sum()))
    best = (float("inf"), 0.0)
    for share in RIDGES:
        ridge = share * float(variances.mean())
        lost = ridge / (variances[real] + ridge)
        error = (beyond + float((held * lost.square()).sum())) * count / (spare + float(lost.sum())) ** 2
        best = min(best, (error, ridge))
    error, ridge = best
    matrix = (directions @ (turned / (variances + ridge)[:, None])).mT  # (K, L)
    mapped = float(((matrix @ gram) * matrix).sum())
    matrix = matrix * (spread / mapped) ** 0.5 if mapped > 0 else matrix
    explained = 1 - error * (count - 1) ** 2 / count / spread
    return WordMap(matrix, means[1].cpu() - matrix @ means[0].cpu(), explained)
