"""Adapters in the forms they are published in, read and written tensor by tensor under this library's names.

Forms: LAVIS' .pth files (released, of its runner, stage 1, stage 2) and transformers' InstructBLIP and BLIP-2, in the
key layouts of 4.x and 5.x.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qformer import weights
from qformer.backbones import inside
from qformer.backbones.vision import INSIDE_LAVIS
from qformer.errors import ConfigError, reason
from qformer.nn.attention import NORM_EPS
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize

Form = Literal["instructblip", "blip-2", "lavis"]

LAVIS_NAMES = (
    (r"^norm\.", "ln_vision."),
    (r"^qformer\.queries$", "query_tokens"),
    (r"^qformer\.(word|position)_embeddings\.", r"Qformer.bert.embeddings.\1_embeddings."),
    (r"^qformer\.norm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.blocks\.(\d+)\.", r"Qformer.bert.encoder.layer.\1."),
    (r"\.self_attention\.(query|key|value)\.", r".attention.self.\1."),
    (r"\.self_attention\.output\.", ".attention.output.dense."),
    (r"\.self_attention\.norm\.", ".attention.output.LayerNorm."),
    (r"\.cross_attention\.(query|key|value)\.", r".crossattention.self.\1."),
    (r"\.cross_attention\.output\.", ".crossattention.output.dense."),
    (r"\.cross_attention\.norm\.", ".crossattention.output.LayerNorm."),
    (r"\.text_feed_forward\.inner\.", ".intermediate.dense."),
    (r"\.text_feed_forward\.outer\.", ".output.dense."),
    (r"\.text_feed_forward\.norm\.", ".output.LayerNorm."),
    (r"\.query_feed_forward\.inner\.", ".intermediate_query.dense."),
    (r"\.query_feed_forward\.outer\.", ".output_query.dense."),
    (r"\.query_feed_forward\.norm\.", ".output_query.LayerNorm."),
)
"""Patterns of our names, applied in order, and what stands there in LAVIS' files (its projection has three names)."""

TRANSFORMERS_NAMES = (
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^projection\.", "language_projection."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.embeddings.layernorm."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"attention\.self\.", "attention.attention."),
)
"""Applied to LAVIS' names, what stands there in transformers."""

PROJECTIONS = {"t5_proj": "lavis_t5", "llm_proj": "lavis_vicuna", "opt_proj": "lavis_opt"}
"""LAVIS' names of the projection, and the preset that says how its LLM was spoken to (see `Published.preset`)."""

PICKLES = (".pth", ".pt", ".bin")

NOT_PARAMETERS = re.compile(r"(position_ids|inv_freq|num_batches_tracked)$")
"""Buffers that older releases stored; they are computed."""

HEAD_WIDTH = 64
"""Of BERT; LAVIS' files do not say how many heads there are."""

BERT_WORDS = 30522
"""Of bert-base-uncased; LAVIS' tables have one row more, for [DEC], and take no other number."""


@dataclass(frozen=True)
class Published:
    """An adapter as a file has it, in our names."""

    source: str
    form: Form
    tensors: Mapping[str, Tensor]
    """By the names of `QFormerConnector.state_dict()`; queries (Q, D)."""
    unused: tuple[str, ...]
    """What else the file holds, by its own names; an encoder is not counted."""
    size: QFormerSize
    norm_eps: float
    projection: str | None = None
    """LAVIS' name of the projection; None in stage 1, which has none."""
    directory: Path | None = None
    """Of a transformers model: where its config.json and its towers are."""
    config: Mapping[str, Any] | None = None
    """Of a transformers model: what its config.json says."""
    encoder: bool = False
    """Whether a file of LAVIS holds an encoder too, as it does where that was tuned with the adapter."""

    @property
    def language_width(self) -> int | None:
        """Of the LLM it was projected to; None where there is no projection."""
        projection = self.tensors.get("projection.weight")
        return None if projection is None else projection.shape[0]

    def projection_in_lavis(self, *, encoder_decoder: bool) -> str:
        """What LAVIS calls its projection: as the file has it, or as LAVIS' own model of the kind would."""
        return self.projection or lavis_projection(encoder_decoder=encoder_decoder, blip2=self.form == "blip-2")

    @property
    def leads_to_encoder_decoder(self) -> bool | None:
        """The kind of LLM that LAVIS' name of the projection tells; None where there is no such name."""
        return None if self.projection is None else self.projection == lavis_projection(encoder_decoder=True)

    @property
    def preset(self) -> str:
        """Which of the presets says what the weights do not."""
        if self.directory is not None:
            return "transformers"
        if self.projection == "t5_proj" and not self.size.instruction:
            return "lavis_t5_blip2"
        return PROJECTIONS.get(self.projection or "", "lavis")


def lavis_projection(*, encoder_decoder: bool, blip2: bool = False) -> str:
    """LAVIS' name of the projection to an LLM of a kind; transformers' BLIP-2 is LAVIS' with OPT or FlanT5."""
    if encoder_decoder:
        return "t5_proj"
    return "opt_proj" if blip2 else "llm_proj"


def published_name(name: str, form: Form, projection: str = "language_projection") -> str:
    """Our name of a tensor of the connector -> that of a published form; `projection`: LAVIS' name of it."""
    for pattern, replacement in LAVIS_NAMES:
        name = re.sub(pattern, replacement, name)
    if form == "lavis":
        return re.sub(r"^projection\.", f"{projection}.", name)
    for pattern, replacement in TRANSFORMERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace("qformer.embeddings.layernorm.", "qformer.layernorm.") if form == "blip-2" else name


def own_names(size: QFormerSize, language_width: int = 1) -> dict[str, torch.Size]:
    """Names and shapes of a connector's tensors, without making it."""
    with torch.device("meta"):
        made = QFormerConnector(QFormer(size), language_width)
    return {name: tensor.shape for name, tensor in made.state_dict().items()}


# -- reading ----------------------------------------------------------------------------------------------------------


def read_lavis(path: Path) -> Published:
    """An adapter from a .pth file of LAVIS: released, of its runner, of stage 1 or stage 2, wrapped in `model` or not.

    Raises:
        ConfigError: the file is none of LAVIS', not whole, would run code, or holds no Q-Former.
    """
    if path.suffix == ".safetensors":
        raise ConfigError(
            f"{path}: tensors alone do not tell what they belong to; give the directory it is in, with its config.json."
        )
    held = weights.read_pickle(path)
    inner = held.get("model", held)
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{path}: 'model' is a {type(inner).__name__} where named tensors belong.")
    theirs = {name: tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}
    if "query_tokens" not in theirs:
        hint = (
            "it looks like an image encoder: give it as vision=, beside an adapter"
            if "patch_embed.proj.weight" in theirs
            else "give a file of LAVIS with query_tokens and Qformer.*"
        )
        raise ConfigError(f"{path}: it holds no Q-Former; {hint}.")
    adapter = {name: tensor for name, tensor in theirs.items() if not name.startswith(INSIDE_LAVIS)}
    projection = next((name for name in PROJECTIONS if f"{name}.weight" in adapter), None)
    size = _measured(adapter, "lavis", str(path))
    tensors, unused = _renamed(adapter, size, "lavis", projection or "projection")
    return Published(str(path), "lavis", tensors, unused, size, 1e-5, projection, encoder=len(adapter) < len(theirs))


def read_transformers(directory: Path, source: str) -> Published:
    """The adapter inside a transformers InstructBLIP or BLIP-2: its Q-Former, projection, and the encoder's last norm.

    Raises:
        ConfigError: files are missing or not whole, or config.json says other sizes than the tensors have.
    """
    from transformers import AutoConfig

    described = read_config(directory, source)
    form: Form = described["model_type"]
    try:
        AutoConfig.from_pretrained(directory)
    except Exception as error:  # strict in types and values, each with an error of its own
        raise ConfigError(
            f"{source}: transformers can make nothing of its config.json ({reason(error)}); fetch it again."
        ) from None
    theirs = {
        re.sub(r"^(model\.)?(embeddings\.|)", lambda found: "qformer." * bool(found[2]) + found[2], name): tensor
        for name, tensor in weights.read_weights(directory, source, _is_of_adapter).items()
    }  # the model for retrieval (stage 1) keeps its words outside its Q-Former
    if "query_tokens" not in theirs:
        raise ConfigError(f"{source}: its weights hold no query_tokens, so they are of no {form} model.")
    size = _agreed(_measured(theirs, form, source), described, source)
    tensors, unused = _renamed(theirs, size, form)
    vision = described.get("vision_config") or {}
    eps = described.get("qformer_norm_eps", vision.get("layer_norm_eps", 1e-6))
    if not isinstance(eps, int | float):
        raise ConfigError(f"{source}: config.json's qformer_norm_eps is {eps!r}; it takes a number, such as 1e-5.")
    return Published(source, form, tensors, unused, size, float(eps), None, directory, described)


def read_embeddings(published: Published) -> Tensor | None:
    """The input embeddings of the LLM inside a published model; None where the file holds no LLM."""
    if published.directory is None:
        return None
    from transformers import AutoConfig

    tower = inside.language(AutoConfig.from_pretrained(published.directory))
    names = inside.embedding_names(tower.config) if tower is not None else set()

    def wanted(name: str) -> bool:
        name = name.removeprefix("model.")
        return name.startswith("language_model.") and name.removeprefix("language_model.") in names

    found = weights.read_weights(published.directory, published.source, wanted)
    return next(iter(found.values()), None)


def read_config(directory: Path, source: str) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        ConfigError: it is not there, or is not JSON.
    """
    path = directory / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{source}: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: it cannot be read ({error}).") from None
    if not isinstance(described, dict):
        raise ConfigError(f"{path}: it holds a {type(described).__name__} where named values belong.")
    return described


def is_transformers(described: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model whose adapter can be read."""
    return described.get("model_type") in ("instructblip", "blip-2")


def _is_of_adapter(name: str) -> bool:
    name = name.removeprefix("model.")
    return name.startswith("vision_model.post_layernorm.") or not name.startswith(("vision_model.", "language_model."))


def _measured(theirs: Mapping[str, Tensor], form: Form, source: str) -> QFormerSize:
    """The shape that the tensors imply; heads are BERT's, 64 wide, until a config says otherwise."""

    def shape(ours: str) -> torch.Size | None:
        name = published_name(ours, form)
        if name in theirs and theirs[name].ndim != 2:
            raise ConfigError(f"{source}: {name} has shape {tuple(theirs[name].shape)}, which is no matrix.")
        return theirs[name].shape if name in theirs else None

    numbered = [re.search(r"encoder\.layer\.(\d+)\.", name) for name in theirs]
    layers = max((int(found[1]) + 1 for found in numbered if found), default=0)
    looking = [n for n in range(layers) if shape(f"qformer.blocks.{n}.cross_attention.key.weight") is not None]
    inner = shape("qformer.blocks.0.query_feed_forward.inner.weight")
    if not looking or inner is None or theirs["query_tokens"].ndim != 3:
        raise ConfigError(
            f"{source}: its Q-Former lacks blocks, cross-attention or feed-forwards of the queries; fetch it again, or "
            f"give another file."
        )
    every = looking[1] - looking[0] if len(looking) > 1 else layers
    if looking != list(range(0, layers, every)):
        raise ConfigError(
            f"{source}: blocks {looking} of {layers} look at the picture, which no single distance describes; such a "
            f"Q-Former cannot be built here."
        )
    _, queries, hidden = theirs["query_tokens"].shape
    words, places = shape("qformer.word_embeddings.weight"), shape("qformer.position_embeddings.weight")
    text = shape("qformer.blocks.0.text_feed_forward.inner.weight")
    if len({half is None for half in (words, places, text)}) > 1:
        raise ConfigError(
            f"{source}: of what reads an instruction it has a part alone (word embeddings: {_told(words)}, positions: "
            f"{_told(places)}, feed-forwards of words: {_told(text)}); fetch it again."
        )
    key = shape("qformer.blocks.0.cross_attention.key.weight")
    assert key is not None
    return QFormerSize(
        vision_width=key[1],
        hidden=hidden,
        layers=layers,
        heads=max(1, hidden // HEAD_WIDTH),
        intermediate=inner[0],
        queries=queries,
        cross_attention_every=every,
        instruction=text is not None,
        **({"vocabulary": words[0], "positions": places[0]} if words and places else {}),
    )


def _told(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))


def _agreed(measured: QFormerSize, described: Mapping[str, Any], source: str) -> QFormerSize:
    """The measured shape with what config.json alone knows, if they agree in all that both know."""
    inner = described.get("qformer_config") or {}
    said = published_size(described)
    if not measured.instruction:
        said = {name: value for name, value in said.items() if name not in ("vocabulary", "positions")}
    lies = [
        f"{field} {value} (the tensors say {getattr(measured, field)})"
        for field, value in said.items()
        if value != getattr(measured, field) and not (field == "cross_attention_every" and value >= measured.layers)
    ]
    if lies:
        raise ConfigError(f"{source}: config.json says of its Q-Former {', '.join(lies)}; correct config.json.")
    act, eps = inner.get("hidden_act", "gelu"), inner.get("layer_norm_eps", NORM_EPS)
    if act != "gelu" or eps != NORM_EPS:
        raise ConfigError(
            f"{source}: config.json says hidden_act '{act}' and layer_norm_eps {eps} of its Q-Former, and here it "
            f"computes with 'gelu' and {NORM_EPS}."
        )
    heads = inner.get("num_attention_heads", 12)
    if not isinstance(heads, int) or heads < 1 or measured.hidden % heads:
        raise ConfigError(
            f"{source}: config.json says num_attention_heads {heads}, which does not divide the Q-Former's width "
            f"{measured.hidden}; correct config.json."
        )
    return dataclasses.replace(measured, heads=heads, dropout=float(inner.get("hidden_dropout_prob", 0.1)))


def published_size(described: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `QFormerSize` that config.json of a whole model tells."""
    inner = described.get("qformer_config") or {}
    return {
        "hidden": inner.get("hidden_size", 768),
        "layers": inner.get("num_hidden_layers", 12),
        "intermediate": inner.get("intermediate_size", 3072),
        "cross_attention_every": inner.get("cross_attention_frequency", 2),
        "vision_width": inner.get("encoder_hidden_size", 1408),
        "queries": described.get("num_query_tokens", 32),
        "vocabulary": inner.get("vocab_size", 30522),
        "positions": inner.get("max_position_embeddings", 512),
    }


def _renamed(
    theirs: Mapping[str, Tensor], size: QFormerSize, form: Form, projection: str = "language_projection"
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under our names, and the names that are left."""
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in own_names(size):
        origin = published_name(name, form, projection)
        if origin in theirs:
            used.add(origin)
            ours[name] = theirs[origin][0] if name == "qformer.queries" else theirs[origin]
    return ours, tuple(name for name in theirs if name not in used and not NOT_PARAMETERS.search(name))


# -- fetching ---------------------------------------------------------------------------------------------------------


def place(source: str | Path, revision: str | None = None) -> Path:
    """Where the files behind a path or a hub id are; a hub id is fetched, or found in the hub's cache.

    Raises:
        ConfigError: there is no such path, or the hub does not give it.
    """
    path, name = Path(source), str(source)
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix in PICKLES:
        raise ConfigError(f"{source}: there is no such file or directory; give one, or a hub id like owner/name.")
    from huggingface_hub import snapshot_download

    def fetched(*patterns: str) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))

    try:
        found = fetched("*.json")
        described = read_config(found, name)
        if not is_transformers(described):
            return fetched("*.json", "adapter.safetensors", "instruction_tokenizer/*")
        words = ("*.json", "*.model", "*.txt", "*.jinja", "qformer_tokenizer/*")
        found = fetched(*words, "model*.safetensors")
        return found if list(found.glob("model*.safetensors")) else fetched(*words, "pytorch_model*.bin")
    except ConfigError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"{source}: neither a path here nor a model that can be fetched from the hub or its cache "
            f"({reason(error)})."
        ) from None


# -- writing ----------------------------------------------------------------------------------------------------------


def renamed_for(
    tensors: Mapping[str, Tensor], form: Form, projection: str = "language_projection"
) -> dict[str, Tensor]:
    """A connector's tensors under the names of a published form; queries (1, Q, D)."""
    return {
        published_name(name, form, projection): (tensor[None] if name == "qformer.queries" else tensor)
        for name, tensor in tensors.items()
    }
