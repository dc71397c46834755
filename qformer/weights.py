"""Reading and writing weights: a Q-Former's start from BERT, and tensors in files that are whole or not there."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from qformer.errors import ConfigError, TrainingError, reason
from qformer.nn.qformer import QFormer, QFormerSize
from qformer.tensorfiles import load_tensors, read_pickle

BERT_TO_QFORMER = (
    (r"^embeddings\.(word|position)_embeddings\.", r"\1_embeddings."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.self\.", ".self_attention."),
    (r"\.attention\.output\.dense\.", ".self_attention.output."),
    (r"\.attention\.output\.LayerNorm\.", ".self_attention.norm."),
    (r"\.intermediate\.dense\.", ".text_feed_forward.inner."),
    (r"\.output\.dense\.", ".text_feed_forward.outer."),
    (r"\.output\.LayerNorm\.", ".text_feed_forward.norm."),
)
"""Patterns of BERT's names, applied in order, and what stands there in `QFormer.state_dict()`."""

OLD_NAMES = ((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
"""The prefix of models with heads, and the LayerNorm names of early releases."""

SHAPE_FIELDS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
}
"""`QFormerSize` fields and what BERT's config.json calls them."""


HEADINGS = {
    "loaded": "loaded",
    "copied": "copied",
    "made": "made",
    "unused": "unused",
    "reshaped": "shape differs",
}
"""What the table calls each kind of tensor."""


@dataclass(frozen=True)
class LoadReport:
    """Where each tensor of a started Q-Former comes from, and what of the source was not needed."""

    source: str
    loaded: tuple[str, ...]
    """Taken as they are, by the Q-Former's names."""
    copied: tuple[str, ...]
    """Query feed-forwards, taken from the text ones."""
    made: tuple[str, ...]
    """Drawn anew: queries and cross-attention."""
    unused: tuple[str, ...]
    """Left in the source, by the source's names."""
    reshaped: tuple[str, ...] = ()
    """In the source with another shape, so made anew: the name, the shape found and the shape wanted."""

    def table(self) -> str:
        """The report in lines; tensors that differ only in a number or in weight and bias share one."""
        lines = [f"Q-Former from {self.source}"]
        for kind in HEADINGS:
            names = getattr(self, kind)
            lines.append(f"  {HEADINGS[kind]}: {len(names) or 'nothing'}")
            for group, count in Counter(map(_group, names)).items():
                lines.append(f"    {group}" + (f" ×{count}" if count > 1 else ""))
        return "\n".join(lines)

    def line(self) -> str:
        """The report's counts in one line, for a load that took everything as it was."""
        counts = ", ".join(f"{HEADINGS[kind]}: {len(getattr(self, kind)) or 'nothing'}" for kind in HEADINGS)
        return f"Q-Former from {self.source}: {counts}"


def start_from_bert(
    source: str | Path,
    *,
    vision_width: int,
    queries: int = 32,
    cross_attention_every: int = 2,
    instruction: bool = True,
    dropout: float = 0.1,
    frames: int = 0,
    hidden: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    intermediate: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[QFormer, LoadReport]:
    """A Q-Former that starts from a BERT checkpoint, as in BLIP-2's first stage.

    Self-attention, feed-forwards and embeddings are BERT's; the query feed-forward is a copy of the text one;
    cross-attention and queries are new, drawn from `generator`.  Token types, pooler and heads are left unused: the
    Q-Former has none.

    `source` is a directory or hub id with config.json and model.safetensors (or pytorch_model.bin, or shards).  Sizes
    left out are the checkpoint's; fewer layers than it has keep the first ones.

    Raises:
        ConfigError: nothing to read there, not a BERT, sizes asked for that the checkpoint does not have, or tensors
            that are missing or of another shape than its config.json says.
    """
    directory = located(source)
    described = _bert_config(directory, str(source))
    shape: dict[str, int] = {field: described[theirs] for field, theirs in SHAPE_FIELDS.items()}
    asked = {"hidden": hidden, "layers": layers, "heads": heads, "intermediate": intermediate}
    for field, value in asked.items():
        given = shape[field]
        if value is None or value == given:
            continue
        if field != "layers" or value > given:
            raise ConfigError(
                f"qformer.{field} is {value} and the BERT checkpoint {source} has {given}; set it to {given}"
                f"{' or fewer' if field == 'layers' else ''}, or leave it out."
            )
        shape[field] = value
    size = QFormerSize(
        vision_width=vision_width,
        queries=queries,
        cross_attention_every=cross_attention_every,
        instruction=instruction,
        dropout=dropout,
        frames=frames,
        **shape,
    )
    qformer = QFormer(size, generator)
    return qformer, _take_bert(qformer, read_weights(directory, str(source)), str(source))


def bert_shape(source: str) -> dict[str, int] | None:
    """A BERT checkpoint's sizes by `QFormerSize`'s names, from its config.json alone; None where none can be had.

    Raises:
        ConfigError: it is there, and not a BERT's.
    """
    from transformers.utils import cached_file

    if (Path(source) / "config.json").is_file():
        directory = Path(source)
    else:
        try:
            found = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            return None
        if found is None:
            return None
        directory = Path(found).parent
    described = _bert_config(directory, source)
    return {field: described[theirs] for field, theirs in SHAPE_FIELDS.items()}


def read_bert(source: str | Path) -> tuple[dict[str, int], dict[str, Tensor], tuple[str, ...]]:
    """A BERT checkpoint's sizes by `QFormerSize`'s names, its tensors by the Q-Former's, and what it has besides.

    Raises:
        ConfigError: nothing to read there, or not a BERT.
    """
    directory = located(source)
    described = _bert_config(directory, str(source))
    tensors: dict[str, Tensor] = {}
    unused = []
    for name, tensor in read_weights(directory, str(source)).items():
        ours = _qformer_name(name)
        if ours.startswith(("blocks.", "word_", "position_", "norm.")):
            tensors[ours] = tensor
        else:
            unused.append(name)
    return {field: described[theirs] for field, theirs in SHAPE_FIELDS.items()}, tensors, tuple(unused)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that appears whole or not at all.

    Raises:
        TrainingError: it cannot be written; says why.
    """
    held: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        held[name] = plain.clone() if plain.untyped_storage().data_ptr() in storages else plain
        storages.add(plain.untyped_storage().data_ptr())  # the format refuses tensors that share memory
    with whole_file(path) as work:
        try:
            save_file(held, work, dict(metadata or {}))
        except SafetensorError as error:  # how the library reports a full disk, among others
            raise OSError(str(error)) from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to in place of `path`; it becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        TrainingError: the file system refuses; says why.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield work
        with work.open("rb+") as written:
            os.fsync(written.fileno())
        work.chmod(0o666 & ~_umask())  # safetensors leaves files that their owner alone may read
        os.replace(work, path)
    except OSError as error:
        raise TrainingError(
            f"{path}: it cannot be written ({error.strerror or error}); free some space or choose another place."
        ) from None
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a module with tensors of exactly its names and shapes.

    Raises:
        ConfigError: names what is missing, unexpected, of another shape or no weights; the module is left as it was.
    """
    own = module.state_dict()
    refuse_strange(tensors, where)
    faults = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} (found {tuple(tensors[name].shape)}, wanted {tuple(own[name].shape)})"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {shortened(names)}" for kind, names in faults.items() if names)
        raise ConfigError(f"{where}: the weights do not fit. {told}.")
    module.load_state_dict(tensors)


def refuse_strange(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse what cannot be weights: whole numbers (of a quantised file), and tensors without dense values.

    Raises:
        ConfigError: names one of them.
    """
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not (dense and tensor.is_floating_point()):
            kind = str(tensor.dtype).removeprefix("torch.") if dense else "not dense"
            raise ConfigError(
                f"{where}: {name} is {kind}, and weights are dense floating-point numbers; fetch the file again, in "
                f"the form it was published in."
            )


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str, unused: Iterable[str] = ()) -> LoadReport:
    """Fill a module with what a source has of its tensors; the others stay as they were drawn.

    Args:
        module: is changed in place; types and devices stay its own.
        tensors: by the module's names.
        source: for the report.
        unused: what else the source holds.

    Raises:
        ConfigError: a tensor that cannot be weights.
    """
    own = module.state_dict()
    refuse_strange(tensors, source)
    loaded = [name for name in own if name in tensors and tensors[name].shape == own[name].shape]
    reshaped = [
        f"{name} {tuple(tensors[name].shape)}, wanted {tuple(own[name].shape)}"
        for name in own
        if name in tensors and name not in loaded
    ]
    made = [name for name in own if name not in tensors]
    module.load_state_dict({**own, **{name: tensors[name] for name in loaded}})
    left = [*(name for name in tensors if name not in own), *unused]
    return LoadReport(source, tuple(loaded), (), tuple(made), tuple(left), tuple(reshaped))


def _take_bert(qformer: QFormer, weights: Mapping[str, Tensor], source: str) -> LoadReport:
    own = qformer.state_dict()
    theirs: dict[str, str] = {}  # the Q-Former's name of a tensor -> the checkpoint's
    for name in weights:
        theirs.setdefault(_qformer_name(name), name)
    taken: dict[str, str] = {}  # the Q-Former's name -> the checkpoint's, for what is filled
    loaded: list[str] = []
    copied: list[str] = []
    made: list[str] = []
    for name in own:
        origin = name.replace(".query_feed_forward.", ".text_feed_forward.")
        if name in ("queries", "frame_embedding") or ".cross_attention." in name:
            made.append(name)
            continue
        if origin not in theirs:
            raise ConfigError(
                f"{source}: the BERT checkpoint has no tensor for {origin}; give one whose weights fit its config.json."
            )
        taken[name] = theirs[origin]
        (loaded if origin == name else copied).append(name)
    for name, origin in taken.items():
        if weights[origin].shape != own[name].shape:
            raise ConfigError(
                f"{source}: {origin} has shape {tuple(weights[origin].shape)} where its config.json implies "
                f"{tuple(own[name].shape)}; correct config.json (vocabulary and positions are taken from it)."
            )
    refuse_strange({origin: weights[origin] for origin in taken.values()}, source)
    qformer.load_state_dict({**own, **{name: weights[origin] for name, origin in taken.items()}})
    used = set(taken.values())
    unused = tuple(name for name in weights if name not in used)
    return LoadReport(source, tuple(loaded), tuple(copied), tuple(made), unused)


def _qformer_name(name: str) -> str:
    for pattern, replacement in (*OLD_NAMES, *BERT_TO_QFORMER):
        name = re.sub(pattern, replacement, name)
    return name


def _group(name: str) -> str:
    """A name without what tells its neighbours apart: block numbers and weight or bias."""
    name = re.sub(r"\.\d+\.", ".*.", name)
    return re.sub(r"\.(weight|bias|gamma|beta)$", "", name)


def shortened(names: Iterable[str], most: int = 8) -> str:
    """Names in a sentence, the first few of them."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def located(source: str | Path) -> Path:
    """The directory of a checkpoint; a hub id is fetched, or found in the hub's cache."""
    directory = Path(source)
    if directory.is_dir():
        return directory
    name = str(source)
    if directory.is_file():
        raise ConfigError(
            f"{source}: it is a file, and a BERT checkpoint is a directory or hub id; an adapter to start from is a "
            f"directory too, or a .pth file of LAVIS."
        )
    if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(f"{source}: there is no such directory; give a BERT checkpoint's directory or hub id.")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, allow_patterns=["config.json", "model*.safetensors*"]))
        if not list(found.glob("model*.safetensors")):
            found = Path(snapshot_download(name, allow_patterns=["config.json", "pytorch_model*.bin*"]))
    except Exception as error:  # the hub's client raises many kinds
        raise ConfigError(
            f"{source}: neither a directory nor a BERT checkpoint that can be fetched from the hub ({reason(error)})."
        ) from None
    return found


def _bert_config(directory: Path, source: str) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{source}: it has no config.json; give a BERT checkpoint's directory or hub id.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: it cannot be read ({error}).") from None
    kind = described.get("model_type", "bert") if isinstance(described, dict) else None
    if kind != "bert":
        raise ConfigError(f"{path}: model_type is '{kind}'; the Q-Former starts from a checkpoint of type 'bert'.")
    lacking = [field for field in SHAPE_FIELDS.values() if not isinstance(described.get(field), int)]
    if lacking:
        raise ConfigError(f"{path}: it lacks {', '.join(lacking)}; a BERT checkpoint's config.json gives them.")
    if described["hidden_size"] % described["num_attention_heads"]:
        raise ConfigError(
            f"{path}: hidden_size ({described['hidden_size']}) does not divide evenly by num_attention_heads "
            f"({described['num_attention_heads']}); correct config.json."
        )
    activation, positions = described.get("hidden_act", "gelu"), described.get("position_embedding_type", "absolute")
    if activation != "gelu" or positions != "absolute":  # gelu_new and the like are approximations of another value
        raise ConfigError(
            f"{path}: hidden_act is '{activation}' and position_embedding_type '{positions}'; the Q-Former computes "
            f"with the exact 'gelu' and 'absolute' positions."
        )
    return described


def read_weights(directory: Path, source: str, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The wanted tensors of a checkpoint's directory, by name; shards without a wanted tensor are not opened.

    Raises:
        ConfigError: no weights there, a shard is missing, or a file is not whole or not safe to read.
    """
    files = weight_files(directory, source, wanted)
    read = load_tensors if files[0].suffix == ".safetensors" else _load_pickle
    return {name: tensor for file in files for name, tensor in read(file, wanted).items()}


def weight_files(directory: Path, source: str, wanted: Callable[[str], bool] = lambda _: True) -> list[Path]:
    """The files that hold the wanted tensors: one, or shards behind an index, safetensors before pickles.

    Raises:
        ConfigError: no weights there, or a shard is missing.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, whole = directory / f"{stem}.{ending}.index.json", directory / f"{stem}.{ending}"
        if index.is_file():
            shards = _shards(index, wanted)
        elif whole.is_file():
            shards = [whole.name]
        else:
            continue
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise ConfigError(
                f"{source}: {index.name} names {shortened(missing)}, which is not there; fetch the missing shards."
            )
        return [directory / shard for shard in shards]
    raise ConfigError(f"{source}: it holds neither model.safetensors nor pytorch_model.bin.")


def _shards(index: Path, wanted: Callable[[str], bool]) -> list[str]:
    try:
        held: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({shard for name, shard in held.items() if wanted(name)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index}: not an index of shards (an object with weight_map); fetch it again.") from None


def _load_pickle(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    held = read_pickle(path)
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor) and wanted(name)}
