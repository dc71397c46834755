"""An encoder–decoder: rows are read by the encoder, and what is trained on is written by the decoder.

R rows, N reads, Q soft tokens a read, L LLM width, S positions of the longest row, C candidates, T their longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qformer.backbones.language import LanguageTower, padded
from qformer.backbones.ranking import Group
from qformer.errors import DataError
from qformer.nn.losses import token_log_likelihood
from qformer.sample import Row, Text


class EncoderDecoder(LanguageTower):
    """A sequence-to-sequence LLM: the encoder reads all but the trained span, the decoder writes it."""

    is_encoder_decoder = True

    def _log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
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
        return self._decoded(read, mask, targets), self._sent(torch.tensor([len(ids) for ids in targets]))

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

    def _scored(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        """Behind a cache there is less to compute, which a CPU takes; a GPU, which waits for passes of so few positions
        (`ranking.SCORED_POSITIONS`) to be launched, takes one pass of the decoder for two.
        """
        return super()._scored(soft, groups) if self.device.type == "cpu" else self._at_once(soft, groups)

    def _at_once(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        """Sums of log p of the groups' candidates: prompts are encoded once, and each candidate is a row of its own."""
        read, mask = self._encoded(soft, [prompt for prompt, _ in groups])
        owner = self._sent(torch.tensor([n for n, (_, candidates) in enumerate(groups) for _ in candidates]))
        return self._decoded(read[owner], mask[owner], [ids for _, candidates in groups for ids in candidates])

    def _behind(self, soft: Tensor, groups: Sequence[Group]) -> Tensor:
        from transformers import DynamicCache, EncoderDecoderCache

        read, mask = self._encoded(soft, [prompt for prompt, _ in groups])
        owner = self._sent(torch.tensor([n for n, (_, candidates) in enumerate(groups) for _ in candidates]))
        ids = self._sent(padded([ids for _, candidates in groups for ids in candidates], -1))  # (C, T)
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
        labels = padded(targets, -1)
        fed = torch.cat([self._starts(len(labels)), self._sent(labels[:, :-1].clamp(min=0))], dim=1)
        scored, width = labels >= 0, labels.shape[1]
        tokens = self._sent(labels[scored])
        if self._head_stands_alone:
            log_p = self._log_p_of(self._chosen(self._hidden(read, mask, fed)[:, -width:], scored), tokens)
        else:
            log_p = token_log_likelihood(self._chosen(self._written(read, mask, fed)[:, -width:], scored), tokens)
        return log_p.new_zeros(len(labels)).index_add(0, self._sent(scored.nonzero()[:, 0]), log_p)

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
        return self._sent(torch.tensor([ids] * rows))

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
