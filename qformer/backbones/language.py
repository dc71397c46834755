"""The frozen language model: any causal or sequence-to-sequence LLM of transformers behind a few members.

R rows, N reads, Q soft tokens a read, L LLM width, S positions of the longest row, C candidates, T their longest.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qformer.backbones import packing, ranking, reading
from qformer.backbones.ranking import Group
from qformer.backbones.sharding import Shards
from qformer.cards import Decoding
from qformer.errors import ConfigError, DataError
from qformer.nn.losses import token_log_likelihood
from qformer.sample import Row, Slot, Text, row_length
from qformer.text import Joiner, Profile, Truncations

FINGERPRINT_ROWS = 64
CANNOT = (TypeError, AttributeError, RuntimeError, ValueError)
"""What models raise that are asked for a mask, for positions or for a cache that they have not."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """Rows as tensors: inputs (R, S, L), mask (R, S) of ones and zeros, labels (R, S), -1 where nothing is trained."""

    inputs: Tensor
    mask: Tensor
    labels: Tensor

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
        table = torch.cat([self._embeddings(torch.tensor(ids, device=self.device)), soft])
        return Joined(
            inputs=table[_padded(places, 0, left).to(self.device)],
            mask=_padded([[1] * len(place) for place in places], 0, left).to(self.device),
            labels=_padded(labels, -1, left).to(self.device),
        )

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

    @abstractmethod
    def log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Soft tokens (N, Q, L) -> sums of log p over each row's trained tokens (R,), and their numbers (R,)."""

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
                partial(self._scorers[self.ranks], soft),
                rows,
                ids,
                normalize,
                queries=soft.shape[1],
                vocabulary=self._embeddings.weight.shape[0],
                packed=self.ranks == "packed",
            )

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Evaluation mode and no gradients for a while: in training mode a checkpointed layer keeps no cache."""
        before = self.training
        self.eval()
        try:
            with torch.no_grad():
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


class DecoderOnly(LanguageTower):
    """A causal LLM: rows padded on the right to be scored, on the left to be continued, mask and positions given."""

    is_encoder_decoder = False

    def log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Soft tokens (N, Q, L) -> (R,) sums and (R,) counts; the head runs on predicting positions alone.

        Raises:
            DataError: a row begins with a trained token, or is too long for the LLM.
        """
        if any(isinstance(row[0], Text) and row[0].trained for row in rows):
            raise DataError(
                "a row has nothing before its first trained token, so nothing predicts it; give the prompt words, a "
                "picture, or an opening mark (language.profile.opening)."
            )
        return self._likelihood(soft, rows, self.packs)

    def _likelihood(
        self, soft: Tensor, rows: Sequence[Row], packs: str | None, bins: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor]:
        lengths = [row_length(row, soft.shape[1]) for row in rows]
        self._check_length(max(lengths))
        if packs is None:
            joined = self._join(soft, rows)
            given = self._given(joined.inputs, joined.mask, joined.positions)
            owners = torch.arange(len(rows), device=self.device)[:, None].expand_as(joined.labels)
            firsts = joined.positions == 0
        else:
            packed = packing.packed(lengths, bins or packing.cheapest(lengths, self.width)).to(self.device)
            joined = self._join(soft, [tuple(chain.from_iterable(rows[n] for n in numbers)) for numbers in packed.bins])
            mask = packed.mask(self.dtype) if packs == "mask" else None
            given = self._given(joined.inputs, mask, packed.positions)
            owners, firsts = packed.owners, packed.firsts
        # What stands at a position is predicted by the one before it, and a row's first by none.
        wanted = nn.functional.pad(joined.labels.masked_fill(firsts, -1)[:, 1:], (0, 1), value=-1)
        predicting = wanted >= 0
        log_p = self._log_p(given, predicting, wanted[predicting])
        owner = owners[predicting]
        counts = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        return log_p.new_zeros(len(rows)).index_add(0, owner, log_p), counts.index_add(0, owner, torch.ones_like(owner))

    @property
    def packs(self) -> str | None:
        """How rows to be scored share tensor rows, see `qformer.backbones.packing`; None: they are padded."""
        return self._packs if self.packing else None

    @cached_property
    @torch.no_grad()
    def _packs(self) -> str | None:
        """The first way in which rows beside others score as alone: asked of the model, since families differ in what
        they make of positions and masks, and say nothing of it.

        A row must not notice what its neighbours hold, to the bit and therefore at any precision and any size of
        weights, and score as a padded row does.
        """
        soft = self._embeddings(torch.arange(2, device=self.device)[None])
        texts = [(3, 4, 5, 9), (6,), (7, 3, 8, 4, 5), (5, 6, 3)]
        rows = [(Slot(0), Text(ids), Text(tuple(each + 2 for each in ids), trained=True)) for ids in texts]
        others = [(Slot(0), Text(row[1].ids[::-1]), row[2]) if n in (0, 2) else row for n, row in enumerate(rows)]
        near = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.05
        wanted = self._likelihood(soft, rows, None)[0]
        for way in ("positions", "mask"):
            if way == "mask" and self._window < math.inf:
                continue  # the mask shows everything, however far away
            try:
                found, beside = (self._likelihood(soft, each, way, [range(4)])[0] for each in (rows, others))
            except CANNOT:
                continue
            if torch.equal(found[1::2], beside[1::2]) and torch.allclose(found, wanted, rtol=near, atol=near):
                return way
        return None

    def write(self, soft: Tensor, rows: Sequence[Row], **decoding: Any) -> Tensor:
        """New ids (R, T), a continuation per row; `decoding`: the fields of `qformer.cards.Decoding`.

        Raises:
            DataError: a prompt and what is to be written behind it are too long for the LLM.
        """
        from transformers import RepetitionPenaltyLogitsProcessor

        settings = self._decoding(decoding)
        joined = self._join(soft, rows, left=True)
        self._check_length(joined.mask.shape[1] + settings["max_new_tokens"])
        penalty = RepetitionPenaltyLogitsProcessor(settings.pop("repetition_penalty"))
        # Positions are counted by `generate` from the mask, exactly as `Joined` counts them.  The penalty is put in by
        # hand: behind embeddings `generate` takes it off a padded row's first new tokens, as many as it has padding.
        given = {"inputs_embeds": joined.inputs, "attention_mask": joined.mask, "logits_processor": [penalty]}
        with self._answering():
            lengths = joined.mask.sum(1).tolist()
            if reading.worth(lengths) and self.reads_ahead and max(lengths) <= self._window:
                given[self._cache_name] = self._read(joined, lengths, copies=settings["num_beams"])
            return self.model.generate(**given, **settings)

    def _read(
        self, joined: Joined, lengths: Sequence[int], copies: int, bins: Sequence[Sequence[int]] | None = None
    ) -> Any:
        """The cache of prompts padded on the left, all but the last position of each, so many copies of a prompt."""
        from transformers import DynamicCache

        layout = reading.Layout.of(lengths, self.width, bins)
        packed = layout.packing.to(self.device)
        given = self._given(layout.packed(joined.inputs), packed.mask(self.dtype), packed.positions, cache=True)
        read = DynamicCache()
        if self._head_stands_alone:
            self.model.base_model(**given, **{self._cache_name: read})
        else:
            self.model(**given, **{self._cache_name: read}, logits_to_keep=1)
        return layout.padded(read.layers, DynamicCache(config=self.model.config.get_text_config(decoder=True)), copies)

    @property
    def reads_ahead(self) -> bool:
        """Whether prompts of unlike length are read side by side before an answer is written."""
        return self.packing and self.shards is None and self._reads_ahead

    @cached_property
    @torch.no_grad()
    def _reads_ahead(self) -> bool:
        """Whether what is read side by side is continued as what is read padded: asked of the model, as `_packs` is."""
        if not (self._head_stands_alone or self._keeps_positions):
            return False
        soft = self._embeddings(torch.arange(2, device=self.device)[None])
        texts = [(3, 4, 5, 9), (6,), (7, 3, 8)]
        near = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.05
        found = []
        with self._answering():
            for turned in (False, True):
                rows = [(Slot(0), Text(ids[::-1] if turned and n != 1 else ids)) for n, ids in enumerate(texts)]
                joined = self._join(soft, rows, left=True)
                last = joined.inputs[:, -1:], joined.mask, joined.positions[:, -1:]
                try:
                    cache = self._read(joined, joined.mask.sum(1).tolist(), 1, [range(3)])
                    after = self.model(**self._given(*last, cache=True), **{self._cache_name: cache}).logits[:, -1]
                except CANNOT:
                    return False
                whole = self.model(**self._given(joined.inputs, joined.mask, joined.positions)).logits[:, -1]
                if not torch.allclose(after, whole, rtol=near, atol=near):
                    return False
                found.append(after[1])
        return torch.equal(*found)

    @property
    def _scorers(self) -> dict[str, Callable[[Tensor, Sequence[Group]], Tensor]]:
        return {"packed": self._packed, **super()._scorers}

    def _packed(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        """Sums of log p of the groups' candidates, each group in one row."""
        if not all(prompt for prompt, _ in groups):
            return self._apart(soft, groups)  # says what is wrong
        trees = [ranking.tree_of(candidates) for _, candidates in groups]
        joined = self._join(soft, [prompt for prompt, _ in groups], left=True)
        fed = max(len(tree.ids) for tree in trees)
        rows, prompt = joined.mask.shape
        lengths = joined.mask.sum(1)
        longest = int(lengths.max()) + max(int(tree.depths.max()) + 2 if len(tree.ids) else 1 for tree in trees)
        self._check_length(longest)
        if longest > self._window:  # the mask below shows everything, however far away
            return self._behind(soft, groups)
        ids = torch.zeros(rows, fed, dtype=torch.long)
        depths = torch.zeros(rows, fed, dtype=torch.long)
        sees = torch.zeros(rows, prompt + fed, prompt + fed, dtype=torch.bool)
        sees[:, :, :prompt] = joined.mask.bool().cpu()[:, None]
        sees[:, :prompt, :prompt] &= torch.ones(prompt, prompt, dtype=torch.bool).tril()
        predicting = torch.zeros(rows, prompt + fed, dtype=torch.bool)
        for row, tree in enumerate(trees):
            count = len(tree.ids)
            ids[row, :count], depths[row, :count] = tree.ids, tree.depths
            sees[row, prompt : prompt + count, prompt : prompt + count] = tree.sees
            predicting[row, prompt - 1 : prompt + count] = True
        sees |= torch.eye(prompt + fed, dtype=torch.bool)  # padding sees itself: nothing at all would give NaN
        hidden = torch.zeros(sees.shape, dtype=self.dtype).masked_fill(~sees, torch.finfo(self.dtype).min)
        given = self._given(
            torch.cat([joined.inputs, self._embeddings(ids.to(self.device))], dim=1),
            hidden[:, None].to(self.device),
            torch.cat([joined.positions, lengths[:, None] + depths.to(self.device)], dim=1),
        )
        logits = self._logits(given, predicting.to(self.device))
        starts = torch.tensor([0, *(len(tree.ids) + 1 for tree in trees)]).cumsum(0)
        counts = torch.tensor([0, *(len(candidates) for _, candidates in groups)]).cumsum(0)
        places = torch.cat([tree.places + start for tree, start in zip(trees, starts, strict=False)]).to(self.device)
        owners = torch.cat([tree.owners + count for tree, count in zip(trees, counts, strict=False)]).to(self.device)
        log_p = _picked(logits, places, torch.cat([tree.tokens for tree in trees]).to(self.device))
        return log_p.new_zeros(int(counts[-1])).index_add(0, owners, log_p)

    @property
    def _window(self) -> float:
        """Positions that every block looks back on."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        chunk = getattr(config, "attention_chunk_size", None)
        return min(window or math.inf, chunk or math.inf)

    def _behind(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        prompts = [prompt for prompt, _ in groups]
        if not all(prompts):
            return self._apart(soft, groups)  # says what is wrong
        owner = [number for number, (_, candidates) in enumerate(groups) for _ in candidates]
        joined = self._join(soft, prompts, left=True)
        ids = _padded([ids for _, candidates in groups for ids in candidates], -1).to(self.device)  # (C, T)
        self._check_length(joined.mask.shape[1] + ids.shape[1])
        last = {"logits_to_keep": 1} if self._keeps_positions else {}
        prefix = self.model(**self._given(joined.inputs, joined.mask, joined.positions, cache=True), **last)
        first = token_log_likelihood(prefix.logits[:, -1][owner], ids[:, 0])
        if ids.shape[1] == 1:
            return first
        fed, wanted = ids[:, :-1], ids[:, 1:]
        cache = getattr(prefix, self._cache_name)
        cache.batch_select_indices(torch.tensor(owner, device=self.device))
        positions = joined.mask.sum(1)[owner][:, None] + torch.arange(fed.shape[1], device=self.device)
        given = self._given(
            self._embeddings(fed.clamp(min=0)),
            torch.cat([joined.mask[owner], (fed >= 0).long()], dim=1),
            positions,
            cache=True,
        )
        logits = self.model(**given, **{self._cache_name: cache}).logits
        scored = wanted >= 0
        log_p = token_log_likelihood(logits[scored], wanted[scored])
        return first.index_add(0, scored.nonzero()[:, 0], log_p)

    def _given(self, inputs: Tensor, mask: Tensor | None, positions: Tensor, *, cache: bool = False) -> dict[str, Any]:
        """What every forward pass is told; models without `position_ids` (ALiBi) count along the mask themselves."""
        given = {"inputs_embeds": inputs, "attention_mask": mask, "use_cache": cache}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            given["position_ids"] = positions
        return given

    def _log_p(self, given: dict[str, Any], predicting: Tensor, tokens: Tensor) -> Tensor:
        """Log p (M,) of tokens (M,) at the predicting positions (R, S), row by row."""
        if self._head_stands_alone:
            return self._log_p_of(self.model.base_model(**given).last_hidden_state[predicting], tokens)
        return token_log_likelihood(self._logits(given, predicting), tokens)

    def _logits(self, given: dict[str, Any], predicting: Tensor) -> Tensor:
        """Which positions (R, S) predict a token that is wanted -> their logits (…, vocabulary), row by row."""
        if self._head_stands_alone:
            hidden = self.model.base_model(**given).last_hidden_state
            return self.model.get_output_embeddings()(hidden[predicting])
        if self._keeps_positions:
            kept = predicting.any(0).nonzero().flatten()
            return self.model(**given, logits_to_keep=kept).logits[predicting[:, kept]]
        return self.model(**given).logits[predicting]

    @cached_property
    def _keeps_positions(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _asked_twice(self) -> tuple[Tensor, Tensor]:
        inputs = self._embeddings(torch.arange(4, device=self.device)[None])
        given = self._given(
            inputs, torch.ones_like(inputs[..., 0], dtype=torch.long), torch.arange(4, device=self.device)[None]
        )
        return self.model.base_model(**given).last_hidden_state, self.model(**given).logits


class EncoderDecoder(LanguageTower):
    """A sequence-to-sequence LLM: the encoder reads all but the trained span, the decoder writes it."""

    is_encoder_decoder = True

    def log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Soft tokens (N, Q, L) -> (R,) sums and (R,) counts.

        Raises:
            DataError: a row with another number of trained spans than one, at its end, or too long for the LLM.
        """
        for row in rows:
            trained = [isinstance(piece, Text) and piece.trained for piece in row]
            if trained.count(True) != 1 or not trained[-1]:
                raise DataError(
                    "an encoder–decoder takes one trained span a row, the last; set turns: each in the card."
                )
        targets = [row[-1].ids for row in rows]  # type: ignore[union-attr]
        read, mask = self._encoded(soft, [row[:-1] for row in rows])
        return self._decoded(read, mask, targets), torch.tensor([len(ids) for ids in targets], device=self.device)

    def write(self, soft: Tensor, rows: Sequence[Row], **decoding: Any) -> Tensor:
        """New ids (R, T), an answer per row; `decoding`: the fields of `qformer.cards.Decoding`.

        Raises:
            DataError: a prompt, or what is to be written, is too long for the LLM.
        """
        settings = self._decoding(decoding)
        starts = self._starts(len(rows))
        joined = self._join(soft, self._closed(rows))
        self._check_length(max(joined.mask.shape[1], starts.shape[1] + settings["max_new_tokens"]))
        given = {"inputs_embeds": joined.inputs, "attention_mask": joined.mask, "decoder_input_ids": starts}
        with self._answering():
            return self.model.generate(**given, **settings)[:, starts.shape[1] :]

    def _behind(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        from transformers import DynamicCache, EncoderDecoderCache

        read, mask = self._encoded(soft, [prompt for prompt, _ in groups])
        owner = torch.tensor([n for n, (_, choices) in enumerate(groups) for _ in choices], device=self.device)
        ids = _padded([ids for _, candidates in groups for ids in candidates], -1).to(self.device)  # (C, T)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = self._written(read, mask, self._starts(len(groups)), cache)[:, -1]
        sums = token_log_likelihood(first[owner], ids[:, 0])
        if ids.shape[1] == 1:
            return sums
        fed, wanted = ids[:, :-1], ids[:, 1:]
        cache.batch_select_indices(owner)
        logits = self._written(read[owner], mask[owner], fed.clamp(min=0), cache)
        scored = wanted >= 0
        log_p = token_log_likelihood(logits[scored], wanted[scored])
        return sums.index_add(0, scored.nonzero()[:, 0], log_p)

    def _closed(self, rows: Sequence[Row]) -> list[Row]:
        return [(*row, Text(self.profile.closing)) for row in rows]

    def _encoded(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """What the encoder makes of prompts (R, S, L), padded on the right, and the mask (R, S)."""
        joined = self._join(soft, self._closed(rows))
        self._check_length(joined.mask.shape[1])
        encoder = self.model.get_encoder()
        return encoder(inputs_embeds=joined.inputs, attention_mask=joined.mask).last_hidden_state, joined.mask

    def _decoded(self, read: Tensor, mask: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """(R,) sums of log p of targets, written behind the decoder's start as `generate` does."""
        labels = _padded(targets, -1).to(self.device)
        fed = torch.cat([self._starts(len(labels)), labels[:, :-1].clamp(min=0)], dim=1)
        scored, width = labels >= 0, labels.shape[1]
        if self._head_stands_alone:
            log_p = self._log_p_of(self._hidden(read, mask, fed)[:, -width:][scored], labels[scored])
        else:
            log_p = token_log_likelihood(self._written(read, mask, fed)[:, -width:][scored], labels[scored])
        return log_p.new_zeros(len(labels)).index_add(0, scored.nonzero()[:, 0], log_p)

    def _hidden(self, read: Tensor, mask: Tensor, fed: Tensor) -> Tensor:
        """What the output layer reads (R, T, L) behind ids (R, T)."""
        self._check_length(fed.shape[1])
        given = {"encoder_hidden_states": read, "encoder_attention_mask": mask, "use_cache": False}
        return self.model.get_decoder()(input_ids=fed, **given).last_hidden_state

    def _asked_twice(self) -> tuple[Tensor, Tensor]:
        read = self._embeddings(torch.arange(4, device=self.device)[None])
        mask, fed = torch.ones_like(read[..., 0], dtype=torch.long), torch.arange(4, device=self.device)[None]
        return self._hidden(read, mask, fed), self._written(read, mask, fed)

    def _starts(self, rows: int) -> Tensor:
        """(R, D) ids that a decoder is given: the one it starts with, and what the profile has behind it."""
        ids = (self.model.generation_config.decoder_start_token_id, *self.profile.decoder_opening)
        return torch.tensor([ids] * rows, device=self.device)

    def _written(self, read: Tensor, mask: Tensor, fed: Tensor, cache: Any | None = None) -> Tensor:
        """Logits (R, T, vocabulary) of the decoder behind ids (R, T), and behind what the cache holds."""
        from transformers.modeling_outputs import BaseModelOutput

        self._check_length(fed.shape[1])
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=read),
            attention_mask=mask,
            decoder_input_ids=fed,
            use_cache=cache is not None,
            **{self._cache_name: cache},
        ).logits


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


def _picked(logits: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Log p (E,) of tokens (E,) by logits (N, vocabulary) at places (E,); in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[places, tokens] - logits.logsumexp(-1)[places]


def _padded(rows: Sequence[Sequence[int]], filler: int, left: bool = False) -> Tensor:
    """Lists of whole numbers as one (R, S) tensor."""
    longest = max(map(len, rows))
    if left:
        return torch.tensor([[filler] * (longest - len(row)) + [*row] for row in rows])
    return torch.tensor([[*row] + [filler] * (longest - len(row)) for row in rows])
