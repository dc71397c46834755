"""An adapter's start from several sources: which tensor comes from where, and what is made anew."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qformer import resources, weights
from qformer.backbones.language import LanguageTower, same_language
from qformer.config import InitSource, QFormerConfig
from qformer.errors import ConfigError
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.weights import LoadReport

PARTS = {
    "norm": r"norm\.",
    "queries": r"qformer\.queries$",
    "embeddings": r"qformer\.(word|position)_embeddings\.",
    "self_attention": r"qformer\.(norm|blocks\.\d+\.self_attention)\.",
    "cross_attention": r"qformer\.blocks\.\d+\.cross_attention\.",
    "query_feed_forward": r"qformer\.blocks\.\d+\.query_feed_forward\.",
    "text_feed_forward": r"qformer\.blocks\.\d+\.text_feed_forward\.",
    "text": r"qformer\.((word|position)_embeddings|blocks\.\d+\.text_feed_forward)\.",
    "projection": r"projection\.",
    "frames": r"qformer\.frame_embedding$",
}
"""Patterns that the names of a part's tensors begin with; the norm of the embeddings goes with self-attention."""

NEW, COPIED = "new", "copied"
"""Sources that are no files: drawn anew, and copied from the other half's feed-forward."""

OTHER_HALF = {"text_feed_forward": "query_feed_forward", "query_feed_forward": "text_feed_forward"}


@dataclass(frozen=True)
class Source:
    """What a source has of an adapter, by the connector's names."""

    name: str
    tensors: Mapping[str, Tensor]
    size: Mapping[str, Any]
    """The fields of `QFormerSize` that it tells."""
    unused: tuple[str, ...] = ()
    copied: frozenset[str] = frozenset()
    """Names of tensors that are copies of others in it."""
    norm_eps: float | None = None
    fingerprint: Tensor | None = None
    """Of the LLM that its projection leads to, where it says so."""
    encoder_decoder: bool | None = None
    """Whether its projection leads to an encoder–decoder, where it tells that alone, as LAVIS' files do."""


def from_bert(name: str) -> Source:
    """A BERT checkpoint: words, self-attention and the text half, and the query half as a copy of it.

    Raises:
        ConfigError: nothing to read there, or not a BERT.
    """
    size, tensors, unused = weights.read_bert(resources.located(name))
    ours = {f"qformer.{each}": tensor for each, tensor in tensors.items()}
    copies = {each.replace("text_feed", "query_feed"): tensor for each, tensor in ours.items() if "text_feed" in each}
    return Source(name, {**ours, **copies}, size, unused, frozenset(copies))


def start(
    chosen: Sequence[InitSource],
    sources: Mapping[str, Source],
    given: QFormerConfig,
    vision_width: int,
    language: LanguageTower,
    generator: torch.Generator,
) -> tuple[QFormerConnector, LoadReport]:
    """A connector filled from sources in order: the first that covers a part and has it gives it.

    Args:
        chosen: what the settings list.
        sources: what was read, by the name in the list.
        given: the settings; sizes they fix must be those of the sources.
        vision_width: of the encoder.
        language: the LLM; a projection that leads to another one is not taken.
        generator: of what is drawn anew.

    Raises:
        ConfigError: sizes that contradict each other, or tensors that no source gives, unless one is not strict.
    """
    size = _size(chosen, sources, given, vision_width)
    eps = next((s.norm_eps for c in chosen if (s := sources.get(c.source)) and s.norm_eps), given.norm_eps)
    connector = QFormerConnector(QFormer(size, generator), language.width, generator, eps)
    own, fingerprint = connector.state_dict(), language.fingerprint()
    taken: dict[str, Tensor] = {}
    told: dict[str, list[str]] = {kind: [] for kind in ("loaded", "copied", "made", "unused", "reshaped")}
    copies: list[str] = []
    open_names = list(own)
    loose = any(not each.strict for each in chosen)
    why = ""
    for each in chosen:
        source = sources.get(each.source)
        covered = [name for name in open_names if covers(each.parts, name)]
        label = f"{Path(each.source).name}: " if len(chosen) > 1 else ""
        if source is None:
            _refuse_partless(each)
            (told["made"] if each.source == NEW else copies).extend(covered)
            open_names = [name for name in open_names if name not in covered]
            continue
        held = _without_foreign_projection(source, fingerprint, language.is_encoder_decoder)
        withheld = [name for name in covered if name in source.tensors and name not in held]
        if withheld:
            why += f" The projection of {each.source} leads to another LLM, so it is not taken."
            told["unused"] += [label + name for name in withheld if each.parts]
        weights.refuse_strange(held, source.name)
        missing = []
        for name in covered:
            if name in held and held[name].shape == own[name].shape:
                taken[name] = held[name]
                told["copied" if name in source.copied else "loaded"].append(label + name)
            elif name in held:
                told["reshaped"].append(f"{label}{name} {tuple(held[name].shape)}, wanted {tuple(own[name].shape)}")
                missing.append(told["reshaped"][-1])
            elif each.parts:
                missing.append(name)
        if missing and each.strict:
            raise ConfigError(
                f"qformer.init: {each.source} does not give what it is to give: {weights.shortened(missing)}. Take "
                f"the part from another source, or set strict: false to have it made anew.{why}"
            )
        open_names = [name for name in open_names if name not in taken]
        if not each.parts:
            told["unused"] += [
                label + name for name in (*source.unused, *(n for n in source.tensors if n not in taken))
            ]
    told["made"] += [name for name in open_names if covers(["frames"], name)]  # at zero: most sources have none
    open_names = [name for name in open_names if not covers(["frames"], name)]
    if open_names and not loose:
        raise ConfigError(
            f"qformer.init: no source gives {weights.shortened(open_names)}; add one, such as {{from: {NEW}, parts: "
            f"[...]}}, or set strict: false.{why}"
        )
    told["made"] += open_names
    connector.load_state_dict({**own, **taken})
    _copy(connector, copies)
    told["copied"] += copies
    name = ", ".join(dict.fromkeys(each.source for each in chosen if each.source in sources))
    return connector, LoadReport(name, *(tuple(told[kind]) for kind in told))


def _size(
    chosen: Sequence[InitSource], sources: Mapping[str, Source], given: QFormerConfig, vision_width: int
) -> QFormerSize:
    """Each size from the first source that tells it; what the settings fix must be the same."""
    found: dict[str, Any] = {}
    for each in chosen:
        if (source := sources.get(each.source)) is not None:
            reads = given.instruction and source.size.get("instruction", True)
            told = {
                name: value for name, value in source.size.items() if reads or name not in ("vocabulary", "positions")
            }
            found = {**told, **found}
    for name in ("hidden", "layers", "heads", "intermediate", "queries", "cross_attention_every"):
        said = getattr(given, name)
        if said is not None and found.setdefault(name, said) != said:
            raise ConfigError(
                f"qformer.{name} is {said} and qformer.init gives {found[name]}; set it to {found[name]}."
            )
    fixed = {"vision_width": vision_width, "instruction": given.instruction, "dropout": given.dropout}
    if given.frames is not None:
        fixed["frames"] = given.frames
    known = {entry.name for entry in dataclasses.fields(QFormerSize)}
    return QFormerSize(**{name: value for name, value in {**found, **fixed}.items() if name in known})


def covers(parts: Sequence[str], name: str) -> bool:
    """Whether a tensor is in one of the parts; no parts: in any case."""
    return not parts or any(re.match(PARTS[part], name) for part in parts)


def _refuse_partless(each: InitSource) -> None:
    wrong = [part for part in each.parts if each.source == COPIED and part not in OTHER_HALF]
    if not each.parts or wrong:
        raise ConfigError(
            f"qformer.init: '{each.source}' needs parts"
            + (
                f", and of {list(OTHER_HALF)} alone, since only these have another half."
                if each.source == COPIED
                else "."
            )
        )


def _without_foreign_projection(source: Source, fingerprint: Tensor, encoder_decoder: bool) -> dict[str, Tensor]:
    """A source's tensors, less a projection to another LLM, where the source tells which it was or of which kind."""
    same_kind = source.encoder_decoder in (None, encoder_decoder)
    if same_kind and (source.fingerprint is None or same_language(fingerprint, source.fingerprint)):
        return dict(source.tensors)
    return {name: tensor for name, tensor in source.tensors.items() if not name.startswith("projection.")}


@torch.no_grad()
def _copy(connector: QFormerConnector, names: Sequence[str]) -> None:
    own = connector.state_dict()
    for name in names:
        for half, other in OTHER_HALF.items():
            if f".{half}." in name:
                own[name].copy_(own[name.replace(half, other)])
                break
