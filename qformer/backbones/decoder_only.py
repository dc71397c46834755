"""A decoder-only LLM: rows are packed or padded, prompts read ahead, candidates ranked in one packed row.

R rows, N reads, Q soft tokens a read, L LLM width, S positions of the longest row, C candidates, T their longest.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from qformer.backbones import packing, ranking, reading
from qformer.backbones.language import CANNOT, Joined, LanguageTower, padded
from qformer.backbones.ranking import Group
from qformer.errors import DataError
from qformer.nn.losses import token_log_likelihood
from qformer.sample import Row, Slot, Text, row_length


class DecoderOnly(LanguageTower):
    """A causal LLM: rows padded on the right to be scored, on the left to be continued, mask and positions given."""

    is_encoder_decoder = False

    def _log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
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
            labels = joined.labels
            owners = torch.arange(len(rows))[:, None].expand_as(labels)
        else:
            packed = packing.packed(lengths, bins or packing.cheapest(lengths, self.width))
            joined = self._join(soft, [tuple(chain.from_iterable(rows[n] for n in numbers)) for numbers in packed.bins])
            owners, labels = packed.owners, joined.labels.masked_fill(packed.firsts, -1)
            there = packed.to(self.device)
            given = self._given(joined.inputs, there.mask(self.dtype) if packs == "mask" else None, there.positions)
        # What stands at a position is predicted by the one before it, and a row's first by none.
        wanted = nn.functional.pad(labels[:, 1:], (0, 1), value=-1)
        predicting = wanted >= 0
        owner = owners[predicting]
        log_p = self._log_p(given, predicting, self._sent(wanted[predicting]))
        sums = log_p.new_zeros(len(rows)).index_add(0, self._sent(owner), log_p)
        return sums, self._sent(owner.bincount(minlength=len(rows)))

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
            lengths = joined.lengths
            if reading.worth(lengths) and self.reads_ahead and max(lengths) <= self._window:
                given[self._cache_name] = self._read(joined, copies=settings["num_beams"])
            return self.model.generate(**given, **settings)

    def _read(self, joined: Joined, copies: int, bins: Sequence[Sequence[int]] | None = None) -> Any:
        """The cache of prompts padded on the left, all but the last position of each, so many copies of a prompt."""
        from transformers import DynamicCache

        layout = reading.Layout.of(joined.lengths, self.width, bins)
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
                    cache = self._read(joined, 1, [range(3)])
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
        lengths = torch.tensor(joined.lengths)
        longest = max(joined.lengths) + max(int(tree.depths.max()) + 2 if len(tree.ids) else 1 for tree in trees)
        self._check_length(longest)
        if longest > self._window:  # the mask below shows everything, however far away
            return self._behind(soft, groups)
        ids = torch.zeros(rows, fed, dtype=torch.long)
        depths = torch.zeros(rows, fed, dtype=torch.long)
        sees = torch.zeros(rows, prompt + fed, prompt + fed, dtype=torch.bool)
        sees[:, :, :prompt] = (torch.arange(prompt) >= prompt - lengths[:, None])[:, None]
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
            torch.cat([joined.inputs, self._embeddings(self._sent(ids))], dim=1),
            self._sent(hidden[:, None]),
            torch.cat([joined.positions, self._sent(lengths[:, None] + depths)], dim=1),
        )
        logits = self._logits(given, predicting)
        starts = torch.tensor([0, *(len(tree.ids) + 1 for tree in trees)]).cumsum(0)
        counts = torch.tensor([0, *(len(candidates) for _, candidates in groups)]).cumsum(0)
        places = torch.cat([tree.places + start for tree, start in zip(trees, starts, strict=False)])
        owners = torch.cat([tree.owners + count for tree, count in zip(trees, counts, strict=False)])
        tokens = torch.cat([tree.tokens for tree in trees])
        log_p = _picked(logits, self._sent(places), self._sent(tokens))
        return log_p.new_zeros(int(counts[-1])).index_add(0, self._sent(owners), log_p)

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
        ids = padded([ids for _, candidates in groups for ids in candidates], -1).to(self.device)  # (C, T)
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
            return self._log_p_of(self._chosen(self.model.base_model(**given).last_hidden_state, predicting), tokens)
        return token_log_likelihood(self._logits(given, predicting), tokens)

    def _logits(self, given: dict[str, Any], predicting: Tensor) -> Tensor:
        """Which positions (R, S) predict a token that is wanted, known in the machine's memory -> their logits
        (…, vocabulary), row by row.
        """
        if self._head_stands_alone:
            hidden = self.model.base_model(**given).last_hidden_state
            return self.model.get_output_embeddings()(self._chosen(hidden, predicting))
        if self._keeps_positions:
            kept = predicting.any(0).nonzero().flatten()
            return self._chosen(self.model(**given, logits_to_keep=self._sent(kept)).logits, predicting[:, kept])
        return self._chosen(self.model(**given).logits, predicting)

    @cached_property
    def _keeps_positions(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _asked_twice(self) -> tuple[Tensor, Tensor]:
        inputs = self._embeddings(torch.arange(4, device=self.device)[None])
        given = self._given(
            inputs, torch.ones_like(inputs[..., 0], dtype=torch.long), torch.arange(4, device=self.device)[None]
        )
        return self.model.base_model(**given).last_hidden_state, self.model(**given).logits


def _picked(logits: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Log p (E,) of tokens (E,) by logits (N, vocabulary) at places (E,); in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[places, tokens] - logits.logsumexp(-1)[places]
