"""The frozen language model: any causal or sequence-to-sequence LLM of transformers behind a few members.

R rows, N reads, Q soft tokens a read, L LLM width, S positions of the longest row, C candidates, T their longest.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qformer import devices
from qformer.backbones import fused, precision, ranking
from qformer.backbones.ranking import Group
from qformer.backbones.sharding import Shards
from qformer.cards import Decoding
from qformer.errors import ConfigError, DataError
from qformer.nn.losses import token_log_likelihood
from qformer.sample import Row, Slot, Text
from qformer.text import Joiner, Profile, Truncations

FINGERPRINT_ROWS = 64
CANNOT = (TypeError, AttributeError, RuntimeError, ValueError)
"""What models raise that are asked for a mask, for positions or for a cache that they have not."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """Rows as tensors: inputs (R, S, L), mask (R, S) of ones and zeros, labels (R, S), -1 where nothing is trained, and
    each row's length.

    Labels stay in the machine's memory: what is chosen by them there is chosen without waiting for a GPU.
    """

    inputs: Tensor
    mask: Tensor
    labels: Tensor
    lengths: tuple[int, ...]

    @property
    def positions(self) -> Tensor:
        """(R, S): counted from each row's own first position, on whichever side it is padded."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)


class LanguageTower(nn.Module, ABC):
    """What decoder-only and encoder–decoder LLMs share: a frozen model, its tokenizer and its profile."""

    is_encoder_decoder: bool

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        profile: Profile,
        *,
        gradient_checkpointing: bool = False,
        packing: bool = True,
    ):
        super().__init__()
        self.model: Any = model
        self.tokenizer, self.profile = tokenizer, profile
        self.checkpointing, self.packing = gradient_checkpointing, packing
        self.truncations = Truncations()
        """Counts every text that is cut for this LLM, candidates among them."""
        self.shards: Shards | None = None
        """The processes that hold its blocks in parts, see `qformer.backbones.sharding`; None: each holds all."""
        model.requires_grad_(False)
        fused.fuse(model)
        _leave_four_bits_as_they_are(model)
        _forget_generation_defaults(model, tokenizer)
        if gradient_checkpointing:
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise ConfigError(
                    f"language.gradient_checkpointing is true, and {type(model).__name__} does not support it; "
                    f"set it to false."
                )
            _silence_dropout(model)
            # The older name is deprecated in newer releases of transformers, which the lower bound does not reach.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            model.disable_input_require_grads()  # soft tokens bring their gradient; words need none
        self.train(False)

    def train(self, mode: bool = True) -> LanguageTower:
        """Evaluation mode always; with gradient checkpointing training mode, where its dropouts are 0 (in evaluation
        mode transformers would silently recompute nothing).
        """
        super().train(False)
        self.training = mode
        self.model.train(mode and self.checkpointing)
        return self

    @property
    def width(self) -> int:
        """L: the width of the input embeddings."""
        return int(self._embeddings.weight.shape[1])

    @property
    def positions(self) -> int | None:
        """The longest row that the LLM takes; None where nothing is said."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        """What the embeddings are held in."""
        return self._embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self._embeddings.weight.device

    @property
    def _embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    @torch.no_grad()
    def embedding_norm(self) -> float:
        """Mean length of a word's embedding as the LLM reads it."""
        parts = torch.arange(self.words).split(4096)
        return float(torch.cat([self.embedded(part).norm(dim=-1) for part in parts]).mean())

    @property
    def words(self) -> int:
        """Ids that both the tokenizer and the table of embeddings have."""
        return min(len(self.tokenizer), self._embeddings.weight.shape[0])

    @torch.no_grad()
    def embedded(self, ids: Tensor) -> Tensor:
        """Ids (N,) -> their embeddings (N, L) in float32 as the LLM reads them: through its module, whose scaling
        counts (Gemma), so that soft tokens stand in the same space.
        """
        return self._embeddings(ids.to(self.device)).float()

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """64 fixed embedding rows (64, L) in float32 that tell this LLM from others."""
        return fingerprint(self._embeddings.weight)

    def together(self) -> AbstractContextManager[None]:
        """Where processes that hold the LLM in parts ask it unlike things, or unlike often; alone it is nothing."""
        return nullcontext() if self.shards is None else self.shards.together()

    def know_itself(self) -> None:
        """Find out now what is else found out when it is first asked for, on all processes together."""
        _ = self.packs, self.ranks, self._head_stands_alone

    # -- rows as tensors ----------------------------------------------------------------------------------------------

    def _join(self, soft: Tensor, rows: Sequence[Row], *, left: bool = False) -> Joined:
        """Soft tokens (N, Q, L) and rows of ids and slots as embeddings in the LLM's dtype, padded on one side."""
        queries, soft = soft.shape[1], soft.to(self.dtype).flatten(0, 1)
        ids = [0]  # what padding holds; the mask hides it
        places: list[list[int]] = []  # of each position in the table below; 0 is padding
        labels: list[list[int]] = []
        for row in rows:
            place: list[int] = []
            label: list[int] = []
            for piece in row:
                if isinstance(piece, Slot):
                    start = piece.read * queries - len(soft)  # from the table's end
                    place += range(start, start + queries)
                    label += [-1] * queries
                else:
                    place += range(len(ids), len(ids) + len(piece.ids))
                    label += piece.ids if piece.trained else [-1] * len(piece.ids)
                    ids += piece.ids
            places.append(place)
            labels.append(label)
        table = torch.cat([self._embeddings(self._sent(torch.tensor(ids))), soft])
        return Joined(
            inputs=table[self._sent(padded(places, 0, left))],
            mask=self._sent(padded([[1] * len(place) for place in places], 0, left)),
            labels=padded(labels, -1, left),
            lengths=tuple(map(len, places)),
        )

    def _sent(self, values: Tensor) -> Tensor:
        """The same on the LLM's device, without waiting for it."""
        return devices.sent(values, self.device)

    def _chosen(self, values: Tensor, which: Tensor) -> Tensor:
        """Of values (R, S, …) on the device those that `which` (R, S), in the machine's memory, says (M, …)."""
        return values.flatten(0, 1).index_select(0, self._sent(which.flatten().nonzero().flatten()))

    def _check_length(self, length: int) -> None:
        limit = self.positions
        if limit is not None and length > limit:
            raise DataError(
                f"a row takes {length} positions (soft tokens, prompt and answer), and the LLM has {limit}; lower "
                f"language.instruction_limit, language.target_limit, qformer.queries or decoding.max_new_tokens."
            )

    # -- scoring ------------------------------------------------------------------------------------------------------

    @property
    def packs(self) -> str | None:
        """How rows to be scored share tensor rows, see `qformer.backbones.packing`; None: they are padded."""
        return None

    def log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Soft tokens (N, Q, L) -> sums of log p over each row's trained tokens (R,), and their numbers (R,).

        An LLM in half precision computes in it, whatever autocast says.

        Raises:
            DataError: a row too long for the LLM, or one whose trained tokens this kind of LLM cannot score.
        """
        with precision.in_own(self.dtype, self.device):
            return self._log_likelihood(soft, rows)

    @abstractmethod
    def _log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """What `log_likelihood` gives."""

    @cached_property
    @torch.no_grad()
    def _head_stands_alone(self) -> bool:
        """Whether the last hidden states and the output layer give the logits of the whole, to the bit: asked of the
        model with four ids, since soft caps, scales and biases stand between or behind them in some families.
        """
        try:
            hidden, logits = self._asked_twice()
            return torch.equal(self.model.get_output_embeddings()(hidden), logits)
        except CANNOT:
            return False

    @abstractmethod
    def _asked_twice(self) -> tuple[Tensor, Tensor]:
        """Last hidden states and logits of the same few ids."""

    def _log_p_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log p (M,) of tokens (M,) by the output layer alone, from what it reads (M, L).

        Where they are many, their logits are written in parts, and again in the backward pass, so that never more of
        them are held than `ranking.LOGITS_AT_ONCE` numbers.
        """
        head = self.model.get_output_embeddings()
        most = max(1, ranking.LOGITS_AT_ONCE // self._embeddings.weight.shape[0])
        if len(tokens) <= most:
            return token_log_likelihood(head(hidden), tokens)
        parts = [
            checkpoint(lambda h, t: token_log_likelihood(head(h), t), *part, use_reentrant=False)
            for part in zip(hidden.split(most), tokens.split(most), strict=True)
        ]
        return torch.cat(parts)

    def rank(
        self,
        soft: Tensor,
        rows: Sequence[Row],
        candidates: Sequence[Sequence[str]],
        normalize: str = "sum",
        end: bool = True,
    ) -> list[list[float]]:
        """Log-likelihoods of each row's candidates behind it, in their order.

        normalize: "sum", "mean" (over scored tokens), "pmi" (the sum minus the sum without slots); `end`: whether the
        end mark is scored.

        Raises:
            ConfigError: an unknown `normalize`, a row without candidates, or a candidate with nothing to score.
            DataError: a prompt with nothing in it, or too long for the LLM.
        """
        joiner = Joiner(self.tokenizer, self.profile, None)
        joiner.truncations = self.truncations
        ids = ranking.requested(joiner, rows, candidates, end)
        with self._answering():
            return ranking.ranked(
                partial(self._scored, soft),
                rows,
                ids,
                normalize,
                queries=soft.shape[1],
                vocabulary=self._embeddings.weight.shape[0],
                packed=self.ranks == "packed",
            )

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Evaluation mode, no gradients, its own precision for a while: in training mode a checkpointed layer keeps no
        cache.
        """
        before = self.training
        self.eval()
        try:
            with torch.no_grad(), precision.in_own(self.dtype, self.device):
                yield
        finally:
            self.train(before)

    @cached_property
    def _cache_name(self) -> str:
        """What the model calls its keys and values of earlier positions; newer releases have a shorter name."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    @property
    def _scorers(self) -> dict[str, Callable[[Tensor, Sequence[Group]], Tensor]]:
        """Ways to score candidates, the fastest first."""
        return {"behind": self._behind, "apart": self._apart}

    @cached_property
    @torch.no_grad()
    def ranks(self) -> str:
        """How candidates are scored: "packed", "behind" or "apart", see `qformer.backbones.ranking`.

        The first way that scores two prompts of unlike length, with candidates that begin alike and then branch, as
        whole rows do: asked of the model, since some masks, positions and caches allow no more.
        """
        soft = self._embeddings(torch.arange(2, device=self.device)[None])
        candidates = ((7,), (8, 9, 10), (8, 11, 12, 13))
        groups = [Group((Slot(0), Text(ids)), candidates) for ids in ((3, 4, 5), (6,))]
        wanted = self._apart(soft, groups)
        near = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.05
        for name, score in self._scorers.items():
            try:
                found = score(soft, groups)
            except CANNOT:
                continue
            if torch.allclose(found, wanted, rtol=near, atol=near):
                return name
        return "apart"

    def _scored(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        """Sums of log p of the groups' candidates, in the fastest way that is right."""
        return self._scorers[self.ranks](soft, groups)

    @abstractmethod
    def _behind(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        """Sums of log p of the groups' candidates, each behind its prompt's cache."""

    def _apart(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        """Sums of log p of the groups' candidates, a row each."""
        rows = [(*prompt, Text(ids, trained=True)) for prompt, candidates in groups for ids in candidates]
        return self.log_likelihood(soft, rows)[0]

    # -- writing ------------------------------------------------------------------------------------------------------

    def generate(self, soft: Tensor, rows: Sequence[Row], **decoding: Any) -> list[str]:
        """One answer per row; `decoding`: the fields of `qformer.cards.Decoding`.

        Raises:
            DataError: a prompt and what is to be written are too long for the LLM.
        """
        return self._answers(self.write(soft, rows, **decoding))

    @abstractmethod
    def write(self, soft: Tensor, rows: Sequence[Row], **decoding: Any) -> Tensor:
        """What `generate` makes answers of: the new ids (R, T) of each row, with end marks and padding."""

    @property
    def _ends(self) -> list[int]:
        """What ends an answer: the profile's end mark, or the tokenizer's own."""
        own = self.tokenizer.eos_token_id
        return list(dict.fromkeys([self.profile.end[0], *([] if own is None else [own])]))

    def _decoding(self, given: dict[str, Any]) -> dict[str, Any]:
        """Every value explicit, so that no file in the model's folder decides."""
        values = dataclasses.asdict(Decoding(**given))
        if values["do_sample"]:
            values["top_k"] = 0
        else:
            del values["temperature"], values["top_p"]  # they choose nothing, and transformers warns of them
        if values["num_beams"] == 1:
            del values["length_penalty"]
        else:
            values["early_stopping"] = False
        fixed = {"use_cache": True, "num_return_sequences": 1, "no_repeat_ngram_size": 0}
        if self.shards is not None:
            fixed["synced_gpus"] = False  # `together` does it, for batches of unlike number too
        known = self.profile.pad < self._embeddings.weight.shape[0]  # some tokenizers add a mark the model lacks
        pad = self.profile.pad if known else self._ends[0]
        return {**values, **fixed, "pad_token_id": pad, "eos_token_id": self._ends}

    def _answers(self, generated: Tensor) -> list[str]:
        """New ids (R, T) as texts, cut at the first end mark and the first stop string."""
        answers = []
        for ids in generated.tolist():
            cut = next((place for place, each in enumerate(ids) if each in self._ends), len(ids))
            text = self.tokenizer.decode(ids[:cut], skip_special_tokens=True)
            for stop in filter(None, self.profile.stop):
                text = text.split(stop)[0]
            answers.append(text.strip())
        return answers


def fingerprint(embeddings: Tensor) -> Tensor:
    """64 fixed rows of a table of embeddings (words, L) in float32, spread evenly below id 1,000.

    In a smaller vocabulary they are spread below the greatest power of two in it, so that rows added at its end choose
    no others.
    """
    rows = embeddings.shape[0]
    span = 1000 if rows >= 1000 else 1 << (rows.bit_length() - 1)
    ids = [number * span // FINGERPRINT_ROWS for number in range(FINGERPRINT_ROWS)]
    return embeddings[ids].float().clone()


def same_language(first: Tensor, second: Tensor) -> bool:
    """Whether two fingerprints are of one LLM: rows equal within 2 % of their length, so that precision and
    quantisation do not matter.
    """
    if first.shape != second.shape:
        return False
    return bool((first.cpu() - second.cpu()).norm() <= 0.02 * second.norm())


def _forget_generation_defaults(model: Any, tokenizer: Any) -> None:
    """Only the id that a decoder starts with is kept of what a model's folder says about decoding."""
    import transformers

    fresh = transformers.GenerationConfig()
    if model.config.is_encoder_decoder:
        starts = (
            getattr(model.config, "decoder_start_token_id", None),
            getattr(model.generation_config, "decoder_start_token_id", None),
            tokenizer.bos_token_id,
        )
        fresh.decoder_start_token_id = next((start for start in starts if start is not None), None)
        if fresh.decoder_start_token_id is None:
            raise ConfigError(
                "the LLM's config.json lacks decoder_start_token_id, the id its decoder starts with; add it."
            )
    model.generation_config = fresh


def _silence_dropout(model: Any) -> None:
    """Every dropout of a model to 0: modules, and the rates that attention code reads from attributes and configs."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


def _leave_four_bits_as_they_are(model: Any) -> None:
    """Where a CPU multiplies bfloat16 by itself (AVX-512), bitsandbytes packs 4-bit weights anew when they are first
    used without gradients, and from then on gives none through them, to training either.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def padded(rows: Sequence[Sequence[int]], filler: int, left: bool = False) -> Tensor:
    """Lists of whole numbers as one (R, S) tensor."""
    longest = max(map(len, rows))
    if left:
        return torch.tensor([[filler] * (longest - len(row)) + [*row] for row in rows])
    return torch.tensor([[*row] + [filler] * (longest - len(row)) for row in rows])
